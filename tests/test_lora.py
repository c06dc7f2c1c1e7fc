"""train_text_to_image_lora.py: what it changes and what it does not, exact resume, two processes, bad input."""

import json
import re
import shutil

import pytest
import torch
from conftest import load_script
from copies import run_copies
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from image_data import snapshot, write_image_folder
from running import REPO, TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA, TRAIN_TEXT_TO_IMAGE_LORA
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import checkpoint_state, losses, read_log, same, train, trains_into, words

from sdtune.lora import add_adapters, lora_weights

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
def fit(lora_script, tiny_pipeline, images):
    """Trains four steps into a folder, or as the settings say; returns the exit status."""
    return trains_into(lora_script, tiny_pipeline, images)


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    """The output of eight steps without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert fit(folder, **EVERYTHING) == 0
    return folder


@pytest.fixture
def trained_models(lora_script, monkeypatch):
    """A list that will hold the pipeline and the models with adapters of the runs that follow."""
    kept, load_models = [], lora_script.load_models_with_adapters

    def load_and_keep(*args):
        kept.append(load_models(*args))
        return kept[-1]

    monkeypatch.setattr(lora_script, "load_models_with_adapters", load_and_keep)
    return kept


@pytest.fixture
def without_models(lora_script, monkeypatch):
    """Runs that load a model fail, in a test of what has to end before."""
    monkeypatch.setattr(lora_script, "load_base", None)


def adapters(folder):
    """The adapters that a run has written, by name."""
    return load_file(folder / WEIGHTS)


def state(folder, step):
    """All that a checkpoint holds, and what was logged until then."""
    return checkpoint_state(folder / f"checkpoint-{step}"), read_log(folder)


# ------------------------------------------------------------------------------------------------------ what changes


@pytest.mark.parametrize(
    "settings",
    [{}, {"train_text_encoder": True, "lora_target": "all"}, {"use_dora": True, "lora_target": "all"}],
    ids=["unet", "both", "dora"],
)
def test_only_adapters_change(fit, trained_models, tiny_pipeline, tmp_path, settings):
    before = snapshot(tiny_pipeline)
    assert fit(tmp_path / "out", **settings) == 0
    ((pipeline, models, _),) = trained_models
    for name in ("unet", "text_encoder", "vae"):
        start = load_file(next((tiny_pipeline / name).glob("*.safetensors")))
        now = getattr(pipeline, name).state_dict()
        now = {key.replace(".base_layer", ""): value for key, value in now.items() if "lora_" not in key}
        assert now.keys() >= start.keys()
        assert all(torch.equal(now[key], value) for key, value in start.items())
    weights = adapters(tmp_path / "out")
    assert {key.split(".")[0] for key in weights} == set(models)
    ups = [value for key, value in weights.items() if "lora_B" in key]
    assert all(value.abs().max() > 0 for value in ups)  # they begin at zero
    assert snapshot(tiny_pipeline) == before


def test_targets_are_the_layers_that_they_name(fit, tmp_path):
    layers = {}
    for target in ("attention", "attention+ff", "all"):
        assert fit(tmp_path / target, lora_target=target, max_train_steps=1) == 0
        ends = [re.search(r"(to_out\.0|net\.0\.proj|net\.2|\w+)\.lora_", key) for key in adapters(tmp_path / target)]
        layers[target] = {end.group(1) for end in ends}
    assert layers["attention"] == {"to_q", "to_k", "to_v", "to_out.0"}
    assert layers["attention+ff"] == layers["attention"] | {"net.0.proj", "net.2"}
    more = {"proj_in", "proj_out", "conv1", "conv2", "time_emb_proj", "conv_shortcut"}
    assert layers["all"] == layers["attention+ff"] | more


def test_rank_4_on_attention_is_small(lora_script):
    """Under two percent of the weights of the miniature's UNet, counted without loading it."""
    args = lora_script.make_parser().parse_args(["--rank=4"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(MINIATURE, subfolder="unet"))
        whole = sum(parameter.numel() for parameter in unet.parameters())
        add_adapters(args, {"unet": unet})
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    assert trained == sum(value.numel() for value in lora_weights({"unet": unet}).values())
    assert 0 < trained < 0.02 * whole


def test_rank_and_alpha_stand_in_the_header(fit, tiny_pipeline, tmp_path):
    assert fit(tmp_path, rank=3, lora_alpha=6, max_train_steps=1) == 0
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert all(min(weight.shape) == 3 for weight in adapters(tmp_path).values())
    assert header["unet.r"] == 3
    assert header["unet.lora_alpha"] == 6
    assert header["unet.use_rslora"] is False
    assert str(tiny_pipeline) not in json.dumps(header)


def test_clipping_sees_the_adapters(fit, tmp_path):
    """Adam forgives any scale of its gradients, but not an epsilon as large as they are."""
    moved = {}
    for name, norm in (("clipped", 1e-3), ("free", float("inf"))):
        assert fit(tmp_path / name, max_grad_norm=norm, adam_epsilon=1e-2) == 0
        ups = [value for key, value in adapters(tmp_path / name).items() if "lora_B" in key]
        moved[name] = sum(value.abs().sum() for value in ups)
    assert moved["clipped"] < 0.5 * moved["free"]


@pytest.mark.parametrize("source", ["flag", "config"])
def test_adapters_stay_float32_in_half_precision(fit, trained_models, tmp_path, monkeypatch, source):
    """fp16 would fail to unscale half-precision gradients; on a CPU bf16 shows that the dtypes are right."""
    if source == "config":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    precision = "bf16" if source == "flag" else None
    assert fit(tmp_path, train_text_encoder=True, mixed_precision=precision, max_train_steps=2) == 0
    ((pipeline, models, _),) = trained_models
    for model in models.values():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}
        assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pipeline.vae.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in adapters(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize("target", ["attention", "all"])
@pytest.mark.parametrize("base", ["tiny_pipeline_sd1", "miniature"])
def test_dora_starts_as_the_identity_in_half_precision(lora_script, request, base, target):
    """To the bit: a magnitude that is off by 1e-4 already turns roundings, by up to 0.03 of a prediction."""
    folder = MINIATURE if base == "miniature" else request.getfixturevalue(base)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.bfloat16)
    unet, text_encoder = pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, (4, 20), generator=generator)
    latents, timesteps = torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([1, 300, 700, 990])

    @torch.no_grad()
    def predict():
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = text_encoder(tokens)[0]
            return embeddings, unet(latents, timesteps, embeddings).sample

    before = predict()
    args = lora_script.make_parser().parse_args(["--use_dora", f"--lora_target={target}", "--train_text_encoder"])
    models = {"unet": unet, "text_encoder": text_encoder}
    add_adapters(args, models)
    assert all(torch.equal(now, there) for now, there in zip(predict(), before, strict=True))
    weights = lora_weights(models)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    # The lengths of the rounded rows, but not rounded themselves.
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rows = unet.get_submodule(name).base_layer.weight.float().norm(dim=1)
    assert torch.equal(weights[f"unet.{name}.lora_magnitude_vector"], rows)
    assert not torch.equal(rows, rows.bfloat16().float())
    for value in weights.values():  # which are in use
        value.mul_(0.5)
    assert not torch.equal(predict()[1], before[1])


