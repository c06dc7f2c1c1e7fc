"""tools/convert_checkpoint.py: the published layout to the key, there and back to the bit, and every refusal."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import load_script
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from original_layout import original_state_dict, save_original
from published_layout import COMPONENTS, DIGESTS, NOT_IN_A_FOLDER, SCHEDULE, digest, published
from running import REPO, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_pipeline
from transformers import CLIPTextConfig, CLIPTextModel

TOOL = REPO / "tools" / "convert_checkpoint.py"
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
WEIGHTS = (UNET, VAE, TEXT)
OPEN_CLIP, POSITIONS = "cond_stage_model.model.", "cond_stage_model.transformer.text_model.embeddings.position_ids"

# Settings of the published pipeline folders (config.json of each part) where they differ from the classes' defaults.
VAE_CONFIG = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
              "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TEXT_CONFIG = {"vocab_size": 49408, "max_position_embeddings": 77}
PUBLISHED = {
    1: ({"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "hidden_act": "quick_gelu"}),
    2: ({"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
         "use_linear_projection": True},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
         "hidden_act": "gelu"})}


@pytest.fixture(scope="module")
def tool():
    return load_script(TOOL)


@pytest.fixture(scope="module")
def tiny_sd2(tmp_path_factory):
    """Folder of a small pipeline with what sets Stable Diffusion 2.1 apart: OpenCLIP's text encoder, linear maps
    around attention, v-prediction."""
    pipeline = make_pipeline(prediction_type="v_prediction", num_blocks=4, layers_per_block=2,
                             use_linear_projection=True)
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
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(tiny_pipeline, tmp_path):
    """A copy of the pipeline folder, for tests that spoil it."""
    return shutil.copytree(tiny_pipeline, tmp_path / "copy")


@pytest.fixture
def refused(tool, capsys):
    """Runs the tool, which must refuse with status 2, and returns its one message."""
    def run(*words):
        with pytest.raises(SystemExit) as stop:
            tool.main(list(map(str, words)))
        assert stop.value.code == 2
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        return text.err.split("convert_checkpoint.py: ", 1)[1].strip()

    return run


def same(a, b):
    """Whether two dictionaries have the same tensors, to the bit and in the same precision."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def names(folder):
    """All that is in a folder, hidden files too."""
    return sorted(os.listdir(folder))


def meta_models(version):
    """UNet, VAE and text encoder of the published sizes, without weights."""
    unet, text = PUBLISHED[version]
    with torch.device("meta"):
        return {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**VAE_CONFIG),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG, **text))}


# ---------------------------------------------------------------------------------------------- the published layout
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_expected_keys_are_the_published_ones(component):
    assert digest(component) == DIGESTS[component]


@pytest.mark.parametrize("version, missing, name", [(1, 0, "stable-diffusion-v1"), (2, 14, "stable-diffusion-v2")])
def test_keys_and_shapes_are_those_of_published_files(tool, version, missing, name):
    models, wanted = meta_models(version), published(version)
    weights = {(part, key): value for part, model in models.items() for key, value in model.state_dict().items()}
    scheduler = make_pipeline().scheduler.config
    file = tool.to_original(weights, models, "folder") | tool.schedule(scheduler)
    absent = {key for key in wanted if key.removeprefix(OPEN_CLIP).startswith(NOT_IN_A_FOLDER)}
    assert len(absent) == missing
    assert {key: tuple(value.shape) for key, value in file.items()} == {
        key: shape for key, shape in wanted.items() if key not in absent}
    assert tool.architecture(models) == name


