"""`sdtune push-model` sends a result and nothing else, in one commit."""

import functools
import json
import shutil

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from fake_hub import USER
from huggingface_hub import ModelCard
from image_data import make_image, snapshot
from reach_hub import push_to, reaching
from running import kill_copy_when, status_of
from safetensors.numpy import save_file
from training import same

from sdtune.commands import push_model as command

NAME = f"{USER}/drawer"
LORA = {"unet.mid_block.attentions.0.to_q.lora_A.weight": np.ones((4, 8), np.float32)}


def run(*words):
    """Runs the command in this process, where the Hub is out of reach; returns its exit status."""
    return status_of(command.main, *words)


@pytest.fixture
def push(fake_hub, monkeypatch):
    """Factory: push(folder, *flags, name=NAME) runs the command against the stand-in; returns its exit status."""
    return functools.partial(push_to, fake_hub, monkeypatch, command.main, NAME)


def clutter(folder):
    """Puts into a result what a run leaves beside it, and something of the user's own."""
    for name in ("checkpoint-2/optimizer.bin", "logs/events", ".env", "unet/.hidden", "notes.txt", "samples/grid.psd"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("PASSWORD=1")
    settings = {"pretrained_model_name_or_path": "somebody/a-base", "train_data_dir": str(folder)}
    (folder / "args.json").write_text(json.dumps(settings))
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    make_image(0).save(folder / "samples" / "step-000002.png")


@pytest.fixture
def result(tiny_pipeline, tmp_path):
    """A pipeline folder as a training leaves it, whose UNet was loaded from a path of this machine."""
    folder = shutil.copytree(tiny_pipeline, tmp_path / "out")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_name_or_path": str(folder)}))
    clutter(folder)
    return folder


@pytest.fixture
def parts(tiny_pipeline):
    """The names of the files of the pipeline."""
    return {path.relative_to(tiny_pipeline).as_posix() for path in tiny_pipeline.rglob("*") if path.is_file()}


def test_pipeline_arrives_and_nothing_else(fake_hub, push, result, parts, tmp_path, capsys):
    before = snapshot(result)
    assert push(result, "--private", "--commit_message=Two steps", "--hub_token=hf_other") == 0
    repo = fake_hub.repos[NAME]
    assert (repo.type, repo.private, fake_hub.tokens) == ("model", True, {"hf_other"})
    assert set(repo.files) == parts | {"README.md", "log.jsonl", "samples/step-000002.png"}
    assert [commit.message for commit in repo.commits] == ["Two steps"]
    changed = {name for name in repo.files if name != "README.md" and repo.files[name] != (result / name).read_bytes()}
    assert changed == {"unet/config.json"}
    for data in repo.files.values():
        assert str(tmp_path).encode() not in data
        assert b"PASSWORD" not in data
    assert "Not sent: .env, args.json, checkpoint-2, logs, notes.txt" in capsys.readouterr().out
    card = ModelCard(repo.files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("diffusers", "somebody/a-base")
    assert f'model = "{NAME}"  # ' in card.text
    assert "pipe = StableDiffusionPipeline.from_pretrained(model)\n" in card.text
    assert snapshot(result) == before

    # Who downloads it has the same weights.
    for name, data in repo.files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    here = StableDiffusionPipeline.from_pretrained(result)
    there = StableDiffusionPipeline.from_pretrained(tmp_path / "copy")
    for name in ("unet", "vae", "text_encoder"):
        assert same(getattr(here, name).state_dict(), getattr(there, name).state_dict())

    # The same again sends nothing; a card that was edited on the Hub stays until it shall not.
    assert push(result) == 0
    assert len(repo.commits) == 1
    repo.files["README.md"] += b"\nEdited.\n"
    (result / "README.md").write_text("---\nlicense: mit\n---\n# My own\n")
    capsys.readouterr()
    assert push(result) == 0
    assert "is kept; --overwrite_card" in capsys.readouterr().out
    assert repo.files["README.md"].endswith(b"\nEdited.\n")
    assert push(result, "--overwrite_card") == 0
    assert repo.files["README.md"] == (result / "README.md").read_bytes()
    assert [commit.paths for commit in repo.commits[1:]] == [["README.md"]]
    assert repo.commits[1].message == "Add the trained weights"


def test_lora_arrives(fake_hub, push, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    clutter(folder)
    for name in ("pytorch_lora_weights", "for_webui"):
        save_file(LORA, folder / f"{name}.safetensors")
    save_file({"weight": np.ones(3)}, folder / "optimizer.safetensors")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own\n")
    assert push(folder, name="lora") == 0
    repo = fake_hub.repos[f"{USER}/lora"]
    weights = ["pytorch_lora_weights.safetensors", "for_webui.safetensors"]
    sent = [*weights, "README.md", "log.jsonl", "samples/step-000002.png"]
    assert repo.files == {name: (folder / name).read_bytes() for name in sent}
    assert not repo.private


@pytest.mark.parametrize("stage, answered", [("upload", 1), ("commit", 0)])
def test_killed_upload_goes_on(fake_hub, push, result, stage, answered, monkeypatch):
    """Nobody gets half a model, and no weights are sent twice."""
    fake_hub.hang[stage] = answered
    with reaching(fake_hub, monkeypatch):
        kill_copy_when(lambda: fake_hub.waiting, command.main, result, NAME)
    assert fake_hub.repos[NAME].files == {}
    large = 4  # UNet, VAE, text encoder and a sample
    assert fake_hub.answered["upload"] == (1 if stage == "upload" else large)
    fake_hub.hang.clear()
    assert push(result) == 0
    assert fake_hub.answered["upload"] == large
    assert len(fake_hub.repos[NAME].commits) == 1
    assert "unet/diffusion_pytorch_model.safetensors" in fake_hub.repos[NAME].files


def test_failures_say_how_to_go_on(fake_hub, push, result, capsys):
    before = snapshot(result)
    fake_hub.fail["create"] = 403
    assert push(result) == 2
    wanted = f"REPO_ID={NAME}: cannot be made; log in with `hf auth login` or --hub_token"
    assert wanted in capsys.readouterr().err
    fake_hub.fail = {"upload": 403}
    assert push(result) == 1
    message = capsys.readouterr().err
    assert "The upload failed" in message
    assert f"The result is whole in {result}" in message
    assert "the same command goes on" in message
    assert "Traceback" not in message
    fake_hub.fail = {}
    assert push(result, "--private") == 2  # it was made public above
    assert f"--private: {NAME} exists and is public" in capsys.readouterr().err
    assert not fake_hub.repos[NAME].files
    assert snapshot(result) == before


# ---- Without the Hub


def test_dry_run_lists_the_files(result, parts, capsys):
    assert run(result, NAME, "--dry_run") == 0
    sent, left = capsys.readouterr().out.splitlines()
    assert sent.startswith("Would send a pipeline: ")
    names = set(sent.removeprefix("Would send a pipeline: ").split(", "))
    assert names == parts | {"log.jsonl", "samples/step-000002.png"}
    assert left == "Not sent: .env, args.json, checkpoint-2, logs, notes.txt"


def test_result_that_is_not_whole(result, tmp_path, capsys):
    weights, index = result / "unet" / "diffusion_pytorch_model.safetensors", result / "model_index.json"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(result, NAME) == 2
    assert f"{weights}: is no whole .safetensors file" in capsys.readouterr().err
    shutil.rmtree(result / "vae")
    assert run(result, NAME) == 2
    assert f"{result}: has no vae, of which its model_index.json tells" in capsys.readouterr().err
    for text in ("[]", "[1]", "{}", "no JSON"):
        index.write_text(text)
        assert run(result, NAME) == 2
        assert "model_index.json: cannot be read" in capsys.readouterr().err
    save_file({"weight": np.ones(3)}, tmp_path / "other.safetensors")
    assert run(tmp_path, NAME) == 2
    assert f"{tmp_path}: holds neither a pipeline with model_index.json nor LoRA weights" in capsys.readouterr().err


def test_card_of_a_lora_names_its_base(tmp_path):
    names = ["for_webui.safetensors", "pytorch_lora_weights.safetensors"]
    assert 'base = "BASE"  # ' in command.make_card(tmp_path, NAME, names, is_lora=True)
    for base in (str(tmp_path), "models/mine/local", None, 3):
        (tmp_path / "args.json").write_text(json.dumps({"pretrained_model_name_or_path": base}))
        card = ModelCard(command.make_card(tmp_path, NAME, names, is_lora=True))
        assert card.data.base_model is None
    clutter(tmp_path)
    card = ModelCard(command.make_card(tmp_path, NAME, names, is_lora=True))
    assert card.data.base_model == "somebody/a-base"
    assert card.data.tags == ["text-to-image", "stable-diffusion", "stable-diffusion-diffusers", "lora"]
    assert 'base = "somebody/a-base"\n' in card.text
    assert 'pipe.load_lora_weights(model, weight_name="pytorch_lora_weights.safetensors")\n' in card.text
    card = command.make_card(tmp_path, NAME, names[:1], is_lora=True)
    assert 'weight_name="for_webui.safetensors")\n' in card


def test_a_card_of_a_script_names_the_model_as_the_hub_does(fake_hub, push, result):
    """In the line of its code, and nowhere else; the card here stays."""
    line = 'model = "out"  # its name on the Hub, or the path of its folder'
    (result / "README.md").write_text(f"# out\n\n```python\n{line}\nmodel = 1\n```\nmodel = 2, its name\n")
    before = snapshot(result)
    assert push(result) == 0
    named = line.replace('"out"', f'"{NAME}"')
    sent = fake_hub.repos[NAME].files["README.md"].decode()
    assert sent == f"# out\n\n```python\n{named}\nmodel = 1\n```\nmodel = 2, its name\n"
    assert snapshot(result) == before


@pytest.mark.parametrize("origin", ["/home/ann/base", "models/base/unet"])
def test_configuration_goes_without_a_local_path(tmp_path, origin):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": 1, "_name_or_path": origin, "name_or_path": origin}))
    assert json.loads(command.content(path, NAME)) == {"a": 1}


def test_configuration_keeps_a_name_on_the_hub(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": 1, "_name_or_path": "somebody/a-base"}))
    assert command.content(path, NAME) == path


def test_wrong_words_are_listed_together(tmp_path, capsys):
    assert run(tmp_path / "nowhere", "a/b/c", "--commit_message= ") == 2
    message = capsys.readouterr().err
    for part in (f"FOLDER={tmp_path / 'nowhere'}", "REPO_ID=a/b/c", "--commit_message"):
        assert part in message


def test_without_a_connection(result, capsys):
    assert run(result, NAME) == 2
    assert "cannot be made; log in" in capsys.readouterr().err
