"""What runs in JAX computes what PyTorch computes, and keeps the promises of the torch scripts."""

import functools
import json
import os
import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes most of the time of these tests
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cards import code_in, run_code
from conftest import load_script
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fake_hub import files_of
from flax import serialization, traverse_util
from image_data import write_image_folder
from jax.sharding import Mesh
from PIL import Image
from reach_hub import reaching
from running import REPO, run_script, start_script
from running import TRAIN_TEXT_TO_IMAGE_FLAX as FLAX
from safetensors.numpy import load_file
from shards import make_rows, write_shards, write_tar
from stubs import grey_samples
from tiny import make_pipeline, make_text_encoder, make_tokenizer, make_vae
from training import draws, losses, parse, read_log, text_encoder, train, unet, words
from transformers import CLIPTextModel

from sdtune.checkpoints import Run
from sdtune.digests import write_digests
from sdtune.errors import InputError
from sdtune.flax.encoding import encode_once
from sdtune.flax.networks import apply_text_encoder, apply_unet, apply_vae_encoder, check_networks
from sdtune.flax.training import check_agreement, check_shared_output, choose_checkpoint, start_run, told_by_first
from sdtune.flax.validation import make_measure, validate
from sdtune.flax.weights import arrays_of, load_flax, read_flax, reads_flax, write_flax
from sdtune.validation import LookGivenUp

MINIATURE = REPO / "miniature" / "pipeline"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"

# A large epsilon keeps AdamW from blowing up the rounding of gradients near zero. What is compiled has such numbers in
# it: runs that have the same ones share it.
ALIKE = {"adam_epsilon": 1e-3, "adam_weight_decay": 0.1}


@pytest.fixture(scope="module")
def script():
    """examples/text_to_image/train_text_to_image_flax.py as a module."""
    return load_script(FLAX)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a pipeline whose UNet has a single level: it compiles in half the time of tiny_pipeline's."""
    folder = tmp_path_factory.mktemp("base")
    make_pipeline(num_blocks=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 6)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Images that are not square, so that crops are random: 48 x 40 pixels."""
    return write_image_folder(tmp_path_factory.mktemp("data") / "wide", 7, (48, 40))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where compiled programs are shared by the runs of this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fit(script, base, images, cache, tmp_path):
    """Runs the script on the base and the images, unless others are given; returns the folder of its output."""

    def run(name="out", base=base, data=images, status=0, **settings):
        assert train(script, base, data, tmp_path / name, cache_dir=cache, **{**ALIKE, **settings}) == status
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def fit_once(script, base, images, cache, tmp_path_factory):
    """As `fit`, but a second run with the same settings is the first one: its folder is read only."""
    folders = {}

    def run(base=base, data=images, **settings):
        settings = {"cache_dir": cache, **ALIKE, **settings}
        key = tuple(sorted(words(base, data, "", **settings)))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("once") / "out"
            assert train(script, base, data, folders[key], **settings) == 0
        return folders[key]

    return run


def weights_of(module):
    return {name: jnp.asarray(value.numpy()) for name, value in module.state_dict().items()}


def relative(a, b):
    """The norm of the difference by that of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def relative_update(a, b, start):
    """How far two sets of weights are apart, by how far b is from the start."""
    apart = sum(np.square(np.float64(a[name]) - np.float64(b[name])).sum() for name in b)
    moved = sum(np.square(np.float64(b[name]) - np.float64(start[name])).sum() for name in b)
    return (apart / moved) ** 0.5


def assert_equal(weights, expected):
    """Asserts that two sets of weights, by name, are the same to the bit."""
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(weights[name], expected[name])] == []


# ------------------------------------------------------------------------------------------------------- networks

SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 4, "cross_attention_dim": 24, "sample_size": 8}
UNETS = {
    "sd1": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "layers_per_block": 2,
    },
    "sd2": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": [2, 4],
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        "upcast_attention": True,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
}


class Config(dict):
    """A config that may be a static argument."""

    def __hash__(self):
        return id(self)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, gradient_checkpointing",
    [
        (8, False),
        (9, True),  # odd latents lose a row on the way down
    ],
)
@pytest.mark.parametrize("name", [*UNETS, "miniature"])
def test_unet_and_its_gradients_are_those_of_torch(name, size, gradient_checkpointing):
    torch.manual_seed(0)
    if name == "miniature":
        module = UNet2DConditionModel.from_pretrained(MINIATURE / "unet")
    else:
        module = UNet2DConditionModel(**SMALL, **UNETS[name])
    draw = np.random.default_rng(0)
    latents, direction = draw.standard_normal((2, 2, 4, size, size), np.float32)
    prompt_embeds = draw.standard_normal((2, 7, module.config.cross_attention_dim), np.float32)
    timesteps = np.array([3, 977])
    expected = module(*map(torch.from_numpy, (latents, timesteps, prompt_embeds))).sample
    (expected * torch.from_numpy(direction)).sum().backward()

    def total(weights):
        found = apply_unet(weights, latents, timesteps, prompt_embeds, module.config, gradient_checkpointing)
        return (found * direction).sum(), found

    grads, found = jax.jit(jax.grad(total, has_aux=True))(weights_of(module))
    assert relative(found, expected.detach()) < 1e-5
    for key, weight in module.named_parameters():
        assert relative(grads[key], weight.grad) < 1e-5, key


@pytest.mark.parametrize("name", ["tiny", "miniature"])
def test_vae_moments_are_those_of_torch(name):
    module = make_vae() if name == "tiny" else AutoencoderKL.from_pretrained(MINIATURE / "vae")
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = module.encode(torch.from_numpy(pixels)).latent_dist.parameters
    program = jax.jit(apply_vae_encoder, static_argnums=2)
    assert relative(program(weights_of(module), pixels, Config(module.config)), expected) < 1e-5


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "miniature"])
def test_text_embeddings_are_those_of_torch(act):
    if act == "miniature":
        module = CLIPTextModel.from_pretrained(MINIATURE / "text_encoder")
    else:
        config = make_text_encoder(make_tokenizer()).config
        config.hidden_act = act
        module = CLIPTextModel(config)
    tokens = np.random.default_rng(0).integers(0, module.config.vocab_size, (2, 77))
    with torch.no_grad():
        expected = module(torch.from_numpy(tokens)).last_hidden_state
    assert relative(apply_text_encoder(weights_of(module), tokens, module.config.to_dict()), expected) < 1e-5