def test_schedule_is_that_of_the_original_code(tool, tiny_pipeline):
    """Against the closed forms in numpy's float64, as register_schedule has them."""
    config = json.loads((tiny_pipeline / "scheduler" / "scheduler_config.json").read_text())
    buffers = {name: value.numpy() for name, value in tool.schedule(config).items()}
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    product = np.cumprod(1 - betas)
    previous = np.append(1, product[:-1])
    expected = {
        "betas": betas, "alphas_cumprod": product, "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(product), "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - product),
        "log_one_minus_alphas_cumprod": np.log(1 - product), "sqrt_recip_alphas_cumprod": np.sqrt(1 / product),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / product - 1),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - product),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - product),
        "posterior_variance": betas * (1 - previous) / (1 - product)}
    expected["posterior_log_variance_clipped"] = np.log(np.maximum(expected["posterior_variance"], 1e-20))
    assert list(buffers) == SCHEDULE
    assert buffers.keys() == expected.keys()
    for name, value in expected.items():
        assert buffers[name].dtype == np.float32
        # One unit in the last place of float32 is 1.2e-7; the two ways to float64's linspace may round differently.
        np.testing.assert_allclose(buffers[name], value, rtol=2e-7, atol=0, err_msg=name)


def test_schedule_follows_the_scheduler(tool):
    linear = {"num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear"}
    np.testing.assert_allclose(tool.schedule(linear)["betas"], np.linspace(0.1, 0.2, 10), rtol=1e-6)
    trained = tool.schedule({**linear, "trained_betas": [0.5, 0.25]})
    assert trained["alphas_cumprod"].tolist() == [0.5, 0.375]


# ---------------------------------------------------------------------------------------------------- there and back
def test_there_and_back_to_the_bit(tool, folder, tmp_path):
    file, back, again = tmp_path / "model.safetensors", tmp_path / "back", tmp_path / "again.safetensors"
    tool.main([str(folder), str(file)])
    tool.main([str(file), str(back), "--config_folder", str(folder)])
    tool.main([str(back), str(again)])
    for name in WEIGHTS:
        assert same(load_file(folder / name), load_file(back / name)), name
    assert same(load_file(file), load_file(again))
    assert names(back) == names(folder)
    for part in ("tokenizer", "scheduler"):
        for path in (folder / part).iterdir():
            assert (back / part / path.name).read_bytes() == path.read_bytes()
    for part in ("unet", "vae", "text_encoder"):
        settings = [json.loads((path / part / "config.json").read_text()) for path in (back, folder)]
        assert settings[0] == settings[1], part
    assert (file.stat().st_mode & 0o777) == ((back / UNET).stat().st_mode & 0o777) == 0o666 & ~umask()


def umask():
    os.umask(value := os.umask(0))
    return value


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_from_single_file_gives_the_same_weights_to_the_bit(folder, suffix, tmp_path):
    """By save_original, which other tests start from, and which is this tool."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    path = save_original(pipeline, tmp_path / f"model.{suffix}")
    loaded = StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()), part
    assert loaded.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()


def test_what_the_command_writes_is_what_from_single_file_reads(tool, tiny_sd2, tmp_path):
    tool.main([str(tiny_sd2), str(tmp_path / "model.safetensors")])
    file, pipeline = load_file(tmp_path / "model.safetensors"), StableDiffusionPipeline.from_pretrained(tiny_sd2)
    assert same(file, original_state_dict(pipeline))
    text = load_file(tiny_sd2 / TEXT)
    for kind in ("weight", "bias"):
        block = f"{OPEN_CLIP}transformer.resblocks.1.attn.in_proj_{kind}"
        parts = [text[f"encoder.layers.1.self_attn.{name}_proj.{kind}"] for name in "qkv"]
        assert torch.equal(file[block], torch.cat(parts))
        assert not any(torch.equal(parts[0], other) for other in parts[1:])
    assert file["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (16, 16, 1, 1)
    assert file["model.diffusion_model.middle_block.1.proj_in.weight"].ndim == 2  # linear in SD 2
    assert POSITIONS not in file


def test_what_a_folder_has_no_place_for_is_left_out_and_named(tool, tiny_sd2, tmp_path, capsys):
    """A file as published: OpenCLIP's last block, its projection and scale, averaged weights."""
    tool.main([str(tiny_sd2), str(tmp_path / "short.safetensors")])
    assert "tokenizer" in capsys.readouterr().out
    file = load_file(tmp_path / "short.safetensors")
    block = {key.replace("resblocks.1.", "resblocks.2."): value.clone() for key, value in file.items()
             if "resblocks.1." in key}
    extra = {**block, OPEN_CLIP + "logit_scale": torch.ones(()), OPEN_CLIP + "text_projection": torch.eye(32),
             "model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout2bias": torch.ones(4)}
    assert len(extra) == 16
    save_file(file | extra, tmp_path / "long.safetensors")
    tool.main([str(tmp_path / "long.safetensors"), str(tmp_path / "back"), "--config_folder", str(tiny_sd2)])
    assert "16 tensors of the file have no place in a folder: cond_stage_model.model." in capsys.readouterr().out
    for name in WEIGHTS:
        assert same(load_file(tiny_sd2 / name), load_file(tmp_path / "back" / name))


