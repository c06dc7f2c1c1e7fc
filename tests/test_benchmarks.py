"""The tools in benchmarks/: what they compute from what was measured, and that they run, on a CPU at toy size."""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from running import REPO, run_script

BENCHMARKS = REPO / "benchmarks"


def load(name):
    """The module benchmarks/NAME.py, under a name of its own, with those beside it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


measuring, transforms, table, on_gpu, pictures = map(load, ["measuring", "transforms", "table", "on_gpu", "pictures"])


def run_tool(name, *words):
    """Runs benchmarks/NAME.py as its users do; returns what it prints."""
    result = run_script(words, {"OMP_NUM_THREADS": "1"}, script=BENCHMARKS / f"{name}.py", timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["sweep", "profile_step"])
def test_help_comes_without_warnings_of_libraries(name):
    """As of all tools that import models.py: parts of diffusers and transformers, which warn, are loaded when used."""
    result = run_script(["--help"], {"OMP_NUM_THREADS": "1"}, script=BENCHMARKS / f"{name}.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: {name}.py ")


# ------------------------------------------------------------------------------------------------------ statistics
@pytest.mark.parametrize(
    "number, low, high, confidence",
    [  # of the numbers 1 to n; sums of binomial coefficients, worked out by hand
        (1, 1, 1, 0),
        (3, 1, 3, 1 - 2 / 8),
        (7, 1, 7, 1 - 2 / 128),
        (9, 2, 8, 1 - 2 * (1 + 9) / 512),
        (10, 2, 9, 1 - 2 * (1 + 10) / 1024),
    ],
)
def test_the_interval_of_a_median_is_between_two_of_the_values(number, low, high, confidence):
    values = list(range(1, number + 1))[::-1]
    assert measuring.interval_of_median(values) == pytest.approx((low, high, confidence))


def test_records_replace_those_of_their_name(tmp_path):
    path = tmp_path / "results" / "compare-cpu.json"
    measuring.merge_records(path, [{"name": "full", "pairs": 1}, {"name": "lora", "pairs": 1}])
    measuring.merge_records(path, [{"name": "lora", "pairs": 7}, {"name": "dreambooth", "pairs": 7}])
    rows = json.loads(path.read_text())
    assert [(row["name"], row["pairs"]) for row in rows] == [("full", 1), ("lora", 7), ("dreambooth", 7)]


def test_losses_of_the_first_and_the_last_quarter(tmp_path):
    log = tmp_path / "log.jsonl"
    assert on_gpu.losses_of(log, 8) == {}
    losses = [4.0, 2.0, 9.0, 9.0, 9.0, 9.0, 2.0, 1.0, 100.0]
    log.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses)))
    assert on_gpu.losses_of(log, 8) == {"first_loss": 3.0, "last_loss": 1.5, "falls": True}
    assert on_gpu.losses_of(log, 9) == {"first_loss": 3.0, "last_loss": 50.5, "falls": False}


def test_operations_of_the_published_unet_are_counted():
    """804 GFLOP for a forward pass at 512 pixels is what others count; a backward pass takes twice as many."""
    assert on_gpu.step_flops("sd15", 512) == pytest.approx(3 * 804e9, rel=0.01)
    assert on_gpu.step_flops("toy", 64) / on_gpu.step_flops("toy", 32) == pytest.approx(4, rel=0.2)


def test_what_a_script_lacks_is_told(monkeypatch):
    monkeypatch.setitem(on_gpu.NEEDS, "--use_ema", "a_package_that_is_nowhere")
    assert on_gpu.why_not(on_gpu.FULL, ["--use_8bit_adam", "--rank=4"]) == "--rank is not there"
    assert on_gpu.why_not(on_gpu.LORA, ["--rank=4"]) is None
    assert on_gpu.why_not(on_gpu.FULL, ["--use_ema"]) == "a_package_that_is_nowhere is not installed"
    told = "loading\nx.py: --a=1: must be 2\nTraceback:\nsubprocess.CalledProcessError: status 1\n"
    assert on_gpu.reason_of(told) == "x.py: --a=1: must be 2"
    assert on_gpu.reason_of("RuntimeError: out of memory\n  at the end\n") == "RuntimeError: out of memory"
    assert on_gpu.reason_of("ended after 3 steps\nPlan\n 0%| | 3/9 [00:00<?]") == "ended after 3 steps"
    assert on_gpu.reason_of("train ended with status 1:\nKilled\n") == "Killed"


def test_ticks_are_round():
    assert [pictures.round_tick(number) for number in (0.7, 1, 1.1, 2.2, 30, 260)] == [1, 1, 2, 2.5, 50, 500]


# ------------------------------------------------------------------------------------- in the place of torchvision
def test_transforms_do_what_their_names_say():
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    image = Image.fromarray(pixels)
    assert np.array_equal(transforms.CenterCrop(2)(image), pixels[1:3, 2:4])
    assert transforms.Resize(8)(image).size == (12, 8)
    assert transforms.Resize(4, transforms.InterpolationMode.LANCZOS)(image) is image
    upright = Image.fromarray(pixels.transpose(1, 0, 2))
    assert transforms.Resize(2)(upright).size == (2, 3)
    tensor = transforms.ToTensor()(image)
    assert tensor.shape == (3, 4, 6)
    assert tensor[1, 2, 3].item() == np.float32(pixels[2, 3, 1] / 255)
    normal = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])(image)
    assert torch.allclose(normal, torch.from_numpy(pixels.transpose(2, 0, 1)) / 127.5 - 1)
    torch.manual_seed(0)
    seen = {tuple(np.array(transforms.RandomCrop(3)(image))[0, 0]) for _ in range(100)}
    assert seen == {tuple(pixels[top, left]) for top in range(2) for left in range(4)}
    flips = [np.array_equal(transforms.RandomHorizontalFlip()(image), pixels[:, ::-1]) for _ in range(100)]
    assert 30 < sum(flips) < 70


# -------------------------------------------------------------------------------------------------------- the runs
SCRIPT = """
import sys
import torch
{torchvision}