def change_config(folder, part, changes):
    """Changes the config of a part of a pipeline folder."""
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def model_args(folder, **flags):
    """The flags that name a base, for tests of parts."""
    unset = "single_file_config revision variant cache_dir hub_token tokenizer_name tokenizer_max_length".split()
    defaults = {**dict.fromkeys(unset), "from_flax": False, "from_pt": False}
    return SimpleNamespace(**{"pretrained_model_name_or_path": str(folder), **defaults, **flags})


@pytest.mark.parametrize(
    "part, changes",
    [
        ("unet", {"dropout": 0.1}),
        ("unet", {"act_fn": "gelu"}),
        ("unet", {"some_new_key": 1}),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}),
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}),
        ("unet", {"addition_embed_type": "text_time"}),
        ("unet", {"cross_attention_dim": [32, 32]}),
        ("vae", {"mid_block_add_attention": False}),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
        ("text_encoder", {"hidden_act": "relu"}),
        ("text_encoder", {"use_sliding_window": True}),
    ],
)
def test_what_is_not_known_is_told_by_name(tiny_pipeline, tmp_path, part, changes):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    assert check_networks(model_args(folder)) == []
    change_config(folder, part, changes)
    ((key, value),) = changes.items()
    is_blocks = key == "down_block_types"
    told = f"blocks of type {value[0]} are" if is_blocks else f"{key}={value!r} is"
    assert check_networks(model_args(folder)) == [
        f"{part}: {told} not known in JAX; use train_text_to_image.py for this model"
    ]


def test_what_is_not_known_is_refused(fit, base, tmp_path, capsys):
    folder = shutil.copytree(base, tmp_path / "base")
    change_config(folder, "unet", {"dropout": 0.1})
    change_config(folder, "text_encoder", {"hidden_act": "relu"})
    output = fit(base=folder, status=2)
    said = capsys.readouterr().err
    assert "unet: dropout=0.1 is not known in JAX" in said
    assert "text_encoder: hidden_act='relu' is not known in JAX" in said
    assert not output.exists()


# -------------------------------------------------------------------------------------------- the step, against torch

ONE_STEP = {"max_train_steps": 1, "checkpointing_steps": 1, "learning_rate": 1e-2}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="epsilon"),
        pytest.param(
            {
                "snr_gamma": 1.0,
                "noise_offset": 0.5,
                "input_perturbation": 0.5,
                "random_flip": True,
                "center_crop": True,
            },
            id="epsilon, min-SNR",
        ),
        pytest.param(
            {
                "prediction_type": "v_prediction",
                "snr_gamma": 5.0,
                "caption_dropout": 0.5,
                "max_grad_norm": 0.1,
                "gradient_checkpointing": True,
            },
            id="v, min-SNR",
        ),
        pytest.param(ZERO_SNR, id="v, zero SNR"),
    ],
)
def test_one_step_is_that_of_the_torch_script(train_script, fit_once, base, wide, tmp_path, settings):
    """On crops that are random."""
    settings = {**ALIKE, **ONE_STEP, **settings}
    assert train(train_script, base, wide, tmp_path / "torch", **settings) == 0
    folder = fit_once(data=wide, **settings)
    there, here = read_log(tmp_path / "torch"), read_log(folder)
    assert here[0]["loss"] == pytest.approx(there[0]["loss"], rel=1e-5)
    assert here[0]["grad_norm"] == pytest.approx(there[0]["grad_norm"], rel=1e-4)
    assert relative_update(unet(folder), unet(tmp_path / "torch"), unet(base)) < 1e-4