def test_early_files_and_pickled_ones_are_read(tool, tiny_pipeline, tmp_path):
    """Early files name the text encoder's tensors with a level less."""
    file = save_original(StableDiffusionPipeline.from_pretrained(tiny_pipeline), tmp_path / "model.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    early = {key.replace(".text_model.", "."): value for key, value in state.items()}
    assert early.keys() != state.keys()
    save_file(early, tmp_path / "early.safetensors")
    for source in (file, tmp_path / "early.safetensors"):
        back = tmp_path / f"back_{source.stem}"
        tool.main([str(source), str(back), "--config_folder", str(tiny_pipeline)])
        for name in WEIGHTS:
            assert same(load_file(tiny_pipeline / name), load_file(back / name))


def test_half_precision(tool, tiny_pipeline, tmp_path):
    half, back, again = tmp_path / "half.safetensors", tmp_path / "back", tmp_path / "again.safetensors"
    tool.main([str(tiny_pipeline), str(tmp_path / "full.safetensors")])
    tool.main([str(tiny_pipeline), str(half), "--save_precision=fp16"])
    full, halves = load_file(tmp_path / "full.safetensors"), load_file(half)
    exact = {POSITIONS, *SCHEDULE}  # the schedule's small numbers would be lost
    assert same(halves, {key: value if key in exact else value.half() for key, value in full.items()})
    assert halves[POSITIONS].dtype == torch.int64

    tool.main([str(half), str(back), "--config_folder", str(tiny_pipeline)])
    for name in WEIGHTS:  # a text encoder in half precision fails when the folder is used
        dtype = torch.float32 if name == TEXT else torch.float16
        expected = {key: value.half().to(dtype) for key, value in load_file(tiny_pipeline / name).items()}
        assert same(load_file(back / name), expected)
    tool.main([str(back), str(again), "--save_precision=fp16"])
    assert same(load_file(again), halves)
    pipeline = StableDiffusionPipeline.from_pretrained(back)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


def test_older_folders_are_read(tool, copy, tiny_pipeline, tmp_path):
    """Names that the libraries have changed, pickled weights, shards, and the file of a variant."""
    tool.main([str(tiny_pipeline), str(tmp_path / "new.safetensors")])
    expected, limit = load_file(tmp_path / "new.safetensors"), 77
    text = {f"text_model.{key}": value for key, value in load_file(copy / TEXT).items()}
    save_file(text | {"text_model.embeddings.position_ids": torch.arange(limit)[None]}, copy / TEXT)
    vae = load_file(copy / VAE)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        vae = {key.replace(f"attentions.0.{new}", f"attentions.0.{old}"): value for key, value in vae.items()}
    assert sum("proj_attn" in key for key in vae) == 4
    torch.save(vae, (copy / VAE).with_suffix(".bin"))
    (copy / VAE).unlink()
    unet = sorted(load_file(copy / UNET).items())
    (copy / UNET).unlink()
    for number, part in ((1, unet[:50]), (2, unet[50:])):
        save_file(dict(part), copy / UNET.replace(".", f"-0000{number}-of-00002."))
    tool.main([str(copy), str(tmp_path / "old.safetensors")])
    assert same(load_file(tmp_path / "old.safetensors"), expected)

    variant = shutil.copytree(tiny_pipeline, tmp_path / "variant")
    for name in WEIGHTS:
        save_file({k: v.half() for k, v in load_file(variant / name).items()}, variant / name.replace(".", ".fp16."))
        (variant / name).unlink()
    tool.main([str(variant), str(tmp_path / "variant.safetensors"), "--variant=fp16"])
    expected = {k: v if k in SCHEDULE or k == POSITIONS else v.half() for k, v in expected.items()}
    assert same(load_file(tmp_path / "variant.safetensors"), expected)


def test_parts_that_a_file_cannot_hold_come_from_the_config_folder(tool, copy, tmp_path, capsys):
    """A safety checker with weights is taken over; of one without, only the entry would be left, so it goes."""
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": True}
    (copy / "model_index.json").write_text(json.dumps(index))
    for part, name in (("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json")):
        (copy / part).mkdir()
        (copy / part / name).write_text("{}")
    tool.main([str(copy), str(tmp_path / "model.safetensors")])
    assert "Not in it, for lack of a place: feature_extractor, safety_checker, tokenizer." in capsys.readouterr().out

    words = [str(tmp_path / "model.safetensors"), str(tmp_path / "back"), "--config_folder", str(copy), "--overwrite"]
    tool.main(words)
    back = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert (back["safety_checker"], back["requires_safety_checker"]) == ([None, None], False)
    assert back["feature_extractor"] == index["feature_extractor"]
    assert not (tmp_path / "back" / "safety_checker").exists()
    save_file({"a": torch.ones(1)}, copy / "safety_checker" / "model.safetensors")
    tool.main(words)
    assert json.loads((tmp_path / "back" / "model_index.json").read_text()) == index
    assert (tmp_path / "back" / "safety_checker" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------ what a file says of itself
def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("version, prediction, name, resolution", [
    (1, "epsilon", "stable-diffusion-v1", "512x512"), (2, "epsilon", "stable-diffusion-v2-512", "768x768"),
    (2, "v_prediction", "stable-diffusion-v2-768-v", "768x768")])
def test_header_names_the_architecture(tool, version, prediction, name, resolution):
    words = tool.make_header(meta_models(version), prediction, "my model")
    assert words["modelspec.architecture"] == name
    assert words["modelspec.resolution"] == resolution
    assert words["modelspec.prediction_type"] == {"v_prediction": "v"}.get(prediction, prediction)
    assert words["modelspec.title"] == "my model"
    assert all(isinstance(value, str) for value in words.values())


def test_objective_is_written_and_checked(tool, tiny_pipeline, tiny_pipeline_v, tmp_path, refused, capsys):
    file = tmp_path / "model.safetensors"
    tool.main([str(tiny_pipeline_v), str(file)])
    assert header(file) == {"format": "pt", "modelspec.title": "model", "modelspec.prediction_type": "v"}
    out = capsys.readouterr().out
    assert "A1111, Forge and ComfyUI do not read it" in out.replace("\n", " ")  # its sizes are no one else's
    assert max(map(len, out.splitlines()[1:])) <= 100
    text = refused(file, tmp_path / "back", "--config_folder", tiny_pipeline)
    assert "prediction_type v_prediction, the scheduler of --config_folder has epsilon" in text
    tool.main([str(file), str(tmp_path / "back"), "--config_folder", str(tiny_pipeline_v)])


def test_zero_terminal_snr_is_marked(tool, copy, tiny_pipeline, tmp_path, refused):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    tool.main([str(copy), str(tmp_path / "zero.safetensors")])
    tool.main([str(tiny_pipeline), str(tmp_path / "plain.safetensors")])
    zero, plain = (load_file(tmp_path / f"{name}.safetensors") for name in ("zero", "plain"))
    assert zero.pop("ztsnr").numel() == 1
    assert same(zero, plain)
    text = refused(tmp_path / "zero.safetensors", tmp_path / "back", "--config_folder", tiny_pipeline)
    assert "rescale_betas_zero_snr True" in text
    tool.main([str(tmp_path / "zero.safetensors"), str(tmp_path / "back"), "--config_folder", str(copy)])


# ----------------------------------------------------------------------------------------------------------- refusals
def test_folders_of_other_models_are_named(copy, tmp_path, refused):
    index = json.loads((copy / "model_index.json").read_text())
    for kind, more in (("StableDiffusionXLPipeline", {}), ("StableDiffusion3Pipeline", {}),
                       ("StableDiffusionPipeline", {"text_encoder": ["transformers", "T5EncoderModel"]})):
        (copy / "model_index.json").write_text(json.dumps({**index, **more, "_class_name": kind}))
        text = refused(copy, tmp_path / "model.safetensors")
        assert f"{copy}: is a {kind}" in text
        assert text.endswith("; only Stable Diffusion 1 and 2 are converted")
        assert not more or "text_encoder of class T5EncoderModel" in text
    assert names(tmp_path) == ["copy"]


@pytest.mark.parametrize("key, kind", [
    ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
    ("double_blocks.0.img_attn.proj.weight", "Flux"), ("control_model.input_blocks.0.0.weight", "a ControlNet"),
    ("lora_unet_mid_block.lora_up.weight", "a LoRA, which convert_lora.py converts"),
    ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "a LoRA, which convert_lora.py converts"),
    ("depth_model.model.weight", "Stable Diffusion 2 with depth"), ("decoder.conv_in.weight", "a single part"),
    ("something.weight", "lacks")])
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


def test_broken_files_are_refused(tool, copy, tiny_pipeline, tmp_path, refused):
    whole = tmp_path / "whole.safetensors"
    tool.main([str(tiny_pipeline), str(whole)])
    state = load_file(whole)
    before = names(tmp_path)
    torch.save({"state_dict": {"a": Payload(str(tmp_path / "trap"))}}, tmp_path / "trap.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "text.ckpt").write_text("no weights")
    torch.save([1], tmp_path / "list.ckpt")
    bias = "model.diffusion_model.out.2.bias"
    variations = {
        "lacks": ({key: value for key, value in state.items() if key != bias}, f"lacks 1 tensors, such as {bias}"),
        "shape": (state | {bias: torch.ones(5)}, f"{bias}: has the shape (5,), its config says (4,)"),
        "more": (state | {bias + "2": torch.ones(5)}, f"has, unlike its config, 1 tensors, such as {bias}2"),
        "int8": (state | {bias: torch.ones(4, dtype=torch.int8)}, f"{bias}: is int8; only weights in float32")}
    for name, (tensors, _) in variations.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    given = names(tmp_path)
    for name in ("trap.ckpt", "cut.safetensors", "text.ckpt", "list.ckpt"):
        text = refused(tmp_path / name, tmp_path / "back", "--config_folder", tiny_pipeline)
        assert f"{tmp_path / name}: cannot be read as weights" in text
        assert "\n" not in text
    for name, (_, expected) in variations.items():
        text = refused(tmp_path / f"{name}.safetensors", tmp_path / "back", "--config_folder", tiny_pipeline)
        assert expected in text
    assert names(tmp_path) == given != before

    (copy / UNET).write_bytes((copy / UNET).read_bytes()[:-100])
    assert f"{copy / UNET}: cannot be read as weights" in refused(copy, tmp_path / "model.safetensors")
    state = load_file(tiny_pipeline / UNET)
    save_file({key: value for key, value in state.items() if key != "conv_in.weight"}, copy / UNET)
    assert f"{copy}: lacks 1 tensors, such as unet.conv_in.weight" in refused(copy, tmp_path / "model.safetensors")
    assert names(tmp_path) == given


def test_another_architecture_is_refused(tool, tiny_pipeline, tiny_sd2, copy, tmp_path, refused):
    tool.main([str(tiny_pipeline), str(tmp_path / "model.safetensors")])
    text = refused(tmp_path / "model.safetensors", tmp_path / "back", "--config_folder", tiny_sd2)
    assert re.search(r"lacks \d+ tensors, such as cond_stage_model\.model\.", text)
    path = copy / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "class_embed_type": "timestep"}))
    text = refused(copy, tmp_path / "other.safetensors")
    assert text == "unet: has class_embedding.linear_1.bias, which Stable Diffusion 1 and 2 do not have"
    path.write_text(json.dumps({**config, "layers_per_block": [1, 1]}))
    assert "layers_per_block" in refused(copy, tmp_path / "other.safetensors")
    path.write_text(json.dumps({**config, "down_block_types": ["DownBlock2D"]}))
    assert f"{copy / 'unet'}: its config.json makes no model" in refused(copy, tmp_path / "other.safetensors")
    path.write_text(json.dumps(config))
    path = copy / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "relu"}))
    assert "activation relu" in refused(copy, tmp_path / "other.safetensors")


