"""DeepSpeed on CPUs: ZeRO-2 and ZeRO-3 train as one process does, resume to the bit, and unpickle nothing."""

import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_script
from copies import end_of, run_copies, start_copy
from diffusers import StableDiffusionPipeline
from image_data import write_image_folder
from running import REPO, TRAIN_DREAMBOOTH, TRAIN_TEXT_TO_IMAGE_LORA, status_of
from safetensors.torch import load_file
from shards import make_rows, write_tar
from training import losses, parse, read_log, same, train, unet, words

from sdtune.commands import export
from sdtune.deepspeed import check_deepspeed, load_tensors
from sdtune.digests import write_digests
from sdtune.lora_layouts import LORA_FILE

pytest.importorskip("deepspeed", reason="`make install` installs it; a user may do without")

ZERO = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
LIKE_ONE = 1e-5  # sums are in another order; the weights move by 3e-4


@pytest.fixture(scope="module")
def lora_script():
    return load_script(TRAIN_TEXT_TO_IMAGE_LORA)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine images, so that two processes have unequal shares of two held out, and of the last step of an epoch."""
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 9, (48, 40))


def run_zero(stage, script, line, said, number=2, **environment):
    """Trains in so many processes under a stage of ZeRO; returns their exit statuses."""
    environment = {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), **environment}
    return run_copies(script, line, said, number, **environment)


def weights_of(folder):
    """The weights that a run gave, of the full or of the LoRA script, by name."""
    return load_file(Path(folder) / LORA_FILE) if Path(folder, LORA_FILE).exists() else unet(folder)


def largest_difference(a, b):
    """Between tensors of the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---- training