@pytest.mark.slow
def test_a_short_run_is_that_of_the_torch_script(train_script, fit, tiny_pipeline, images, tmp_path):
    """Schedule, average, accumulation, short steps at the end of an epoch, held-out loss and its gain."""
    settings = {
        **ALIKE,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_decay": 0.5,
        "num_validation_samples": 1,
        "validation_steps": 3,
    }
    assert train(train_script, tiny_pipeline, images, tmp_path / "torch", **settings) == 0
    folder = fit("flax", base=tiny_pipeline, **settings)
    there, here = read_log(tmp_path / "torch"), read_log(folder)
    assert [row.keys() for row in here] == [row.keys() for row in there]
    for row, expected in zip(here, there, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert relative_update(unet(folder), unet(tmp_path / "torch"), unet(tiny_pipeline)) < 1e-3


def test_what_is_frozen_is_the_base_to_the_bit(fit_once, base):
    folder = fit_once(max_train_steps=1, save_flax=True)
    assert_equal(load_file(folder / VAE_FILE), load_file(base / VAE_FILE))
    assert_equal(text_encoder(folder), text_encoder(base))
    start, after = unet(base), unet(folder)
    assert not [name for name in start if torch.equal(start[name], after[name])]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    image = pipeline("a circle", num_inference_steps=2, height=32, width=32, output_type="np").images[0]
    assert np.isfinite(image).all()


@pytest.mark.slow
def test_scheduler_of_the_result_fits_its_objective(fit_once, wide):
    folder = fit_once(data=wide, **ONE_STEP, **ZERO_SNR)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr


@pytest.mark.slow
def test_bf16_trains_float32_weights(fit, fit_once):
    plain, half = fit_once(), fit(mixed_precision="bf16", checkpointing_steps=4)
    assert losses(half) != losses(plain)
    assert losses(half) == pytest.approx(losses(plain), rel=0.03)
    state = load_file(half / "checkpoint-4" / "state.safetensors")
    assert {array.dtype for name, array in state.items() if not name.endswith("count")} == {np.dtype(np.float32)}


def test_images_encoded_once_are_those_encoded_in_every_step(fit):
    """Square images: the centre is all there is. Half of them are mirrored."""
    settings = {"random_flip": True, "max_train_steps": 6}
    once, anew = fit("once", center_crop=True, **settings), fit("anew", **settings, dataloader_num_workers=2)
    assert losses(once) == pytest.approx(losses(anew), rel=1e-5)


@pytest.mark.slow
def test_accumulation_equals_a_larger_batch(fit, fit_once):
    """Five images in steps of four: the second step of an epoch is short in both."""
    whole = fit_once(train_batch_size=4, **SHARED)
    parts = fit("parts", train_batch_size=1, gradient_accumulation_steps=4, **SHARED)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    file = "checkpoint-4/unet/diffusion_pytorch_model.safetensors"
    there, here = (load_file(folder / file) for folder in (whole, parts))
    assert max(np.abs(here[name] - there[name]).max() for name in there) < 1e-6


def test_fp16_is_the_precision_of_what_is_frozen(script, fit, fit_once, base, monkeypatch):
    """As it was in diffusers' script: the UNet's gradients would vanish in it."""
    one_step = {"max_train_steps": 1, "save_flax": True}  # whose program other tests have made
    plain, dtypes = fit_once(**one_step), {}
    frozen, apply_unet_there = script.frozen, script.apply_unet

    def frozen_and_note(function, model, dtype):
        dtypes[type(model).__name__] = dtype
        return frozen(function, model, dtype)

    def apply_unet_and_note(weights, *args, **settings):
        dtypes["UNet"] = {array.dtype for array in weights.values()}
        return apply_unet_there(weights, *args, **settings)

    monkeypatch.setattr(script, "frozen", frozen_and_note)
    monkeypatch.setattr(script, "apply_unet", apply_unet_and_note)
    half = fit(mixed_precision="fp16", checkpointing_steps=1, **one_step)
    float32 = jnp.dtype(jnp.float32)
    assert dtypes == {"AutoencoderKL": jnp.float16, "CLIPTextModel": jnp.float16, "UNet": {float32}}
    assert losses(half) != losses(plain)
    assert losses(half) == pytest.approx(losses(plain), rel=3e-3)
    state = load_file(half / "checkpoint-1" / "state.safetensors")
    assert {array.dtype for name, array in state.items() if not name.endswith("count")} == {np.dtype(np.float32)}
    assert_equal(load_file(half / VAE_FILE), load_file(base / VAE_FILE))  # the copy that is saved is not rounded


def test_the_plan_says_what_fp16_is_for(fit, capsys):
    fit(mixed_precision="fp16", dry_run=True)
    said = capsys.readouterr().out
    assert "passes in float32; frozen: VAE, text encoder, in float16" in " ".join(said.split())
    fit(mixed_precision="bf16", dry_run=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "passes in bfloat16; frozen: VAE, text encoder optimizer" in said  # the next row


def test_flags_of_the_torch_script_are_refused(script, capsys):
    for flag in ("use_8bit_adam", "offload_ema", "allow_tf32"):
        with pytest.raises(SystemExit):
            script.main([f"--{flag}"])
        assert f"--{flag} is not taken: {script.REPLACED_FLAGS[f'--{flag}']}" in capsys.readouterr().err


def test_a_bad_folder_gives_the_report_of_the_torch_script(
    script, train_script, tiny_pipeline, messy_folder, tmp_path, capsys
):
    messy = messy_folder()
    assert train(train_script, tiny_pipeline, messy.path, tmp_path / "torch") == 2
    there = capsys.readouterr()
    assert train(script, tiny_pipeline, messy.path, tmp_path / "flax") == 2
    here = capsys.readouterr()
    assert here.out == there.out
    assert here.err == there.err.replace("train_text_to_image.py", "train_text_to_image_flax.py")
    assert here.err.count("\n") > len(messy.bad)


# ---------------------------------------------------------------------------------------------- devices and hosts

# Of six images one is held out: the second step of an epoch has a single one, and three of four devices get a sample
# of weight 0.
SHARED = {
    "learning_rate": 1e-4,
    "center_crop": True,
    "random_flip": True,
    "use_ema": True,
    "checkpointing_steps": 2,
    "num_validation_samples": 1,
}


def assert_same_losses(folder, expected):
    """Asserts that the losses of steps and of held-out images are the same to rounding."""
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-5)
    here, there = [
        [row["held_out_loss"] for row in read_log(place) if "held_out_loss" in row] for place in (folder, expected)
    ]
    assert len(there) == 2
    assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.slow
def test_four_devices_equal_one(fit_once, base, images, cache, tmp_path):
    one = fit_once(train_batch_size=4, **SHARED)
    line = words(base, images, tmp_path / "four", train_batch_size=1, cache_dir=cache, **ALIKE, **SHARED)
    result = run_script(line, script=FLAX, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4"})
    assert result.returncode == 0, result.stderr
    assert "x 4 cpu devices" in result.stdout
    assert_same_losses(tmp_path / "four", one)


@pytest.mark.slow
def test_two_hosts_equal_one(fit_once, base, images, cache, tmp_path):
    """With random crops, so that each host encodes its own images in every step."""
    settings = {**SHARED, "center_crop": False}
    one = fit_once(train_batch_size=4, **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    where = {"coordinator_address": address, "num_hosts": 2, "cache_dir": cache}
    line = words(base, images, tmp_path / "two", train_batch_size=2, **where, **ALIKE, **settings)
    (tmp_path / "elsewhere").symlink_to(base)  # as the second host knows the model
    own = [["--host_index=0"], ["--host_index=1", f"--pretrained_model_name_or_path={tmp_path / 'elsewhere'}"]]
    hosts = [start_script([*line, *flags], script=FLAX) for flags in own]
    said = [host.communicate(timeout=600)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert "Plan" in said[0]
    assert "Plan" not in said[1]
    assert_same_losses(tmp_path / "two", one)
    assert {path.name for path in (tmp_path / "two").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_hosts_have_to_be_numbered(fit, capsys):
    fit(coordinator_address="localhost:1", num_hosts=2, status=2)
    assert "--coordinator_address=localhost:1: HOST:PORT needs --num_hosts and --host_index" in capsys.readouterr().err
    fit(coordinator_address="localhost:1", num_hosts=2, host_index=2, status=2)
    assert "--host_index=2: must be below --num_hosts" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- checkpoints

EVERYTHING = {
    **ALIKE,
    "max_train_steps": 8,
    "checkpointing_steps": 4,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "caption_dropout": 0.3,
    "random_flip": True,
    "noise_offset": 0.05,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
}


@pytest.fixture(scope="module")
def straight(fit_once, wide):
    """The output of eight steps without interruption."""
    return fit_once(data=wide, **EVERYTHING)


def assert_same_run(folder, straight):
    files = [path.relative_to(straight) for path in straight.rglob("*.safetensors")]
    last = {file.as_posix() for file in files if file.parts[0] == "checkpoint-8"}
    weights = [f"checkpoint-8/{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "unet_ema")]
    assert last == {"checkpoint-8/state.safetensors", *weights}
    for file in files:
        assert_equal(load_file(folder / file), load_file(straight / file))
    assert read_log(folder) == read_log(straight)


def test_no_file_of_the_result_names_a_path(straight, base):
    """They are what --push_to_hub uploads."""
    for path in [path for path in straight.rglob("*.json") if path.name not in ("args.json", "progress.json")]:
        assert str(base) not in path.read_text(), path
    assert str(base) not in (straight / "README.md").read_text()


def test_resumed_equals_straight(fit, straight, wide, tmp_path):
    names = {name.split("/")[0] for name in load_file(straight / "checkpoint-8" / "state.safetensors")}
    assert names == {"optimizer"}
    shutil.copytree(straight, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    shutil.rmtree(tmp_path / "out" / "unet")
    assert_same_run(fit(data=wide, resume_from_checkpoint="latest", **EVERYTHING), straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_is_resumed(script, fit, straight, wide, tmp_path, monkeypatch, number):
    write_log = script.write_log

    def write_log_and_signal(accelerator, output_dir, step, numbers):
        write_log(accelerator, output_dir, step, numbers)
        if step == 4:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_log", write_log_and_signal)
        fit(data=wide, status=128 + number, **EVERYTHING)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert_same_run(fit(data=wide, resume_from_checkpoint="latest", **EVERYTHING), straight)
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    last_step = rows[0]["last_step"]
    events = [("started", 0), ("stopped", 5), ("resumed", 5), ("finished", last_step)]
    assert [(row["event"], row["step"]) for row in rows] == events
    assert rows[1]["why"] == number.name


def test_changed_resume_is_refused_unless_allowed(fit, straight, wide, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "out")
    settings = {**EVERYTHING, "data": wide, "resume_from_checkpoint": "latest", "learning_rate": 1e-5}
    fit(**settings, status=2)
    assert "learning_rate: 0.001 there, 1e-05 now" in capsys.readouterr().err
    fit(**settings | {"use_ema": False, "ema_decay": None}, allow_changed_resume=True, status=2)
    assert "use_ema: True there, False now" in capsys.readouterr().err
    fit(**settings, allow_changed_resume=True)


def test_a_checkpoint_of_the_torch_script_is_refused(train_script, fit, base, images, tmp_path, capsys):
    settings = {"max_train_steps": 2, "checkpointing_steps": 1}
    assert train(train_script, base, images, tmp_path / "torch", **settings) == 0
    fit(**settings, resume_from_checkpoint=tmp_path / "torch" / "checkpoint-1", status=2)
    assert "state: ['optimizer', 'lr_scheduler'] there, ['unet', 'optimizer'] now" in capsys.readouterr().err


def test_broken_step_ends_the_run_before_it_does_harm(fit, capsys):
    folder = fit(learning_rate=1e30, status=1)
    assert "a lower --learning_rate" in capsys.readouterr().err
    (checkpoint,) = folder.glob("checkpoint-*")
    for file in ("state.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert all(np.isfinite(array).all() for array in load_file(checkpoint / file).values())


def test_skipped_steps_are_told_at_the_end(fit, capsys):
    """After the first step, whose rate leaves nothing to compute with."""
    fit(learning_rate=1e30, max_nan_steps=100)
    assert "\n3 of 4 steps were skipped, since loss or gradient was not finite.\n" in capsys.readouterr().out


def test_a_run_says_that_it_compiles_and_how_long_that_took(fit, capsys):
    """Before its first line on a step, be it the first of all or not; a run without one compiles nothing."""
    for last_step, first_line in ((1, "Step 1 of 1: "), (2, "Step 2 of 2: ")):
        fit(max_train_steps=last_step, checkpointing_steps=1, resume_from_checkpoint="latest")
        told = "Compiling the step, which may take minutes.\nCompiled: the first step took "
        assert re.search(rf"\n{told}\d+\.\d s\.\n{first_line}", capsys.readouterr().out)
    fit(max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert "Compil" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- Flax's own files

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
FILES = {"unet": "diffusion_flax_model", "vae": "diffusion_flax_model", "text_encoder": "flax_model"}
LISTS = {
    "down_blocks",
    "up_blocks",
    "resnets",
    "attentions",
    "transformer_blocks",
    "downsamplers",
    "upsamplers",
    "net",
    "to_out",
}


def flax_tree(part, weights, dtype):
    """The tree that Flax's classes had, from the definition of the layout."""
    flat = {}
    for name, value in weights.items():
        words, path = name.split("."), []
        while words:
            word = words.pop(0)
            path.append(f"{word}_{words.pop(0)}" if word in LISTS and words[0].isdigit() else word)
        if part == "vae":
            path = [OLD_ATTENTION.get(word, word) for word in path]
        if part == "text_encoder":
            path = ["text_model", *path]
        array, kind = value.float().numpy().astype(dtype), path.pop()
        if kind == "weight":
            kind = {1: "scale", 2: "kernel", 4: "kernel"}[array.ndim]
            if path[-1] in ("token_embedding", "position_embedding"):
                kind = "embedding"
        if kind == "kernel":
            array = array.T if array.ndim == 2 else np.moveaxis(array, (0, 1), (3, 2))
        flat[*path, kind] = array
    return traverse_util.unflatten_dict(flat)


def write_flax_pipeline(source, folder, monkeypatch, dtype=np.float32):
    """A pipeline folder as Flax's pipeline wrote it, with arrays in chunks."""
    pipeline = StableDiffusionPipeline.from_pretrained(source)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 2_000)
    for part, file in FILES.items():
        content = serialization.to_bytes(flax_tree(part, getattr(pipeline, part).state_dict(), dtype))
        assert b"__msgpack_chunked_array__" in content
        (folder / part / f"{file}.msgpack").write_bytes(content)
    change_config(folder, "unet", {"_class_name": "FlaxUNet2DConditionModel", "split_head_dim": False})
    change_config(folder, "vae", {"_class_name": "FlaxAutoencoderKL"})
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "FlaxPNDMScheduler"}))
    return folder


def rounded(weight, dtype):
    """A weight of PyTorch's in float32, as `dtype` of JAX keeps it."""
    return weight if dtype is np.float32 or not weight.is_floating_point() else weight.bfloat16().float()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_flax_weights_are_read_in_float32(tiny_pipeline, tmp_path, monkeypatch, dtype):
    source = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    found = read_flax(write_flax_pipeline(tiny_pipeline, tmp_path / "base", monkeypatch, dtype))
    for part in FILES:
        expected = getattr(source, part).state_dict()
        assert_equal(
            getattr(found, part).state_dict(), {name: rounded(value, dtype) for name, value in expected.items()}
        )
    assert type(found.scheduler) is type(source.scheduler)
    assert found.scheduler.config.beta_end == source.scheduler.config.beta_end


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_flax_weights_load_train_and_come_out_as_torch(fit, fit_once, base, tmp_path, monkeypatch, dtype):
    """Without a flag, where there are no others."""
    flax_base = write_flax_pipeline(base, tmp_path / "base", monkeypatch, dtype)
    folder = fit(base=flax_base, max_train_steps=1)
    result, source = (StableDiffusionPipeline.from_pretrained(place) for place in (folder, base))
    for part in ("vae", "text_encoder"):
        expected = getattr(source, part).state_dict()
        assert_equal(
            getattr(result, part).state_dict(), {name: rounded(value, dtype) for name, value in expected.items()}
        )
    here, there = result.unet.state_dict(), source.unet.state_dict()
    assert 0 < max((here[name] - rounded(there[name], dtype)).abs().max() for name in there) < 2e-3
    if dtype is np.float32:
        from_torch = fit_once(max_train_steps=1, save_flax=True)
        assert losses(folder) == losses(from_torch)
        assert_equal(unet(folder), unet(from_torch))


@pytest.fixture
def both(base, tmp_path, monkeypatch):
    """A base with PyTorch's weights, and Flax's, which are another UNet's, beside them."""
    folder = tmp_path / "both"
    write_flax_pipeline(base, folder, monkeypatch)
    for file in base.glob("*/*.safetensors"):
        shutil.copy(file, folder / file.relative_to(base))
    path = folder / "unet" / "diffusion_flax_model.msgpack"
    tree = serialization.msgpack_restore(path.read_bytes())
    tree["conv_out"]["bias"] = tree["conv_out"]["bias"] + np.float32(1)
    path.write_bytes(serialization.to_bytes(tree))
    return folder


def test_where_both_lie_a_flag_chooses(script, both, capsys):
    args = {name: vars(model_args(both, **{name: True})) for name in ("from_pt", "from_flax", "neither")}
    kinds = {name: script.reads_flax(SimpleNamespace(**flags)) for name, flags in args.items()}
    assert kinds == {"from_pt": False, "from_flax": True, "neither": False}
    assert [script.check_flax(SimpleNamespace(**flags)) for flags in args.values()] == [[], [], []]
    biases = {}
    for name, flags in args.items():
        namespace = SimpleNamespace(**flags, prediction_type=None, rescale_betas_zero_snr=False)
        pipeline, _ = script.load_models(namespace)
        biases[name] = pipeline.unet.conv_out.bias.detach()
    assert torch.equal(biases["from_pt"], biases["neither"])
    assert torch.equal(biases["from_flax"], biases["from_pt"] + 1)


CONTRADICTIONS = [  # kinds of weights, flags, what is said
    ("flax", {"from_pt": True}, "--from_pt=True: the model has Flax weights alone; drop this"),
    ("torch", {"from_flax": True}, "--from_flax=True: the model has no unet/diffusion_flax_model.msgpack; drop this"),
    ("both", {"from_flax": True, "from_pt": True}, "--from_pt=True: contradicts --from_flax; drop one"),
    ("flax", {"variant": "fp16"}, "--variant=fp16: does nothing without a PyTorch pipeline folder or Hub id; drop"),
    ("both", {"variant": "fp16", "from_flax": True}, "--variant=fp16: does nothing without a PyTorch pipeline"),
    ("torch", {"from_pt": True}, None),
    ("both", {"variant": "fp16"}, None),
]


def write_names(folder, kinds):
    """A folder with the files that tell which weights there are, and nothing in them."""
    names = {"flax": ["diffusion_flax_model.msgpack"], "torch": ["diffusion_pytorch_model.fp16.bin"]}
    (folder / "unet").mkdir(parents=True)
    for name in names["flax"] + names["torch"] if kinds == "both" else names[kinds]:
        (folder / "unet" / name).write_text("")
    return folder


@pytest.mark.parametrize("kinds, flags, says", CONTRADICTIONS)
@pytest.mark.parametrize("place", ["folder", "cache", "hub"])
def test_weights_are_told_by_their_files(script, tmp_path, monkeypatch, kinds, flags, says, place):
    """In a folder; in a repository that is in the cache, without a connection; in one on the Hub."""
    name, cache_dir = "user/base", tmp_path / "cache"
    if place == "cache":
        refs = cache_dir / "models--user--base" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text("0" * 40)
        write_names(refs.parent / "snapshots" / ("0" * 40), kinds)
    else:
        folder = write_names(tmp_path / "base", kinds)
        name = str(folder) if place == "folder" else name
    if place == "hub":
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
        monkeypatch.setattr(script.HfApi, "list_repo_files", lambda self, name, revision: files)
    found = script.check_flax(model_args(name, cache_dir=cache_dir, **flags))
    assert [problem.startswith(says) for problem in found] == [True] if says else found == []


def test_a_repository_of_flax_weights_loads_from_the_cache(script, base, images, tmp_path, monkeypatch):
    """Without a flag, and without a connection."""
    refs = tmp_path / "cache" / "models--user--base" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0" * 40)
    write_flax_pipeline(base, refs.parent / "snapshots" / ("0" * 40), monkeypatch)
    line = words("user/base", images, tmp_path / "out", cache_dir=tmp_path / "cache")
    args, problems = script.parse_flags(script.make_parser(), line, {})
    assert problems + script.check_args(args) == []
    pipeline, _ = script.load_models(args)
    source = StableDiffusionPipeline.from_pretrained(base)
    for part in FILES:
        assert_equal(getattr(pipeline, part).state_dict(), getattr(source, part).state_dict())


def test_private_flax_weights_are_reached_by_the_token(base, tmp_path, fake_hub, monkeypatch):
    """What there is, and the weights; the stored token is another one."""
    fake_hub.add_repo("user/base", files_of(write_flax_pipeline(base, tmp_path / "base", monkeypatch)), private=True)
    fake_hub.readers = {"user/base": "hf_reader"}
    args = model_args("user/base", cache_dir=tmp_path / "cache")
    with reaching(fake_hub, monkeypatch):
        assert not reads_flax(args)  # since nothing is known of it
        args.hub_token = "hf_reader"
        assert reads_flax(args)
        pipeline = load_flax(args)
    source = StableDiffusionPipeline.from_pretrained(base)
    for part in FILES:
        assert_equal(getattr(pipeline, part).state_dict(), getattr(source, part).state_dict())


def test_a_weight_too_many_or_too_few_in_flax_is_refused(fit, base, tmp_path, monkeypatch, capsys):
    flax_base = write_flax_pipeline(base, tmp_path / "base", monkeypatch)
    path = flax_base / "unet" / "diffusion_flax_model.msgpack"
    tree = serialization.msgpack_restore(path.read_bytes())
    tree["conv_more"] = tree.pop("conv_in")
    path.write_bytes(serialization.to_bytes(tree))
    fit(base=flax_base, status=2)
    assert "conv_more" in capsys.readouterr().err


def assert_flax_files(folder, pipeline, dtype):
    """Asserts that a folder holds a pipeline's weights in the published layout, by the test's own writer; `dtype` is
    that of UNet and VAE."""
    for part, file in FILES.items():
        tree = flax_tree(part, getattr(pipeline, part).state_dict(), np.float32)
        expected = traverse_util.flatten_dict(tree)
        found = serialization.msgpack_restore((folder / part / f"{file}.msgpack").read_bytes())
        found = traverse_util.flatten_dict(found)
        assert_equal({name: np.float32(array) for name, array in found.items()}, expected)
        assert {array.dtype for array in found.values()} == {np.dtype(np.float32 if part == "text_encoder" else dtype)}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_flax_weights_are_written_in_the_published_layout(tiny_pipeline, tmp_path, dtype):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    if dtype is jnp.bfloat16:
        pipeline.unet.bfloat16()
        pipeline.vae.bfloat16()
    for part in FILES:
        (tmp_path / part).mkdir()
    write_flax(pipeline, tmp_path)
    assert_flax_files(tmp_path, pipeline, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("save_precision, dtype", [("no", np.float32), ("bf16", jnp.bfloat16)])
def test_saved_flax_weights_are_the_result(fit, fit_once, save_precision, dtype):
    """And they are read again."""
    folder = fit_once(max_train_steps=1, save_flax=True, save_precision=save_precision)
    assert_flax_files(folder, StableDiffusionPipeline.from_pretrained(folder), dtype)
    again = fit("again", base=folder, from_flax=True, max_train_steps=1)
    assert losses(again) == losses(fit("torch", base=folder, max_train_steps=1))


# ---------------------------------------------------------------------------------------------------- on the whole


def test_plan_without_training(script, fit, base, monkeypatch, capsys):
    told, count = [], script.checkpoint_bytes
    monkeypatch.setattr(script, "checkpoint_bytes", lambda run: told.append(count(run)) or told[-1])
    warm_up = {"lr_scheduler": "linear", "lr_warmup_steps": 9, "max_train_steps": 4}
    folder = fit(dry_run=True, gradient_accumulation_steps=2, **warm_up)
    said = capsys.readouterr().out
    assert "  warning    --lr_warmup_steps=9: in 4 steps the learning rate never arrives; use fewer" in said
    num_trained = sum(weight.numel() for weight in unet(base).values())
    assert "4 images: 2 a pass x 2 passes x 1 cpu device" in said
    assert f"trained    UNet, {num_trained:,} parameters in float32" in said
    assert set(told) == {4 * (3 * num_trained + 1)}  # weights, two moments, a count
    assert "encoded in every step; once with --center_crop" in " ".join(said.split())
    assert not folder.exists()


def test_samples_and_card(fit, monkeypatch):
    """As the flags say, and as a user's own code draws them from the result."""
    settings = {"validation_prompts": ["a red circle", "a blue square"], "validation_prompt": "a green star"}
    settings |= {"num_validation_images": 1, "validation_num_inference_steps": 3, "validation_guidance_scale": 2}
    settings |= {"validation_scheduler": "DDPMScheduler", "validation_negative_prompt": "a body"}
    folder = fit(max_train_steps=2, seed=7, validation_epochs=1, **settings)
    names = ["step-000000.png", "step-000002.png"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == names
    before, after = [np.array(Image.open(folder / "samples" / name), int) for name in names]
    assert before.shape == after.shape == (32, 3 * 32, 3)
    assert not np.array_equal(before, after)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    # The default is to clip, which is for pixels; a pipeline that is made with such a scheduler turns it off.
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    for number, prompt in enumerate(["a red circle", "a blue square", "a green star"]):
        alone = pipeline(
            prompt,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=2.0,
            negative_prompt="a body",
            generator=torch.Generator().manual_seed(7 + number),
        ).images[0]
        assert np.abs(np.array(alone, int) - after[:, 32 * number : 32 * (number + 1)]).max() <= 1
    card = (folder / "README.md").read_text()
    assert "![samples](samples/step-000002.png)" in card
    assert "a red circle; a blue square; a green star" in card
    assert "- For 2 steps of 2 images each, which is 0.7 epochs, at a learning rate of " in card
    drawn, pipeline = run_code(code_in(card), folder.parent, monkeypatch)
    torch.manual_seed(0)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "a body"}
    expected = pipeline("a red circle", height=32, width=32, **settings).images[0]
    assert np.array_equal(drawn, np.array(expected, int))


def make_look(base, output_dir, encoded):
    """A look at a run at its third step, as a function of `stop_asked`, of five images and two prompts; counts the
    images that it encodes in the list `encoded`."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def vae(pixels):
        encoded.append(len(pixels))
        return np.zeros((len(pixels), 8, 1, 1), np.float32)

    def losses_of(weights, batch):
        return jnp.square(batch["noise"]).mean((1, 2, 3))

    with ThreadPoolExecutor(1) as pool:
        images = grey_samples(5, latent_shape=(4, 1, 1))
        held_out = encode_once(images, vae, lambda tokens: np.zeros((len(tokens), 1, 1), np.float32), 2, pool)
    measure = make_measure(losses_of, mesh, held_out, 2)
    output_dir.mkdir()
    progress = {"global_step": 3, "base_losses": None, "losses": []}
    run = Run(output_dir, {}, progress, {"unet": arrays_of(pipeline.unet)}, SimpleNamespace(last_step=4))
    args = parse("--resolution=32", "--train_batch_size=1", "--validation_num_inference_steps=2")
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    prompts = ["a red circle", "a blue square"]
    return functools.partial(validate, args, Accelerator(cpu=True), run, pipeline, scheduler, measure, prompts)


@pytest.mark.parametrize("after", [0, 4, 10, 12, 15])
def test_a_look_that_is_given_up_leaves_nothing(base, tmp_path, after):
    """Ten batches of losses; two of samples, of two steps each; and what is asked at the end."""
    encoded, asked = [], []
    look = make_look(base, tmp_path / "out", encoded)

    def stop_asked():
        asked.append(None)
        return len(asked) > after

    with pytest.raises(LookGivenUp):
        look(stop_asked)
    assert list((tmp_path / "out").iterdir()) == []
    assert len(asked) <= after + 3
    asked.clear()
    loss = look(lambda: bool(asked.append(None)))
    assert len(asked) == 10 + 2 * (1 + 2) + 1
    assert (tmp_path / "out" / "samples" / "step-000003.png").exists()
    (row,) = read_log(tmp_path / "out")
    noise = [[draws(0, part, index, (4, 1, 1)).noise for part in range(4)] for index in range(5)]
    assert row["held_out_loss"] == loss == pytest.approx(np.square(noise).mean(), rel=1e-5)
    assert sum(encoded) == 6  # five images once, in batches of two


def test_all_hosts_give_up_if_one_is_stopped(base, tmp_path, monkeypatch):
    """Here the other one, of which this one only hears."""
    look = make_look(base, tmp_path / "out", [])
    heard = []

    def allgather(mine):
        heard.append(bool(mine))
        return np.array([mine, len(heard) == 7])

    monkeypatch.setattr("sdtune.flax.validation.multihost_utils.process_allgather", allgather)
    with pytest.raises(LookGivenUp):
        look(lambda: False)
    assert heard == [False] * 7 + [True]  # it stops measuring, and says at the end that it did
    assert list((tmp_path / "out").iterdir()) == []


def test_hosts_that_do_not_agree_end(monkeypatch):
    """They would wait for each other for ever. Here the other host is at another step."""

    def allgather(mine):
        other = mine.copy()
        other[0] += 1
        return np.stack([mine, other])

    values = {"global_step": 2, "captioned_images": "abc"}
    check_agreement(values)
    monkeypatch.setattr("sdtune.flax.training.multihost_utils.process_allgather", allgather)
    with pytest.raises(InputError) as told:
        check_agreement(values)
    assert str(told.value).splitlines()[1:] == ["  global_step: 2 here"]
    assert "one --output_dir that they share" in str(told.value)
    for value in ("0a" * 32, {"a.tar": 1}):
        with pytest.raises(InputError) as told:
            check_agreement({"captioned_images": value})
        assert str(told.value).splitlines()[1:] == ["  captioned_images: not the same here"]


@pytest.fixture
def second_host(monkeypatch):
    """Has this process be the second of two hosts, which hears the JSON of a text in the place of what it says; a
    function that takes that text. Both have to say arrays of the same shape."""

    def hear(text):
        heard = [np.int32(len(text.encode())), np.frombuffer(text.encode(), np.uint8)]

        def broadcast(mine):
            first = heard.pop(0)
            assert (mine.shape, mine.dtype) == (first.shape, first.dtype)
            return first

        monkeypatch.setattr("sdtune.flax.training.multihost_utils.broadcast_one_to_all", broadcast)

    monkeypatch.setattr("sdtune.flax.training.jax.process_index", lambda: 1)
    return hear


@pytest.mark.parametrize(
    "first", ['[null, ["\u00e9"], {"a": 1}]', '{"a longer one than the other one has": [1, 2, 3]}']
)
def test_hosts_are_told_by_the_first_one(second_host, first):
    mine = ["checkpoint-\u00fc", [], {"output_dir": "/mine"}]
    assert told_by_first(mine) == mine
    second_host(first)
    assert told_by_first(mine) == json.loads(first)


def make_checkpoint(folder, settings, step=2):
    """A checkpoint of a run with those settings, without weights; returns its folder."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "args.json").write_text(json.dumps(settings))
    (checkpoint / "progress.json").write_text(json.dumps({"global_step": step}))
    write_digests(checkpoint)
    return checkpoint


def test_hosts_go_on_from_the_checkpoint_of_the_first_one(second_host, tmp_path, monkeypatch):
    """Which knows folders by other paths, and those are in the checkpoint. This host would take another one."""
    settings = {"output_dir": str(tmp_path), "pretrained_model_name_or_path": "mine", "host_index": 1, "seed": 0}
    chosen, newer = make_checkpoint(tmp_path, settings), make_checkpoint(tmp_path, settings, 3)
    run = Run(tmp_path, settings, {}, {}, None)
    theirs = {"output_dir": "/theirs", "pretrained_model_name_or_path": "theirs", "host_index": 0}
    second_host(json.dumps(["checkpoint-2", [], theirs]))
    assert choose_checkpoint(run, "latest") == (chosen, theirs)
    second_host(json.dumps([None, [], theirs]))
    assert choose_checkpoint(run, "latest") == (None, theirs)
    second_host(json.dumps([None, ["checkpoint-3 is damaged"], theirs]))
    with pytest.raises(InputError, match="checkpoint-3 is damaged"):
        choose_checkpoint(run, "checkpoint-3")
    monkeypatch.undo()  # this is the first host, then
    own = {name: settings[name] for name in theirs}
    assert choose_checkpoint(run, "latest") == (newer, own)
    assert choose_checkpoint(run, "checkpoint-2") == (chosen, own)


def test_a_host_that_does_not_see_the_checkpoint_ends_all(second_host, tmp_path, monkeypatch):
    run = Run(tmp_path, {}, {}, {}, None)
    second_host(json.dumps(["checkpoint-2", [], {}]))
    monkeypatch.setattr(
        "sdtune.flax.training.multihost_utils.process_allgather", lambda mine: np.stack([mine * 0, mine])
    )
    with pytest.raises(InputError) as told:
        choose_checkpoint(run, "latest")
    assert str(told.value).splitlines()[1:] == ["  checkpoint-2: not seen here"]
    assert "the hosts do not agree; all need the same flags" in str(told.value)


def test_a_host_hears_that_another_one_cannot_go_on(tmp_path, monkeypatch):
    """It would wait for it, or train alone."""
    checkpoint = make_checkpoint(tmp_path, {})
    args = SimpleNamespace(mixed_precision=None, resume_from_checkpoint="latest")
    monkeypatch.setattr("sdtune.flax.training.new_run", lambda *_: Run(tmp_path, {}, {"global_step": 0}, {}, None))
    monkeypatch.setattr("sdtune.flax.training.resume", lambda *_: None)
    start_run(args, None, {}, {"captioned_images": "a"}, None, set(), set())
    monkeypatch.setattr("sdtune.flax.training.on_some_host", lambda mine: True)
    with pytest.raises(InputError) as told:
        start_run(args, None, {}, {"captioned_images": "a"}, None, set(), set())
    assert str(told.value) == f"{checkpoint}: another host cannot go on from it; read what it says"

    def fail(*_):
        raise InputError("--seed: another one")

    monkeypatch.setattr("sdtune.flax.training.resume", fail)
    with pytest.raises(InputError, match="--seed: another one"):
        start_run(args, None, {}, {"captioned_images": "a"}, None, set(), set())


@pytest.mark.parametrize("index", [0, 1])
def test_hosts_that_share_no_output_folder_end(tmp_path, monkeypatch, index):
    """Of three hosts the third one sees another folder; all are told, and nothing stays behind."""
    seen = []

    def allgather(mine):
        seen.append(bool(mine))
        return np.array([True, True, False])

    monkeypatch.setattr("sdtune.flax.training.jax.process_count", lambda: 3)
    monkeypatch.setattr("sdtune.flax.training.jax.process_index", lambda: index)
    monkeypatch.setattr("sdtune.flax.training.multihost_utils.broadcast_one_to_all", lambda numbers: numbers * 0)
    monkeypatch.setattr("sdtune.flax.training.multihost_utils.sync_global_devices", lambda name: None)
    monkeypatch.setattr("sdtune.flax.training.multihost_utils.process_allgather", allgather)
    if index:
        (tmp_path / ".token").write_text("00" * 16)
    args = SimpleNamespace(output_dir=str(tmp_path), dry_run=False)
    with pytest.raises(InputError) as told:
        check_shared_output(args)
    assert str(told.value) == (
        f"--output_dir={tmp_path}: what host 0 writes there is not seen by host 2; this is host {index}, "
        f"{socket.gethostname()}, which looks into {tmp_path}; name one folder that all machines share, by its whole "
        "path"
    )
    assert seen == [True]
    assert (tmp_path / ".token").exists() == bool(index)  # the first host removes it
    (tmp_path / ".token").write_text("another")
    monkeypatch.setattr("sdtune.flax.training.PATIENCE_WITH_FOLDERS", 0)
    if index:
        with pytest.raises(InputError):
            check_shared_output(args)
        assert seen == [True, False]
    check_shared_output(SimpleNamespace(output_dir=str(tmp_path / "none"), dry_run=True))


def test_losses_fall_where_there_is_little_to_learn(fit, tmp_path):
    data = write_image_folder(tmp_path / "two", 2)
    history = losses(fit(data=data, max_train_steps=100, learning_rate=3e-3, center_crop=True))
    assert np.mean(history[-20:]) < 0.6 * np.mean(history[:5])


@pytest.mark.slow
def test_a_stream_goes_on_and_is_trained_on_as_in_pytorch(fit, train_script, base, tmp_path):
    """Thirteen images in two shards, two of them held out, over two epochs: with whole passes of two."""
    settings = {"dataset_name": write_shards(tmp_path / "set", "tar", [7, 6]), "streaming": True, "data": None}
    settings |= {"num_validation_samples": 2, "shuffle_buffer_size": 4, "max_train_steps": 9}
    whole = fit("whole", **settings)
    assert fit("parts", **{**settings, "max_train_steps": 4})
    parts = fit("parts", resume_from_checkpoint="latest", **settings)
    assert_equal(unet(parts), unet(whole))
    assert losses(parts) == losses(whole)
    del settings["data"]
    assert train(train_script, base, None, tmp_path / "torch", cache_dir=tmp_path, **ALIKE, **settings) == 0
    assert losses(whole) == pytest.approx(losses(tmp_path / "torch"), rel=1e-3)
    fit("parts", resume_from_checkpoint="latest", status=2, **{**settings, "data": None, "shuffle_buffer_size": 5})


def test_a_stream_leaves_out_in_jax_too(fit, tmp_path, capsys):
    rows = make_rows(7)
    rows[2] = (b"a note", "note.png", "no picture")
    write_tar(tmp_path / "set" / "a.tar", rows)
    out = fit(data=None, dataset_name=tmp_path / "set", streaming=True, max_train_steps=4)
    told = "Left out of the stream, once in all epochs:\n  a.tar: note.png: no image that Pillow knows"
    assert told in capsys.readouterr().err
    assert all(loss > 0 for loss in losses(out))


def test_a_step_without_a_usable_image_changes_nothing_in_jax(fit, base, tmp_path):
    rows = [(b"a note", f"note_{number}.png", "no picture") for number in range(2)] + make_rows(4)
    write_tar(tmp_path / "set" / "a.tar", rows)
    settings = {"data": None, "dataset_name": tmp_path / "set", "streaming": True, "shuffle_buffer_size": 1}
    settings |= {"train_batch_size": 2, "adam_weight_decay": 0.9}
    before = unet(base)
    assert_equal(unet(fit("first", **settings, max_train_steps=1)), before)
    after = unet(fit("second", **settings, max_train_steps=2))
    assert any(not np.array_equal(after[name], before[name]) for name in before)
