"""`sdtune convert`: the published layout to the key, there and back to the bit, and every refusal."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from original_layout import original_state_dict, save_original
from published_layout import COMPONENTS, DIGESTS, NOT_IN_A_FOLDER, SCHEDULE, digest, published
from running import run_command
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_pipeline
from training import same
from transformers import CLIPTextConfig, CLIPTextModel

from sdtune.commands import convert
from sdtune.single_file import make_header, schedule, to_original, version_of

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
WEIGHTS = (UNET, VAE, TEXT)
OPEN_CLIP = "cond_stage_model.model."
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
OUT_BIAS = "model.diffusion_model.out.2.bias"  # of 4 channels

# Settings of the published pipeline folders (config.json of each part) where they differ from the classes' defaults.
PUBLISHED_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PUBLISHED_UNET = {
    1: {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    2: {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}
PUBLISHED_TEXT_ENCODER = {
    1: {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    2: {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}


@pytest.fixture(scope="module")
def tiny_sd2(tmp_path_factory):
    """Folder of a small pipeline with what sets Stable Diffusion 2.1 apart: OpenCLIP's text encoder, linear maps
    around attention, v-prediction. Read only."""
    pipeline = make_pipeline(
        prediction_type="v_prediction", num_blocks=4, layers_per_block=2, use_linear_projection=True
    )
    settings = {**pipeline.text_encoder.config.to_dict(), "num_hidden_layers": 2, "hidden_act": "gelu"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text_encoder = CLIPTextModel(CLIPTextConfig(**settings)).eval()
        for parameter in text_encoder.parameters():  # biases start as zeros, which prove nothing
            parameter.data += torch.randn_like(parameter) / 8
    pipeline.register_modules(text_encoder=text_encoder)
    folder = tmp_path_factory.mktemp("tiny_sd2")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny_pipeline", "tiny_pipeline_sd1", "tiny_sd2"])
def folder(request):
    """Each of three pipeline folders. Read only."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def whole_file(tiny_pipeline, tmp_path_factory):
    """The file made of tiny_pipeline. Read only."""
    return to_file(tiny_pipeline, tmp_path_factory.mktemp("whole_file") / "whole.safetensors")


@pytest.fixture(scope="module")
def sd2_file(tiny_sd2, tmp_path_factory):
    """The file made of tiny_sd2. Read only."""
    return to_file(tiny_sd2, tmp_path_factory.mktemp("sd2_file") / "sd2.safetensors")


@pytest.fixture
def copy(tiny_pipeline, tmp_path):
    """A copy of the pipeline folder, for tests that spoil it."""
    return shutil.copytree(tiny_pipeline, tmp_path / "copy")


@pytest.fixture
def refused(capsys):
    """Runs the command, which must refuse with status 2, and returns its one message."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            convert.main(list(map(str, words)))
        assert stop.value.code == 2
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        return text.err.split("sdtune convert:", 1)[1].strip()

    return run


def to_file(folder, file, *flags):
    """Converts a folder to a file, whose path it returns."""
    convert.main([str(folder), str(file), *flags])
    return file


def to_folder(file, output, config_folder, *flags):
    """Converts a file to a folder, whose path it returns."""
    convert.main([str(file), str(output), "--config_folder", str(config_folder), *flags])
    return output


def assert_same_weights(folder, other):
    """Two pipeline folders have the same weights, to the bit."""
    for name in WEIGHTS:
        assert same(without_level(load_file(folder / name)), without_level(load_file(other / name))), name


def without_level(weights):
    """Weights without the level that published files name in the text encoder, and transformers 5 does not."""
    return {name.removeprefix("text_model."): value for name, value in weights.items()}


def as_halves(file):
    """The tensors of a file in half precision, but for positions, and for the schedule's, which would be lost."""
    exact = {POSITIONS, *SCHEDULE}
    return {name: value if name in exact else value.half() for name, value in file.items()}


def change_json(path, **changes):
    """Changes settings of a JSON file; returns all of it."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    return content


def names(folder):
    """All that is in a folder, hidden files too."""
    return sorted(os.listdir(folder))


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def meta_models(version):
    """UNet, VAE and text encoder of the published sizes, without weights."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**PUBLISHED_UNET[version]),
            "vae": AutoencoderKL(**PUBLISHED_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**PUBLISHED_TEXT_ENCODER[version])),
        }