def test_fp16_on_a_cpu_is_refused_in_one_message(fit, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert fit(tmp_path / "out") == 2
    assert "--mixed_precision=fp16 (or accelerate's config)" in capsys.readouterr().err


def test_text_encoder_has_its_own_rate(straight):
    groups = checkpoint_state(straight / "checkpoint-8")["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-3, 1e-2]


def as_numbers(tensors):
    """Tensors as tuples, which sets can hold."""
    return {tuple(tensor.flatten().tolist()) for tensor in tensors}


def test_result_is_the_average(straight):
    saved = checkpoint_state(straight / "checkpoint-8")
    average = saved["pytorch_lora_weights_ema.safetensors"]
    assert same(adapters(straight), average)
    trained = as_numbers(saved["pytorch_lora_weights.safetensors"].values())
    assert not as_numbers(average.values()) & trained


# ---------------------------------------------------------------------------------------------------------- exactness


def test_same_command_gives_the_same_bits(fit, straight, tmp_path):
    assert fit(tmp_path, **EVERYTHING, dataloader_num_workers=2) == 0
    assert same(state(tmp_path, 8), state(straight, 8))
    assert same(adapters(tmp_path), adapters(straight))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "mixed_precision": "bf16"}], ids=["lora", "dora"])
def test_resumed_equals_straight(fit, straight, tmp_path, settings):
    if settings:
        straight = tmp_path / "straight"
        assert fit(straight, **EVERYTHING, **settings) == 0
    out = tmp_path / "out"
    shutil.copytree(straight / "checkpoint-4", out / "checkpoint-4")
    for name in ("args.json", "log.jsonl"):
        shutil.copy(straight / name, out)
    assert fit(out, **EVERYTHING, **settings, resume_from_checkpoint="latest") == 0
    assert same(state(out, 8), state(straight, 8))
    assert same(adapters(out), adapters(straight))


