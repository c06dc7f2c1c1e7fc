"""What comes out: a folder that loads and draws, whatever file it began from, with a card, on the Hub if asked."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from fake_hub import TOKEN, USER
from huggingface_hub import ModelCard
from image_data import snapshot, write_image_folder
from original_layout import save_original
from PIL import Image
from running import run_script
from training import losses, read_log, same, train, unet, words

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
    settings = {"config": config, "validation_prompts": PROMPTS, "hub_token": "hf_a_secret", "use_ema": True}
    settings |= {"cache_dir": folder.parent / "cache", "checkpointing_steps": 2}
    assert train(train_script, licensed, images, folder, **settings) == 0
    return folder


def draw(folder, prompt="a red circle"):
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
    index = json.loads((result / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert index[part] == json.loads((licensed / "model_index.json").read_text())[part]
    for part in ("unet", "vae", "text_encoder"):
        pair = [json.loads((folder / part / "config.json").read_text()) for folder in (result, licensed)]
        assert {k: v for k, v in pair[0].items() if k[0] != "_"} == {k: v for k, v in pair[1].items() if k[0] != "_"}


# ----------------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("fixture, side", [("tiny_pipeline", 32), ("tiny_pipeline_sd1", 64)])
def test_single_file_starts_where_its_folder_does(train_script, request, images, tmp_path, suffix, fixture, side):
    """Weights to the bit. Losses to rounding: weights lie where the file has them, and a sum's order depends on it."""
    folder = request.getfixturevalue(fixture)
    file = save_original(StableDiffusionPipeline.from_pretrained(folder), tmp_path / f"model.{suffix}")
    line = words(file, images, tmp_path, single_file_config=folder)
    loaded = train_script.load_models(train_script.parse_args(line), torch.float32, "cpu")[0]
    expected = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        assert same(dict(getattr(loaded, part).state_dict()), dict(getattr(expected, part).state_dict())), part

    settings = {"max_train_steps": 2, "resolution": side}
    assert train(train_script, folder, images, tmp_path / "folder", **settings) == 0
    assert train(train_script, file, images, tmp_path / "file", **settings, single_file_config=folder) == 0
    assert losses(tmp_path / "file") == pytest.approx(losses(tmp_path / "folder"), rel=1e-5)
    assert np.abs(draw(tmp_path / "file") - draw(tmp_path / "folder")).max() < 0.02


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
    for flag, value in (
        ("learning_rate", 0.001),
        ("train_batch_size", 2),
        ("noise_offset", 0.05),
        ("use_ema", True),
        ("resolution", 32),
        ("max_train_steps", 4),
        ("seed", 0),
    ):
        assert f"| {flag} | {value} |" in text
    assert all(prompt in text for prompt in PROMPTS)
    (picture,) = [line[line.index("(") + 1 : -1] for line in text.splitlines() if line.startswith("![")]
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
    for path in [path for path in result.rglob("*.json") if path.name not in ("args.json", "progress.json")]:
        assert str(licensed) not in path.read_text(), path