def test_paths_and_flags_that_are_wrong(tool, tiny_pipeline, copy, tmp_path, refused):
    file, existing = tmp_path / "model.safetensors", tmp_path / "existing.safetensors"
    tool.main([str(tiny_pipeline), str(file)])
    existing.write_text("mine")
    for words, expected in (
            ([], "give what to read and what to write"), ([tiny_pipeline], "give what to read and what to write"),
            ([tmp_path / "gone", "out.safetensors"], "is no pipeline folder and no .safetensors or .ckpt file"),
            ([existing.with_suffix(".txt"), "out"], "is no pipeline folder and no .safetensors or .ckpt file"),
            ([tmp_path, tmp_path / "out.safetensors"], "model_index.json: cannot be read"),
            ([tiny_pipeline, tmp_path / "out.ckpt"], "end the name of the file to write in .safetensors"),
            ([tiny_pipeline, existing], "exists; give another name, or --overwrite to replace it"),
            ([tiny_pipeline, tmp_path / "out.safetensors", "--config_folder", copy], "is for a file as SOURCE"),
            ([file, tmp_path / "back"], "add --config_folder=FOLDER"),
            ([file, tmp_path / "back", "--config_folder", tmp_path], "--config_folder="),
            ([file, tmp_path / "back.ckpt", "--config_folder", copy], "a pipeline folder is written there"),
            ([file, copy, "--config_folder", tiny_pipeline], "exists; give another name"),
            ([file, copy, "--config_folder", copy, "--overwrite"], "holds what is read"),
            ([file, tmp_path, "--config_folder", copy, "--overwrite"], "holds what is read"),
            ([file, existing, "--config_folder", copy, "--overwrite"], "is a file; give another name")):
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
    assert sorted(names(tmp_path)) == ["copy", "existing.safetensors", "model.safetensors"]