# ---------------------------------------------------------------------------------------------- the published layout
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_expected_keys_are_the_published_ones(component):
    assert digest(component) == DIGESTS[component]


@pytest.mark.parametrize("version, num_absent", [(1, 0), (2, 14)])
def test_keys_and_shapes_are_those_of_published_files(version, num_absent):
    models = meta_models(version)
    weights = {}
    for part, model in models.items():
        for name, value in model.state_dict().items():
            weights[part, name] = value
    file = {**to_original(weights, models, "folder"), **schedule(make_pipeline().scheduler.config)}

    expected = published(version)
    absent = [key for key in expected if key.removeprefix(OPEN_CLIP).startswith(NOT_IN_A_FOLDER)]
    assert len(absent) == num_absent
    for key in absent:
        del expected[key]
    assert {key: tuple(value.shape) for key, value in file.items()} == expected
    assert version_of(models) == version


def test_schedule_is_that_of_the_original_code(tiny_pipeline):
    """Against the closed forms in numpy's float64, as register_schedule has them."""
    config = json.loads((tiny_pipeline / "scheduler" / "scheduler_config.json").read_text())
    buffers = {name: value.numpy() for name, value in schedule(config).items()}
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    product = np.cumprod(1 - betas)
    previous = np.append(1, product[:-1])
    variance = betas * (1 - previous) / (1 - product)
    expected = {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(product),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - product),
        "log_one_minus_alphas_cumprod": np.log(1 - product),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / product),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / product - 1),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - product),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - product),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
    }
    assert list(buffers) == SCHEDULE
    assert buffers.keys() == expected.keys()
    for name, value in expected.items():
        assert buffers[name].dtype == np.float32
        # One unit in the last place of float32 is 1.2e-7; the two ways to float64's linspace may round differently.
        np.testing.assert_allclose(buffers[name], value, rtol=2e-7, atol=0, err_msg=name)


def test_schedule_follows_the_scheduler():
    linear = {"num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear"}
    np.testing.assert_allclose(schedule(linear)["betas"], np.linspace(0.1, 0.2, 10), rtol=1e-6)
    trained = schedule({**linear, "trained_betas": [0.5, 0.25]})
    assert trained["alphas_cumprod"].tolist() == [0.5, 0.375]


# ---------------------------------------------------------------------------------------------------- there and back
def test_there_and_back_to_the_bit(folder, tmp_path):
    file = to_file(folder, tmp_path / "model.safetensors")
    back = to_folder(file, tmp_path / "back", folder)
    again = to_file(back, tmp_path / "again.safetensors")
    assert_same_weights(folder, back)
    assert same(load_file(file), load_file(again))
    assert names(back) == names(folder)
    assert load_file(back / TEXT).keys() == {f"text_model.{name}" for name in load_file(folder / TEXT)}
    for part in ("tokenizer", "scheduler"):
        for path in (folder / part).iterdir():
            assert (back / part / path.name).read_bytes() == path.read_bytes()
    for part in ("unet", "vae", "text_encoder"):
        written, given = [json.loads((path / part / "config.json").read_text()) for path in (back, folder)]
        assert written == given, part
    for path in (file, back / UNET):
        assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_from_single_file_gives_the_same_weights_to_the_bit(folder, suffix, tmp_path):
    """By save_original, which other tests start from, and which calls what the command does."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    path = save_original(pipeline, tmp_path / f"model.{suffix}")
    loaded = StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        assert same(dict(getattr(pipeline, part).state_dict()), dict(getattr(loaded, part).state_dict())), part
    assert loaded.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()


def test_what_the_command_writes_is_what_from_single_file_reads(tiny_sd2, sd2_file):
    file = load_file(sd2_file)
    assert same(file, original_state_dict(StableDiffusionPipeline.from_pretrained(tiny_sd2)))
    text = load_file(tiny_sd2 / TEXT)
    for kind in ("weight", "bias"):
        queries, keys, values = [text[f"encoder.layers.1.self_attn.{name}_proj.{kind}"] for name in "qkv"]
        together = file[f"{OPEN_CLIP}transformer.resblocks.1.attn.in_proj_{kind}"]
        assert torch.equal(together, torch.cat([queries, keys, values]))
        assert not torch.equal(queries, keys)
        assert not torch.equal(queries, values)
    assert file["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (16, 16, 1, 1)
    assert file["model.diffusion_model.middle_block.1.proj_in.weight"].ndim == 2  # linear in SD 2
    assert POSITIONS not in file


def test_what_a_folder_has_no_place_for_is_left_out_and_named(tiny_sd2, tmp_path, capsys):
    """A file as published: OpenCLIP's last block, its projection and scale, averaged weights."""
    short = to_file(tiny_sd2, tmp_path / "short.safetensors")
    assert "tokenizer" in capsys.readouterr().out
    file = load_file(short)
    more = {
        f"{OPEN_CLIP}logit_scale": torch.ones(()),
        f"{OPEN_CLIP}text_projection": torch.eye(32),
        "model_ema.decay": torch.ones(()),
        "model_ema.diffusion_modelout2bias": torch.ones(4),
    }
    for name, value in file.items():
        if "resblocks.1." in name:
            more[name.replace("resblocks.1.", "resblocks.2.")] = value.clone()
    assert len(more) == 16
    save_file(file | more, tmp_path / "long.safetensors")
    back = to_folder(tmp_path / "long.safetensors", tmp_path / "back", tiny_sd2)
    told = "16 tensors of the file have no place in a folder: cond_stage_model.model."
    assert told in capsys.readouterr().out
    assert_same_weights(tiny_sd2, back)