class UNet2DConditionModel(torch.nn.Linear):
    pass

unet = UNet2DConditionModel(1, 1)
optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
with torch.no_grad():
    unet(torch.ones(1, 1))  # which is no step
for step in range(5):
    unet(torch.ones(1, 1)).sum().backward()
    optimizer.step()
print("words", sys.argv[1:])
if "--fail" in sys.argv:
    raise ValueError("on purpose")
"""


@pytest.mark.slow
def test_a_script_is_measured_as_it_is(tmp_path):
    script = tmp_path / "train_something.py"
    script.write_text(SCRIPT.format(torchvision="from torchvision import transforms\ntransforms.Resize(8)"))
    run = measuring.Run(script, ["--seed=1"], tmp_path)
    run.finish()
    assert [message[0] for message in run.messages] == ["first step", *["step"] * 5]
    assert "words ['--seed=1']" in run.told()
    measures = measuring.measures_of(run)
    assert 0 < measures["seconds_per_step"] < 1 < measures["cpu_to_first_step"] < 60
    assert 100e6 < measures["peak_memory"] < 4e9
    run = measuring.Run(script, ["--fail"], tmp_path)
    with pytest.raises(RuntimeError, match="on purpose"):
        run.finish()


@pytest.mark.slow
def test_two_scripts_are_compared(tmp_path):
    """One with itself, which costs as much."""
    words = ["--names", "lora", "--size=toy", "--resolution=32", "--pairs=1", "--steps=40"]
    told = run_tool("compare", "--peer", REPO, *words, f"--output={tmp_path}", "--", "--snr_gamma=5")
    assert "lora, pair 1 of 1: seconds_per_step " in told
    (record,) = json.loads((tmp_path / "compare-cpu.json").read_text())
    assert record["name"] == "lora"
    for what in ("seconds_per_step", "peak_memory", "time_to_first_step"):
        assert record[f"{what}_ratio"] == pytest.approx(1, rel=0.5 if what == "time_to_first_step" else 0.15)
        assert record[f"{what}_ratio"] == record["intervals"][f"{what}_ratio"][0]
    assert record["versions"]["torch"] == torch.__version__
    assert record["commands"]["ours"].startswith(
        "accelerate launch examples/text_to_image/train_text_to_image_lora.py"
    )
    assert record["commands"]["ours"].endswith("--snr_gamma=5")
    assert not re.search(r"[= ]/", json.dumps(record["commands"]))  # a place of this machine
    with Image.open(tmp_path / "compare-cpu.png") as picture:
        assert picture.width == 900


@pytest.mark.slow
def test_cost_is_measured_by_number_of_images(tmp_path):
    words = ["--images", "6", "12", "--resolutions", "--batches", "--processes", "2", "--steps=6", "--rounds=1"]
    run_tool("sweep", *words, f"--output={tmp_path}")
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert [record["images"] for record in results["images"]] == [6, 12]
    assert all(0 < record["seconds_per_step"] < 5 for record in results["images"])
    assert results["processes"][0]["images_per_second"] == 4 / results["processes"][0]["seconds_per_step"]
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.height == 4 * 420  # three by images, one by processes


@pytest.mark.slow
def test_findings_of_a_gpu_are_found_on_a_cpu(tmp_path):
    names = ["LoRA", "README", "bf16", "fp16"]
    words = ["--size=toy", "--resolution=32", "--steps=8", "--steps_to_compare=4", "--batches", "2", "--only", *names]
    told = run_tool("on_gpu", *words, "--peer", REPO, f"--output={tmp_path / 'on_gpu.json'}")
    findings = json.loads((tmp_path / "on_gpu.json").read_text())["findings"]
    assert list(findings) == ["LoRA, theirs", "LoRA, ours", "LoRA, ours, fastest", "README", "bf16", "fp16"]
    assert "--cache_latents" in findings["LoRA, ours, fastest"]["flags"]
    assert findings["LoRA, ours"]["flags"] == findings["LoRA, theirs"]["flags"]
    assert findings["bf16"]["images_per_second"] > 0.1
    assert findings["bf16"]["first_loss"] == pytest.approx(1, abs=0.8)  # of noise that is not predicted yet
    assert "a CPU cannot train in fp16" in findings["fp16"]["error"]
    assert re.search(r"^bf16: batch 1, [\d.]+ images/s, loss", told, re.MULTILINE)
    assert re.search(r"^fp16: .*a CPU cannot train in fp16", told, re.MULTILINE)


def test_passes_of_a_step_count():
    assert on_gpu.images_of_step(["--use_ema"], 3) == 3
    assert on_gpu.images_of_step(["--gradient_accumulation_steps=4"], 2) == 8


@pytest.mark.slow
def test_the_parts_of_a_step_are_timed():
    told = run_tool("profile_step", "--peer", REPO, "--size=toy", "--resolution=32", "--steps=3")
    lines = [line for line in told.splitlines() if re.match(r"\|.*\d", line)]
    rows = [re.findall(r"[^|\s][^|]*[^|\s]", line) for line in lines]
    assert [row[0] for row in rows][-3:] == ["optimizer", "the rest", "a step"]
    for column in (1, 2):
        times = [float(row[column]) for row in rows]
        assert sum(times[:-1]) == pytest.approx(times[-1], abs=0.5)


# ------------------------------------------------------------------------------------------------------- the table
def test_the_table_of_the_readme_is_made_from_the_results():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert table.with_table(text, table.make_table(measuring.RESULTS)) == text


def test_a_table_shows_ratios_with_their_intervals(tmp_path):
    ratios = {"seconds_per_step_ratio": 0.871, "peak_memory_ratio": 1, "time_to_first_step_ratio": 0.7}
    intervals = {name: [ratio - 0.01, ratio + 0.02] for name, ratio in ratios.items()}
    measuring.merge_records(tmp_path / "compare-cpu.json", [{"name": "lora", **ratios, "intervals": intervals}])
    row = "| LoRA | 0.87 (0.86 to 0.89) | 1.00 (0.99 to 1.02) | 0.70 (0.69 to 0.72)"
    lines = table.make_table(tmp_path).splitlines()
    assert len(lines) == 2 + 6
    assert f"{row} |" in lines
    assert lines[2] == "| whole UNet | not measured | not measured | not measured |"
    on_gpu = {"name": "lora", "seconds_per_step_ratio": 0.5, "intervals": {"seconds_per_step_ratio": [0.4, 0.6]}}
    measuring.merge_records(tmp_path / "compare-gpu.json", [on_gpu])
    lines = table.make_table(tmp_path).splitlines()
    assert f"{row} | 0.50 (0.40 to 0.60) |" in lines
    assert lines[2] == "| whole UNet | not measured | not measured | not measured | not measured |"
