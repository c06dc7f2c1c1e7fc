"""Several processes share a batch: on one machine and on several, as launchers start them, until one of them ends."""

import functools
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from copies import (
    FORK,
    end_of,
    free_port,
    run_copies,
    run_machines,
    run_main,
    run_module,
    start_launcher,
    start_ranks,
    wait_for_end,
)
from image_data import snapshot, write_image_folder
from running import REPO
from training import checkpoint_state, draws, losses, read_log, same, train, unet, words

from sdtune.diffusion import diffusion_losses
from sdtune.errors import InputError
from sdtune.training import check_company

# Six images a step: two processes with three each, one with six, three with two. Of eight images the second step of an
# epoch has two, so that some processes have none. A large epsilon keeps AdamW from blowing up the rounding of
# gradients near zero.
SIX = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "random_flip": True,
    "caption_dropout": 0.3,
    "lr_scheduler": "cosine",
    "learning_rate": 1e-4,
    "adam_epsilon": 1e-3,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 8, (48, 40))


@pytest.fixture(scope="module")
def fit(train_script, tiny_pipeline, images, tmp_path_factory):
    """Trains into a folder in so many processes that share six images a step."""

    def run(folder, number, **settings):
        said = tmp_path_factory.mktemp("run") / "said"
        settings = {**SIX, "train_batch_size": 6 // number, **settings}
        statuses = run_copies(train_script, words(tiny_pipeline, images, folder, **settings), said, number)
        assert statuses == [0] * number, said.read_text()

    return run


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    """The output of four steps in two processes without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    fit(folder, 2)
    return folder


def largest_difference(folder, other):
    """Of the UNets in two folders."""
    a, b = unet(folder), unet(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def copy_half(straight, folder):
    """Copies a run of four steps as it was after two."""
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "unet")
    return folder


# ------------------------------------------------------------------------------------------------------- none alone


@pytest.mark.parametrize("number, is_trial", [(2, False), (3, True)])
def test_processes_that_would_train_alone_are_refused(train_script, tiny_pipeline, images, tmp_path, number, is_trial):
    """As accelerate leaves them that find no GPU, on a machine without one."""
    folder, files = tmp_path / "out", [tmp_path / f"said.{rank}" for rank in range(number)]
    line = words(tiny_pipeline, images, folder, dry_run=is_trial)
    copies = start_ranks(train_script, [line] * number, files, 1, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="")
    assert [end_of(copy) for copy in copies] == [2] * number
    told = f"{number} processes were started (WORLD_SIZE), but PyTorch {torch.__version__} finds no GPUs for them, "
    told += "and each would train alone; use `python` for one process, install a PyTorch that knows your GPUs, or set "
    told += "ACCELERATE_USE_CPU=true to share CPUs"
    for file in files:
        _, _, said = " ".join(file.read_text().split()).partition(": ")
        assert said == told
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------- one of several


@pytest.mark.parametrize("num_images, accumulation", [(11, 1), (9, 2)])
def test_two_processes_equal_one(train_script, tiny_pipeline, tmp_path, num_images, accumulation):
    """The last step of an epoch is short: of 11 images one process has 2 and the other 1; of 9 one has none. Without
    dropout layers: their numbers belong to a process."""
    data = write_image_folder(tmp_path / "images", num_images, (48, 40))
    settings = {
        "max_train_steps": 10,
        "checkpointing_steps": 5,
        "gradient_accumulation_steps": accumulation,
        "use_ema": True,
        "random_flip": True,
        "caption_dropout": 0.3,
        "lr_scheduler": "cosine",
        "learning_rate": 1e-4,
        "lr_warmup_steps": 2,
    }
    one, two, resumed, said = (tmp_path / name for name in ("one", "two", "resumed", "said"))
    statuses = run_copies(train_script, words(tiny_pipeline, data, two, **settings, train_batch_size=2), said)
    assert not any(statuses), said.read_text()
    fit = functools.partial(train, train_script, tiny_pipeline, data, train_batch_size=4, **settings)
    assert fit(one) == 0
    assert "x 2 ranks" in said.read_text()
    assert said.read_text().count("Plan\n") == 1  # not once a process
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert [row["lr"] for row in read_log(two)] == [row["lr"] for row in read_log(one)]
    assert len(losses(one)) == 10

    # The checkpoint of two processes goes on in one.
    assert fit(resumed, resume_from_checkpoint=two / "checkpoint-5") == 0
    assert losses(resumed) == pytest.approx(losses(one)[5:], rel=1e-5)
    assert [row["lr"] for row in read_log(resumed)] == [row["lr"] for row in read_log(one)][5:]


def record_noise(folder):
    """`diffusion_losses` of a script, that writes the noise and timesteps that its process trains on into a folder."""

    def record(unet, noise_scheduler, latents, prompt_embeds, batch, *options):
        rank = os.environ["RANK"]
        number = len(list(folder.glob(f"{rank}-*")))
        torch.save({name: batch[name] for name in ("noise", "timestep", "weight")}, folder / f"{rank}-{number}")
        return diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, *options)

    return record


def test_every_sample_has_noise_of_its_own(train_script, fit, tmp_path, monkeypatch):
    """That of its epoch and index, whichever process has it."""
    monkeypatch.setattr(train_script, "diffusion_losses", record_noise(tmp_path))
    fit(tmp_path / "out", 2)
    seen = [torch.load(path) for path in sorted(tmp_path.glob("[01]-*"))]
    assert len(seen) == 8  # of two processes, in four steps
    found = set()
    for batch in seen:
        for noise, timestep, weight in zip(batch["noise"], batch["timestep"], batch["weight"], strict=True):
            if weight:
                found.add((tuple(noise.flatten().tolist()), int(timestep)))
    expected = set()
    for epoch in range(2):
        for index in range(8):
            drawn = draws(0, epoch, index)
            expected.add((tuple(drawn.noise.flatten().tolist()), drawn.timestep))
    assert len(expected) == 16
    assert found == expected


# ------------------------------------------------------------------------------------------------- stop and go on


def test_two_processes_resume_to_the_same_bits(fit, straight, tmp_path):
    folder = copy_half(straight, tmp_path / "out")
    fit(folder, 2, resume_from_checkpoint="latest")
    assert same(unet(folder), unet(straight))
    assert same(checkpoint_state(folder / "checkpoint-4"), checkpoint_state(straight / "checkpoint-4"))
    assert read_log(folder) == read_log(straight)


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_processes_goes_on(fit, straight, tmp_path, number):
    folder = copy_half(straight, tmp_path / "out")
    fit(folder, number, resume_from_checkpoint="latest")
    assert read_log(folder)[:2] == read_log(straight)[:2]
    assert losses(folder) == pytest.approx(losses(straight), rel=1e-5)
    assert largest_difference(folder, straight) < 1e-6
    assert largest_difference(folder / "checkpoint-4", straight / "checkpoint-4") < 1e-6
    assert largest_difference(folder, straight / "checkpoint-2") > 1e-5


def test_another_batch_is_refused(train_script, tiny_pipeline, images, straight, tmp_path, capsys):
    """What decides is how many images a step has, over all processes."""
    folder = copy_half(straight, tmp_path / "out")
    settings = {**SIX, "train_batch_size": 3, "resume_from_checkpoint": "latest"}
    assert train(train_script, tiny_pipeline, images, folder, **settings) == 2
    assert "samples_per_step: 6 there, 3 now" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- launchers

# Any number of steps, so that a run can be stopped anywhere and be compared with one of as many steps.
ENDLESS = {
    "max_train_steps": 100_000,
    "checkpointing_steps": 100_000,
    "train_batch_size": 2,
    "lr_scheduler": "constant",
    "use_ema": True,
}


def wait_until(condition, launchers, said, seconds=120):
    """Waits until something holds, as long as all launchers go on."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(launcher.is_alive() for launcher in launchers), said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)


def has_steps(folder, number):
    """Whether the log of a running script has so many lines."""
    log = folder / "log.jsonl"
    return log.exists() and len(log.read_text().splitlines()) >= number


def ranks_of(launcher):
    """The processes that train which a launcher has started, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if any(word.endswith("train_text_to_image.py") for word in process.cmdline()):
            found[int(process.environ()["RANK"])] = process
    return found


def end_all(launchers, processes):
    """Ends whatever a test that failed has left behind."""
    for launcher in launchers:
        launcher.kill()
        launcher.join()
    for process in processes:
        if process.is_running():
            process.kill()


def start_several_gpus(script, line, said):
    """Starts `accelerate launch` with the configuration for several GPUs, of which the processes use the CPU here."""
    options = ["--config_file", str(REPO / "examples" / "accelerate" / "several_gpus.yaml"), "--num_processes=2"]
    words = [*options, script.__file__, *line]
    return start_on_cpu("accelerate.commands.launch", words, said)


def start_on_cpu(module, words, said):
    """Starts a launcher's module in a copy of this process."""
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = FORK.Process(target=run_main, args=(run_module, [module, words], said, environment))
    launcher.start()
    return launcher


def start_torchrun(script, line, said):
    """Starts torchrun with two processes."""
    return start_launcher(script, line, said, "torchrun", nproc=2)


@pytest.mark.slow
@pytest.mark.parametrize("start", [start_torchrun, start_several_gpus])
def test_a_signal_to_the_launcher_saves_once(train_script, tiny_pipeline, images, tmp_path, start):
    """The workers hear of it by the launcher, or notice its end; none stays behind."""
    folder, said = tmp_path / "out", tmp_path / "said"
    launcher = start(train_script, words(tiny_pipeline, images, folder, **ENDLESS), said)
    ranks = {}
    try:
        wait_until(lambda: has_steps(folder, 2), [launcher], said)
        ranks = ranks_of(launcher)
        assert sorted(ranks) == [0, 1]
        everything = psutil.Process(launcher.pid).children(recursive=True)
        os.kill(launcher.pid, signal.SIGTERM)
        assert end_of(launcher) != 0
        for process in everything:
            wait_for_end(process)
    finally:
        end_all([launcher], ranks.values())
    step = len(read_log(folder))
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert checkpoint_state(folder / f"checkpoint-{step}")["progress"]["global_step"] == step
    assert said.read_text().count("holds the state after step") == 1
    assert f"checkpoint-{step} holds the state after step {step}; go on with" in said.read_text()


# ------------------------------------------------------------------------------------------------- several machines


def start_machine(launcher, script, line, said, number, port):
    """Starts what is started on one of two machines, by its number, as examples/accelerate/README.md says."""
    if launcher == "torchrun":
        options = [
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_backend=c10d",
            "--rdzv_id=test",
            "--local_addr=127.0.0.1",
        ]
        options += [f"--rdzv_endpoint=127.0.0.1:{port}"]
        return start_on_cpu("torch.distributed.run", [*options, script.__file__, *line], said)
    options = ["--config_file", str(REPO / "examples" / "accelerate" / "several_machines.yaml"), "--num_processes=2"]
    options += [f"--machine_rank={number}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    return start_on_cpu("accelerate.commands.launch", [*options, script.__file__, *line], said)


def start_machines(launcher, script, line, said):
    """Starts the launchers of two machines."""
    port = free_port()
    return [start_machine(launcher, script, line, said, number, port) for number in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher, lost", [("torchrun", 0), ("accelerate", 1)])
def test_the_loss_of_a_machine_ends_the_other_one(train_script, tiny_pipeline, images, tmp_path, launcher, lost):
    """Within a minute, with a message and a checkpoint, from which both go on to the bits of a run without that, which
    is one of copies: launchers change nothing in it."""
    folder, straight, said = tmp_path / "out", tmp_path / "straight", tmp_path / "said"
    line = words(tiny_pipeline, images, folder, **ENDLESS)
    launchers, ranks = start_machines(launcher, train_script, line, said), {}
    try:
        wait_until(lambda: has_steps(folder, 2), launchers, said)
        of_rank = {}
        for machine in launchers:
            found = ranks_of(machine)
            ranks |= found
            of_rank |= dict.fromkeys(found, machine)
        assert sorted(ranks) == [0, 1]
        started = time.monotonic()
        for pid in (of_rank[lost].pid, ranks[lost].pid):
            os.kill(pid, signal.SIGKILL)
        assert end_of(of_rank[1 - lost], seconds=60) != 0, said.read_text()
        for process in ranks.values():
            wait_for_end(process)
        assert time.monotonic() - started < 60
    finally:
        end_all(launchers, ranks.values())
    text = said.read_text()
    assert f"Rank {1 - lost} on {os.uname().nodename}: Stopped after step " in text
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"Stopped after step {step} by the end of another process (" in text
    assert f"{checkpoint} holds its state; go on with --resume_from_checkpoint=latest" in text
    assert not (folder / "model_index.json").exists()

    settings = {**ENDLESS, "max_train_steps": step + 2}
    line = words(tiny_pipeline, images, folder, **settings, resume_from_checkpoint="latest")
    again = tmp_path / "again"
    if launcher == "torchrun":
        launchers = start_machines(launcher, train_script, line, again)
        try:
            assert [end_of(machine) for machine in launchers] == [0, 0], again.read_text()
        finally:
            end_all(launchers, [])
    else:  # the same, without seconds of imports
        statuses, texts = run_machines(train_script, [line, line], again)
        assert statuses == [0, 0], texts
    line = words(tiny_pipeline, images, straight, **settings)
    assert run_copies(train_script, line, again) == [0, 0], again.read_text()
    assert same(unet(folder), unet(straight))
    assert losses(folder) == losses(straight)


@pytest.mark.parametrize("lost", [0, 2])
def test_all_that_are_left_end(train_script, tiny_pipeline, images, tmp_path, lost):
    """Of three machines two are left, and each may write the checkpoint; the first one wins. Sums of three gradients
    are rounded differently in the first step of a process, after which DDP orders them anew; those of two are not."""
    folder, straight, said = tmp_path / "out", tmp_path / "straight", tmp_path / "said"
    settings = {**ENDLESS, "learning_rate": 1e-4, "adam_epsilon": 1e-3}
    files = [tmp_path / f"said{rank}" for rank in range(3)]
    copies = start_ranks(train_script, [words(tiny_pipeline, images, folder, **settings)] * 3, files, 1)
    try:
        wait_until(lambda: has_steps(folder, 2), copies, files[0])
        copies[lost].kill()
        statuses = [end_of(copy, 60) for copy in copies]
    finally:
        end_all(copies, [])
    left = [rank for rank in range(3) if rank != lost]
    texts = [files[rank].read_text() for rank in left]
    assert [statuses[rank] for rank in left] == [1, 1], texts
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    for rank, text in zip(left, texts, strict=True):
        last = text.strip().splitlines()[-1]
        assert last.startswith(
            f"Rank {rank} on {os.uname().nodename}: Stopped after step {step} by the end of another "
        )
        assert last.endswith(f"{checkpoint} holds its state; go on with --resume_from_checkpoint=latest")
        assert "Traceback" not in text
    settings["max_train_steps"] = step + 1
    for output_dir, more in ((folder, {"resume_from_checkpoint": "latest"}), (straight, {})):
        line = words(tiny_pipeline, images, output_dir, **settings, **more)
        assert run_copies(train_script, line, said, 3) == [0, 0, 0], said.read_text()
    assert losses(folder) == pytest.approx(losses(straight), rel=1e-5)
    assert largest_difference(folder, straight) < 1e-6


# ------------------------------------------------------------------------------------------------- one output folder


def of_machine(script, folders):
    """The script as two machines run it, each in a working folder of its own."""

    def main(line):
        os.chdir(folders[int(os.environ["RANK"])])
        script.main(line)

    return SimpleNamespace(main=main)


@pytest.mark.parametrize("goes_on", [False, True])
def test_machines_that_share_no_output_folder_are_told(
    train_script, tiny_pipeline, images, straight, tmp_path, monkeypatch, goes_on
):
    """Before a model is loaded, and nothing stays behind."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    settings = {**ENDLESS}
    if goes_on:
        settings |= {**SIX, "train_batch_size": 3, "resume_from_checkpoint": "latest"}
        copy_half(straight, here / "out")
    before = snapshot(tmp_path)
    monkeypatch.setattr(train_script, "PATIENCE_WITH_FOLDERS", 0.5)
    monkeypatch.setattr(train_script, "load_models", None)
    line = words(tiny_pipeline, images, "out", **settings)
    statuses, said = run_machines(of_machine(train_script, [here, there]), [line, line], tmp_path / "said")
    assert statuses == [2, 2], said
    host = os.uname().nodename
    told = (
        f": --output_dir=out: 1 of 2 processes does not see what rank 0 writes to {here / 'out'} on {host}, such as "
        f"rank 1, which looks into {there / 'out'} on {host}; name one folder that all machines share, by its whole "
        "path"
    )
    for text in said:
        assert text.strip().splitlines()[-1].endswith(told)
        assert "Traceback" not in text
    after = {name: content for name, content in snapshot(tmp_path).items() if not name.startswith("said")}
    assert after == before


def test_a_folder_that_lags_is_waited_for(train_script, tiny_pipeline, images, tmp_path, monkeypatch):
    """Another machine sees what the first one wrote a moment later."""
    sees_token, asked = train_script.sees_token, tmp_path / "asked"

    def read_late(output_dir, token, seconds):
        read_text = train_script.Path.read_text
        started = time.monotonic()

        def late(path, **options):
            if time.monotonic() < started + 1:
                raise FileNotFoundError
            asked.write_text(f"{seconds}")
            return read_text(path, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_script.Path, "read_text", late)
            return sees_token(output_dir, token, seconds)

    monkeypatch.setattr(train_script, "sees_token", read_late)
    line = words(tiny_pipeline, images, tmp_path / "out", max_train_steps=1)
    statuses, said = run_machines(train_script, [line, line], tmp_path / "said")
    assert statuses == [0, 0], said
    assert asked.read_text() == "75"
    assert not (tmp_path / "out" / ".token").exists()


def test_a_folder_that_cannot_be_written_to_is_told_on_all_machines(
    train_script, tiny_pipeline, images, tmp_path, monkeypatch
):
    """Though only the first one writes."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_script.Path, "write_text", fail)
    line = words(tiny_pipeline, images, tmp_path / "out", max_train_steps=1)
    statuses, said = run_machines(train_script, [line, line], tmp_path / "said")
    assert statuses == [2, 2], said
    for text in said:
        told = f"--output_dir={tmp_path / 'out'}: cannot be written to ([Errno 28] No space left on device); make room"
        assert text.strip().endswith(told)


@pytest.mark.parametrize("left", ["a token that a kill left", None])
def test_what_a_kill_left_is_no_run(train_script, tiny_pipeline, images, tmp_path, left):
    """A folder with nothing but a token is free."""
    folder = tmp_path / "out"
    folder.mkdir()
    if left:
        (folder / ".token").write_text(left)
    line = words(tiny_pipeline, images, folder, max_train_steps=1)
    assert run_copies(train_script, line, tmp_path / "said") == [0, 0], (tmp_path / "said").read_text()
    assert not (folder / ".token").exists()
    assert json.loads((folder / "checkpoint-1" / "progress.json").read_text())["global_step"] == 1


def test_machines_may_know_folders_and_the_model_by_other_paths(
    train_script, tiny_pipeline, images, tmp_path, monkeypatch
):
    """The second one has its own copy of the model, and another way to the output; a checkpoint is in one place."""
    copy = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "real")
    settings = {"checkpointing_steps": 1, "max_train_steps": 2}
    first = words(tiny_pipeline, images, tmp_path / "real" / "out", **settings)
    second = words(copy, images, tmp_path / "way" / "out", **settings)
    statuses, said = run_machines(train_script, [first, second], tmp_path / "said")
    assert statuses == [0, 0], said
    names = {path.name for path in (tmp_path / "real" / "out").glob("checkpoint-*")}
    assert names == {"checkpoint-1", "checkpoint-2"}
    for rank in (0, 1):
        assert (tmp_path / "real" / "out" / "checkpoint-2" / f"random_states_{rank}.pkl").is_file()
    more = ["--resume_from_checkpoint=latest", "--max_train_steps=3"]
    statuses, said = run_machines(train_script, [first + more, second + more], tmp_path / "said")
    assert statuses == [0, 0], said
    assert len(losses(tmp_path / "real" / "out")) == 3


def test_it_is_told_why_each_process_would_train_alone(monkeypatch):
    alone, together = SimpleNamespace(num_processes=1), SimpleNamespace(num_processes=4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match=r"^WORLD_SIZE=4, but LOCAL_RANK is not set"):
        check_company(alone)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match=r"^4 processes were started .* finds no GPUs"):
        check_company(alone)
    check_company(together)
