"""tools/push_model.py sends a result and nothing else, in one commit."""

import json
import shutil

import numpy as np
import pytest
from conftest import load_script
from diffusers import StableDiffusionPipeline
from fake_hub import USER
from huggingface_hub import ModelCard
from image_data import make_image, snapshot
from running import REPO, kill_when, run_script, start_script
from safetensors.numpy import save_file
from training import same

TOOL = REPO / "tools" / "push_model.py"
NAME = f"{USER}/drawer"
LORA = {"unet.mid_block.attentions.0.to_q.lora_A.weight": np.ones((4, 8), np.float32)}


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    return load_script(TOOL)


def run(tool, *args):
    """Runs the tool in this process, where the Hub is out of reach; returns its exit status."""
    try:
        tool.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code
    return 0


def push(hub, folder, *flags, name=NAME):
    return run_script([folder, name, *flags], env=hub.env, script=TOOL)


def clutter(folder):
    """Puts into a result what a run leaves beside it, and something of the user's own."""
    for name in ("checkpoint-2/state.pt", "logs/events", ".env", "unet/.hidden", "notes.txt", "samples/grid.psd"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("PASSWORD=1")
    (folder / "args.json").write_text(json.dumps({"pretrained_model_name_or_path": "somebody/a-base",
                                                  "train_data_dir": str(folder)}))
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (folder / "samples").mkdir(exist_ok=True)
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


@pytest.mark.slow
def test_pipeline_arrives_and_nothing_else(fake_hub, result, parts, tmp_path):
    before = snapshot(result)
    ran = push(fake_hub, result, "--private", "--commit_message=Two steps", "--hub_token=hf_other")
    assert ran.returncode == 0, ran.stderr
    repo = fake_hub.repos[NAME]
    assert (repo.type, repo.private, fake_hub.tokens) == ("model", True, {"hf_other"})
    assert set(repo.files) == parts | {"README.md", "log.jsonl", "samples/step-000002.png"}
    assert [commit.message for commit in repo.commits] == ["Two steps"]
    changed = {name for name in repo.files if name != "README.md" and repo.files[name] != (result / name).read_bytes()}
    assert changed == {"unet/config.json"}
    assert not [name for name, data in repo.files.items() if str(tmp_path).encode() in data or b"PASSWORD" in data]
    assert "Not sent: .env, args.json, checkpoint-2, logs, notes.txt" in ran.stdout
    card = ModelCard(repo.files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("diffusers", "somebody/a-base")
    assert f'StableDiffusionPipeline.from_pretrained("{NAME}")' in card.text
    assert snapshot(result) == before

    # Who downloads it has the same weights.
    for name, data in repo.files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    here, there = [StableDiffusionPipeline.from_pretrained(path) for path in (result, tmp_path / "copy")]
    for name in ("unet", "vae", "text_encoder"):
        assert same(getattr(here, name).state_dict(), getattr(there, name).state_dict())

    # The same again sends nothing; a card that was edited on the Hub stays until it shall not.
    assert push(fake_hub, result).returncode == 0
    assert len(repo.commits) == 1
    repo.files["README.md"] += b"\nEdited.\n"
    (result / "README.md").write_text("---\nlicense: mit\n---\n# My own\n")
    ran = push(fake_hub, result)
    assert "is kept; --overwrite_card" in ran.stdout
    assert repo.files["README.md"].endswith(b"\nEdited.\n")
    assert push(fake_hub, result, "--overwrite_card").returncode == 0
    assert repo.files["README.md"] == (result / "README.md").read_bytes()
    assert [commit.paths for commit in repo.commits[1:]] == [["README.md"]]


@pytest.mark.slow
def test_lora_arrives(fake_hub, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    clutter(folder)
    for name in ("pytorch_lora_weights", "for_webui"):
        save_file(LORA, folder / f"{name}.safetensors")
    save_file({"weight": np.ones(3)}, folder / "optimizer.safetensors")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own\n")
    ran = push(fake_hub, folder, name="lora")
    assert ran.returncode == 0, ran.stderr
    repo = fake_hub.repos[f"{USER}/lora"]
    assert repo.files == {name: (folder / name).read_bytes() for name in (
        "pytorch_lora_weights.safetensors", "for_webui.safetensors", "README.md", "log.jsonl",
        "samples/step-000002.png")}
    assert not repo.private


@pytest.mark.slow
@pytest.mark.parametrize("stage, answered", [("upload", 1), ("commit", 0)])
def test_killed_upload_goes_on(fake_hub, result, stage, answered):
    """Nobody gets half a model, and no weights are sent twice."""
    fake_hub.hang[stage] = answered
    process = start_script([result, NAME], env=fake_hub.env, script=TOOL)
    kill_when(process, lambda: fake_hub.waiting)
    assert fake_hub.repos[NAME].files == {}
    large = 4  # UNet, VAE, text encoder and a sample
    assert fake_hub.answered["upload"] == (1 if stage == "upload" else large)
    fake_hub.hang.clear()
    ran = push(fake_hub, result)
    assert ran.returncode == 0, ran.stderr
    assert fake_hub.answered["upload"] == large
    assert len(fake_hub.repos[NAME].commits) == 1
    assert "unet/diffusion_pytorch_model.safetensors" in fake_hub.repos[NAME].files


@pytest.mark.slow
def test_failures_say_how_to_go_on(fake_hub, result):
    before = snapshot(result)
    fake_hub.fail["create"] = 403
    ran = push(fake_hub, result)
    assert ran.returncode == 2
    assert f"REPO_ID={NAME}: cannot be made; log in with `hf auth login` or --hub_token" in ran.stderr
    fake_hub.fail = {"upload": 403}
    ran = push(fake_hub, result)
    assert ran.returncode == 1
    assert "The upload failed" in ran.stderr
    assert f"The result is whole in {result}" in ran.stderr
    assert "the same command goes on" in ran.stderr
    assert "Traceback" not in ran.stderr
    fake_hub.fail = {}
    ran = push(fake_hub, result, "--private")  # it was made public above
    assert ran.returncode == 2
    assert f"--private: {NAME} exists and is public" in ran.stderr
    assert not fake_hub.repos[NAME].files
    assert snapshot(result) == before


# ---- Without the Hub


def test_dry_run_lists_the_files(tool, result, parts, capsys):
    assert run(tool, result, NAME, "--dry_run") == 0
    sent, left = capsys.readouterr().out.splitlines()
    assert sent.startswith("Would send a pipeline: ")
    assert set(sent.removeprefix("Would send a pipeline: ").split(", ")) == parts | {"log.jsonl",
                                                                                   "samples/step-000002.png"}
    assert left == "Not sent: .env, args.json, checkpoint-2, logs, notes.txt"


def test_result_that_is_not_whole(tool, result, tmp_path, capsys):
    weights = result / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(tool, result, NAME) == 2
    assert f"{weights}: is no whole .safetensors file" in capsys.readouterr().err
    shutil.rmtree(result / "vae")
    assert run(tool, result, NAME) == 2
    assert f"{result}: has no vae, of which its model_index.json tells" in capsys.readouterr().err
    (result / "model_index.json").write_text("[]")
    assert run(tool, result, NAME) == 2
    assert "model_index.json: cannot be read" in capsys.readouterr().err
    save_file({"weight": np.ones(3)}, tmp_path / "other.safetensors")
    assert run(tool, tmp_path, NAME) == 2
    assert f"{tmp_path}: holds neither a pipeline with model_index.json nor LoRA weights" in capsys.readouterr().err


def test_card_of_a_lora_names_its_base(tool, tmp_path):
    assert 'from_pretrained("MODEL")' in tool.make_card(tmp_path, NAME, is_lora=True)
    for base in (str(tmp_path), "models/mine/local", None, 3):
        (tmp_path / "args.json").write_text(json.dumps({"pretrained_model_name_or_path": base}))
        card = ModelCard(tool.make_card(tmp_path, NAME, is_lora=True))
        assert card.data.base_model is None
    clutter(tmp_path)
    card = ModelCard(tool.make_card(tmp_path, NAME, is_lora=True))
    assert card.data.base_model == "somebody/a-base"
    assert card.data.tags == ["stable-diffusion", "stable-diffusion-diffusers", "lora"]
    assert f'from_pretrained("somebody/a-base")\npipe.load_lora_weights("{NAME}")' in card.text


def test_configuration_goes_without_a_local_path(tool, tmp_path):
    path = tmp_path / "config.json"
    for origin, kept in (("/home/ann/base", False), ("models/base/unet", False), ("somebody/a-base", True)):
        path.write_text(json.dumps({"a": 1, "_name_or_path": origin, **({} if kept else {"name_or_path": origin})}))
        sent = tool.content(path)
        assert (sent == path) == kept
        if not kept:
            assert json.loads(sent) == {"a": 1}


def test_wrong_words_are_listed_together(tool, tmp_path, capsys):
    assert run(tool, tmp_path / "nowhere", "a/b/c", "--commit_message= ") == 2
    message = capsys.readouterr().err
    for part in (f"FOLDER={tmp_path / 'nowhere'}", "REPO_ID=a/b/c", "--commit_message"):
        assert part in message


def test_without_a_connection(tool, result, capsys):
    assert run(tool, result, NAME) == 2
    assert "cannot be made; log in" in capsys.readouterr().err
