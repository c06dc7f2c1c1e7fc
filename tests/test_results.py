"""What comes out: a folder that loads and draws, whatever file it began from, with a card, on the Hub if asked."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from copies import end_of, start_launcher
from diffusers import StableDiffusionPipeline
from fake_hub import TOKEN, USER, FakeHub
from huggingface_hub import HfApi, ModelCard
from image_data import snapshot, write_image_folder
from original_layout import save_original
from PIL import Image
from reach_hub import reaching
from training import losses, parse, read_log, same, train, unet, words

from sdtune.models import load_base

PROMPTS = ["a red circle", "a green star"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 4)


@pytest.fixture(scope="module")
def licensed(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline with a model card."""
    folder = tmp_path_factory.mktemp("base") / "licensed_base"
    shutil.copytree(tiny_pipeline, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    return folder


@pytest.fixture(scope="module")
def result(train_script, licensed, images, tmp_path_factory):
    """The output of a run with samples, a token and a configuration file."""
    folder = tmp_path_factory.mktemp("result") / "my_model"
    config = folder.parent / "recipe.yaml"
    config.write_text("noise_offset: 0.05\n")
    settings = {
        "config": config,
        "validation_prompts": PROMPTS,
        "hub_token": "hf_a_secret",
        "use_ema": True,
        "cache_dir": folder.parent / "cache",
        "checkpointing_steps": 2,
    }
    assert train(train_script, licensed, images, folder, **settings) == 0
    return folder


def draw(folder, prompt="a red circle"):
    """A picture (32, 32, 3) in [0, 1]."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    settings = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 4.0}
    return pipeline(prompt, generator=generator, output_type="np", **settings).images[0]


# ------------------------------------------------------------------------------------------------------------ folder


def test_result_loads_and_draws_something_else_than_the_base(result, licensed):
    after, before = draw(result), draw(licensed)
    assert after.shape == (32, 32, 3)
    assert np.isfinite(after).all()
    assert 0 <= after.min() < after.max() <= 1
    assert np.abs(after - before).max() > 0.01


def test_result_holds_what_a_pipeline_folder_holds(result, licensed):
    index, base_index = (json.loads((folder / "model_index.json").read_text()) for folder in (result, licensed))
    assert index["_class_name"] == "StableDiffusionPipeline"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert index[part] == base_index[part]
    for part in ("unet", "vae", "text_encoder"):
        assert config_of(result / part) == config_of(licensed / part)


def config_of(folder):
    """A model's configuration, without what tells where it is from."""
    config = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")}


# ----------------------------------------------------------------------------------------------------- single files


@pytest.fixture(scope="module")
def trained_from_folder(train_script, images, tmp_path_factory):
    """Factory: trained_from_folder(pipeline folder, resolution) -> the output of two steps from there."""
    made = {}

    def make(folder, side):
        if folder not in made:
            output = tmp_path_factory.mktemp("from_folder") / "out"
            assert train(train_script, folder, images, output, max_train_steps=2, resolution=side) == 0
            made[folder] = output
        return made[folder]

    return make


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("fixture, side", [("tiny_pipeline", 32), ("tiny_pipeline_sd1", 64)])
def test_single_file_starts_where_its_folder_does(
    train_script, trained_from_folder, request, images, tmp_path, suffix, fixture, side
):
    """Weights to the bit. Losses to rounding: weights lie where the file has them, and a sum's order depends on it."""
    folder = request.getfixturevalue(fixture)
    expected = StableDiffusionPipeline.from_pretrained(folder)
    file = save_original(expected, tmp_path / f"model.{suffix}")
    loaded = load_base(parse(f"--pretrained_model_name_or_path={file}", f"--single_file_config={folder}"))
    for part in ("unet", "vae", "text_encoder"):
        assert same(dict(getattr(loaded, part).state_dict()), dict(getattr(expected, part).state_dict())), part

    from_file, from_folder = tmp_path / "file", trained_from_folder(folder, side)
    settings = {"max_train_steps": 2, "resolution": side, "single_file_config": folder}
    assert train(train_script, file, images, from_file, **settings) == 0
    assert losses(from_file) == pytest.approx(losses(from_folder), rel=1e-5)
    assert np.abs(draw(from_file) - draw(from_folder)).max() < 0.02


class Payload:
    """What pickle calls on loading; a file from somewhere must not get as far."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_is_refused_and_not_run(train_script, tiny_pipeline, images, tmp_path, capsys):
    trap, file = tmp_path / "trap", tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Payload(str(trap))}, file)
    status = train(train_script, file, images, tmp_path / "out", single_file_config=tiny_pipeline)
    assert status == 2
    assert not trap.exists()
    message = capsys.readouterr().err
    assert str(file) in message
    assert len(message.splitlines()) <= 12
    assert not (tmp_path / "out").exists()
    torch.load(file, weights_only=False)
    assert trap.is_dir()  # else this test could not fail


def test_file_that_is_no_model_is_refused(train_script, tiny_pipeline, images, tmp_path, capsys):
    for suffix in ("safetensors", "ckpt"):
        file = tmp_path / f"model.{suffix}"
        file.write_bytes(b"no weights at all")
        assert train(train_script, file, images, tmp_path / "out", single_file_config=tiny_pipeline) == 2
        message = capsys.readouterr().err
        assert str(file) in message
        assert len(message.splitlines()) <= 12


# -------------------------------------------------------------------------------------------------------- model card


def test_card_has_licence_settings_and_samples(result):
    card = ModelCard.load(result / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert "stable-diffusion" in card.data.tags
    text = (result / "README.md").read_text()
    assert text.startswith("---\n")
    assert "# my_model" in text
    assert "licensed_base" in text
    settings = {
        "learning_rate": "0.001 | 0.0001",
        "train_batch_size": "2 | 16",
        "noise_offset": "0.05 | 0.0",
        "use_ema": "True | False",
        "resolution": "32 | 512",
    }
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert f"Prompts, in the order of the pictures: {'; '.join(PROMPTS)}" in text
    assert sorted(rows) == sorted(f"| `--{flag}` | {value} |" for flag, value in settings.items())
    assert all(prompt in text for prompt in PROMPTS)
    line, _ = [line for line in text.splitlines() if line.startswith("![")]
    picture = line[line.index("(") + 1 : -1]
    with Image.open(result / picture) as image:
        assert image.size == (64, 32)


def test_card_and_settings_keep_secrets(result, licensed, images):
    card = (result / "README.md").read_text()
    for private in (str(result), str(result.parent), str(licensed.parent), str(images), "recipe.yaml", "hf_a_secret"):
        assert private not in card
    settings = json.loads((result / "args.json").read_text())
    assert settings["hub_token"] is None
    assert settings["learning_rate"] == 1e-3
    assert settings["noise_offset"] == 0.05
    files = [path for path in result.rglob("*") if path.is_file()]
    assert any("checkpoint-2" in path.parts for path in files)
    assert not [path for path in files if b"hf_a_secret" in path.read_bytes()]


def test_no_file_of_the_result_names_a_path(result, licensed):
    """args.json, the log and the samples' files aside, which stay here."""
    for path in result.rglob("*.json"):
        if path.name not in ("args.json", "progress.json"):
            assert str(licensed) not in path.read_text(), path


def test_card_names_numbers_that_are_names_of_files_too(train_script, licensed, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("64", "secret.txt", "out"):
        Path(name).mkdir()
    settings = {"resolution": 64, "tracker_project_name": "secret.txt"}
    assert train(train_script, licensed, images, "out", max_train_steps=1, **settings) == 0
    card = Path("out", "README.md").read_text()
    assert "| `--resolution` | 64 | 512 |" in card
    assert "secret" not in card


def test_many_prompts_fit_into_the_card(train_script, tiny_pipeline, images, tmp_path):
    """Together they are longer than the name of a file may be, which a look for paths stumbled over."""
    colours = ("red", "green", "blue", "yellow")
    end = "creature with eyes of another colour, number" + " seven" * 9
    prompts = [f"a drawing of a {colour} {end}" for colour in colours]
    output = tmp_path / "out"
    settings = {"max_train_steps": 1, "validation_prompts": prompts, "validation_num_inference_steps": 2}
    assert train(train_script, tiny_pipeline, images, output, **settings) == 0
    card = (output / "README.md").read_text()
    assert "; ".join(prompts) in card
    assert str(tmp_path) not in card


def test_card_of_a_base_without_one(train_script, tiny_pipeline, images, tmp_path):
    assert train(train_script, tiny_pipeline, images, tmp_path, max_train_steps=1) == 0
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "other"
    assert "![" not in card.text


# -------------------------------------------------------------------------------------------------- launcher and Hub


@pytest.fixture(scope="module")
def launched(train_script, licensed, images, tmp_path_factory):
    """The output folder and the repository of a run that users start by `accelerate launch` and that pushes, into a
    folder of theirs; its settings too."""
    folder = tmp_path_factory.mktemp("launched") / "out"
    folder.mkdir()
    (folder / "args.json").write_text("{}")  # an earlier run, in a folder with something of the user's own
    (folder / ".env").write_text("PASSWORD=1")
    settings = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_prompts": PROMPTS, "use_ema": True}
    pushed = {
        "report_to": "tensorboard",
        "logging_dir": "board",
        "overwrite_output_dir": True,
        "push_to_hub": True,
        "hub_model_id": "a_drawer",
        "hub_private_repo": True,
    }
    hub = FakeHub().start()
    said = folder.parent / "said"
    line = words(licensed, images, folder, **settings, **pushed)
    try:
        launcher = start_launcher(train_script, line, said, "accelerate", **hub.env)
        assert end_of(launcher, seconds=240) == 0, said.read_text()
    finally:
        hub.stop()
    return SimpleNamespace(folder=folder, hub=hub, settings=settings)


@pytest.mark.slow
def test_accelerate_launch_trains(launched, train_script, licensed, images, tmp_path):
    assert train(train_script, licensed, images, tmp_path, **launched.settings) == 0
    assert losses(launched.folder) == losses(tmp_path)
    assert same(unet(launched.folder), unet(tmp_path))


@pytest.mark.slow
def test_result_arrives_on_the_hub(launched, tmp_path):
    folder, hub = launched.folder, launched.hub
    assert list(hub.repos) == [f"{USER}/a_drawer"]
    repo = hub.repos[f"{USER}/a_drawer"]
    assert repo.private
    assert hub.tokens == {TOKEN}
    assert [commit.message for commit in repo.commits if commit.paths] == ["Train 2 steps"]

    # All of the pipeline, and neither checkpoints nor the tracker's files nor the settings with their local paths.
    apart = {"args.json", "history.jsonl", ".env", ".lock"}
    local = {path for path in snapshot(folder) if not path.startswith(("checkpoint-", "board/"))} - apart
    assert (folder / ".env").read_text() == "PASSWORD=1"
    assert {path for path in repo.files if path != ".gitattributes"} == local
    assert (folder / "board").is_dir()
    assert "model_index.json" in local
    assert {f"samples/step-{step:06d}.png" for step in (0, 2)} <= local
    for path in local:
        assert repo.files[path] == (folder / path).read_bytes(), path
    assert b"license: mit" in repo.files["README.md"]
    assert f'model = "{USER}/a_drawer"  #'.encode() in repo.files["README.md"]
    for path, data in repo.files.items():
        assert TOKEN.encode() not in data, path
        assert str(folder.parent).encode() not in data, path

    # Who downloads it can draw with it.
    for path, data in repo.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert np.array_equal(draw(tmp_path), draw(folder))


@pytest.fixture
def push(train_script, licensed, images, fake_hub, monkeypatch):
    """Trains two steps into a folder and uploads the result to the Hub; returns the exit status."""

    def run(folder):
        with reaching(fake_hub, monkeypatch):
            return train(train_script, licensed, images, folder, max_train_steps=2, push_to_hub=True)

    return run


def test_failed_upload_loses_nothing(push, fake_hub, tmp_path, capsys):
    """Public this time, and named like the folder."""
    fake_hub.fail["commit"] = 403
    folder = tmp_path / "my_drawer"
    assert push(folder) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert not fake_hub.repos[f"{USER}/my_drawer"].private
    assert not [commit for commit in fake_hub.repos[f"{USER}/my_drawer"].commits if commit.paths]
    assert f"hf upload {USER}/my_drawer {folder}" in message
    assert np.isfinite(draw(folder)).all()
    assert len(read_log(folder)) == 2


def refuse_token(fake_hub, monkeypatch):
    """A token that the Hub does not know."""
    fake_hub.fail["whoami"] = 401


def read_only_token(fake_hub, monkeypatch):
    """A token with which nothing can be uploaded."""
    told = {"name": USER, "auth": {"accessToken": {"role": "read"}}}
    monkeypatch.setattr(HfApi, "whoami", lambda self: told)


@pytest.mark.parametrize("refuse", [refuse_token, read_only_token])
def test_who_cannot_upload_hears_it_at_once(push, fake_hub, tmp_path, monkeypatch, capsys, refuse):
    """Not after hours of training."""
    refuse(fake_hub, monkeypatch)
    assert push(tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f"--push_to_hub: cannot upload to {'out'}; log in with `hf auth login`" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_leaves_no_repository(train_script, push, fake_hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_script, "diffusion_losses", lambda *_: 1 / 0)
        assert push(tmp_path / "out") == 1
    assert fake_hub.repos == {}


def test_a_repository_that_cannot_be_made_costs_no_result(push, fake_hub, tmp_path, capsys):
    fake_hub.fail["create"] = 403
    assert push(tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"hf upload {USER}/out {tmp_path / 'out'}" in message
    assert np.isfinite(draw(tmp_path / "out")).all()


@pytest.mark.slow
def test_wrong_flag_shows_through_accelerate_launch(train_script, licensed, images, tmp_path):
    """The launcher adds a traceback of its own, which is no longer than it has to be to find the message."""
    said = tmp_path / "said"
    line = words(licensed, images, tmp_path / "out", resolution=33)
    assert end_of(start_launcher(train_script, line, said, "accelerate")) == 1
    (line,) = [line for line in said.read_text().splitlines() if line.startswith("train_text_to_image.py: ")]
    assert line.endswith("--resolution=33: must be a multiple of 8 for this VAE; use 32")
    assert "in train\n" not in said.read_text()
    assert not (tmp_path / "out").exists()
