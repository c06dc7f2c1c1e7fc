"""The whole path that the README shows, from a folder of pictures without captions to a model and a dataset on the
Hub, on the miniature: each command works on what the one before it left."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import load_script
from diffusers import StableDiffusionPipeline
from fake_hub import USER
from image_data import snapshot
from PIL import Image
from reach_hub import reaching
from running import REPO, TRAIN_TEXT_TO_IMAGE_LORA, status_of
from safetensors.torch import load_file
from training import read_log

from sdtune.__main__ import main as sdtune
from sdtune.lora_layouts import LORA_FILE

MINIATURE = REPO / "miniature"
BASE, CLIP = MINIATURE / "pipeline", MINIATURE / "clip"
NUM_IMAGES = 30
PROMPTS = ["a green creature with red eyes", "a blue creature with yellow eyes"]


def picture(path):
    """Pixels (height, width, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def colours_of(path):
    """The colours in a picture."""
    return {tuple(colour) for colour in picture(path).reshape(-1, 3).tolist()}


def told(path):
    """What a generated picture says of its making; "" for a grid."""
    with Image.open(path) as image:
        return image.info.get("parameters", "")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `sdtune` with the words in this process, or the main() of a script; it has to succeed. Returns what it
    prints."""
    monkeypatch.setattr(sys, "argv", ["sdtune"])  # which sdtune changes

    def run_main(*words, main=sdtune):
        status = status_of(main, *words)
        said = capsys.readouterr()
        assert status == 0, said.out + said.err
        return said.out

    return run_main


def caption(run, images, captioner):
    """A captioner with random weights says something of each image."""
    drawn = snapshot(images)
    run("caption", images, f"--model={captioner}", "--trigger_word=sks", "--max_new_tokens=4")
    captions = [json.loads(line) for line in (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(captions) == NUM_IMAGES
    assert all(row["text"].startswith("sks, ") and len(row["text"].split()) == 5 for row in captions)
    assert len({row["text"] for row in captions}) > 1
    assert {name: found for name, found in snapshot(images).items() if name != "metadata.jsonl"} == drawn


def check(run, images, folder):
    """Nothing is wrong with what the renderer drew."""
    report, page = folder / "report.json", folder / "report.html"
    flags = [f"--pretrained_model_name_or_path={BASE}", "--resolution=64", f"--html={page}", f"--json={report}"]
    run("check", images, *flags)
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["num_images"] == found["num_usable"] == NUM_IMAGES
    for fault in ("unusable", "missing_captions", "cut_captions", "enlarged", "exact_duplicates", "near_duplicates"):
        assert not found[fault], found
    assert found["captions_with_word"]["creature"] == NUM_IMAGES
    assert page.read_text(encoding="utf-8").count("data:image") >= NUM_IMAGES


def show(run, images, sheet):
    """The sheet holds all colours of the images that it shows."""
    run("show", images, "--resolution=64", "--num_images=6", f"--output={sheet}")
    colours = colours_of(sheet)
    shown = [path for path in images.glob("*.png") if colours_of(path) <= colours]
    assert len(shown) >= 6


def train_lora(run, script, images, lora):
    """The adapters differ from those that do nothing."""
    flags = [
        f"--pretrained_model_name_or_path={BASE}",
        f"--train_data_dir={images}",
        f"--output_dir={lora}",
        "--resolution=64",
        "--rank=4",
        "--lora_target=all",
        "--train_batch_size=4",
        "--max_train_steps=12",
        "--learning_rate=3e-3",
        "--num_validation_samples=6",
        "--report_to=none",
    ]
    run(*flags, main=script.main)
    weights = load_file(lora / LORA_FILE)
    assert any(value.abs().max() > 1e-4 for name, value in weights.items() if "lora_B" in name)


def generate(run, lora, pictures):
    """Base and result differ, from the same noise, and the files hold the prompts."""
    flags = ["--base", BASE, "--lora", lora, "--num_inference_steps", "4", "--prompts", *PROMPTS]
    run("generate", BASE, *flags, f"--output_dir={pictures}")
    files = [path for path in sorted(pictures.rglob("*.png")) if told(path)]
    assert len(files) == 2 * len(PROMPTS)
    for prompt in PROMPTS:
        one, other = [picture(path) for path in files if told(path).startswith(prompt)]
        assert one.shape == other.shape == (64, 64, 3)
        assert abs(one - other).mean() > 1


def evaluate(run, images, lora, folder):
    """The held-out loss is the one that fell in training."""
    flags = [
        "--base",
        BASE,
        "--lora",
        lora,
        f"--clip_model={CLIP}",
        "--num_images=8",
        "--resolution=64",
        "--num_validation_samples=6",
        "--num_inference_steps=4",
        f"--output_dir={folder}",
    ]
    run("evaluate", BASE, images, *flags)
    losses = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["held_out_loss"]
    last = [row for row in read_log(lora) if "held_out_loss" in row][-1]
    assert losses["model"]["mean"] == pytest.approx(last["held_out_loss"], rel=1e-4)
    assert losses["gain"]["mean"] == pytest.approx(last["held_out_gain"], rel=1e-3)
    assert last["held_out_gain"] > 0
    assert picture(folder / "closest_pairs.png").std() > 10


def convert(run, lora, merged, single):
    """Merged into a folder, that into one file, which gives back the folder's bits."""
    run("convert-lora", lora / LORA_FILE, merged, f"--merge={BASE}")
    run("convert", merged, single)
    again = StableDiffusionPipeline.from_single_file(str(single), config=str(merged), dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(merged, dtype=torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        merged_part, read_part = (getattr(one, part).state_dict() for one in (pipeline, again))
        assert merged_part.keys() == read_part.keys()
        assert all(torch.equal(value, read_part[name]) for name, value in merged_part.items())
    base = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    trained = pipeline.unet.state_dict()
    assert any(not torch.equal(value, trained[name]) for name, value in base.unet.state_dict().items())


def push(run, images, lora, hub, monkeypatch):
    """The Hub holds the adapters and the dataset."""
    with reaching(hub, monkeypatch):
        for command, folder in (("push-model", lora), ("push-dataset", images)):
            run(command, folder, f"{USER}/{folder.name}", "--private")
            assert hub.repos[f"{USER}/{folder.name}"].private
    sent = hub.repos[f"{USER}/{lora.name}"].files
    assert sent[LORA_FILE] == (lora / LORA_FILE).read_bytes()
    names = hub.repos[f"{USER}/{images.name}"].files
    assert len([name for name in names if name.endswith(".png")]) == NUM_IMAGES


def train_by_name(run, script, folder, hub, monkeypatch):
    """Who has nothing but the dataset's name can train on it."""
    flags = [
        f"--pretrained_model_name_or_path={BASE}",
        f"--dataset_name={USER}/creatures",
        f"--output_dir={folder}",
        "--resolution=64",
        "--report_to=none",
        "--dry_run",
    ]
    with reaching(hub, monkeypatch):
        said = run(*flags, main=script.main)
    assert f"{NUM_IMAGES} to train on" in said


@pytest.mark.slow
def test_from_a_folder_of_pictures_to_a_shared_model(run, tmp_path, tiny_captioner, fake_hub, monkeypatch):
    images, lora = tmp_path / "creatures", tmp_path / "my_lora"
    script = load_script(TRAIN_TEXT_TO_IMAGE_LORA)
    render = load_script(MINIATURE / "render.py")
    render.main(["creatures", f"--output_dir={images}", f"--num_images={NUM_IMAGES}", "--seed=5"])
    metadata = images / "metadata.jsonl"
    truth = metadata.read_text(encoding="utf-8")
    metadata.unlink()

    caption(run, images, tiny_captioner)
    metadata.write_text(truth, encoding="utf-8")  # what trains below are the renderer's captions
    check(run, images, tmp_path)
    show(run, images, tmp_path / "sheet.png")
    train_lora(run, script, images, lora)
    generate(run, lora, tmp_path / "pictures")
    evaluate(run, images, lora, tmp_path / "evaluation")
    convert(run, lora, tmp_path / "my_model", tmp_path / "my_model.safetensors")
    push(run, images, lora, fake_hub, monkeypatch)
    shutil.rmtree(images)
    train_by_name(run, script, tmp_path / "again", fake_hub, monkeypatch)