SETTINGS = {
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.1,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "num_validation_samples": 1,
    "validation_steps": 3,
    "keep_best": True,
}
CASES = {
    "full, ZeRO-2": (2, {"use_ema": True, "ema_decay": 0.9}, {}),
    "full, ZeRO-3": (3, {"gradient_checkpointing": True}, {}),
    "LoRA, ZeRO-2": (2, {"rank": 4}, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}),
    "LoRA, ZeRO-3": (3, {"rank": 4}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_zero_trains_as_one_process_and_resumes_to_the_bit(
    train_script, lora_script, tiny_pipeline, images, tmp_path, case
):
    """Two processes, of which each has half of the batch; with the samples' weights in short steps, clipping,
    accumulation and a look at held-out images, of which one process alone has one."""
    stage, more, environment = CASES[case]
    script, settings = (lora_script if "rank" in more else train_script), {**SETTINGS, **more}
    one, two, resumed, said = (tmp_path / name for name in ("one", "two", "resumed", "said"))
    line = functools.partial(words, tiny_pipeline, images, train_batch_size=1, **settings)
    assert run_zero(stage, script, line(two), said, **environment) == [0, 0], said.read_text()
    assert train(script, tiny_pipeline, images, one, train_batch_size=2, **settings) == 0
    assert len(losses(two)) == 6
    assert losses(two) == pytest.approx(losses(one), abs=LIKE_ONE)
    held_out = [[row["held_out_loss"] for row in read_log(run) if "held_out_loss" in row] for run in (one, two)]
    assert held_out[0] == pytest.approx(held_out[1], abs=LIKE_ONE)
    assert largest_difference(weights_of(two), weights_of(one)) < LIKE_ONE

    line = line(resumed, resume_from_checkpoint=two / "checkpoint-3")
    assert run_zero(stage, script, line, said, **environment) == [0, 0], said.read_text()
    assert same(weights_of(resumed), weights_of(two))
    after = [row for row in read_log(two) if row["step"] > 3]
    assert read_log(resumed)[-len(after) :] == after
    assert_files(two / "checkpoint-6", case)
    assert_loads(two, tiny_pipeline, case)
    assert status_of(export.main, two / "checkpoint-6", tmp_path / "exported") == 0
    assert same(weights_of(tmp_path / "exported"), weights_of(two))


def assert_files(checkpoint, case):
    """A checkpoint has the weights as files that people load; DeepSpeed's own have none but its optimizer's."""
    assert not list(checkpoint.rglob("*.partial"))
    model_states = sorted((checkpoint / "pytorch_model").glob("*model_states.pt"))
    assert len(model_states) == (2 if "ZeRO-3" in case else 1)
    for path in model_states:
        assert load_tensors(path)["module"] == {}
    if "LoRA" in case:
        total = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        assert total < 500_000  # the base takes 3,200,000
        assert same(load_file(checkpoint / LORA_FILE), load_file(checkpoint.parent / LORA_FILE))
    elif "ZeRO-3" in case:
        assert same(unet(checkpoint), unet(checkpoint.parent))
    else:  # whose result is the average
        averaged = load_file(checkpoint / "unet_ema" / "diffusion_pytorch_model.safetensors")
        assert same(averaged, unet(checkpoint.parent))
        assert not same(unet(checkpoint), averaged)


def assert_loads(folder, base, case):
    """The result loads and draws."""
    pipeline = StableDiffusionPipeline.from_pretrained(base if "LoRA" in case else folder)
    pipeline.set_progress_bar_config(disable=True)
    if "LoRA" in case:
        pipeline.load_lora_weights(folder)
    image = pipeline("a", num_inference_steps=1, height=32, width=32).images[0]
    assert image.size == (32, 32)


@pytest.mark.slow
def test_dreambooth_trains_under_zero(tiny_pipeline, images, tmp_path):
    script, said = load_script(TRAIN_DREAMBOOTH), tmp_path / "said"
    settings = {"instance_prompt": "a sks dog", "instance_data_dir": images, "learning_rate": 1e-4}
    line = words(tiny_pipeline, None, tmp_path / "two", train_batch_size=1, **settings)
    assert run_zero(3, script, line, said) == [0, 0], said.read_text()
    assert train(script, tiny_pipeline, None, tmp_path / "one", train_batch_size=2, **settings) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=LIKE_ONE)
    # They move by 4e-4, but where a gradient is near 0 rounding decides how far Adam's first steps go.
    assert largest_difference(unet(tmp_path / "two"), unet(tmp_path / "one")) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_stay_in_float32_under_bf16(train_script, tiny_pipeline, images, tmp_path, stage):
    """Their passes are autocast. Rounded to bfloat16, they would not have these steps, some 1/100 of a last digit."""
    said, settings = tmp_path / "said", {"mixed_precision": "bf16", "learning_rate": 1e-6, "lr_scheduler": "constant"}
    line = words(tiny_pipeline, images, tmp_path / "two", train_batch_size=1, **settings)
    assert run_zero(stage, train_script, line, said) == [0, 0], said.read_text()
    assert "passes in bfloat16" in said.read_text()
    assert train(train_script, tiny_pipeline, images, tmp_path / "one", train_batch_size=2, **settings) == 0
    one, two, base = unet(tmp_path / "one"), unet(tmp_path / "two"), unet(tiny_pipeline)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-3)  # bfloat16 has 8 bits
    assert {weight.dtype for weight in two.values()} == {torch.float32}
    assert largest_difference(two, base) < 5e-6
    moved = [(two[name] - base[name], one[name] - base[name]) for name in two]
    alike = torch.cat([(a.sign() == b.sign()).flatten() for a, b in moved]).float().mean()
    assert alike > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_steps_without_a_number_are_skipped_up_to_a_limit(
    train_script, tiny_pipeline, images, tmp_path, monkeypatch, stage
):
    """In one of two processes alone, and with gradients that are finite where the loss is not."""
    said, losses_of = tmp_path / "said", train_script.diffusion_losses
    calls = iter(range(100))

    def broken(*parts):
        own = losses_of(*parts)
        is_broken = next(calls) in (1, 3, 4) and os.environ["RANK"] == "1"
        return own + torch.inf if is_broken else own

    monkeypatch.setattr(train_script, "diffusion_losses", broken)
    line = words(tiny_pipeline, images, tmp_path / "out", max_nan_steps=1, max_train_steps=8, checkpointing_steps=1)
    assert run_zero(stage, train_script, line, said) == [1, 1], said.read_text()
    assert "Step 2: loss or gradient is not finite; skipped, 1 in a row." in said.read_text()
    assert "not finite, in step 5" in said.read_text()
    first, second, third, fourth = [unet(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert same(first, second)
    assert not same(second, third)
    assert same(third, fourth)
    assert not (tmp_path / "out" / "checkpoint-5").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_of_a_stream_without_a_usable_image_changes_nothing(train_script, tiny_pipeline, tmp_path, stage):
    """Each of two processes has a shard whose every other row is none, and which decays weights much."""
    for name in ("a", "b"):
        first, second = make_rows(2)
        bad = [(b"a note", f"note_{number}.png", "none") for number in range(2)]
        write_tar(tmp_path / "set" / f"{name}.tar", [bad[0], first, bad[1], second])
    settings = {"dataset_name": tmp_path / "set", "streaming": True, "shuffle_buffer_size": 1, "train_batch_size": 1}
    settings |= {"adam_weight_decay": 0.9, "max_train_steps": 3, "checkpointing_steps": 1, "cache_dir": tmp_path}
    line, said = words(tiny_pipeline, None, tmp_path / "out", **settings), tmp_path / "said"
    assert run_zero(stage, train_script, line, said) == [0, 0], said.read_text()
    first, second, third = [unet(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2, 3)]
    assert same(first, unet(tiny_pipeline))
    assert not same(second, first)
    assert same(third, second)


# ---- resuming


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, lora_script, tiny_pipeline, images):
    """The folder of a LoRA run of two steps by two processes under ZeRO-2."""
    folder = tmp_path_factory.mktemp("stopped")
    line = words(tiny_pipeline, images, folder / "out", train_batch_size=1, max_train_steps=2)
    assert run_zero(2, lora_script, line, folder / "said") == [0, 0], (folder / "said").read_text()
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, number, now",
    [(2, 1, "ZeRO-2 of 1 processes"), (3, 2, "ZeRO-3 of 2 processes"), (None, 1, "None")],
    ids=["one process", "another stage", "without"],
)
def test_a_checkpoint_is_of_its_stage_and_number_of_processes(
    lora_script, tiny_pipeline, images, tmp_path, stopped, stage, number, now
):
    said = tmp_path / "said"
    line = words(
        tiny_pipeline, images, tmp_path / "out", train_batch_size=2, resume_from_checkpoint=stopped / "checkpoint-2"
    )
    if stage is None:
        assert end_of(start_copy(lora_script, line, said)) == 2
    else:
        assert 2 in run_zero(stage, lora_script, [*line, f"--train_batch_size={2 // number}"], said, number)
    message = " ".join(said.read_text().split())
    assert (
        f"sharding: ZeRO-2 of 2 processes there, {now} now; use the accelerate config of there, under ZeRO" in message
    )
    assert "begin a new run from what `sdtune export` makes of the checkpoint" in message
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_a_new_run_begins_with_what_export_makes_of_a_checkpoint(
    lora_script, tiny_pipeline, images, tmp_path, stopped
):
    """Which any number of processes can do."""
    assert status_of(export.main, stopped / "checkpoint-2", tmp_path / "exported") == 0
    settings = {"init_lora_weights": tmp_path / "exported", "max_train_steps": 1, "learning_rate": 1e-9}
    assert train(lora_script, tiny_pipeline, images, tmp_path / "new", **settings) == 0
    assert largest_difference(weights_of(tmp_path / "new"), weights_of(stopped)) < 1e-6