def test_early_files_and_pickled_ones_are_read(tiny_pipeline, tmp_path):
    """Early files name the text encoder's tensors with a level less."""
    pickled = save_original(StableDiffusionPipeline.from_pretrained(tiny_pipeline), tmp_path / "model.ckpt")
    state = torch.load(pickled, weights_only=True)["state_dict"]
    renamed = {key.replace(".text_model.", "."): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    early = tmp_path / "early.safetensors"
    save_file(renamed, early)
    for source in (pickled, early):
        back = to_folder(source, tmp_path / f"back_{source.stem}", tiny_pipeline)
        assert_same_weights(tiny_pipeline, back)


def test_half_precision(tiny_pipeline, whole_file, tmp_path):
    half = to_file(tiny_pipeline, tmp_path / "half.safetensors", "--save_precision=fp16")
    halves = load_file(half)
    assert same(halves, as_halves(load_file(whole_file)))
    assert halves[POSITIONS].dtype == torch.int64

    back = to_folder(half, tmp_path / "back", tiny_pipeline)
    for name in WEIGHTS:  # a text encoder in half precision fails when the folder is used
        dtype = torch.float32 if name == TEXT else torch.float16
        expected = {key: value.half().to(dtype) for key, value in load_file(tiny_pipeline / name).items()}
        assert same(without_level(load_file(back / name)), expected)
    again = to_file(back, tmp_path / "again.safetensors", "--save_precision=fp16")
    assert same(load_file(again), halves)
    pipeline = StableDiffusionPipeline.from_pretrained(back)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


def test_older_folders_are_read(copy, tiny_pipeline, whole_file, tmp_path):
    """Names that the libraries have changed, pickled weights, shards, and the file of a variant."""
    text = {f"text_model.{key}": value for key, value in load_file(copy / TEXT).items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, copy / TEXT)
    vae = load_file(copy / VAE)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        vae = {key.replace(f"attentions.0.{new}", f"attentions.0.{old}"): value for key, value in vae.items()}
    assert sum("proj_attn" in key for key in vae) == 4
    torch.save(vae, (copy / VAE).with_suffix(".bin"))
    (copy / VAE).unlink()
    unet = sorted(load_file(copy / UNET).items())
    (copy / UNET).unlink()
    save_file(dict(unet[:50]), copy / UNET.replace(".", "-00001-of-00002."))
    save_file(dict(unet[50:]), copy / UNET.replace(".", "-00002-of-00002."))
    old = to_file(copy, tmp_path / "old.safetensors")
    assert same(load_file(old), load_file(whole_file))

    variant = shutil.copytree(tiny_pipeline, tmp_path / "variant")
    for name in WEIGHTS:
        halves = {key: value.half() for key, value in load_file(variant / name).items()}
        save_file(halves, variant / name.replace(".", ".fp16."))
        (variant / name).unlink()
    file = to_file(variant, tmp_path / "variant.safetensors", "--variant=fp16")
    assert same(load_file(file), as_halves(load_file(whole_file)))


def test_parts_that_a_file_cannot_hold_come_from_the_config_folder(copy, tmp_path, capsys):
    """A safety checker with weights is taken over; of one without, only the entry would be left, so it goes."""
    index = change_json(
        copy / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    for part, name in (("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json")):
        (copy / part).mkdir()
        (copy / part / name).write_text("{}")
    file, back = to_file(copy, tmp_path / "model.safetensors"), tmp_path / "back"
    assert "Not in it, for lack of a place: feature_extractor, safety_checker, tokenizer." in capsys.readouterr().out

    to_folder(file, back, copy)
    written = json.loads((back / "model_index.json").read_text())
    assert written["safety_checker"] == [None, None]
    assert written["requires_safety_checker"] is False
    assert written["feature_extractor"] == index["feature_extractor"]
    assert not (back / "safety_checker").exists()
    save_file({"a": torch.ones(1)}, copy / "safety_checker" / "model.safetensors")
    to_folder(file, back, copy, "--overwrite")
    assert json.loads((back / "model_index.json").read_text()) == index
    assert (back / "safety_checker" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------ what a file says of itself
def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    "version, prediction_type, prediction, architecture, resolution",
    [
        (1, "epsilon", "epsilon", "stable-diffusion-v1", "512x512"),
        (2, "epsilon", "epsilon", "stable-diffusion-v2-512", "768x768"),
        (2, "v_prediction", "v", "stable-diffusion-v2-768-v", "768x768"),
    ],
)
def test_header_names_the_architecture(version, prediction_type, prediction, architecture, resolution):
    words = make_header(meta_models(version), prediction_type, "my model")
    assert words["modelspec.architecture"] == architecture
    assert words["modelspec.resolution"] == resolution
    assert words["modelspec.prediction_type"] == prediction
    assert words["modelspec.title"] == "my model"
    assert all(isinstance(value, str) for value in words.values())


def test_objective_is_written_and_checked(tiny_pipeline, tiny_pipeline_v, tmp_path, refused, capsys):
    file = to_file(tiny_pipeline_v, tmp_path / "model.safetensors")
    assert header(file) == {"format": "pt", "modelspec.title": "model", "modelspec.prediction_type": "v"}
    out = capsys.readouterr().out
    assert "A1111, Forge and ComfyUI do not read it" in out.replace("\n", " ")  # its sizes are no one else's
    assert max(map(len, out.splitlines()[1:])) <= 100
    text = refused(file, tmp_path / "back", "--config_folder", tiny_pipeline)
    assert "prediction_type v_prediction, the scheduler of --config_folder has epsilon" in text
    to_folder(file, tmp_path / "back", tiny_pipeline_v)


def test_zero_terminal_snr_is_marked(copy, tiny_pipeline, whole_file, tmp_path, refused):
    change_json(copy / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    file = to_file(copy, tmp_path / "zero.safetensors")
    zero = load_file(file)
    assert zero.pop("ztsnr").numel() == 1
    assert same(zero, load_file(whole_file))
    text = refused(file, tmp_path / "back", "--config_folder", tiny_pipeline)
    assert "rescale_betas_zero_snr True" in text
    to_folder(file, tmp_path / "back", copy)


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline"),
        (
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "StableDiffusionPipeline with a text_encoder of class T5EncoderModel",
        ),
    ],
)
def test_folders_of_other_models_are_named(copy, tmp_path, refused, changes, kind):
    change_json(copy / "model_index.json", **changes)
    text = refused(copy, tmp_path / "model.safetensors")
    assert text == f"{copy}: is a {kind}; only Stable Diffusion 1 and 2 are converted"
    assert names(tmp_path) == ["copy"]


@pytest.mark.parametrize(
    "key, kind",
    [
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.proj.weight", "Flux"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("lora_unet_mid_block.lora_up.weight", "a LoRA, which sdtune convert-lora converts"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "a LoRA, which sdtune convert-lora converts"),
        ("depth_model.model.weight", "Stable Diffusion 2 with depth"),
        ("decoder.conv_in.weight", "a single part"),
        ("something.weight", "lacks"),
    ],
)
def test_files_of_other_models_are_named(tiny_pipeline, tmp_path, refused, key, kind):
    save_file({key: torch.ones(2)}, tmp_path / "other.safetensors")
    text = refused(tmp_path / "other.safetensors", tmp_path / "back", "--config_folder", tiny_pipeline)
    assert text.startswith(f"{tmp_path / 'other.safetensors'}: ")
    assert kind in text
    assert names(tmp_path) == ["other.safetensors"]


class Payload:
    """What pickle calls on loading; a file from somewhere must not get as far."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_broken_files_are_refused(tiny_pipeline, whole_file, tmp_path, refused):
    torch.save({"state_dict": {"a": Payload(str(tmp_path / "trap"))}}, tmp_path / "trap.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(whole_file.read_bytes()[:-100])
    (tmp_path / "text.ckpt").write_text("no weights")
    torch.save([1], tmp_path / "list.ckpt")
    given = names(tmp_path)
    assert len(given) == 4
    for name in given:
        text = refused(tmp_path / name, tmp_path / "back", "--config_folder", tiny_pipeline)
        assert f"{tmp_path / name}: cannot be read as weights" in text
        assert "\n" not in text
    assert names(tmp_path) == given


def test_files_of_other_tensors_are_refused(tiny_pipeline, whole_file, tmp_path, refused):
    whole = load_file(whole_file)
    without_bias = {key: value for key, value in whole.items() if key != OUT_BIAS}
    cases = {
        f"lacks 1 tensor, such as {OUT_BIAS}": without_bias,
        f"{OUT_BIAS}: has the shape (5,), its config says (4,)": {**whole, OUT_BIAS: torch.ones(5)},
        f"has, unlike its config, 1 tensor, such as {OUT_BIAS}2": {**whole, f"{OUT_BIAS}2": torch.ones(5)},
        f"{OUT_BIAS}: is int8; only weights in float32": {**whole, OUT_BIAS: torch.ones(4, dtype=torch.int8)},
    }
    for expected, tensors in cases.items():
        save_file(tensors, tmp_path / "given.safetensors")
        text = refused(tmp_path / "given.safetensors", tmp_path / "back", "--config_folder", tiny_pipeline)
        assert expected in text
    assert names(tmp_path) == ["given.safetensors"]


def test_folders_of_broken_or_other_weights_are_refused(copy, tiny_pipeline, tmp_path, refused):
    (copy / UNET).write_bytes((copy / UNET).read_bytes()[:-100])
    assert f"{copy / UNET}: cannot be read as weights" in refused(copy, tmp_path / "model.safetensors")
    state = load_file(tiny_pipeline / UNET)
    del state["conv_in.weight"]
    save_file(state, copy / UNET)
    assert f"{copy}: lacks 1 tensor, such as unet.conv_in.weight" in refused(copy, tmp_path / "model.safetensors")
    assert names(tmp_path) == ["copy"]


def test_another_architecture_is_refused(tiny_sd2, whole_file, copy, tmp_path, refused):
    text = refused(whole_file, tmp_path / "back", "--config_folder", tiny_sd2)
    assert re.search(r"lacks \d+ tensors, such as cond_stage_model\.model\.", text)

    output, path = tmp_path / "other.safetensors", copy / "unet" / "config.json"
    config = path.read_text()
    change_json(path, class_embed_type="timestep")
    text = refused(copy, output)
    assert text == "unet: has class_embedding.linear_1.bias, which Stable Diffusion 1 and 2 do not have"
    change_json(path, class_embed_type=None, layers_per_block=[1, 1])
    assert "layers_per_block" in refused(copy, output)
    change_json(path, layers_per_block=1, down_block_types=["DownBlock2D"])
    assert f"{copy / 'unet'}: its config.json makes no model" in refused(copy, output)
    path.write_text(config)
    change_json(copy / "text_encoder" / "config.json", hidden_act="relu")
    assert "activation relu" in refused(copy, output)


def test_paths_and_flags_that_are_wrong(tiny_pipeline, whole_file, copy, tmp_path, refused):
    file, existing = tmp_path / "model.safetensors", tmp_path / "existing.safetensors"
    shutil.copy(whole_file, file)
    existing.write_text("mine")
    cases = [
        ([], "give what to read and what to write"),
        ([tiny_pipeline], "give what to read and what to write"),
        ([tmp_path / "gone", "out.safetensors"], "is no pipeline folder and no .safetensors or .ckpt file"),
        ([existing.with_suffix(".txt"), "out"], "is no pipeline folder and no .safetensors or .ckpt file"),
        ([tmp_path, tmp_path / "out.safetensors"], "model_index.json: cannot be read"),
        ([tiny_pipeline, tmp_path / "out.ckpt"], "end the name of the file to write in .safetensors"),
        ([tiny_pipeline, existing], "exists; give another name, or --overwrite to replace it"),
        ([tiny_pipeline, tmp_path / "out.safetensors", "--config_folder", copy], "is for a file as SOURCE"),
        ([tiny_pipeline, tmp_path / "out.safetensors", "--save_precision=fp8"], "--save_precision: invalid choice"),
        ([file, tmp_path / "back", "--config_folder", copy, "--variant=fp16"], "is for a folder as SOURCE"),
        ([file, tmp_path / "back"], "add --config_folder=FOLDER"),
        ([file, tmp_path / "back", "--config_folder", tmp_path], "--config_folder="),
        ([file, tmp_path / "back.ckpt", "--config_folder", copy], "a pipeline folder is written there"),
        ([file, copy, "--config_folder", tiny_pipeline], "exists; give another name"),
        ([file, copy, "--config_folder", copy, "--overwrite"], "holds what is read"),
        ([file, tmp_path, "--config_folder", copy, "--overwrite"], "holds what is read"),
        ([file, existing, "--config_folder", copy, "--overwrite"], "is a file; give another name"),
    ]
    for words, expected in cases:
        text = refused(*words)
        assert expected in text
        assert "\n" not in text
    assert existing.read_text() == "mine"
    (copy / "mine.txt").write_text("mine")
    text = refused(file, copy, "--config_folder", tiny_pipeline, "--overwrite")
    assert "holds mine.txt, which is no part of a pipeline" in text

    shutil.rmtree(copy / "scheduler")
    (copy / UNET).unlink()
    (copy / "vae" / "config.json").unlink()
    text = refused(copy, existing, "--config_folder", copy).splitlines()  # all at once
    assert len(text) == 3
    assert f"{copy}: lacks vae/config.json, scheduler/scheduler_config.json, {UNET}" in text[1]
    assert names(tmp_path) == ["copy", "existing.safetensors", "model.safetensors"]


def test_flags_come_from_a_file_too(tiny_pipeline, tmp_path):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "model.safetensors"
    recipe.write_text("save_precision: bf16\noverwrite: true\n")
    output.write_text("old")
    to_file(tiny_pipeline, output, f"--config={recipe}")
    assert load_file(output)[OUT_BIAS].dtype == torch.bfloat16


@pytest.mark.parametrize("direction", ["file", "folder"])
def test_a_write_that_fails_leaves_what_was_there(
    tiny_pipeline, whole_file, tmp_path, refused, monkeypatch, direction
):
    """A full disk, half-way: the old result stays, and nothing else does."""
    if direction == "file":
        old = to_file(tiny_pipeline, tmp_path / "old.safetensors")
        words = [tiny_pipeline, old]
    else:
        old = to_folder(whole_file, tmp_path / "old", tiny_pipeline)
        words = [whole_file, old, "--config_folder", tiny_pipeline]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(source, path, *_):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", fail)
    monkeypatch.setattr(convert.shutil, "copytree", lambda source, target: fail(source, target / "file"))
    assert "No space left on device" in refused(*words, "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_as_a_program(tiny_pipeline, tmp_path, monkeypatch, refused):
    words = [str(tiny_pipeline), "out.safetensors", "--save_precision=fp16"]
    result = run_command(["convert", *words], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Wrote out.safetensors.\n")
    assert names(tmp_path) == ["out.safetensors"]
    monkeypatch.chdir(tmp_path)
    assert refused(*words).startswith("out.safetensors: exists;")