def test_two_processes_equal_one(lora_script, fit, tiny_pipeline, images, tmp_path):
    """Without dropout, which draws by process; a mean over two halves adds in another order."""
    one, two, said = tmp_path / "one", tmp_path / "two", tmp_path / "said"
    settings = {**EVERYTHING, "lora_dropout": 0, "max_train_steps": 10, "checkpointing_steps": 5}
    assert run_copies(lora_script, words(tiny_pipeline, images, two, **settings), said) == [0, 0], said.read_text()
    assert fit(one, **{**settings, "train_batch_size": 4}) == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    results = adapters(one), adapters(two)
    assert all(torch.allclose(results[0][key], results[1][key], rtol=0, atol=1e-4) for key in results[0])


def test_lora_file_goes_on(fit, straight, tmp_path):
    """A step of size zero leaves what was loaded, also from names without the text encoder's level text_model, as
    transformers 5 has them."""
    settings = {"train_text_encoder": True, "learning_rate": 1e-30, "max_train_steps": 1, "adam_weight_decay": 0}
    renamed = {key.replace(".text_model.", "."): value for key, value in adapters(straight).items()}
    assert renamed.keys() != adapters(straight).keys()
    with safe_open(straight / WEIGHTS, "pt") as file:
        save_file(renamed, tmp_path / "renamed.safetensors", file.metadata())
    for path in (straight, straight / WEIGHTS, tmp_path / "renamed.safetensors"):
        folder = tmp_path / f"from_{path.name}"
        assert fit(folder, init_lora_weights=path, **settings) == 0
        assert same(adapters(folder), adapters(straight))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "--rank: must be a whole number in [1, inf), not '0'"),
        ({"lora_alpha": 0}, "--lora_alpha: must be in (0, inf), not '0'"),
        ({"lora_dropout": 1}, "--lora_dropout: must be in [0, 1), not '1'"),
        ({"text_encoder_lr": 1e-4}, "--text_encoder_lr=0.0001: does nothing without --train_text_encoder"),
        ({"kohya_file_name": "x"}, "--kohya_file_name=x: does nothing without --output_kohya_format"),
        ({"kohya_file_name": "a/b", "output_kohya_format": True}, "--kohya_file_name=a/b: is a path"),
        ({"kohya_file_name": "pytorch_lora_weights", "output_kohya_format": True}, "the name of the other file"),
        ({"kohya_file_name": "pytorch_lora_weights.safetensors", "output_kohya_format": True}, "of the other file"),
        ({"init_lora_weights": "nowhere"}, "--init_lora_weights=nowhere: there is no such file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_flags_end_before_models_load(fit, without_models, tmp_path, capsys, settings, message):
    assert fit(tmp_path / "out", **settings) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 12
    assert not (tmp_path / "out").exists()


def test_target_that_matches_no_layer(fit, without_models, tiny_pipeline, tmp_path, capsys):
    """A UNet without attention has nothing for --lora_target=attention."""
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    config["down_block_types"] = ["DownBlock2D"] * len(config["down_block_types"])
    config["up_block_types"] = ["UpBlock2D"] * len(config["up_block_types"])
    config["mid_block_type"] = None
    (model / "unet" / "config.json").write_text(json.dumps(config))
    assert fit(tmp_path / "out", base=model) == 2
    assert "--lora_target=attention: cannot be used with these flags and model" in capsys.readouterr().err


OTHER_LAYERS = "it is in kohya's layout, or of another base, --rank, --lora_target"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 8}, "r is 4 in its unet, not 8"),
        ({"lora_target": "all"}, OTHER_LAYERS),
        ({"lora_alpha": 8}, "lora_alpha is 4 in its unet, not 8.0"),
        ({"use_rslora": True}, "use_rslora is False in its unet, not True"),
        ({"train_text_encoder": False}, OTHER_LAYERS),
    ],
    ids=["rank", "target", "alpha", "rslora", "text encoder"],
)
def test_lora_file_of_other_settings(fit, without_models, straight, tmp_path, capsys, settings, message):
    settings = {"init_lora_weights": straight, "train_text_encoder": True, **settings}
    assert fit(tmp_path / "out", **settings) == 2
    assert message in capsys.readouterr().err


def test_lora_file_of_another_base(fit, without_models, tiny_pipeline_sd1, straight, tmp_path, capsys):
    settings = {"init_lora_weights": straight, "train_text_encoder": True}
    assert fit(tmp_path / "out", base=tiny_pipeline_sd1, **settings) == 2
    error = capsys.readouterr().err
    assert f"--init_lora_weights={straight}: cannot be used with these flags and model" in error
    assert f"({OTHER_LAYERS}" in error


