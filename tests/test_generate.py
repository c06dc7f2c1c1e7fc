"""`sdtune generate` draws what it is told, says so in the files and in the grid, and loses or replaces nothing."""

import json
import os
import signal
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from image_data import snapshot
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageFont
from running import REPO, run_command, start_command, status_of
from safetensors.torch import load_file, save_file

from sdtune import grids
from sdtune.commands import convert_lora, evaluate, generate
from sdtune.errors import InputError
from sdtune.fonts import wrap
from sdtune.inference import EVALUATE_KEYS, read_prompts
from sdtune.lora_layouts import LORA_FILE
from sdtune.pictures import Picture, list_pictures

CAT, DOG = "a picture of a red circle", "a picture of a blue star"


def run(*words):
    """Calls main(); returns the exit status that its process would have."""
    return status_of(generate.main, *words)


def parse(*words):
    """The flags of a command line without mistakes."""
    args, problems = generate.parse_args([str(word) for word in words])
    assert problems == []
    return args


def pixels(path):
    """An image file as an array."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def settings(path):
    """The settings in a picture's metadata."""
    with Image.open(path) as image:
        return json.loads(image.info["settings"])


def pictures(folder):
    """The drawn pictures, in the order of their names, without grids."""
    return sorted(Path(folder).glob("[0-9]*.png"))


def furthest(one, other):
    """The largest difference between two images, in 8-bit levels."""
    return np.abs(one.astype(int) - other).max()