class Planted:
    """What would run when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_a_planted_pickle_runs_nothing(lora_script, tiny_pipeline, images, tmp_path, stopped, file, by):
    checkpoint, planted = tmp_path / "out" / "checkpoint-2", tmp_path / "planted"
    shutil.copytree(stopped, tmp_path / "out")
    path = checkpoint / "pytorch_model" / file
    if by == "torch":
        torch.save({**load_tensors(path), "planted": Planted(planted)}, path)
    else:
        path.write_bytes(pickle.dumps(Planted(planted)))
    write_digests(checkpoint)
    line = words(tiny_pipeline, images, tmp_path / "out", train_batch_size=1, resume_from_checkpoint=checkpoint)
    said = tmp_path / "said"
    assert 2 in run_zero(2, lora_script, line, said)
    assert f"{checkpoint} is damaged, or of another script" in said.read_text()
    assert not planted.exists()


def test_a_pickle_alone_would_run(tmp_path):
    """So that the test above can fail."""
    torch.save({"planted": Planted(tmp_path / "planted")}, tmp_path / "file.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_tensors(tmp_path / "file.pt")
    assert not (tmp_path / "planted").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "planted").exists()


# ---- refusals


@pytest.fixture
def asked(monkeypatch):
    """What a launcher sets for DeepSpeed; a function that sets more."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return lambda name, value: monkeypatch.setenv(f"ACCELERATE_{name}", value)