def test_card_names_numbers_that_are_names_of_files_too(train_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("512", "secret.txt", "out"):
        Path(name).mkdir()
    settings = {"resolution": 512, "validation_prompts": ["a cat"], "hub_model_id": "secret.txt"}
    train_script.write_card("out", "nobody/base", None, settings, 3, "...", [])
    card = Path("out", "README.md").read_text()
    assert "| resolution | 512 |" in card
    assert "secret" not in card


def test_card_of_a_base_without_one(train_script, tiny_pipeline, images, tmp_path):
    assert train(train_script, tiny_pipeline, images, tmp_path, max_train_steps=1) == 0
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "other"
    assert "![" not in card.text


# --------------------------------------------------------------------------------------------------------------- Hub


@pytest.fixture(scope="module")
def pushed_words(licensed, images):
    """The command of a run that pushes, for an output folder."""

    def make(folder, **settings):
        settings = {"validation_prompts": PROMPTS, "checkpointing_steps": 1, "report_to": "tensorboard", **settings}
        return words(licensed, images, folder, max_train_steps=2, push_to_hub=True, **settings)

    return make


def test_many_prompts_fit_into_the_card(train_script, tiny_pipeline, images, tmp_path):
    """Together they are longer than the name of a file may be, which a look for paths stumbled over."""
    prompts = [f"a drawing of a {colour} creature with eyes of another colour, number {'seven ' * 9}"
               for colour in ("red", "green", "blue", "yellow")]
    args = train_script.parse_args(words(tiny_pipeline, images, tmp_path / "out", validation_prompts=prompts))
    pipeline, _, _, noise_scheduler = train_script.load_models(args, torch.float32, "cpu")
    train_script.save_model(args, pipeline, noise_scheduler.config, 1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "; ".join(prompts) in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_result_arrives_on_the_hub(pushed_words, fake_hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "args.json").write_text("{}")  # an earlier run, in a folder with something of the user's own
    (folder / ".env").write_text("PASSWORD=1")
    settings = {"hub_model_id": "a_drawer", "hub_private_repo": True, "logging_dir": "board"}
    settings |= {"overwrite_output_dir": True}
    ran = run_script(pushed_words(folder, **settings), env=fake_hub.env)
    assert ran.returncode == 0, ran.stderr
    assert list(fake_hub.repos) == [f"{USER}/a_drawer"]
    repo = fake_hub.repos[f"{USER}/a_drawer"]
    assert repo.private
    assert fake_hub.tokens == {TOKEN}
    assert [commit.message for commit in repo.commits if commit.paths] == ["Train 2 steps"]

    # All of the pipeline, and neither checkpoints nor the tracker's files nor the settings with their local paths.
    apart = {"args.json", ".env"}
    local = {path for path in snapshot(folder) if not path.startswith(("checkpoint-", "board/"))} - apart
    assert (folder / ".env").read_text() == "PASSWORD=1"
    assert {path for path in repo.files if path != ".gitattributes"} == local
    assert (folder / "board").is_dir()
    assert "model_index.json" in local
    assert {f"samples/step-{step:06d}.png" for step in (0, 2)} <= local
    for path in local:
        assert repo.files[path] == (folder / path).read_bytes(), path
    assert b"license: mit" in repo.files["README.md"]
    secrets = (TOKEN.encode(), str(tmp_path).encode())
    assert not [path for path, data in repo.files.items() if any(secret in data for secret in secrets)]

    # Who downloads it can draw with it.
    downloaded = tmp_path / "downloaded"
    for path, data in repo.files.items():
        (downloaded / path).parent.mkdir(parents=True, exist_ok=True)
        (downloaded / path).write_bytes(data)
    assert np.array_equal(draw(downloaded), draw(folder))


@pytest.mark.slow
def test_failed_upload_loses_nothing(pushed_words, fake_hub, tmp_path):
    """Public this time, and named like the folder."""
    fake_hub.fail["commit"] = 403
    folder = tmp_path / "my_drawer"
    ran = run_script(pushed_words(folder), env=fake_hub.env)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert not fake_hub.repos[f"{USER}/my_drawer"].private
    assert not [commit for commit in fake_hub.repos[f"{USER}/my_drawer"].commits if commit.paths]
    assert f"hf upload {USER}/my_drawer {folder}" in ran.stderr
    assert np.isfinite(draw(folder)).all()
    assert len(read_log(folder)) == 2


@pytest.mark.slow
def test_repository_that_cannot_be_made_ends_the_run_at_once(pushed_words, fake_hub, tmp_path):
    """Not after hours of training."""
    fake_hub.fail["create"] = 403
    ran = run_script(pushed_words(tmp_path / "out"), env=fake_hub.env)
    assert ran.returncode == 2
    assert "hf auth login" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- launcher


@pytest.mark.slow
def test_accelerate_launch_trains(train_script, licensed, images, tmp_path):
    ran = run_script(words(licensed, images, tmp_path / "out", use_ema=True), launcher="accelerate")
    assert ran.returncode == 0, ran.stderr
    assert train(train_script, licensed, images, tmp_path / "here", use_ema=True) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "here")
    assert same(unet(tmp_path / "out"), unet(tmp_path / "here"))


@pytest.mark.slow
def test_wrong_flag_shows_through_accelerate_launch(licensed, images, tmp_path):
    """The launcher adds a traceback of its own, which is no longer than it has to be to find the message."""
    ran = run_script(words(licensed, images, tmp_path / "out", resolution=33), launcher="accelerate")
    assert ran.returncode == 1
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("train_text_to_image.py: ")]
    assert line.endswith("--resolution=33: must be a multiple of 8 for this VAE; use 32")
    assert "in train\n" not in ran.stderr
    assert not (tmp_path / "out").exists()