@pytest.mark.parametrize(
    "weights",
    [{}, {"lora_unet_mid.lora_down.weight": torch.zeros(4, 8)}],
    ids=["without layers", "without our header"],
)
def test_lora_file_from_elsewhere(fit, without_models, tmp_path, capsys, weights):
    save_file(weights, tmp_path / "other.safetensors")
    assert fit(tmp_path / "out", init_lora_weights=tmp_path / "other.safetensors") == 2
    assert OTHER_LAYERS in capsys.readouterr().err


def test_checkpoint_of_the_other_script(train_script, tiny_pipeline, images, straight, tmp_path, capsys):
    settings = {"resume_from_checkpoint": straight / "checkpoint-8", "max_train_steps": 8}
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", **settings) == 2
    assert (
        "holds LoRA adapters, which this script does not train; use the script that wrote it"
        in capsys.readouterr().err
    )


def test_messy_folder_is_listed(lora_script, fit, messy_folder, tmp_path, monkeypatch, capsys):
    messy = messy_folder()
    before = snapshot(messy.path)
    with monkeypatch.context() as patch:
        patch.setattr(lora_script, "load_base", None)
        assert fit(tmp_path / "out", data=messy.path) == 2
    error = capsys.readouterr().err
    assert all(str(path) in error for path in messy.bad.values())
    assert fit(tmp_path / "out", data=messy.path, skip_bad_images=True, max_train_steps=1) == 0
    assert snapshot(messy.path) == before


# -------------------------------------------------------------------------------------------------------------- result


@pytest.mark.parametrize(
    "path", [TRAIN_TEXT_TO_IMAGE_LORA, TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA], ids=lambda path: path.stem
)
def test_gradient_checkpointing_changes_nothing(path, tiny_pipeline, images, tmp_path, recwarn):
    """In the UNet and in the text encoder."""
    settings = {"train_text_encoder": True, "learning_rate": 1e-2, "max_train_steps": 3}
    if "dreambooth" in path.stem:
        settings |= {"train_data_dir": None, "instance_data_dir": images}
    script, plain, again = load_script(path), tmp_path / "plain", tmp_path / "again"
    assert train(script, tiny_pipeline, images, plain, **settings) == 0
    assert train(script, tiny_pipeline, images, again, **settings, gradient_checkpointing=True) == 0
    assert losses(again) == pytest.approx(losses(plain), rel=1e-5)
    assert len(set(losses(plain))) == 3
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_the_hub_gets_the_result_alone(lora_script, fit, tmp_path, monkeypatch):
    """Not other LoRA files in the folder, nor those in folders below, which the Hub's * would take."""
    out, sent = tmp_path / "out", {}
    monkeypatch.setattr(lora_script.HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(lora_script.HfApi, "create_repo", lambda self, *_, **__: None)
    monkeypatch.setattr(lora_script.HfApi, "upload_folder", lambda self, **words: sent.update(words))
    (out / "private").mkdir(parents=True)
    (out / "args.json").write_text("{}")
    for name in ("mine.safetensors", "private/secret.safetensors"):
        save_file({}, out / name)
        (out / name).chmod(0o600)
    settings = {
        "max_train_steps": 1,
        "push_to_hub": True,
        "output_kohya_format": True,
        "kohya_file_name": "new[1]",
        "overwrite_output_dir": True,
        "validation_prompts": ["a red circle"],
    }
    assert fit(out, **settings) == 0
    allowed = filter_repo_objects([*snapshot(out)], allow_patterns=sent["allow_patterns"])
    files = {name for name in allowed if not name.startswith("samples/")}
    assert files == {"README.md", "log.jsonl", "pytorch_lora_weights.safetensors", "new[1].safetensors"}
    modes = {name: (out / name).stat().st_mode & 0o777 for name in files}
    assert set(modes.values()) == {modes["README.md"]}
    assert r" *new\[1\].safetensors* holds the same adapters" in (out / "README.md").read_text()
    assert (out / "mine.safetensors").stat().st_mode & 0o777 == 0o600


def test_card_and_kohya_file(fit, tmp_path):
    folder = tmp_path / "my-lora"
    assert fit(folder, output_kohya_format=True, max_train_steps=1) == 0
    card = (folder / "README.md").read_text()
    assert 'pipe.load_lora_weights(model, weight_name="pytorch_lora_weights.safetensors")' in card
    beside = "\nBeside `pytorch_lora_weights.safetensors` *{}* holds the same adapters for A1111, Forge and ComfyUI.\n"
    assert beside.format("my-lora.safetensors") in card
    assert "- lora" in card
    with safe_open(folder / "my-lora.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == "4"
    assert header["ss_output_name"] == "my-lora"
    assert "circle" not in json.dumps(header)
    assert str(tmp_path) not in json.dumps(header) + card
