"""train_text_to_image_lora.py: what it changes and what it does not, exact resume, two processes, bad input."""

import argparse
import json
import re
import shutil

import pytest
import torch
from conftest import load_script
from diffusers import UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from image_data import snapshot, write_image_folder
from running import REPO, TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA, TRAIN_TEXT_TO_IMAGE_LORA, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import losses, read_log, same, train, words

# All that is random or has a state, dropout included. 11 images in steps of 4 make epochs of 3 steps.
EVERYTHING = {
    "max_train_steps": 8,
    "checkpointing_steps": 4,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "caption_dropout": 0.3,
    "random_flip": True,
    "lora_dropout": 0.2,
    "train_text_encoder": True,
    "text_encoder_lr": 1e-2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
}
WEIGHTS = "pytorch_lora_weights.safetensors"
MINIATURE = REPO / "miniature" / "pipeline"


@pytest.fixture(scope="module")
def lora_script():
    """examples/text_to_image/train_text_to_image_lora.py as a module."""
    return load_script(TRAIN_TEXT_TO_IMAGE_LORA)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images larger than the resolution and not square, so that crops are random; two captions each."""
    captions = [[f"a red circle {index}", f"a small picture {index}"] for index in range(11)]
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 11, (48, 40), captions)


@pytest.fixture(scope="module")
def straight(lora_script, tiny_pipeline, images, tmp_path_factory):
    """The output of eight steps without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert train(lora_script, tiny_pipeline, images, folder, **EVERYTHING) == 0
    return folder


def state(folder, step):
    """All that a checkpoint holds, and what was logged until then."""
    checkpoint = folder / f"checkpoint-{step}"
    progress = json.loads((checkpoint / "progress.json").read_text())
    return torch.load(checkpoint / "state.pt", weights_only=True), progress, read_log(folder)


def trained_models(script, monkeypatch):
    """A list that will hold the pipeline and the models with adapters of the runs that follow."""
    kept, load_models = [], script.load_models

    def load_and_keep(*args):
        kept.append(load_models(*args))
        return kept[-1]

    monkeypatch.setattr(script, "load_models", load_and_keep)
    return kept


# ------------------------------------------------------------------------------------------------------ what changes


