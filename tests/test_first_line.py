"""The first line that a user reads is one of ours: no library speaks before it."""

import shutil

import pytest
from conftest import load_script
from image_data import write_image_folder
from running import (
    REPO,
    SCRIPTS,
    TRAIN_TEXT_TO_IMAGE,
    TRAIN_TEXT_TO_IMAGE_LORA,
    run_command,
    run_script,
)
from training import train, words

from sdtune.__main__ import COMMANDS as ALL_COMMANDS

pytestmark = pytest.mark.slow
COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture(scope="module")
def places(tiny_pipeline, tiny_captioner, tmp_path_factory):
    """Folders that commands read, by name, and `new`, below which they write."""
    folder = tmp_path_factory.mktemp("places")
    write_image_folder(folder / "images", 6)
    found = {"model": tiny_pipeline, "captioner": tiny_captioner, "clip": REPO / "miniature" / "clip"}
    for name, path in {"full": TRAIN_TEXT_TO_IMAGE, "lora": TRAIN_TEXT_TO_IMAGE_LORA}.items():
        settings = {"max_train_steps": 1, "checkpointing_steps": 1}
        assert train(load_script(path), tiny_pipeline, folder / "images", folder / name, **settings) == 0
        found[name] = folder / name
    return {**found, "images": folder / "images", "new": folder / "new"}


@pytest.fixture(scope="module")
def hub_cache(tiny_pipeline, tmp_path_factory):
    """A cache of the Hub's with the model me/tiny."""
    folder = tmp_path_factory.mktemp("hub")
    repo = folder / "models--me--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_pipeline, repo / "snapshots" / COMMIT)
    return folder


@pytest.mark.parametrize(
    "path, is_trial",
    [*[(path, False) for path in SCRIPTS], (TRAIN_TEXT_TO_IMAGE_LORA, True)],
    ids=[*[path.stem for path in SCRIPTS], "trial"],
)
def test_of_a_script_it_is_the_plan(path, is_trial, hub_cache, tmp_path):
    """With a model of the Hub's, a tracker, samples to draw, images held out, and files that are left aside."""
    folder = write_image_folder(tmp_path / "images", 4)
    (folder / "notes.pdf").write_text("of another kind")
    settings = {"validation_prompts": ["a cat"], "validation_num_inference_steps": 1, "report_to": "tensorboard"}
    settings |= {"num_validation_samples": 1}
    if "dreambooth" in path.stem:
        settings |= {"train_data_dir": None, "instance_data_dir": folder, "instance_prompt": "a sks photo"}
    line = words("me/tiny", folder, tmp_path / "out", dry_run=is_trial, max_train_steps=1, **settings)
    done = run_script(line, env={"HF_HUB_CACHE": str(hub_cache)}, script=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Plan\n")
    assert done.stderr == ""  # where there is no terminal there is no bar either


COMMANDS = {  # the words behind `sdtune`, and how the first line begins
    "caption": ("caption {images} --model={captioner} --overwrite --dry_run", "6 images: 0 keep their captions"),
    "check": ("check {images} --pretrained_model_name_or_path={model} --resolution=32", "{images}: 6 images"),
    "show": ("show {images} --resolution=32 --output={new}.png", "Wrote {new}.png: 6 of 6 images"),
    "generate": ("generate {model} --prompts cat --num_inference_steps=1 --output_dir={new}", "1 picture drawn"),
    "generate_lora": (
        "generate {model} --lora={lora} --prompts cat --num_inference_steps=1 --output_dir={new}_lora",
        "1 picture drawn",
    ),
    "evaluate": (
        "evaluate {model} {images} --prompts cat --num_images=3 --num_inference_steps=1 --resolution=32 "
        "--clip_model={clip} --output_dir={new}_figures",
        "",
    ),
    "export": ("export {full}/checkpoint-1 {new}_model", "Wrote {new}_model: "),
    "export_lora": ("export {lora}/checkpoint-1 {new}_adapters", "Wrote {new}_adapters: "),
    "convert": ("convert {model} {new}.safetensors", "Wrote {new}.safetensors."),
    "convert_lora": ("convert-lora {lora} {new}_kohya.safetensors --to=kohya", "Wrote {new}_kohya.safetensors: "),
    "push_dataset": ("push-dataset {images} me/mine --dry_run", "Would send 6 images"),
    "push_model": ("push-model {model} me/mine --dry_run", "Would send a pipeline: "),
    "find_batch_size": ("find-batch-size -- true", ""),
    "report": ("report {full} --output={new}.html", "full: No images were held out"),
}


def test_all_commands_are_looked_at():
    assert {line.split()[0] for line, _ in COMMANDS.values()} == ALL_COMMANDS.keys()


@pytest.mark.parametrize("case", COMMANDS)
def test_of_a_command_it_is_its_own(case, places):
    """Nothing comes beside it, either."""
    line, first = COMMANDS[case]
    done = run_command([word.format(**places) for word in line.split()])
    told = "the command told no time and memory of its steps: it has no step left, or is no script for PyTorch"
    said = f"sdtune find-batch-size: {told}\n" if case == "find_batch_size" else ""
    assert done.stdout.startswith(first.format(**places)), done.stdout
    assert done.stderr == said


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_of_a_mistake_it_is_the_message(path):
    """One that is seen before libraries are asked, and one that is seen after."""
    missing = "--pretrained_model_name_or_path=no/such/model"
    done = run_script(["--lr=1"], script=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{path.name}: --lr: is no flag; did you mean --learning_rate?\n"
    done = run_script([missing], script=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{path.name}: \n")
    assert all(line.startswith(("  --", "    ", "  no/such/model: ")) for line in done.stderr.splitlines()[1:])