@pytest.fixture(scope="module")
def lora(tiny_pipeline, tmp_path_factory):
    """A folder with a LoRA of rank 2 on attention, far from zero, in diffusers' layout."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = {name: 3 * value for name, value in get_peft_model_state_dict(pipeline.unet).items()}
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    pipeline.save_lora_weights(folder, unet_lora_layers=weights)
    return folder


def test_pictures_are_those_of_the_pipeline_and_say_how_they_were_made(tiny_pipeline, tmp_path, capsys):
    flags = ["--seeds", 3, 12, "--num_inference_steps", 1, 2, "--guidance_scale", 1, 7.5, "--width", 32]
    flags += ["--negative_prompt", "green: a, b", "--scheduler", "euler", "--batch_size", 1]
    assert run(tiny_pipeline, "--prompts", CAT, DOG, *flags, "--output_dir", tmp_path) == 0
    files = pictures(tmp_path)
    assert len(files) == 16
    assert files[0].name == "000_a-picture-of-a-red-circle_seed0003_steps001_scale01.0.png"
    made = [settings(path) for path in files]
    order = [(item["prompt"], item["seed"], item["num_inference_steps"], item["guidance_scale"]) for item in made]
    assert order == [
        (prompt, seed, steps, scale)
        for prompt in (CAT, DOG)
        for seed in (3, 12)
        for steps in (1, 2)
        for scale in (1.0, 7.5)
    ]

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        DOG,
        negative_prompt="green: a, b",
        generator=torch.Generator().manual_seed(12),
        width=32,
        height=64,  # as high as the model draws
        num_inference_steps=2,
        guidance_scale=7.5,
    ).images[0]
    assert np.array_equal(pixels(files[-1]), np.asarray(drawn))

    with Image.open(files[-1]) as image:
        prompt, negative, numbers = image.info["parameters"].split("\n")
    assert (prompt, negative) == (DOG, "Negative prompt: green: a, b")
    assert numbers == (
        f"Steps: 2, Sampler: Euler, CFG scale: 7.5, Seed: 12, Size: 32x64, Model hash: {made[-1]['model_hash']}, "
        f"Model: {tiny_pipeline.name}, Version: diffusers {diffusers.__version__}"
    )
    assert made[-1]["scheduler"] == {"class": "EulerDiscreteScheduler"}
    assert str(tiny_pipeline.parent) not in json.dumps(made)  # pictures are passed on, and paths are private
    assert "16 pictures drawn, 0 were there" in capsys.readouterr().out


def test_base_and_loras(tiny_pipeline, lora, tmp_path):
    kohya = tmp_path / "kohya.safetensors"
    convert_lora.main([str(lora), str(kohya), "--to", "kohya"])
    adapters = {
        "diffusers": [f"{lora}:0.5"],
        "file": [f"{lora / LORA_FILE}:0.5"],
        "kohya": [f"{kohya}:0.5"],
        "twice": [f"{lora}:0.25", f"{kohya}:.25"],
        "whole": [lora],
    }
    common = [tiny_pipeline, "--prompts", CAT, "--num_inference_steps", 2, "--seed", 5]
    drawn = {}
    for name, given in adapters.items():
        flags = [word for item in given for word in ("--lora", item)]
        assert run(*common, *flags, "--output_dir", tmp_path / name) == 0
        drawn[name] = pixels(*pictures(tmp_path / name))
    assert run(*common, "--lora", f"{lora}:0", "--base", tiny_pipeline, "--output_dir", tmp_path / "none") == 0
    result, base = pictures(tmp_path / "none")
    assert base.name == result.name.replace(".png", "_base.png")
    assert settings(base)["lora"] == []
    assert np.array_equal(pixels(result), pixels(base))  # so both start from the same noise

    assert furthest(drawn["whole"], pixels(base)) > 20
    assert furthest(drawn["whole"], drawn["diffusers"]) > 10
    for same in ("file", "kohya", "twice"):  # up to the order of sums and the rounding to 8 bits
        assert furthest(drawn[same], drawn["diffusers"]) <= 1
    [twice] = pictures(tmp_path / "twice")
    assert settings(twice)["lora"] == [
        {"name": "mine", "scale": 0.25, "hash": generate.weights_hash(lora / LORA_FILE)},
        {"name": "kohya", "scale": 0.25, "hash": generate.weights_hash(kohya)},
    ]
    with Image.open(twice) as image:
        assert image.info["parameters"].startswith(f"{CAT} <lora:mine:0.25> <lora:kohya:0.25>\nSteps: 2, ")


def test_a_rerun_goes_on_and_replaces_nothing(tiny_pipeline, tmp_path, capsys):
    common = [tiny_pipeline, "--prompts", CAT, DOG, "--num_inference_steps", 1, "--output_dir", tmp_path]
    assert run(*common) == 0
    before = snapshot(tmp_path)
    first = pictures(tmp_path)[0]
    first.unlink()
    assert run(*common) == 0
    assert "1 picture drawn, 1 was there" in capsys.readouterr().out
    after = snapshot(tmp_path)
    digests = [{name: digest for name, (_, _, digest) in files.items()} for files in (before, after)]
    assert digests[0] == digests[1]
    assert {name for name in after if after[name] != before[name]} == {first.name}  # the others were not touched

    first.write_bytes(b"a picture of somebody else's")
    before = snapshot(tmp_path)
    assert run(*common, "--scheduler", "ddim") == 2
    told = capsys.readouterr().err
    assert "2 pictures are there that other settings or weights drew" in told
    assert str(first) in told
    assert snapshot(tmp_path) == before
    assert run(*common, "--scheduler", "ddim", "--overwrite") == 0
    assert [settings(path)["sampler"] for path in pictures(tmp_path)] == ["DDIM", "DDIM"]


def test_other_weights_are_told_apart(tiny_pipeline, tiny_pipeline_v, tmp_path):
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    unet = (tiny_pipeline / "unet" / weights.name).read_bytes()
    weights.parent.mkdir()
    weights.write_bytes(unet)
    alone = generate.weights_hash(tmp_path)
    assert alone != generate.weights_hash(tiny_pipeline)  # which has a VAE and a text encoder besides
    assert generate.weights_hash(tiny_pipeline) == generate.weights_hash(tiny_pipeline_v)  # the same weights
    weights.write_bytes(unet[:-1] + b"!")
    assert generate.weights_hash(tmp_path) != alone


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "Stopped; the same command goes on from here."),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_a_picture_is_whole_or_not_there(tiny_pipeline, tmp_path, monkeypatch, capsys, error, status, message):
    save = Image.Image.save

    def stop_half_way(image, file, *args, **kwargs):
        save(image, file, *args, **kwargs)
        file.truncate(file.tell() // 2)
        raise error

    monkeypatch.setattr(Image.Image, "save", stop_half_way)
    common = [tiny_pipeline, "--prompts", CAT, "--num_inference_steps", 1, "--output_dir", tmp_path]
    capsys.readouterr()
    assert run(*common) == status
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert run(*common) == 0
    assert list(tmp_path.iterdir()) == pictures(tmp_path)
    assert len(pictures(tmp_path)) == 1


@pytest.mark.slow
def test_killed_at_any_moment(tiny_pipeline, tmp_path):
    output = tmp_path / "out"
    words = ["generate", tiny_pipeline, "--prompts", CAT, DOG, "--seeds", *range(30), "--num_inference_steps", 2]
    words += ["--output_dir", output]
    process = start_command(words)
    end = time.monotonic() + 240
    while len(pictures(output)) < 5 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    found = pictures(output)
    assert 5 <= len(found) < 60
    before = {path: pixels(path) for path in found}  # which reads each to its end
    done = run_command(words)
    assert done.returncode == 0, done.stderr
    assert f"{60 - len(found)} pictures drawn, {len(found)} were there" in done.stdout
    assert len(pictures(output)) == 60
    assert all(np.array_equal(pixels(path), before[path]) for path in found)
    assert not list(output.glob(".*"))


def test_recipes(tmp_path, monkeypatch):
    recipe = REPO / "examples" / "configs" / "dreambooth.yaml"
    args = parse("model", "--config", recipe)
    assert args.prompts[1] == "a sks star on a pink background"
    assert (args.seeds, args.num_inference_steps, args.guidance_scale) == ([0], [25], [3.0])
    args = parse("model", "--config", recipe, "--seeds", 1, 2, "--prompts", CAT)
    assert (args.seeds, args.prompts, args.num_inference_steps) == ([1, 2], [CAT], [25])
    (tmp_path / "prompts.txt").write_text(f"{CAT}\n\n  {DOG} \n{CAT}\n", encoding="utf-8")
    args = parse("model", "--config", recipe, "--prompts_file", tmp_path / "prompts.txt")
    assert read_prompts(args.prompts, args.prompts_file) == [CAT, DOG]

    own = tmp_path / "own.yaml"
    own.write_text("prompts: a\nlora: [one:0.5, two]\nmixed_precision: no\noverwrite: true\nguidance_scale: [1, 2]\n")
    args = parse("model", "--config", own)
    assert (args.lora, args.mixed_precision, args.overwrite) == (["one:0.5", "two"], "no", True)
    assert (args.model, args.prompts, args.guidance_scale) == ("model", ["a"], [1.0, 2.0])
    assert parse("model", "--config", own, "--lora", "three").lora == ["three"]
    own.write_text("evaluation: {seed: 5, seeds: [1, 2], num_images: 9, clip_model: x, resolution: 64, base: ~/base}")
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse("model", "--config=~/own.yaml", "--output_dir=~/out")
    assert (args.seeds, args.base, args.output_dir) == ([1, 2], f"{tmp_path}/base", f"{tmp_path}/out")


def test_keys_of_the_other_command_are_left_to_that():
    others, _ = evaluate.parse_args(["model"])
    only_theirs = vars(others).keys() - vars(parse("model")).keys()
    assert only_theirs - {"dataset", "seed"} == EVALUATE_KEYS  # a seed is one of --seeds


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("evaluation: {steps: 3}", "unknown key steps"),
        ("max_train_steps: 3", "max_train_steps"),
        ("num_images: 9", "unknown key num_images"),
        ("evaluation: {model: x}", "unknown key model"),
        ("batch_size: [2, 3]", "3 stands in a list where one value is taken"),
        ("evaluation: [1]", "is no YAML file of flags"),
        ("a: [", "is no YAML file of flags"),
    ],
)
def test_recipes_that_are_refused(tmp_path, capsys, text, told):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    assert run("model", "--config", own) == 2
    assert told in capsys.readouterr().err


def test_all_mistakes_at_once(tiny_pipeline, lora, tmp_path, capsys):
    flags = ["--base", tmp_path / "nowhere", "--lora", tmp_path / "no.safetensors", "--height", 33]
    flags += ["--scheduler", "eulerian", "--num_inference_steps", 0, "--guidance_scale", "inf"]
    (tmp_path / "own.yaml").write_text("batch_size: 0")
    flags += ["--config", tmp_path / "own.yaml", "--output_dir", tmp_path / "out"]
    assert run(tiny_pipeline, *flags) == 2
    told = capsys.readouterr().err
    for wrong in (
        "--prompts is missing: give this",
        "--base=",
        "--lora=",
        "--height=33: must be a multiple of 8",
        "use 32",
        "--scheduler=eulerian: is no scheduler",
        "--num_inference_steps: must be a whole number in [1, inf), not '0'",
        "--guidance_scale: must be in [1, inf), not 'inf'",
        "--batch_size: must be a whole number in [1, inf), not '0'",
    ):
        assert wrong in told, wrong
    assert "Traceback" not in told
    assert run(lora, "--prompts", CAT, "--output_dir", tmp_path / "out") == 2
    assert f"give the model that they were trained on, and --lora={lora}" in capsys.readouterr().err
    flags = ["--num_inference_steps", 1001, "--output_dir", tmp_path / "out"]
    assert run(tiny_pipeline, "--prompts", CAT, *flags) == 2
    assert "--num_inference_steps=1001: must be at most 1000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_lora_file_without_layers_is_refused(tiny_pipeline, tmp_path, capsys):
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    assert run(tiny_pipeline, "--prompts", CAT, "--lora", empty, "--output_dir", tmp_path / "out") == 2
    assert "only 0 of its 0 layers are in" in capsys.readouterr().err


def test_a_lora_of_another_model_is_refused(tiny_pipeline, tiny_pipeline_sd1, lora, tmp_path, capsys):
    output = ["--prompts", CAT, "--output_dir", tmp_path / "out"]
    assert run(tiny_pipeline_sd1, "--lora", lora, *output) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"--lora={lora / LORA_FILE}: " in message
    assert "its layers have other sizes" in message or "layers are in" in message
    weights = load_file(lora / LORA_FILE)
    more = {name.replace("down_blocks.0", "down_blocks.7"): value.clone() for name, value in weights.items()}
    save_file(weights | more, tmp_path / "more.safetensors")
    assert run(tiny_pipeline, "--lora", tmp_path / "more.safetensors", *output) == 2
    assert "layers are in" in capsys.readouterr().err
    save_file({"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(2)}, tmp_path / "dora.safetensors")
    assert run(tiny_pipeline, "--lora", tmp_path / "dora.safetensors", *output) == 2
    assert "convert it by `sdtune convert-lora --to diffusers`" in capsys.readouterr().err
    assert not pictures(tmp_path / "out")


def test_every_short_name_is_a_scheduler_that_can_be_used(tiny_pipeline):
    config = diffusers.DDPMScheduler.load_config(tiny_pipeline, subfolder="scheduler")
    for name, (kind, _, known_as) in generate.SCHEDULERS.items():
        scheduler, options, label = generate.choose_scheduler(name, config)
        assert (scheduler.__name__, label) == (kind, known_as)
        made = scheduler.from_config(config, **options)
        made.set_timesteps(10)
        assert len(made.timesteps) >= 10
        assert all(made.config[key] == value for key, value in options.items())
    assert generate.choose_scheduler("EulerDiscreteScheduler", config)[2] == "Euler"
    assert generate.choose_scheduler(None, config)[0] is diffusers.PNDMScheduler
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler"):
        generate.choose_scheduler("FlowMatchEulerDiscreteScheduler", config)


@pytest.mark.parametrize(
    ("varied", "rows", "columns"),
    [
        (
            {"steps": [50, 10], "scales": [7.5, 1.0]},
            [("10 steps",), ("50 steps",)],
            ["scale 1", "scale 7.5"],
        ),
        (
            {"prompts": [CAT, DOG], "models": ["result", "base"]},
            [("base",), ("result",)],
            [CAT, DOG],
        ),
        (
            {"models": ["result", "base"]},
            [()],
            ["base", "result"],
        ),
        (
            {"seeds": [1, 2], "prompts": [CAT, DOG], "models": ["result", "base"]},
            [(CAT, "base"), (CAT, "result"), (DOG, "base"), (DOG, "result")],
            ["seed 1", "seed 2"],
        ),
        (
            {"prompts": [f"prompt {k}" for k in range(9)], "models": ["result", "base"]},
            [(f"prompt {k}",) for k in range(9)],
            ["base", "result"],
        ),
    ],
)
def test_the_grid_says_what_varies(varied, rows, columns):
    alone = {"prompts": [CAT], "seeds": [0], "steps": [25], "scales": [5.0], "models": ["result"]}
    found = grids.layout(list_pictures(**(alone | varied)))
    assert list(found) == rows
    assert [list(row) for row in found.values()] == [columns] * len(rows)


def test_the_grid_shows_the_pictures_beside_their_labels(tmp_path):
    wanted = list_pictures([CAT], [0], [5, 9], [1.0, 2.0, 3.0], ["result"])
    for number, picture in enumerate(wanted):
        Image.new("RGB", (512, 384), (40 * number, 0, 200)).save(tmp_path / picture.name())
    grid = grids.make_grid(grids.layout(wanted), tmp_path, "a title " * 40, None)
    assert grid.width == grids.LABEL_WIDTH + 3 * (256 + grids.MARGIN)
    array = np.array(grid)
    tiles = (array == [[[0, 0, 200]]]).all(-1)
    rows, columns = np.nonzero(tiles)
    top = rows.min()
    assert (rows.max() + 1 - top, columns.min(), columns.max()) == (192, grids.LABEL_WIDTH, grids.LABEL_WIDTH + 255)
    for number in range(6):
        down, across = divmod(number, 3)
        y, x = top + down * (192 + grids.MARGIN), grids.LABEL_WIDTH + across * (256 + grids.MARGIN)
        assert (array[y : y + 192, x : x + 256] == (40 * number, 0, 200)).all()
        array[y : y + 192, x : x + 256] = 255
    ink = (array < 128).all(-1)
    assert ink[:top].any()
    assert ink[top:, : grids.LABEL_WIDTH].any()
    assert not ink[top:, grids.LABEL_WIDTH :].any()  # labels stay beside the pictures


def test_texts_are_broken_to_the_width():
    font = ImageFont.load_default(grids.FONT_SIZE)
    for text in ("a drawing of a green creature with red eyes", "w" * 60, "a " + "m" * 40 + " b"):
        lines = wrap(text, font, 120, 20)
        assert all(font.getlength(line) <= 120 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = wrap("a drawing of a green creature with red eyes", font, 120, 2)
    assert len(short) == 2
    assert short[-1].endswith("...")
    assert font.getlength(short[-1]) <= 120
    assert wrap("", font, 120, 2) == []


def test_many_rows_go_to_several_grids(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "ROWS_PER_GRID", 2)
    flags = ["--num_inference_steps", 1, "--seeds", 0, 1, 2, "--guidance_scale", 1, 2]
    assert run(tiny_pipeline, "--prompts", CAT, *flags, "--output_dir", tmp_path) == 0
    made = sorted(tmp_path.glob("grid_*.png"))
    assert [path.name[-8:] for path in made] == ["_001.png", "_002.png"]
    rows = [row for path in made for row in settings(path)["rows"]]
    assert [row["label"] for row in rows] == [["seed 0"], ["seed 1"], ["seed 2"]]
    assert [name for row in rows for name in row["pictures"]] == [path.name for path in pictures(tmp_path)]


def test_a_prompt_or_font_that_cannot_be_read_is_named(tiny_pipeline, tmp_path, capsys):
    (tmp_path / "no.ttf").write_text("no font")
    flags = ["--font", tmp_path / "no.ttf", "--output_dir", tmp_path / "out"]
    assert run(tiny_pipeline, *flags, "--prompts", "caf\udce9") == 2
    message = capsys.readouterr().err
    assert r"--prompts: 'caf\udce9' is not UTF-8" in message
    assert "no.ttf: is no font file" in message
    assert not (tmp_path / "out").exists()


def test_scales_that_are_close_and_empty_prompts_have_labels():
    scales = (7.1234, 7.1235678)
    drawn = [Picture(0, "", 0, 25, scale, "result") for scale in scales]
    drawn += [Picture(1, "a cat", 0, 25, scale, "result") for scale in scales]
    rows = grids.layout(drawn)
    assert list(rows) == [("(empty prompt)",), ("a cat",)]
    assert [list(row) for row in rows.values()] == [["scale 7.1234", "scale 7.1235678"]] * 2