@pytest.mark.parametrize("settings", [{}, {"train_text_encoder": True, "lora_target": "all"}], ids=["unet", "both"])
def test_only_adapters_change(lora_script, tiny_pipeline, images, tmp_path, monkeypatch, settings):
    kept, before = trained_models(lora_script, monkeypatch), snapshot(tiny_pipeline)
    assert train(lora_script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    pipeline, models, _ = kept[0]
    for name in ("unet", "text_encoder", "vae"):
        start = load_file(next((tiny_pipeline / name).glob("*.safetensors")))
        now = {
            key.replace(".base_layer", ""): value
            for key, value in getattr(pipeline, name).state_dict().items()
            if "lora_" not in key
        }
        assert now.keys() >= start.keys()
        assert all(torch.equal(now[key], value) for key, value in start.items())
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert {key.split(".")[0] for key in weights} == set(models)
    ups = [value for key, value in weights.items() if "lora_B" in key]
    assert all(value.abs().max() > 0 for value in ups)  # they begin at zero
    assert snapshot(tiny_pipeline) == before


def test_targets_are_the_layers_that_they_name(lora_script, tiny_pipeline, images, tmp_path):
    layers = {}
    for target in ("attention", "attention+ff", "all"):
        assert train(lora_script, tiny_pipeline, images, tmp_path / target, lora_target=target, max_train_steps=1) == 0
        keys = load_file(tmp_path / target / WEIGHTS)
        layers[target] = {re.search(r"(to_out\.0|net\.0\.proj|net\.2|\w+)\.lora_", key).group(1) for key in keys}
    assert layers["attention"] == {"to_q", "to_k", "to_v", "to_out.0"}
    assert layers["attention+ff"] == layers["attention"] | {"net.0.proj", "net.2"}
    more = {"proj_in", "proj_out", "conv1", "conv2", "time_emb_proj", "conv_shortcut"}
    assert layers["all"] == layers["attention+ff"] | more


def test_rank_4_on_attention_is_small(lora_script):
    """Under two percent of the weights of the miniature's UNet, counted without loading it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(MINIATURE, subfolder="unet"))
        whole = sum(parameter.numel() for parameter in unet.parameters())
        lora_script.add_adapters({"unet": unet}, **vars(lora_script.parse_args(["--rank=4"])))
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    assert trained == sum(value.numel() for value in lora_script.lora_weights({"unet": unet}).values())
    assert 0 < trained < 0.02 * whole


def test_rank_and_alpha_stand_in_the_header(lora_script, tiny_pipeline, images, tmp_path):
    assert train(lora_script, tiny_pipeline, images, tmp_path, rank=3, lora_alpha=6, max_train_steps=1) == 0
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(min(file.get_slice(key).get_shape()) == 3 for key in file.keys())  # noqa: SIM118
    assert (header["unet.r"], header["unet.lora_alpha"], header["unet.use_rslora"]) == (3, 6, False)
    assert str(tiny_pipeline) not in json.dumps(header)


def test_clipping_sees_the_adapters(lora_script, tiny_pipeline, images, tmp_path):
    """Adam forgives any scale of its gradients, but not an epsilon as large as they are."""
    results = {}
    for norm in (1e-3, float("inf")):
        settings = {"max_grad_norm": norm, "adam_epsilon": 1e-2}
        assert train(lora_script, tiny_pipeline, images, tmp_path / str(norm), **settings) == 0
        results[norm] = load_file(tmp_path / str(norm) / WEIGHTS)
    moved = {
        norm: sum(value.abs().sum() for key, value in found.items() if "lora_B" in key)
        for norm, found in results.items()
    }
    assert moved[1e-3] < 0.5 * moved[float("inf")]


@pytest.mark.parametrize("source", ["flag", "config"])
def test_adapters_stay_float32_in_half_precision(lora_script, tiny_pipeline, images, tmp_path, monkeypatch, source):
    """fp16 would fail to unscale half-precision gradients; on a CPU bf16 shows that the dtypes are right."""
    kept, settings = trained_models(lora_script, monkeypatch), {}
    if source == "flag":
        settings = {"mixed_precision": "bf16"}
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(lora_script, tiny_pipeline, images, tmp_path, train_text_encoder=True, **settings) == 0
    pipeline, models, _ = kept[0]
    for model in models.values():
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_fp16_on_a_cpu_is_refused_in_one_message(lora_script, tiny_pipeline, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert train(lora_script, tiny_pipeline, images, tmp_path / "out") == 2
    assert "--mixed_precision=fp16 (or accelerate's config)" in capsys.readouterr().err


def test_text_encoder_has_its_own_rate(lora_script, tiny_pipeline, images, straight):
    groups = state(straight, 8)[0]["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-3, 1e-2]


def test_result_is_the_average(straight):
    saved, _, _ = state(straight, 8)
    result = load_file(straight / WEIGHTS)
    average = {tuple(value.flatten().tolist()) for value in saved["ema"]["shadow_params"]}
    last = {tuple(value.flatten().tolist()) for value in saved["adapters"].values()}
    assert {tuple(value.flatten().tolist()) for value in result.values()} == average
    assert not average & last


# ---------------------------------------------------------------------------------------------------------- exactness


def test_same_command_gives_the_same_bits(lora_script, tiny_pipeline, images, straight, tmp_path):
    assert train(lora_script, tiny_pipeline, images, tmp_path, **EVERYTHING, dataloader_num_workers=2) == 0
    assert same(state(tmp_path, 8), state(straight, 8))
    assert same(load_file(tmp_path / WEIGHTS), load_file(straight / WEIGHTS))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "mixed_precision": "bf16"}], ids=["lora", "dora"])
def test_resumed_equals_straight(lora_script, tiny_pipeline, images, tmp_path, settings):
    settings = {**EVERYTHING, **settings}
    assert train(lora_script, tiny_pipeline, images, tmp_path / "straight", **settings) == 0
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    shutil.copy(tmp_path / "straight" / "args.json", tmp_path / "out")
    shutil.copy(tmp_path / "straight" / "log.jsonl", tmp_path / "out")
    settings["resume_from_checkpoint"] = "latest"
    assert train(lora_script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    assert same(state(tmp_path / "out", 8), state(tmp_path / "straight", 8))
    assert same(load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "straight" / WEIGHTS))


@pytest.mark.slow
def test_two_processes_equal_one(lora_script, tiny_pipeline, images, tmp_path):
    """Without dropout, which draws by process; a mean over two halves adds in another order."""
    settings = {**EVERYTHING, "lora_dropout": 0, "max_train_steps": 10, "checkpointing_steps": 5}
    assert train(lora_script, tiny_pipeline, images, tmp_path / "one", **{**settings, "train_batch_size": 4}) == 0
    line = words(tiny_pipeline, images, tmp_path / "two", **settings)
    result = run_script(line, script=TRAIN_TEXT_TO_IMAGE_LORA, nproc=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-4) for key in one)


def test_lora_file_goes_on(lora_script, tiny_pipeline, images, straight, tmp_path):
    """A step of size zero leaves what was loaded."""
    settings = {"train_text_encoder": True, "learning_rate": 1e-30, "max_train_steps": 1, "adam_weight_decay": 0}
    for path in (straight, straight / WEIGHTS):
        folder = tmp_path / path.name
        assert train(lora_script, tiny_pipeline, images, folder, init_lora_weights=path, **settings) == 0
        assert same(load_file(folder / WEIGHTS), load_file(straight / WEIGHTS))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "--rank=0: must be in [1, inf)"),
        ({"lora_alpha": 0}, "--lora_alpha=0.0: must be in (0, inf)"),
        ({"lora_dropout": 1}, "--lora_dropout=1.0: must be in [0, 1)"),
        ({"text_encoder_lr": 1e-4}, "--text_encoder_lr=0.0001: does nothing without --train_text_encoder"),
        ({"kohya_file_name": "x"}, "--kohya_file_name=x: does nothing without --output_kohya_format"),
        ({"kohya_file_name": "a/b", "output_kohya_format": True}, "--kohya_file_name=a/b: is a path"),
        ({"kohya_file_name": "pytorch_lora_weights", "output_kohya_format": True}, "the name of the other file"),
        ({"kohya_file_name": "pytorch_lora_weights.safetensors", "output_kohya_format": True}, "of the other file"),
        ({"init_lora_weights": "nowhere"}, "--init_lora_weights=nowhere: cannot be used with"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_flags_end_before_models_load(
    lora_script, tiny_pipeline, images, tmp_path, monkeypatch, capsys, settings, message
):
    monkeypatch.setattr(lora_script, "load_base", None)
    assert train(lora_script, tiny_pipeline, images, tmp_path / "out", **settings) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 12
    assert not (tmp_path / "out").exists()


def test_target_that_matches_no_layer(lora_script, tiny_pipeline, images, tmp_path, monkeypatch, capsys):
    """A UNet without attention has nothing for --lora_target=attention."""
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    config = json.loads((model / "unet" / "config.json").read_text())
    config["down_block_types"] = ["DownBlock2D"] * len(config["down_block_types"])
    config["up_block_types"] = ["UpBlock2D"] * len(config["up_block_types"])
    config["mid_block_type"] = None
    (model / "unet" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(lora_script, "load_base", None)
    assert train(lora_script, model, images, tmp_path / "out") == 2
    assert "--lora_target=attention: cannot be used with these flags and model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 8}, "r is 4 in its unet, not 8"),
        ({"lora_target": "all"}, "it is in kohya's layout, or of another base, --rank, --lora_target"),
        ({"lora_alpha": 8}, "lora_alpha is 4 in its unet, not 8.0"),
        ({"use_rslora": True}, "use_rslora is False in its unet, not True"),
        ({"train_text_encoder": False}, "it is in kohya's layout, or of another base, --rank, --lora_target"),
    ],
    ids=["rank", "target", "alpha", "rslora", "text encoder"],
)
def test_lora_file_of_other_settings(
    lora_script, tiny_pipeline, images, straight, tmp_path, monkeypatch, capsys, settings, message
):
    monkeypatch.setattr(lora_script, "load_base", None)
    settings = {"init_lora_weights": straight, "train_text_encoder": True, **settings}
    assert train(lora_script, tiny_pipeline, images, tmp_path / "out", **settings) == 2
    assert message in capsys.readouterr().err


def test_checkpoint_of_the_other_script(lora_script, train_script, tiny_pipeline, images, tmp_path, capsys):
    assert train(lora_script, tiny_pipeline, images, tmp_path / "lora", checkpointing_steps=2) == 0
    settings = {"resume_from_checkpoint": tmp_path / "lora" / "checkpoint-2"}
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", **settings) == 2
    assert "state: " in capsys.readouterr().err


def test_lora_file_of_another_base(
    lora_script, tiny_pipeline, tiny_pipeline_sd1, images, straight, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lora_script, "load_base", None)
    settings = {"init_lora_weights": straight, "train_text_encoder": True}
    assert train(lora_script, tiny_pipeline_sd1, images, tmp_path / "out", **settings) == 2
    error = capsys.readouterr().err
    assert f"--init_lora_weights={straight}: cannot be used with these flags and model" in error
    assert "(it is in kohya's layout, or of another base, --rank, --lora_target" in error


@pytest.mark.parametrize(
    "path", [TRAIN_TEXT_TO_IMAGE_LORA, TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA], ids=lambda path: path.stem
)
def test_gradient_checkpointing_changes_nothing(path, tiny_pipeline, images, tmp_path, recwarn):
    """In the UNet and in the text encoder."""
    script, settings = load_script(path), {"train_text_encoder": True, "learning_rate": 1e-2}
    if "dreambooth" in path.stem:
        settings |= {"train_data_dir": None, "instance_data_dir": images}
    assert train(script, tiny_pipeline, images, tmp_path / "plain", **settings) == 0
    assert train(script, tiny_pipeline, images, tmp_path / "again", **settings, gradient_checkpointing=True) == 0
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert len(set(losses(tmp_path / "plain"))) == 4
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_the_hub_gets_the_result_alone(lora_script, tiny_pipeline, images, tmp_path, monkeypatch):
    """Not other LoRA files in the folder, nor those in folders below, which the Hub's * would take."""
    out, sent = tmp_path / "out", {}
    monkeypatch.setattr(lora_script.HfApi, "create_repo", lambda self, *_, **__: argparse.Namespace(repo_id="me/x"))
    monkeypatch.setattr(lora_script.HfApi, "upload_folder", lambda self, **words: sent.update(words))
    (out / "private").mkdir(parents=True)
    (out / "args.json").write_text("{}")
    for name in ("mine.safetensors", "private/secret.safetensors"):
        save_file({}, out / name)
        (out / name).chmod(0o600)
    assert (
        train(
            lora_script,
            tiny_pipeline,
            images,
            out,
            push_to_hub=True,
            output_kohya_format=True,
            kohya_file_name="new[1]",
            overwrite_output_dir=True,
            validation_prompts=["a red circle"],
        )
        == 0
    )
    allowed = filter_repo_objects([*snapshot(out)], allow_patterns=sent["allow_patterns"])
    files = {name for name in allowed if not name.startswith("samples/")}
    assert files == {"README.md", "log.jsonl", "pytorch_lora_weights.safetensors", "new[1].safetensors"}
    modes = {name: (out / name).stat().st_mode & 0o777 for name in ("mine.safetensors", *files)}
    assert modes.pop("mine.safetensors") == 0o600
    assert set(modes.values()) == {modes["README.md"]}


def test_a_lora_file_without_layers_is_refused(lora_script, tiny_pipeline, images, tmp_path, capsys):
    save_file({}, tmp_path / "empty.safetensors")
    settings = {"init_lora_weights": tmp_path / "empty.safetensors"}
    assert train(lora_script, tiny_pipeline, images, tmp_path / "out", **settings) == 2
    assert "it is in kohya's layout, or of another base" in capsys.readouterr().err


def test_file_without_our_header_is_refused(lora_script, tiny_pipeline, images, tmp_path, capsys):
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "kohya.safetensors")
    settings = {"init_lora_weights": tmp_path / "kohya.safetensors"}
    assert train(lora_script, tiny_pipeline, images, tmp_path / "out", **settings) == 2
    assert "it is in kohya's layout, or of another base, --rank, --lora_target" in capsys.readouterr().err


def test_messy_folder_is_listed(lora_script, tiny_pipeline, messy_folder, tmp_path, monkeypatch, capsys):
    messy = messy_folder()
    before = snapshot(messy.path)
    monkeypatch.setattr(lora_script, "load_base", None)
    assert train(lora_script, tiny_pipeline, messy.path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert all(str(path) in error for path in messy.bad.values())
    monkeypatch.undo()
    settings = {"skip_bad_images": True, "max_train_steps": 1}
    assert train(lora_script, tiny_pipeline, messy.path, tmp_path / "out", **settings) == 0
    assert snapshot(messy.path) == before


# -------------------------------------------------------------------------------------------------------------- result


def test_card_and_kohya_file(lora_script, tiny_pipeline, images, tmp_path):
    folder = tmp_path / "my-lora"
    assert train(lora_script, tiny_pipeline, images, folder, output_kohya_format=True, max_train_steps=1) == 0
    card = (folder / "README.md").read_text()
    assert "load_lora_weights" in card
    assert "- lora" in card
    with safe_open(folder / "my-lora.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == "4"
    assert header["ss_output_name"] == "my-lora"
    assert "circle" not in json.dumps(header)
    assert str(tmp_path) not in json.dumps(header) + card