def test_flags_come_from_a_file_too(tool, tiny_pipeline, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("save_precision: bf16\noverwrite: true\n")
    (tmp_path / "model.safetensors").write_text("old")
    tool.main([str(tiny_pipeline), str(tmp_path / "model.safetensors"), f"--config={recipe}"])
    state = load_file(tmp_path / "model.safetensors")
    assert state["model.diffusion_model.out.2.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("direction", ["file", "folder"])
def test_a_write_that_fails_leaves_what_was_there(tool, tiny_pipeline, tmp_path, refused, monkeypatch, direction):
    """A full disk, half-way: the old result stays, and nothing else does."""
    file, old = tmp_path / "model.safetensors", tmp_path / ("old.safetensors" if direction == "file" else "old")
    tool.main([str(tiny_pipeline), str(file)])
    words = [tiny_pipeline, old] if direction == "file" else [file, old, "--config_folder", tiny_pipeline]
    tool.main(list(map(str, words)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(tensors, path, *_):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool, "save_file", fail)
    monkeypatch.setattr(tool.shutil, "copytree", lambda source, target: fail(source, target / "file"))
    assert "No space left on device" in refused(*words, "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_as_a_program(tiny_pipeline, tmp_path):
    """Alone in an empty folder, as somebody copies it."""
    shutil.copy(TOOL, tmp_path / "tool.py")
    words = [tiny_pipeline, "out.safetensors", "--save_precision=fp16"]
    result = run_script(words, script=tmp_path / "tool.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Wrote out.safetensors.\n")
    assert names(tmp_path) == ["out.safetensors", "tool.py"]
    again = run_script(words, script=tmp_path / "tool.py", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("tool.py: out.safetensors: exists;")
    assert "Traceback" not in again.stderr
