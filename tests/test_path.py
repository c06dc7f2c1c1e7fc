"""The whole path that the README shows, from a folder of pictures without captions to a model and a dataset on the
Hub, on the miniature: each tool works on what the one before it left."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import load_script
from diffusers import StableDiffusionPipeline
from fake_hub import USER
from image_data import snapshot
from PIL import Image
from running import REPO, TRAIN_TEXT_TO_IMAGE_LORA, run_script
from safetensors.torch import load_file

MINIATURE = REPO / "miniature"
BASE, CLIP = MINIATURE / "pipeline", MINIATURE / "clip"
NUM_IMAGES = 30
PROMPTS = ["a drawing of a green creature with red eyes", "a drawing of a blue creature with yellow eyes"]


def run(path, *args):
    """Runs a script or tool in this process by its main(); returns its exit status."""
    try:
        load_script(path).main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code or 0
    finally:  # accelerate keeps its state in the process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return 0


def tool(name, *args):
    return run(REPO / "tools" / f"{name}.py", *args)


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def told(path):
    """What a generated picture says of its making; "" for a grid."""
    with Image.open(path) as image:
        return image.info.get("parameters", "")


@pytest.mark.slow
def test_from_a_folder_of_pictures_to_a_shared_model(tmp_path, tiny_captioner, fake_hub, capsys):
    images, lora, merged = tmp_path / "creatures", tmp_path / "my_lora", tmp_path / "my_model"
    render = load_script(MINIATURE / "render.py")
    render.main(["creatures", f"--output_dir={images}", f"--num_images={NUM_IMAGES}", "--seed=5"])
    truth = (images / "metadata.jsonl").read_text(encoding="utf-8")
    (images / "metadata.jsonl").unlink()
    drawn = snapshot(images)

    # Caption: a captioner with random weights says something of each image; what trains below is the renderer's.
    flags = ["--trigger_word=sks", "--max_new_tokens=4"]
    assert tool("caption_images", images, f"--model={tiny_captioner}", *flags) == 0
    captions = [json.loads(line) for line in (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(captions) == NUM_IMAGES
    assert all(row["text"].startswith("sks, ") and len(row["text"].split()) == 5 for row in captions)
    assert len({row["text"] for row in captions}) > 1
    assert {name: data for name, data in snapshot(images).items() if name != "metadata.jsonl"} == drawn
    (images / "metadata.jsonl").write_text(truth, encoding="utf-8")

    # Check: nothing is wrong with what the renderer drew.
    report = tmp_path / "report.json"
    flags = [f"--pretrained_model_name_or_path={BASE}", "--resolution=64", f"--html={tmp_path / 'report.html'}"]
    assert tool("check_dataset", images, *flags, f"--json={report}") == 0, capsys.readouterr().out
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["num_images"] == found["num_usable"] == NUM_IMAGES
    faults = ("unusable", "cut_captions", "enlarged", "exact_duplicates", "near_duplicates")
    assert not any(found[kind] for kind in faults), found
    assert found["captions_with_word"]["creature"] == NUM_IMAGES
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image") >= NUM_IMAGES

    # Show: the sheet holds all pixels of the images.
    sheet = tmp_path / "sheet.png"
    assert tool("show_dataset", images, "--resolution=64", "--num_images=6", f"--output={sheet}") == 0
    colours = {tuple(colour) for colour in picture(sheet).reshape(-1, 3)}
    shown = [{tuple(colour) for colour in picture(path).reshape(-1, 3)} <= colours for path in images.glob("*.png")]
    assert sum(shown) >= 6

    # Train: adapters that differ from those that do nothing.
    flags = [
        f"--pretrained_model_name_or_path={BASE}",
        f"--train_data_dir={images}",
        "--resolution=64",
        "--rank=4",
        "--train_batch_size=4",
        "--max_train_steps=12",
        "--learning_rate=3e-3",
        "--report_to=none",
        "--lora_target=all",
        "--num_validation_samples=6",
    ]
    assert run(TRAIN_TEXT_TO_IMAGE_LORA, *flags, f"--output_dir={lora}") == 0, capsys.readouterr().err
    weights = load_file(lora / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 1e-4 for name, value in weights.items() if "lora_B" in name)

    # Generate: base and result from the same noise differ, and the files hold the prompts.
    pictures = tmp_path / "pictures"
    flags = ["--base", BASE, "--lora", lora, "--num_inference_steps", "4", "--prompts", *PROMPTS]
    assert tool("generate", BASE, *flags, f"--output_dir={pictures}") == 0, capsys.readouterr().err
    files = [path for path in sorted(pictures.rglob("*.png")) if told(path)]
    assert len(files) == 2 * len(PROMPTS)
    for prompt in PROMPTS:
        one, other = [picture(path) for path in files if told(path).startswith(prompt)]
        assert one.shape == other.shape == (64, 64, 3)
        assert abs(one - other).mean() > 1

    # Evaluate: the held-out loss is the one that fell in training.
    evaluation = tmp_path / "evaluation"
    flags = [
        images,
        "--base",
        BASE,
        "--lora",
        lora,
        f"--clip_model={CLIP}",
        "--num_images=8",
        "--resolution=64",
        "--num_validation_samples=6",
        "--num_inference_steps=4",
        f"--output_dir={evaluation}",
    ]
    assert tool("evaluate", BASE, *flags) == 0, capsys.readouterr().err
    figures = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (lora / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in log if "held_out_loss" in row][-1]
    losses = figures["held_out_loss"]
    assert losses["model"]["mean"] == pytest.approx(last["held_out_loss"], rel=1e-4)
    assert losses["gain"]["mean"] == pytest.approx(last["held_out_gain"], rel=1e-3)
    assert last["held_out_gain"] > 0
    assert picture(evaluation / "closest_pairs.png").std() > 10

    # Convert: merged into a folder, that into one file, which gives back the folder's bits.
    assert tool("convert_lora", lora / "pytorch_lora_weights.safetensors", merged, f"--merge={BASE}") == 0
    single = tmp_path / "my_model.safetensors"
    assert tool("convert_checkpoint", merged, single) == 0, capsys.readouterr().err
    again = StableDiffusionPipeline.from_single_file(str(single), config=str(merged), dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(merged, dtype=torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        merged_part, read_part = (getattr(one, part).state_dict() for one in (pipeline, again))
        assert merged_part.keys() == read_part.keys()
        assert all(torch.equal(value, read_part[name]) for name, value in merged_part.items())
    base = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    trained = pipeline.unet.state_dict()
    assert any(not torch.equal(value, trained[name]) for name, value in base.unet.state_dict().items())

    # Push, and read back: the adapters and the dataset, which trains by its name.
    for name, folder in (("push_model", lora), ("push_dataset", images)):
        words = [folder, f"{USER}/{folder.name}", "--private"]
        ran = run_script(words, env=fake_hub.env, script=REPO / "tools" / f"{name}.py")
        assert ran.returncode == 0, ran.stderr
        assert fake_hub.repos[f"{USER}/{folder.name}"].private
    sent = fake_hub.repos[f"{USER}/my_lora"].files
    pictures = [name for name in fake_hub.repos[f"{USER}/creatures"].files if name.endswith(".png")]
    assert len(pictures) == NUM_IMAGES
    assert sent["pytorch_lora_weights.safetensors"] == (lora / "pytorch_lora_weights.safetensors").read_bytes()
    shutil.rmtree(images)
    flags = [
        f"--pretrained_model_name_or_path={BASE}",
        f"--dataset_name={USER}/creatures",
        "--resolution=64",
        "--report_to=none",
        f"--output_dir={tmp_path / 'again'}",
        "--dry_run",
    ]
    ran = run_script(flags, env=fake_hub.env, script=TRAIN_TEXT_TO_IMAGE_LORA)
    assert ran.returncode == 0, ran.stderr
    assert f"{NUM_IMAGES} to train on" in ran.stdout
