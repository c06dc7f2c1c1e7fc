"""What ends a run too early is said in a line, and costs nothing: the state before the step is there to go on from."""

import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from conftest import load_script
from copies import end_of, run_machines, start_copy
from image_data import snapshot, write_image_folder
from running import TRAIN_TEXT_TO_IMAGE_LORA, command_for, environment
from training import checkpoint_state, losses, parse, read_log, same, train, trains_into, unet, words

from sdtune.diffusion import diffusion_losses
from sdtune.digests import write_digests
from sdtune.errors import InputError
from sdtune.failures import explain, is_disk_full, last_words
from sdtune.output import TOKEN_FILE, locked_output, tell_trackers
from sdtune.training import check_environment, has_dropout, max_nan_steps


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 6)


@pytest.fixture(scope="module")
def straight(train_script, tiny_pipeline, images, tmp_path_factory):
    """The output of four steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert train(train_script, tiny_pipeline, images, folder, checkpointing_steps=1) == 0
    return folder


@pytest.fixture
def fit(train_script, tiny_pipeline, images):
    """Trains four steps into a folder, or as the settings say; returns the exit status."""
    return trains_into(train_script, tiny_pipeline, images)


def history(folder):
    """What happened to a run, and after which step, with what is said of it, in order."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert all(datetime.fromisoformat(row["time"]).utcoffset().total_seconds() == 0 for row in rows)
    assert sorted(row["time"] for row in rows) == [row["time"] for row in rows]
    return [(row["event"], row["step"], row.get("why")) for row in rows]


def checkpoints(folder):
    """The names of a run's checkpoints, half-written ones too."""
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def in_step(number, act):
    """`diffusion_losses` of a script, that calls `act` before it does its work in that step."""
    calls = 0

    def act_once(*args, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return diffusion_losses(*args, **options)

    return act_once


def assert_gone_on_with(fit, folder, straight, **settings):
    """What was left of a run in step 3 becomes, by one command, what it would have been."""
    assert checkpoints(folder) == ["checkpoint-2"]
    assert same(checkpoint_state(folder / "checkpoint-2"), checkpoint_state(straight / "checkpoint-2"))
    assert not (folder / "unet").exists()
    assert fit(folder, resume_from_checkpoint="latest", **settings) == 0
    assert same(unet(folder), unet(straight))
    assert read_log(folder) == read_log(straight)


# ----------------------------------------------------------------------------------------- an exception in the loop


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_moved_away(train_script, fit, images, straight, tmp_path, monkeypatch, capsys, workers):
    """It is named; put back, the run goes on as if nothing had happened."""
    data = shutil.copytree(images, tmp_path / "data")
    away = [path.rename(path.with_suffix(".away")) for path in data.glob("*.png")]
    for path in away:
        path.rename(path.with_suffix(".png"))

    def move_away():
        for path in data.glob("*.png"):
            path.rename(path.with_suffix(".away"))

    settings = {"data": data, "dataloader_num_workers": workers}
    with monkeypatch.context() as patch:
        # Workers read two batches ahead.
        patch.setattr(train_script, "diffusion_losses", in_step(2 if workers == 0 else 1, move_away))
        assert fit(tmp_path / "out", **settings) == 1
    message = capsys.readouterr().err
    step = 2 if workers == 0 else len(losses(tmp_path / "out"))
    assert f"Stopped after step {step} by {data}/0" in message
    assert ".png: changed since it was checked, and cannot be read now ([Errno 2] No such file" in message
    assert f"checkpoint-{step} holds its state; go on with --resume_from_checkpoint=latest" in message
    assert "Traceback" not in message.splitlines()[-1]
    for path in data.glob("*.away"):
        path.rename(path.with_suffix(".png"))
    assert checkpoints(tmp_path / "out") == [f"checkpoint-{step}"]
    assert fit(tmp_path / "out", **settings, resume_from_checkpoint="latest") == 0
    assert same(unet(tmp_path / "out"), unet(straight))
    assert read_log(tmp_path / "out") == read_log(straight)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("4 GiB")]
)
def test_too_little_memory_names_the_flags_that_help(
    train_script, fit, straight, tmp_path, monkeypatch, capsys, error
):
    def fail():
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "diffusion_losses", in_step(3, fail))
        assert fit(tmp_path) == 1
    message = capsys.readouterr().err
    assert f"Stopped after step 2 by a lack of memory ({last_words(error)})" in message
    assert message.endswith(
        "Use --train_batch_size=1 --gradient_accumulation_steps=2 (or what `sdtune find-batch-size -- COMMAND` "
        "finds), --gradient_checkpointing, --use_8bit_adam, --mixed_precision=bf16, a smaller --resolution\n"
    )
    assert "Traceback" not in message
    assert_gone_on_with(fit, tmp_path, straight)


