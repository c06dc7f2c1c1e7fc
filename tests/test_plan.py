"""What the plan says of a run: the size of its checkpoints, and what will not be as it was asked for."""

import datetime
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from image_data import write_image_folder
from running import REPO, TRAIN_DREAMBOOTH, TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA, run_script
from training import parse, train, words

from sdtune import output, plan
from sdtune.errors import InputError
from sdtune.plan import warn_of_precision, warn_of_warm_up

FULL_BF16 = {"full_bf16": True, "mixed_precision": "bf16", "max_grad_norm": "inf"}
MINIATURE = REPO / "miniature" / "pipeline"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("device, computes_bf16", [("cpu", False), ("cuda", False), ("cuda", True), ("mps", False)])
def test_bf16_on_a_gpu_that_emulates_it_is_warned_of(monkeypatch, device, computes_bf16, precision):
    """By the device's answers: of a T4, of an A100, of what is no NVIDIA GPU."""
    monkeypatch.setattr(plan, "is_cuda_available", lambda: device == "cuda")
    monkeypatch.setattr(plan, "is_bf16_supported", lambda including_emulation: including_emulation or computes_bf16)
    monkeypatch.setattr(plan, "_is_avx512_bf16_supported", lambda: True)
    accelerator = SimpleNamespace(mixed_precision=precision, device=torch.device(device))
    expected = []
    if device == "cuda" and not computes_bf16 and precision == "bf16":
        expected = ["bf16 is only emulated on this GPU, and slow; use --mixed_precision=fp16"]
    assert warn_of_precision(accelerator) == expected


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize(
    "has_avx512, has_amx, machine, told",
    [
        (True, False, "x86_64", None),
        (False, True, "x86_64", None),
        (False, False, "x86_64", "is several times slower than float32 on this CPU, which lacks AVX512-BF16 and AMX"),
        (False, False, "AMD64", "is several times slower than float32 on this CPU, which lacks AVX512-BF16 and AMX"),
        (False, False, "aarch64", "may be slower than float32 on a CPU"),  # which is not known to PyTorch
    ],
)
def test_bf16_on_a_cpu_without_instructions_for_it_is_warned_of(
    monkeypatch, has_avx512, has_amx, machine, told, precision
):
    monkeypatch.setattr(plan, "_is_avx512_bf16_supported", lambda: has_avx512)
    monkeypatch.setattr(plan, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(plan.platform, "machine", lambda: machine)
    accelerator = SimpleNamespace(mixed_precision=precision, device=torch.device("cpu"))
    expected = [f"bf16 {told}; use --mixed_precision=no"] if told and precision == "bf16" else []
    assert warn_of_precision(accelerator) == expected


def test_the_plan_names_the_device(monkeypatch):
    version = torch.__version__
    monkeypatch.setattr(plan, "get_cpu_capability", lambda: "AVX2")
    for number, told in ((1, "CPU, 1 thread, AVX2"), (6, "CPU, 6 threads (OMP_NUM_THREADS sets fewer), AVX2")):
        monkeypatch.setattr(plan.torch, "get_num_threads", lambda number=number: number)
        assert plan.describe_device(torch.device("cpu")) == f"{told}, by PyTorch {version}"
    assert plan.describe_device(torch.device("mps")) == f"mps, by PyTorch {version}"
    monkeypatch.setattr(plan, "is_cuda_available", lambda: True)
    monkeypatch.setattr(plan, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(plan, "get_device_properties", lambda device: SimpleNamespace(total_memory=85_029_158_912))
    assert plan.describe_device(torch.device("cuda", 1)) == f"card 1, 85 GB, by PyTorch {version}"


def test_what_is_not_used_of_a_folder_of_photos_is_told_by_kind(tiny_pipeline, tmp_path, capsys):
    """Six photos, of which two have captions; a broken one, two of a telephone, a note."""
    folder = write_image_folder(tmp_path / "photos", 6)
    (folder / "metadata.jsonl").unlink()
    for number in (0, 1):
        (folder / f"{number:02d}.txt").write_text(f"a drawing {number}")
    for name in ("a.heic", "b.HEIC", "note.pdf", "broken.jpg"):
        (folder / name).write_bytes(b"none")
    script = load_script(TRAIN_DREAMBOOTH)
    settings = {
        "train_data_dir": None,
        "instance_data_dir": folder,
        "instance_prompt": "a sks star",
        "repeats": 3,
        "skip_bad_images": True,
        "dry_run": True,
    }
    assert train(script, tiny_pipeline, folder, tmp_path / "out", **settings) == 0
    said = capsys.readouterr().out
    foreign = "2 of a kind that is not read (HEIC), such as a.heic; convert to JPEG or PNG first"
    assert said.startswith("Plan\n")
    assert said[said.index("  images ") :].splitlines()[:3] == [
        "  images     18 to train on, 0 held out, at 32 x 32 pixels",
        "             6 photos, each 3 times",
        "             2 with captions of their own, 4 with --instance_prompt",
    ]
    assert said[said.index("  data ") : said.index("  time ")].split() == [
        "data",
        *f"Left aside in {folder}: {foreign}.".split(),
        *f"Left aside in {folder}: 1 file of other kinds, such as note.pdf.".split(),
        *"Left out (--skip_bad_images): 1 of 7 images is unusable:".split(),
        *f"{folder}/broken.jpg: no image that Pillow knows".split(),
    ]
    assert said.endswith("\nNothing was trained; the settings are fine.\n")
    assert max(map(len, said[said.index("Plan") :].replace(str(tmp_path), "").splitlines())) <= 100


def test_what_is_told_of_images_is_told_at_once_where_there_will_be_no_plan(capsys):
    def fail():
        print("Left aside: two.")
        raise InputError("a mistake")

    told = []
    with pytest.raises(InputError), plan.told_in_plan(told):
        fail()
    assert (told, capsys.readouterr().out) == ([], "Left aside: two.\n")
    with plan.told_in_plan(told):
        print("Left aside: three.")
    assert (told, capsys.readouterr().out) == (["Left aside: three.\n"], "")


def test_a_folder_of_other_kinds_of_photos_alone_is_told_to_be_converted(
    train_script, tiny_pipeline, tmp_path, capsys
):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.nef").write_bytes(b"none")
    assert train(train_script, tiny_pipeline, tmp_path / "photos", tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith(
        "holds no images but 1 of a kind that is not read (NEF), such as one.nef; convert to JPEG or PNG first"
    )


@pytest.mark.parametrize("warmup, last_step, is_short", [(500, 300, True), (8, 8, True), (7, 8, False), (0, 1, False)])
def test_a_warm_up_that_is_not_shorter_than_the_run_is_warned_of(warmup, last_step, is_short):
    args = parse("--lr_scheduler=constant_with_warmup", f"--lr_warmup_steps={warmup}")
    told = f"--lr_warmup_steps={warmup}: in {last_step} steps the learning rate never arrives; use fewer"
    assert warn_of_warm_up(args, SimpleNamespace(last_step=last_step)) == ([told] if is_short else [])


@pytest.mark.parametrize(
    "first_step, last_step, done",
    [(60, 60, "all of 60 steps are"), (1, 1, "the one step is"), (59, 60, None), (0, 1, None)],
)
def test_a_run_without_a_step_left_is_warned_of(first_step, last_step, done):
    run = SimpleNamespace(progress={"global_step": first_step}, counts=SimpleNamespace(last_step=last_step))
    told = f"{done} done, and only the result is written again; raise --max_train_steps to train on"
    assert plan.warn_of_no_step(run) == ([told] if done else [])


@pytest.mark.parametrize(
    "num_images, num_held_out, is_short", [(3, 10, True), (10, 10, True), (11, 10, False), (1, 0, False)]
)
def test_more_images_held_out_than_trained_on_are_warned_of(num_images, num_held_out, is_short):
    args = parse(f"--num_validation_samples={num_held_out}")
    told = f"--num_validation_samples={num_held_out}: leaves {num_images} to train on, no more than are held out; "
    told += "use fewer, or more images"
    counts = SimpleNamespace(num_images=num_images)
    assert plan.warn_of_held_out(args, counts, num_held_out) == ([told] if is_short else [])
    assert plan.warn_of_held_out(args, SimpleNamespace(num_images=None), num_held_out) == []  # of a stream


@pytest.mark.parametrize(
    "words, first_step, number",
    [
        (["--checkpointing_steps=4"], 0, 3),  # at 4, 8 and the last
        (["--checkpointing_steps=5"], 0, 2),
        (["--checkpointing_steps=4"], 8, 1),
        (["--checkpointing_steps=1", "--checkpoints_total_limit=2"], 0, 3),  # one more while it is written
        (["--checkpointing_steps=100", "--checkpoints_total_limit=2"], 0, 1),
    ],
)
def test_a_disk_without_room_for_the_checkpoints_is_warned_of(tmp_path, monkeypatch, words, first_step, number):
    args = parse(f"--output_dir={tmp_path / 'new' / 'out'}", *words)
    run = SimpleNamespace(progress={"global_step": first_step}, counts=SimpleNamespace(last_step=10))
    asked = []

    def disk_usage(place):
        asked.append(place)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(plan, "checkpoint_bytes", lambda run: 2_000_000_000)
    monkeypatch.setattr(plan.shutil, "disk_usage", disk_usage)
    free = number * 2_000_000_000
    assert plan.warn_of_disk(args, run) == []
    free -= 1
    (told,) = plan.warn_of_disk(args, run)
    takes = "checkpoint takes" if number == 1 else "checkpoints take"
    assert told.startswith(f"{number} {takes} {2 * number} GB, where ")
    assert "--checkpoints_total_limit" in told
    assert asked == [tmp_path, tmp_path]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 2)


def test_the_plan_ends_with_its_warnings(train_script, tiny_pipeline, images, tmp_path, monkeypatch, capsys):
    settings = {"lr_scheduler": "linear", "lr_warmup_steps": 4, "max_train_steps": 3, "dry_run": True}
    monkeypatch.setattr(train_script, "warn_of_precision", lambda accelerator: ["slow"])
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-5:-3] == [
        "  warning    slow",
        "  warning    --lr_warmup_steps=4: in 3 steps the learning rate never arrives; use fewer",
    ]
    assert [line.split()[0] for line in said[-3:-1]] == ["time", "memory"]
    assert said[-1] == "Nothing was trained; the settings are fine."
    settings |= {"lr_warmup_steps": 2, "num_validation_samples": 1}
    monkeypatch.setattr(train_script, "warn_of_precision", lambda accelerator: [])
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("warning") == 1
    assert "warning --num_validation_samples=1: leaves 1 to train on, no more than are held out; use fewer, " in told
    del settings["num_validation_samples"]
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "path, settings",
    [
        (TRAIN_TEXT_TO_IMAGE, {"use_ema": True}),
        (TRAIN_TEXT_TO_IMAGE, {"use_8bit_adam": True}),
        (TRAIN_TEXT_TO_IMAGE, {"use_8bit_adam": True, "use_ema": True, "mixed_precision": "bf16"}),
        (TRAIN_TEXT_TO_IMAGE, {"optimizer": "adafactor"}),
        (TRAIN_TEXT_TO_IMAGE, {**FULL_BF16, "use_ema": True}),
        (TRAIN_DREAMBOOTH, {**FULL_BF16, "train_text_encoder": True}),
        (TRAIN_TEXT_TO_IMAGE, {"optimizer": "prodigy", "learning_rate": 1}),
        (TRAIN_TEXT_TO_IMAGE_LORA, {"lora_target": "all", "rank": 64, "use_ema": True}),
        (TRAIN_TEXT_TO_IMAGE_LORA, {"lora_target": "all", "rank": 64, "optimizer": "prodigy", "learning_rate": 1}),
        (TRAIN_TEXT_TO_IMAGE_LORA, {"lora_target": "all", "rank": 64, "use_8bit_adam": True, "use_dora": True}),
        (TRAIN_DREAMBOOTH, {"use_8bit_adam": True, "train_text_encoder": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value.stem,
)
def test_checkpoints_are_as_large_as_the_plan_says(images, tmp_path, monkeypatch, path, settings):
    """Within 3 % of the miniature's, whose tensors are smaller than Stable Diffusion's beside what names them."""
    script, told = load_script(path), []
    count = script.checkpoint_bytes
    monkeypatch.setattr(script, "checkpoint_bytes", lambda run: told.append(count(run)) or told[-1])
    if "dreambooth" in path.stem:
        settings = {"train_data_dir": None, "instance_data_dir": images, "instance_prompt": "a sks star", **settings}
    run = {"max_train_steps": 1, "checkpointing_steps": 1, "train_batch_size": 1, **settings}
    assert train(script, MINIATURE, images, tmp_path / "out", **run) == 0
    files = [file for file in (tmp_path / "out" / "checkpoint-1").rglob("*") if file.is_file()]
    assert told[0] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.03)
    # After a resume the moments are there, and counted alike.
    number = len(told)
    resumed = {**run, "max_train_steps": 1, "resume_from_checkpoint": "latest", "dry_run": True}
    assert train(script, MINIATURE, images, tmp_path / "out", **resumed) == 0
    assert len(told) == 2 * number
    assert len(set(told)) == 1


@pytest.mark.parametrize(
    "size, told",
    [(0, "0 KB"), (1_234, "1.23 KB"), (999_400, "999 KB"), (2_500_000, "2.5 MB"), (5_210_000_000, "5.21 GB")],
)
def test_sizes_are_told_in_units_of_1000(size, told):
    assert plan.tell_size(size) == told


# -------------------------------------------------------------------------------------------------------- time, memory


@pytest.mark.parametrize(
    "num_samples, seconds, num_steps, told",
    [
        (4, 0.5, 100, "0.5 s per step, 8 images/s; 100 steps take 0:00:50, until 2026-11-27 23:59"),
        (2, 0.5, 240, "0.5 s per step, 4 images/s; 240 steps take 0:02:00, until 2026-11-28 00:00"),
        (
            4,
            12.3456,
            9_000,
            "12.3 s per step, 0.324 images/s; 9,000 steps take 1 day, 6:51:50, until 2026-11-29 06:50",
        ),
    ],
)
def test_the_time_of_all_steps(monkeypatch, capsys, num_samples, seconds, num_steps, told):
    monkeypatch.setattr(plan, "peak_memory", lambda device: ["1 GB of a", "2 GB of b"])
    counts = SimpleNamespace(num_images=10 * num_samples, steps_per_epoch=10)
    plan.tell_cost(counts, None, num_samples, seconds, num_steps, datetime.datetime(2026, 11, 27, 23, 58, 30))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  time       {told}", "  memory     1 GB of a, 2 GB of b at most"]
    assert max(map(len, lines)) <= 105


def test_the_time_of_a_step_is_that_of_the_mean_step(monkeypatch, capsys):
    """Of 13 images in steps of 4 that is 3.25 / 4 of the step that was measured: 1,000 such steps take as long."""
    monkeypatch.setattr(plan, "peak_memory", lambda device: ["1 GB of a"])
    counts = SimpleNamespace(num_images=13, steps_per_epoch=4)
    plan.tell_cost(counts, None, 4, 0.8, 1000, datetime.datetime(2026, 11, 27, 23, 0))
    told = "  time       0.65 s per step, 5 images/s; 1,000 steps take 0:10:50, until 2026-11-27 23:10"
    assert capsys.readouterr().out.splitlines()[0] == told


def test_the_memory_of_device_and_process(monkeypatch):
    (told,) = plan.peak_memory(torch.device("cpu"))
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert float(told.removesuffix(" GB of this process")) == pytest.approx(int(kilobytes) * 1024 / 1e9, rel=0.02)
    monkeypatch.setattr(output, "is_cuda_available", lambda: True)
    monkeypatch.setattr(output, "max_memory_reserved", lambda device: 5_310_000_000)
    assert plan.peak_memory(torch.device("cuda"))[0] == "5.31 GB of the device"
    monkeypatch.setattr(output.sys, "platform", "win32")
    assert plan.peak_memory(torch.device("cpu")) == ["not measured here"]


@pytest.mark.parametrize(
    "path, settings",
    [
        (TRAIN_TEXT_TO_IMAGE, {"use_ema": True}),
        (TRAIN_TEXT_TO_IMAGE, {"save_precision": "fp16"}),
        (TRAIN_TEXT_TO_IMAGE_LORA, {"rank": 64, "lora_target": "all"}),
        (TRAIN_TEXT_TO_IMAGE_LORA, {"rank": 64, "lora_target": "all", "output_kohya_format": True}),
        (TRAIN_DREAMBOOTH, {"skip_save_text_encoder": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value.stem,
)
def test_a_dry_run_takes_two_steps_and_tells_what_a_run_would(images, tmp_path, monkeypatch, capsys, path, settings):
    """Nothing is written. The size of the result is that of the files that a run leaves, within 6 %: a card too."""
    script, steps, folder = load_script(path), [], tmp_path / "out"
    take_step = script.take_step
    monkeypatch.setattr(script, "take_step", lambda *values: steps.append(take_step(*values)) or steps[-1])
    if "dreambooth" in path.stem:
        settings = {"train_data_dir": None, "instance_data_dir": images, "instance_prompt": "a sks star", **settings}
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 2, **settings}
    assert train(script, MINIATURE, images, folder, **settings, dry_run=True) == 0
    said = capsys.readouterr().out
    assert len(steps) == 2
    assert not folder.exists()
    ((told, unit),) = re.findall(
        r"  disk +2 checkpoints at once: [\d.]+ [MK]B, result: ([\d.]+) ([MK])B; .* GB are free", said
    )
    assert re.search(r"  time +[\d.e-]+ s per step, [\d.e+]+ images/s; 4 steps take 0:\d\d:\d\d, until ", said)
    assert re.search(r"  memory +[\d.]+ GB of this process at most", said)
    assert train(script, MINIATURE, images, folder, **settings) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"  time +.*; 1 step takes ", said)) == 1  # after the third of four
    files = [file for file in folder.rglob("*.safetensors") if "checkpoint" not in str(file)]
    size = float(told) * {"K": 1e3, "M": 1e6}[unit]
    assert size == pytest.approx(sum(file.stat().st_size for file in files), rel=0.06)


def test_a_dry_run_that_lacks_memory_says_so_in_a_line(
    train_script, tiny_pipeline, images, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train_script, "diffusion_losses", fail)
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", dry_run=True, train_batch_size=6) == 1
    said = capsys.readouterr().err
    assert "The trial was stopped by a lack of memory (CUDA out of memory. Tried to allocate 2 GiB). Use " in said
    assert "Use --train_batch_size=3 --gradient_accumulation_steps=2 (or what `sdtune find-batch-size -- " in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_of_two_processes_measures_too(tiny_pipeline, images, tmp_path):
    line = words(tiny_pipeline, images, tmp_path / "out", train_batch_size=1, mixed_precision="no", dry_run=True)
    done = run_script(line, launcher="torchrun", nproc=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 images: 1 a pass x 1 pass x 2 ranks" in done.stdout
    assert len(re.findall(r"  time +[\d.e-]+ s per step, .*; 4 steps take ", done.stdout)) == 1
    assert not (tmp_path / "out").exists()