def test_what_goes_with_zero_is_not_refused(asked, monkeypatch):
    line = ["--use_ema", "--gradient_checkpointing", "--mixed_precision=bf16", "--keep_best", "--offload_ema"]
    assert check_deepspeed(parse(*line)) == []
    asked("DEEPSPEED_ZERO_STAGE", "3")
    asked("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    asked("GRADIENT_CLIPPING", "0.5")
    assert check_deepspeed(parse("--mixed_precision=bf16", "--max_grad_norm=0.5")) == []
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert check_deepspeed(parse("--compile", "--optimizer=prodigy")) == []


@pytest.mark.parametrize(
    "line, told",
    [
        (
            ["--mixed_precision=fp16"],
            "--mixed_precision=fp16 (or accelerate's config): does not go with DeepSpeed; use bf16",
        ),
        (
            ["--use_8bit_adam"],
            "--use_8bit_adam=True: does not go with DeepSpeed; use --optimizer=adamw, or choose GPUs alone",
        ),
        (
            ["--optimizer=prodigy"],
            "--optimizer=prodigy: does not go with DeepSpeed; use --optimizer=adamw, or choose GPUs alone",
        ),
        (["--compile"], "--compile=True: does not go with DeepSpeed; drop this, or choose GPUs alone"),
        (["--channels_last"], "--channels_last=True: does not go with DeepSpeed; drop this, or choose GPUs alone"),
    ],
)
def test_flags_that_do_not_go_with_zero_are_refused(asked, line, told):
    assert check_deepspeed(parse(*line)) == [told]


@pytest.mark.parametrize("flag", ["full_bf16", "train_text_encoder"])
def test_flags_of_some_scripts_are_refused_too(asked, flag):
    args = parse()
    setattr(args, flag, True)
    assert check_deepspeed(args) == [f"--{flag}=True: does not go with DeepSpeed; drop this, or choose GPUs alone"]


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("DEEPSPEED_ZERO_STAGE", "1", "with zero_stage: 1; use 2 or 3"),
        (
            "DEEPSPEED_CONFIG_FILE",
            "my.json",
            "with deepspeed_config_file: my.json, which is not read; give zero_stage and the like in accelerate's "
            "config itself",
        ),
        (
            "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
            "nvme",
            "with offload_optimizer_device: nvme, which is not obeyed; use cpu or none",
        ),
        (
            "DEEPSPEED_OFFLOAD_PARAM_DEVICE",
            "cpu",
            "with offload_param_device: cpu, which needs zero_stage: 3; use that, or none",
        ),
        ("GRADIENT_CLIPPING", "0.5", "with gradient_clipping: 0.5; give --max_grad_norm=0.5 to this script"),
        ("USE_CPU", "true", "and for CPUs, which excludes that; drop use_cpu: without GPUs it takes CPUs"),
    ],
)
def test_what_accelerates_config_asks_beyond_that_is_refused(asked, name, value, told):
    assert check_deepspeed(parse()) == []
    asked(name, value)
    assert check_deepspeed(parse()) == [f"accelerate's config asks for DeepSpeed {told}"]


def test_an_average_needs_whole_weights(asked):
    asked("DEEPSPEED_ZERO_STAGE", "3")
    assert check_deepspeed(parse("--use_ema")) == [
        "--use_ema=True: does not go with ZeRO-3; use zero_stage: 2, or drop this"
    ]


def test_deepspeed_needs_a_launcher(asked, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK")
    (problem,) = check_deepspeed(parse())
    assert problem.endswith("which needs a launcher; start this script by accelerate launch or torchrun")


def test_a_missing_deepspeed_is_named(asked, monkeypatch):
    monkeypatch.setattr("sdtune.deepspeed.is_installed", lambda package: False)
    assert check_deepspeed(parse("--compile")) == [
        "accelerate's config asks for DeepSpeed, which is not installed; run "
        "`pip install -r requirements_deepspeed.txt`"
    ]


# ---- configs


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_configs_launch(train_script, tiny_pipeline, images, tmp_path, stage):
    """As users do it, but without GPUs and with one process; its checkpoint says of what it is."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    config = REPO / "examples" / "accelerate" / f"deepspeed_zero{stage}.yaml"
    line = words(tiny_pipeline, images, tmp_path / "out", max_train_steps=1, mixed_precision="no")
    launched = [f"--config_file={config}", "--num_processes=1", "--main_process_port=0", train_script.__file__, *line]

    class Launcher:
        def main(words):
            launch_command(launch_command_parser().parse_args(words))

    said = tmp_path / "said"
    assert end_of(start_copy(Launcher, launched, said, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")) == 0, (
        said.read_text()
    )
    args = json.loads((tmp_path / "out" / "checkpoint-1" / "args.json").read_text())
    assert args["sharding"] == f"ZeRO-{stage} of 1 processes"