def test_what_only_a_developer_understands_comes_with_its_traceback(
    train_script, fit, straight, tmp_path, monkeypatch, capsys
):
    def fail():
        raise ZeroDivisionError("division by zero")

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "diffusion_losses", in_step(3, fail))
        assert fit(tmp_path) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert "Stopped after step 2 by division by zero. " in message.splitlines()[-1]
    assert_gone_on_with(fit, tmp_path, straight)


def test_a_reader_that_leaves_is_named_as_the_reason(tiny_pipeline, images, tmp_path):
    """As `head` does."""
    out = tmp_path / "out"
    command, _ = command_for(words(tiny_pipeline, images, out, max_train_steps=500, logging_steps=1))
    job = subprocess.Popen(command, env=environment({}), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any(line.startswith("Step 1 ") for line in job.stdout)
    job.stdout.close()
    said, status = " ".join(job.stderr.read().split()), job.wait()
    job.stderr.close()
    (step,) = [int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*")]
    why = "the end of the program that read its output"
    assert 0 < step < 500
    assert said.startswith(f"Stopped after step {step} by {why}. ")
    assert status == 1
    last = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["step"], last["why"]) == ("stopped", step, why)


def test_a_half_done_optimizer_step_is_not_saved(train_script, fit, tmp_path, monkeypatch, capsys):
    """Weights and moments would not belong together; the checkpoint before does."""

    def fail(*_):
        raise MemoryError("4 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "update_average", fail)
        assert fit(tmp_path, use_ema=True) == 1
    message = capsys.readouterr().err
    assert "No checkpoint could be written (the weights were being changed), and there is none before" in message
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    "error, is_full",
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/5: file write failed"), True),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (Exception("Error while serializing: I/O error: File too large (os error 27)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 17439232 vs 17439124"), True),
        (OSError(2, "No such file or directory"), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_recognised(error, is_full):
    assert is_disk_full(error) == is_full
    reason, _ = explain(parse(), error)
    assert (reason == "a full disk") == is_full


def test_a_worker_names_the_mistake_alone():
    told = "Caught InputError in DataLoader worker process 0.\nOriginal Traceback:\n  File x"
    assert last_words(InputError(f"{told}\n__main__.InputError: a.png: gone")) == "a.png: gone"


def limit_files(train_main):
    """main() of a script under a limit on the size of files, which is what a full disk looks like to a process."""

    def run(line):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        train_main(line)

    return run


def test_a_disk_that_fills_up_loses_nothing_whole(train_script, fit, straight, base_of, tmp_path, monkeypatch):
    """A checkpoint has files of 3 MB and more; there is room for less. With room the run goes on from there."""
    assert fit(tmp_path / "out", checkpointing_steps=1, max_train_steps=2) == 0
    before = snapshot(tmp_path / "out" / "checkpoint-2")
    line = words(*base_of, tmp_path / "out", checkpointing_steps=1, resume_from_checkpoint="latest")
    with monkeypatch.context() as patch:
        patch.setattr(train_script, "main", limit_files(train_script.main))
        copy = start_copy(train_script, line, tmp_path / "said")
        assert end_of(copy) == 1, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert "Stopped after step 3 by a full disk. No checkpoint could be written (the disk is full); " in said
    assert (
        f"go on from {tmp_path / 'out' / 'checkpoint-2'} with --resume_from_checkpoint=latest. Make room first" in said
    )
    assert "Traceback" not in said
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]
    assert snapshot(tmp_path / "out" / "checkpoint-2") == before
    assert fit(tmp_path / "out", checkpointing_steps=1, resume_from_checkpoint="latest") == 0
    assert same(unet(tmp_path / "out"), unet(straight))


@pytest.fixture
def base_of(tiny_pipeline, images):
    """Base and images of the runs here."""
    return tiny_pipeline, images


# -------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("fails_in", ["save_pipeline", "write_card", "move_into"])
def test_a_result_is_whole_or_absent(train_script, fit, straight, tmp_path, monkeypatch, capsys, fails_in):
    """The last step has a checkpoint, so that a result that fails can be written by the same command."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train_script, fails_in, fail)
        assert fit(tmp_path) == 1
    message = capsys.readouterr().err
    assert "Stopped after step 4 by a full disk. " in message
    names = [".lock", "args.json", "checkpoint-4", "history.jsonl", "log.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert fit(tmp_path, resume_from_checkpoint="latest") == 0
    stopped = ("stopped", 4, "a full disk")
    assert history(tmp_path) == [("started", 0, None), stopped, ("resumed", 4, None), ("finished", 4, None)]
    assert same(unet(tmp_path), unet(straight))
    assert read_log(tmp_path) == read_log(straight)


def test_a_finished_run_is_extended(fit, straight, tmp_path, monkeypatch, train_script):
    """Though no checkpoint was asked for; the old result stays until the new one is whole."""
    assert fit(tmp_path, max_train_steps=2) == 0
    short = unet(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train_script, "write_card", lambda *_: 1 / 0)
        assert fit(tmp_path, resume_from_checkpoint="latest") == 1
    assert same(unet(tmp_path), short)
    assert fit(tmp_path, resume_from_checkpoint="latest") == 0
    assert same(unet(tmp_path), unet(straight))
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]


# ---------------------------------------------------------------------------------------------------------- the lock


def test_a_second_run_into_the_same_folder_is_told(train_script, base_of, fit, straight, tmp_path, capsys):
    """By whatever flag it comes: both would remove what the other writes. What a kill leaves is no lock."""
    folder, said = tmp_path / "out", tmp_path / "said"
    line = words(*base_of, folder, max_train_steps=100_000, checkpointing_steps=2)
    first = start_copy(train_script, line, said)
    try:
        while not (folder / "checkpoint-2").exists():
            assert first.is_alive(), said.read_text()
        for flags in ({"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
            assert fit(folder, **flags) == 2
            assert f"--output_dir={folder}: another run is writing there" in capsys.readouterr().err
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    assert fit(folder, overwrite_output_dir=True, checkpointing_steps=1) == 0
    assert checkpoints(folder) == checkpoints(straight)
    assert same(checkpoint_state(folder / "checkpoint-2"), checkpoint_state(straight / "checkpoint-2"))
    assert read_log(folder) == read_log(straight)


@pytest.mark.parametrize("place", ["gone", "gone/below"])
def test_a_folder_that_cannot_be_made_is_told(tmp_path, place):
    """Here a link to a disk that is not there."""
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    args = parse(f"--output_dir={tmp_path / place}")
    with pytest.raises(InputError, match=r"cannot be made .*; name another folder"), locked_output(args):
        pass


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), NotImplementedError("no flock here")])
def test_a_folder_that_knows_no_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys, error):
    def fail(self, **options):
        raise error

    monkeypatch.setattr("sdtune.output.FileLock.acquire", fail)
    with locked_output(parse(f"--output_dir={tmp_path / 'out'}")):
        (tmp_path / "out" / "result").write_text("")
    assert f"Warning: {tmp_path / 'out'} cannot be locked ({error})" in capsys.readouterr().out
    assert (tmp_path / "out" / "result").exists()


def test_a_locked_folder_that_stays_empty_is_removed(tmp_path):
    args = parse(f"--output_dir={tmp_path / 'out'}")
    with locked_output(args):
        assert (tmp_path / "out").is_dir()
        with pytest.raises(InputError, match="another run is writing there"), locked_output(args):
            pass
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with locked_output(parse(f"--output_dir={tmp_path / 'mine'}")):
        pass
    assert (tmp_path / "mine").exists()


# -------------------------------------------------------------------------------------------------- processes agree


def lagging_folder(line, tmp_path):
    """A machine that sees what the first one writes, but not yet its checkpoints."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / TOKEN_FILE).symlink_to(tmp_path / "out" / TOKEN_FILE)
    return [*line, f"--output_dir={tmp_path / 'elsewhere'}"]


def other_images(line, tmp_path):
    """A machine with one image less."""
    data = write_image_folder(tmp_path / "five", 5)
    return [*line, f"--train_data_dir={data}"]


def other_rate(line, tmp_path):
    """A machine where somebody mistyped."""
    return [*line, "--learning_rate=0.01"]


@pytest.mark.parametrize(
    "change, difference",
    [
        (lagging_folder, "checkpoint-2: seen on rank 0 ({host}), not seen on rank 1 ({host})"),
        (other_images, "captioned_images: other images or captions on rank 1 ({host}) than on rank 0 ({host})"),
        (other_rate, "learning_rate: 0.001 on rank 0 ({host}), 0.01 on rank 1 ({host})"),
    ],
)
def test_processes_that_do_not_agree_end(train_script, base_of, straight, tmp_path, change, difference):
    """They would wait for each other for ever."""
    folder = shutil.copytree(straight, tmp_path / "out")
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(folder / name)
    line = words(*base_of, folder, train_batch_size=1, resume_from_checkpoint="latest")
    statuses, said = run_machines(train_script, [line, change(line, tmp_path)], tmp_path / "said")
    assert statuses == [2, 2], said
    for text in said:
        assert "the processes do not agree; all need the same flags, the same data and one --output_dir" in text
        assert difference.format(host=os.uname().nodename) in text
        assert "Traceback" not in text


@pytest.mark.parametrize("name", ["args.json", "progress.json"])
def test_a_checkpoint_that_another_machine_alone_cannot_read_is_said_by_both(
    train_script, base_of, straight, tmp_path, name
):
    """The first one waits for nothing that the other one will not do any more."""
    folder = shutil.copytree(straight, tmp_path / "out")
    line = words(*base_of, folder, train_batch_size=1, max_train_steps=6, resume_from_checkpoint="latest")
    other = lagging_folder(line, tmp_path)
    shutil.copytree(folder / "checkpoint-4", tmp_path / "elsewhere" / "checkpoint-4")
    os.truncate(tmp_path / "elsewhere" / "checkpoint-4" / name, 5)
    statuses, said = run_machines(train_script, [line, other], tmp_path / "said")
    assert statuses == [2, 2], said
    for text in said:
        assert f"{tmp_path / 'elsewhere' / 'checkpoint-4'} is damaged, or of another script; name another (" in text
        assert "Traceback" not in text


def test_a_mistake_that_another_machine_alone_has_is_said(train_script, base_of, tmp_path):
    copy = start_copy(
        train_script,
        words(base_of[0], tmp_path / "none", tmp_path / "out"),
        tmp_path / "said",
        RANK="1",
        LOCAL_RANK="0",
    )
    assert end_of(copy) == 2
    said = (tmp_path / "said").read_text()
    start = f"train_text_to_image.py, rank 1 on {os.uname().nodename}: "
    assert said.strip().splitlines()[-1].startswith(start)
    assert f"--train_data_dir={tmp_path / 'none'}: does not exist" in said


# ------------------------------------------------------------------------------------------ losses that are no number


def broken_in(steps):
    """`diffusion_losses` of a script whose losses are not finite in those steps."""
    calls = 0

    def break_some(*args, **options):
        nonlocal calls
        calls += 1
        return diffusion_losses(*args, **options) * (float("nan") if calls in steps else 1.0)

    return break_some


def test_steps_without_a_number_are_skipped_up_to_a_limit(train_script, fit, straight, tmp_path, monkeypatch, capsys):
    """They leave weights, moments and schedule alone; so the steps after them are the ones of a run without them."""
    with monkeypatch.context() as patch:
        patch.setattr(train_script, "diffusion_losses", broken_in({2, 3}))
        assert fit(tmp_path / "out", max_nan_steps=2, checkpointing_steps=1) == 0
    said = capsys.readouterr().out
    assert "Step 3: loss or gradient is not finite; skipped, 2 in a row." in said
    assert "2 of 4 steps were skipped, since loss or gradient was not finite." in said.splitlines()
    first, second, third, last = [checkpoint_state(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    for number, skipped in enumerate((second, third), start=1):
        assert same({**skipped, "progress": None}, {**first, "progress": None})
        assert skipped["progress"]["skipped_steps"] == number
    assert last["lr_scheduler"]["last_epoch"] == 2
    assert [progress["nan_steps"] for progress in (row["progress"] for row in (first, second, third, last))] == [
        0,
        1,
        2,
        0,
    ]
    assert [row["loss"] for row in read_log(tmp_path / "out")][1:3] == [None, None]

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "diffusion_losses", broken_in({2, 3, 4}))
        assert fit(tmp_path / "stopped", max_nan_steps=2, checkpointing_steps=100) == 1
    assert "not finite, in step 4" in capsys.readouterr().err
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-3"]


def test_skipped_steps_are_counted_over_a_resume(train_script, fit, tmp_path, monkeypatch, capsys):
    """Though a checkpoint of an older version has no count."""
    settings = {"max_nan_steps": 100, "checkpointing_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(train_script, "diffusion_losses", broken_in({1, 3, 4, 5}))
        assert fit(tmp_path, **settings, max_train_steps=2) == 0
        assert "\n1 of 2 steps was skipped" in capsys.readouterr().out
        assert fit(tmp_path, **settings, max_train_steps=4, resume_from_checkpoint="latest") == 0
        assert "\n3 of 4 steps were skipped" in capsys.readouterr().out
        older = tmp_path / "checkpoint-4" / "progress.json"
        progress = json.loads(older.read_text())
        assert progress.pop("skipped_steps") == 3
        older.write_text(json.dumps(progress))
        write_digests(older.parent)
        assert fit(tmp_path, **settings, max_train_steps=6, resume_from_checkpoint="latest") == 0
        assert "\n1 of 6 steps was skipped" in capsys.readouterr().out
    assert fit(tmp_path / "other") == 0
    assert "skipped, since" not in capsys.readouterr().out


@pytest.mark.parametrize("precision, number", [("fp16", 5), ("bf16", 0), ("no", 0)])
def test_fp16_alone_skips_by_default(train_script, precision, number):
    """Its scaler finds its scale by such steps."""
    accelerator = SimpleNamespace(mixed_precision=precision)
    assert max_nan_steps(parse(), accelerator) == number
    assert max_nan_steps(parse("--max_nan_steps=3"), accelerator) == 3


def test_the_scaler_is_told_of_a_skipped_step(train_script, fit, tmp_path, monkeypatch):
    """A stand-in for fp16's scaler, which has to see each such step to lower its scale, and skips it by itself."""
    steps = []

    class Scaler:
        def state_dict(self):
            return {"scale": 1.0}

        def step(self, optimizer, *_):
            steps.append(True)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, parameters, norm: torch.tensor(1.0))
    make_state = train_script.make_state

    def with_scaler(args, accelerator, *others):
        state = make_state(args, accelerator, *others)
        accelerator.scaler = Scaler()
        monkeypatch.setattr(state["optimizer"], "step", lambda: accelerator.scaler.step(None))
        return state

    monkeypatch.setattr(train_script, "make_state", with_scaler)
    monkeypatch.setattr(train_script, "diffusion_losses", broken_in({2, 3}))
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: None)
    assert fit(tmp_path, max_nan_steps=2) == 0
    assert len(steps) == 4


# --------------------------------------------------------------------------------------------- a signal in a look


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_draws_gives_the_look_up(train_script, fit, tmp_path, monkeypatch, capsys, number, step):
    """Launchers wait for half a minute, and samples may take longer. Who resumes looks again, and misses nothing."""
    settings = {"validation_steps": 2, "validation_prompts": ["a", "b"], "num_validation_samples": 2, "use_ema": True}
    straight, folder = tmp_path / "straight", tmp_path / "out"
    assert fit(straight, **settings) == 0
    diffuse, calls = train_script.diffusers.UNet2DConditionModel.forward, []

    def signal_in_the_look(self, sample, *args, **options):
        if not torch.is_grad_enabled() and losses_of(folder) == step:
            calls.append(True)
            if len(calls) == 4:  # after the batches of losses, in the denoising of the first samples
                os.kill(os.getpid(), number)
        return diffuse(self, sample, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_script.diffusers.UNet2DConditionModel, "forward", signal_in_the_look)
        assert fit(folder, **settings) == 128 + number
    assert 4 <= len(calls) <= 5  # not the 25 steps of every sample
    assert checkpoints(folder) == [f"checkpoint-{step}"]
    assert f"checkpoint-{step} holds the state after step {step}" in capsys.readouterr().err
    assert not (folder / "samples" / f"step-{step:06d}.png").exists()
    assert not (folder / "model_index.json").exists()
    assert fit(folder, **settings, resume_from_checkpoint="latest") == 0
    assert same(unet(folder), unet(straight))
    assert read_log(folder) == read_log(straight)
    going_on = "resumed" if step else "started"
    stopped = ("stopped", step, number.name)
    assert history(folder) == [("started", 0, None), stopped, (going_on, step, None), ("finished", 4, None)]
    assert history(straight) == [("started", 0, None), ("finished", 4, None)]
    for name in ("step-000000.png", "step-000002.png", "step-000004.png"):
        assert (folder / "samples" / name).read_bytes() == (straight / "samples" / name).read_bytes()


def losses_of(folder):
    """How many steps have a logged loss."""
    return len(losses(folder)) if (folder / "log.jsonl").exists() else 0


# ------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_fixes_how_a_step_is_split(tiny_pipeline, images, tmp_path, capsys):
    """Its masks are drawn by pass and process: another split of the same step would draw others."""
    fit = trains_into(load_script(TRAIN_TEXT_TO_IMAGE_LORA), tiny_pipeline, images)
    settings = {"lora_dropout": 0.1, "checkpointing_steps": 2}
    other = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "latest"}
    assert fit(tmp_path / "with", **settings, max_train_steps=2) == 0
    capsys.readouterr()
    assert fit(tmp_path / "with", **settings, **other) == 2
    assert (
        "dropout_masks: 2 a pass x 1 passes x 1 processes there, 1 a pass x 2 passes x 1 processes now"
        in capsys.readouterr().err
    )
    assert fit(tmp_path / "with", **settings, **other, allow_changed_resume=True) == 0
    assert fit(tmp_path / "without", checkpointing_steps=2, max_train_steps=2) == 0
    assert fit(tmp_path / "without", checkpointing_steps=2, **other) == 0


def test_dropout_is_found_wherever_it_is():
    linear = torch.nn.Linear(2, 2)
    assert not has_dropout({"unet": torch.nn.Sequential(linear, torch.nn.Dropout(0.0))})
    assert has_dropout({"unet": linear, "text_encoder": torch.nn.Sequential(torch.nn.Dropout(0.1))})
    linear.dropout = 0.1  # as transformers' attention has it
    assert has_dropout({"unet": linear})


# ------------------------------------------------------------------------------------------------ surroundings


def test_accelerates_variables_divide_no_gradient(fit, straight, tmp_path, monkeypatch, capsys):
    """Refused where they ask for something else than the flags; otherwise without effect on the weights."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert fit(tmp_path) == 2
    assert "give --gradient_accumulation_steps=4 to this script" in capsys.readouterr().err
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    plain = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert fit(tmp_path / "plain", **plain) == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert fit(tmp_path / "asked", **plain) == 0
    assert same(unet(tmp_path / "plain"), unet(tmp_path / "asked"))


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "is not obeyed here; use no, and --compile"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for PARALLELISM_CONFIG"),
    ],
)
def test_what_accelerate_would_do_by_its_variables_is_refused(monkeypatch, name, value, told):
    assert check_environment(parse()) == []
    monkeypatch.setenv(name, value)
    (problem,) = check_environment(parse())
    assert told in problem


@pytest.mark.parametrize(
    "tracker, remedy", [("wandb", "log in to it (wandb login), work offline"), ("tensorboard", "set it up as it asks")]
)
def test_a_tracker_that_does_not_start_is_said_before_anything_is_written(
    tracker, remedy, train_script, fit, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    monkeypatch.setattr(train_script, "load_base", fail)  # models are not loaded for it
    assert fit(tmp_path / "out", report_to=tracker) == 2
    message = capsys.readouterr().err
    assert f"--report_to={tracker}: does not start (api_key not configured (no-tty)); {remedy}" in message
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_later_costs_its_own_log(fit, straight, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ConnectionError("the quota is used up")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    assert fit(tmp_path / "out", report_to="tensorboard") == 0
    assert (
        capsys.readouterr().err.count("Warning: tensorboard failed and is done without (the quota is used up).") == 1
    )
    assert read_log(tmp_path / "out") == read_log(straight)


def test_trackers_are_told_one_by_one(capsys):
    """One that fails leaves the others alone."""

    class Tracker:
        def __init__(self, name):
            self.name, self.told = name, []

        def log(self, what):
            if self.name == "bad":
                raise OSError("gone")
            self.told.append(what)

    accelerator = SimpleNamespace(trackers=[Tracker("good"), Tracker("bad"), Tracker("better")])
    for number in range(2):
        tell_trackers(accelerator, lambda tracker, number=number: tracker.log(number))
    assert [(tracker.name, tracker.told) for tracker in accelerator.trackers] == [("good", [0, 1]), ("better", [0, 1])]


def test_a_thread_can_train(train_script, base_of, straight, tmp_path):
    """As interfaces in a browser do it: signals come to the main thread alone."""
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(train_script.main(words(*base_of, tmp_path / "out"))))
    thread.start()
    thread.join()
    assert statuses == [None]
    assert same(unet(tmp_path / "out"), unet(straight))


def test_signals_do_afterwards_what_they_did_before(train_script, tiny_pipeline, images, tmp_path):
    """A notebook goes on after a run, and wants its Ctrl-C back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    train_script.main(words(tiny_pipeline, images, tmp_path))
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_history_names_the_flags_that_were_changed(straight, fit, tmp_path):
    """Of an earlier run, and of a line that a kill has cut, nothing stays."""
    (row, _) = [json.loads(line) for line in (straight / "history.jsonl").read_text().splitlines()]
    changed = set(row["changed"])
    assert row["last_step"] == 4
    given = {"pretrained_model_name_or_path", "train_data_dir", "output_dir", "resolution", "train_batch_size"}
    given |= {"max_train_steps", "learning_rate", "logging_steps", "report_to", "dataloader_num_workers"}
    assert changed == given | {"checkpointing_steps"}
    assert fit(tmp_path / "out", max_train_steps=1) == 0
    with (tmp_path / "out" / "history.jsonl").open("a") as file:
        file.write('{"time": "2026')
    assert fit(tmp_path / "out", max_train_steps=2, resume_from_checkpoint="latest") == 0
    once, again = ("started", 0, None), ("resumed", 1, None)
    assert history(tmp_path / "out") == [once, ("finished", 1, None), again, ("finished", 2, None)]
    assert fit(tmp_path / "out", max_train_steps=2, overwrite_output_dir=True, checkpointing_steps=1) == 0
    assert history(tmp_path / "out") == [once, ("finished", 2, None)]


def test_progress_is_json(straight):
    """What a checkpoint says of the run is readable by anybody."""
    progress = json.loads((straight / "checkpoint-3" / "progress.json").read_text())
    assert progress == {"global_step": 3, "base_losses": None, "losses": [], "nan_steps": 0, "skipped_steps": 0}
