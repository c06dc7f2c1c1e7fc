"""What a run trains and what it leaves alone, its rates, averages and precisions, and what it shows on the way."""

import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from image_data import caption_of, make_image, snapshot, write_image_folder
from original_layout import save_original
from PIL import Image
from running import REPO
from safetensors.torch import load_file, save_file
from training import checkpoint_state, checkpoint_unet, draws, losses, parse, read_log, same, text_encoder, train, unet

from sdtune.training import choose_num_workers, make_accelerator


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 6)


@pytest.fixture(scope="module")
def plain(train_script, tiny_pipeline, images, tmp_path_factory):
    """The output of four steps of two images, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert train(train_script, tiny_pipeline, images, folder, checkpointing_steps=1) == 0
    return folder


@pytest.fixture
def fit(train_script, tiny_pipeline, images, tmp_path):
    """Runs the script on the tiny pipeline and the images; returns the folder of its output."""

    def run(name="out", base=tiny_pipeline, data=images, **settings):
        assert train(train_script, base, data, tmp_path / name, **settings) == 0
        return tmp_path / name

    return run


def largest_difference(a, b):
    """Of two sets of weights, by name."""
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


# --------------------------------------------------------------------------------------------------- what is trained


def test_every_weight_of_the_unet_is_trained(fit, tiny_pipeline):
    """Without weight decay, which would move a weight that gets no gradient."""
    after, before = unet(fit(adam_weight_decay=0)), unet(tiny_pipeline)
    assert after.keys() == before.keys()
    assert not [name for name in after if torch.equal(after[name], before[name])]
    assert all(weight.dtype == torch.float32 for weight in after.values())


def vae(folder):
    """The VAE's weights in a pipeline folder, by name."""
    return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("weights_of", [vae, text_encoder])
def test_frozen_parts_are_the_base_to_the_bit(plain, tiny_pipeline, weights_of):
    assert same(weights_of(plain), weights_of(tiny_pipeline))


@pytest.mark.parametrize("kind", ["flattened", "published", "file"])
def test_text_encoder_is_saved_under_its_published_names(fit, tiny_pipeline, tmp_path, kind):
    """Whatever the base was: a folder of transformers 5, an older one, a single file. Libraries before transformers 5
    have the level text_model, and would take a file without it for one without weights."""
    settings, base = {"max_train_steps": 1}, tmp_path / "base"
    shutil.copytree(tiny_pipeline, base)
    names = {f"text_model.{name}" for name in text_encoder(tiny_pipeline)}
    assert {"text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.bias"} < names
    if kind == "published":
        weights = {f"text_model.{name}": weight for name, weight in text_encoder(base).items()}
        save_file(weights, base / "text_encoder" / "model.safetensors", {"format": "pt"})
    elif kind == "file":
        file = save_original(StableDiffusionPipeline.from_pretrained(base), tmp_path / "base.safetensors")
        settings, base = {**settings, "single_file_config": tiny_pipeline}, file
    folder = fit(base=base, **settings)
    file = folder / "text_encoder" / "model.safetensors"
    assert load_file(file).keys() == names
    assert same(text_encoder(folder), text_encoder(tiny_pipeline))
    assert file.stat().st_mode == (folder / "args.json").stat().st_mode
    loaded = StableDiffusionPipeline.from_pretrained(folder).text_encoder
    assert same(dict(loaded.state_dict()), text_encoder(tiny_pipeline))


def test_tokenizer_is_the_base(plain, tiny_pipeline):
    tokens = [json.loads((folder / "tokenizer" / "tokenizer.json").read_text()) for folder in (plain, tiny_pipeline)]
    assert tokens[0]["model"] == tokens[1]["model"]


def test_losses_fall_where_there_is_little_to_learn(fit, tmp_path):
    """Two images by heart: the loss on them, measured alike before and after, falls far below its start of 1."""
    data = write_image_folder(tmp_path / "two", 2)
    history = losses(fit(data=data, max_train_steps=40, learning_rate=3e-3))
    assert np.mean(history[:5]) == pytest.approx(1.1, abs=0.2)
    assert np.mean(history[-20:]) < 0.6 * np.mean(history[:5])


def test_held_out_loss_falls_on_what_resembles_the_training_images(fit):
    folder = fit(num_validation_samples=2, max_train_steps=20, validation_steps=10, learning_rate=3e-3)
    rows = [row for row in read_log(folder) if "held_out_loss" in row]
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert rows[0]["held_out_gain"] == 0
    assert rows[2]["held_out_loss"] < rows[1]["held_out_loss"] < rows[0]["held_out_loss"]
    assert rows[2]["held_out_gain"] == pytest.approx(rows[0]["held_out_loss"] - rows[2]["held_out_loss"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- rates

RATE = 1e-5  # another one than AdamW's own default
STEPS = 8
WARMUP = 2


def rates_of(fit, **settings):
    """The logged rates, as parts of RATE: each is that of the step that comes next. With accumulation a step is still
    a step."""
    settings = {"train_batch_size": 1, "gradient_accumulation_steps": 2, **settings}
    folder = fit(max_train_steps=STEPS, learning_rate=RATE, **settings)
    return [row["lr"] / RATE for row in read_log(folder)]


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


def restarted_cosine(progress, cycles):
    return cosine(progress * cycles % 1) if progress < 1 else 0.0


def polynomial(progress, power):
    """From 1 to what 1e-7 is of the rate."""
    end = 1e-7 / RATE
    return (1 - end) * (1 - progress) ** power + end


@pytest.mark.parametrize(
    "settings, after_warm_up",  # a function of the progress from there, 0 to 1
    [
        ({"lr_scheduler": "constant_with_warmup"}, lambda progress: 1),
        ({"lr_scheduler": "linear"}, lambda progress: 1 - progress),
        ({"lr_scheduler": "cosine"}, cosine),
        ({"lr_scheduler": "cosine_with_restarts"}, cosine),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
            lambda progress: restarted_cosine(progress, cycles=2),
        ),
        ({"lr_scheduler": "polynomial"}, lambda progress: polynomial(progress, power=1)),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, lambda progress: polynomial(progress, power=2)),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_rates_follow_their_schedule(fit, settings, after_warm_up):
    rates = rates_of(fit, lr_warmup_steps=WARMUP, **settings)
    rising = [step / WARMUP for step in range(1, WARMUP)]
    falling = [after_warm_up((step - WARMUP) / (STEPS - WARMUP)) for step in range(WARMUP, STEPS + 1)]
    assert rates == pytest.approx(rising + falling, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"lr_scheduler": "constant"}, [1] * STEPS),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:2,0.5:5,0.1"},
            [1, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1],
        ),
    ],
    ids=["constant", "piecewise_constant"],
)
def test_rates_without_warm_up(fit, settings, expected):
    assert rates_of(fit, **settings) == pytest.approx(expected, rel=1e-6)


def test_warm_up_begins_at_zero(fit, tiny_pipeline):
    """A first step at rate 0 leaves every weight as it was, weight decay or not."""
    folder = fit(max_train_steps=1, lr_scheduler="constant_with_warmup", lr_warmup_steps=5)
    assert same(unet(folder), unet(tiny_pipeline))


def test_scaled_rate_counts_batch_and_accumulation(fit, capsys):
    settings = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_steps": 1}
    scaled = fit("scaled", learning_rate=1e-4, scale_lr=True, **settings)
    by_hand = fit("by_hand", learning_rate=6e-4, **settings)
    assert read_log(scaled)[0]["lr"] == pytest.approx(6e-4, rel=1e-12)
    assert largest_difference(unet(scaled), unet(by_hand)) < 1e-9
    assert "0.0006" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- gradients


def clipped_norm(folder):
    """The norm of the gradient that the first step used: AdamW's first average is (1 - beta1) of it."""
    optimizer = checkpoint_state(folder / "checkpoint-1")["optimizer"]
    squares = [state["exp_avg"].square().sum().item() for state in optimizer["state"].values()]
    return 10 * math.sqrt(sum(squares))


@pytest.mark.parametrize("limit", [0.01, 1.0, math.inf])
def test_gradient_is_clipped_to_the_limit(fit, plain, limit):
    folder = fit(max_grad_norm=limit, max_train_steps=1, checkpointing_steps=1)
    norm = read_log(folder)[0]["grad_norm"]
    assert norm > 1
    assert norm == read_log(plain)[0]["grad_norm"]
    assert clipped_norm(folder) == pytest.approx(min(norm, limit), rel=1e-3)


def test_accumulation_equals_a_larger_batch(fit):
    """Six images in steps of four: the second step of an epoch is short in both. A large epsilon keeps AdamW from
    blowing up the rounding of gradients near zero."""
    settings = {"max_train_steps": 4, "adam_epsilon": 1e-3, "learning_rate": 1e-4}
    whole = fit("whole", train_batch_size=4, **settings)
    parts = fit("parts", train_batch_size=2, gradient_accumulation_steps=2, **settings)
    single = fit("single", train_batch_size=1, gradient_accumulation_steps=4, **settings)
    for other in (parts, single):
        assert losses(other) == pytest.approx(losses(whole), rel=1e-5)
        assert largest_difference(unet(other), unet(whole)) < 1e-6


def test_gradient_checkpointing_changes_nothing(fit, plain):
    folder = fit(gradient_checkpointing=True)
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-6)
    assert largest_difference(unet(folder), unet(plain)) < 1e-4


def test_8bit_adam_trains(fit, plain, tiny_pipeline):
    folder = fit(use_8bit_adam=True, checkpointing_steps=2)
    optimizer = checkpoint_state(folder / "checkpoint-4")["optimizer"]
    states = [state["__bnb_optimizer_quant_state__"] for state in optimizer["state"].values()]
    assert torch.uint8 in {state["state1"].dtype for state in states}
    assert losses(folder)[0] == losses(plain)[0]
    assert losses(folder) == pytest.approx(losses(plain), rel=0.05)
    assert 1e-4 < largest_difference(unet(folder), unet(tiny_pipeline)) < 2 * 4 * 1e-3


# ------------------------------------------------------------------------------------------------------------- average


def average_by_hand(start, folder, decays):
    """The average over the checkpoints of every step, in double precision."""
    average = {name: weight.double() for name, weight in start.items()}
    for step, decay in enumerate(decays, 1):
        weights = checkpoint_unet(folder / f"checkpoint-{step}")
        average = {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}
    return average


@pytest.mark.parametrize(
    "settings, decays",
    [
        ({}, [0, 2 / 11, 3 / 12, 4 / 13]),
        ({"ema_decay": 0.2}, [0, 2 / 11, 0.2, 0.2]),
        ({"ema_decay": 0.45, "ema_warmup": True}, [0, 1 - 2 ** (-2 / 3), 0.45, 0.45]),
        ({"ema_decay": 0.0}, [0, 0, 0, 0]),
    ],
    ids=["default", "decay", "warmup", "none"],
)
def test_result_is_the_average_over_the_steps(fit, plain, tiny_pipeline, settings, decays):
    """EMAModel's decay begins at (1 + n) / (10 + n), n steps after the first, or with warm-up at 1 - (1 + n) ** -2/3;
    the training itself stays as it is."""
    folder = fit(use_ema=True, checkpointing_steps=4, **settings)
    assert same(checkpoint_unet(folder / "checkpoint-4"), unet(plain))
    assert largest_difference(unet(folder), average_by_hand(unet(tiny_pipeline), plain, decays)) < 1e-6


def test_where_and_how_the_average_is_kept_does_not_matter(fit):
    settings = {"use_ema": True, "ema_decay": 0.5}
    result = unet(fit("plain_ema", **settings))
    for name, place in {"offloaded": {"offload_ema": True}, "loop": {"no-foreach_ema": True}}.items():
        assert same(unet(fit(name, **place, **settings)), result)


# --------------------------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_or_not_in_products_and_convolutions_alike(monkeypatch, allowed):
    """Of convolutions it is PyTorch's default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
    make_accelerator(parse(*["--allow_tf32"] * allowed))
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if allowed else "none")
    assert torch.backends.cuda.matmul.allow_tf32 is allowed


KEEPS_MEMORY = """
import resource
import torch
from sdtune.training import keep_freed_memory

def times_touched(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**18 * mebibytes)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return pages / (2**20 * mebibytes / resource.getpagesize())

print(times_touched(64), times_touched(144))
keep_freed_memory()
print(times_touched(64), times_touched(144))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_freed_memory_is_used_again():
    """Each of 20 tensors got new pages before. Now some do, until small things have found places between them."""
    command = [sys.executable, "-c", KEEPS_MEMORY]
    told = subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=True).stdout
    before, after = ([float(times) for times in line.split()] for line in told.splitlines())
    assert before == pytest.approx([20, 20], rel=0.01)
    assert max(after) < 10


def test_processes_keep_each_gradient_once(monkeypatch):
    """As a view of the buckets in which it is shared; and accelerate divides none of them."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator(parse())
    assert accelerator.ddp_handler.gradient_as_bucket_view
    assert accelerator.gradient_accumulation_steps == 1


def test_bf16_trains_float32_weights(fit, plain, tiny_pipeline):
    folder = fit(mixed_precision="bf16", checkpointing_steps=4)
    assert losses(folder) != losses(plain)
    assert losses(folder) == pytest.approx(losses(plain), rel=0.03)
    assert all(weight.dtype == torch.float32 for weight in checkpoint_unet(folder / "checkpoint-4").values())
    optimizer = checkpoint_state(folder / "checkpoint-4")["optimizer"]
    assert {state["exp_avg"].dtype for state in optimizer["state"].values()} == {torch.float32}
    assert same(checkpoint_unet(folder / "checkpoint-4"), unet(folder))
    for weights_of in (vae, text_encoder):
        assert same(weights_of(folder), weights_of(tiny_pipeline))  # not through bf16 and back


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_saved_precision_is_that_of_unet_and_vae(fit, plain, tiny_pipeline, precision, dtype):
    folder = fit(save_precision=precision)
    assert same(unet(folder), {name: weight.to(dtype) for name, weight in unet(plain).items()})
    assert {weight.dtype for weight in vae(folder).values()} == {dtype}
    assert same(text_encoder(folder), text_encoder(tiny_pipeline))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle", height=32, width=32, num_inference_steps=2, output_type="np").images[0]
    assert np.isfinite(image).all()


def test_base_in_half_precision_trains_in_float32(fit, plain, tiny_pipeline, tmp_path):
    """As most published files are; transformers would keep the half of a text encoder."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half")
    folder = fit(base=tmp_path / "half")
    assert {weight.dtype for weight in unet(folder).values()} == {torch.float32}
    assert {weight.dtype for weight in text_encoder(folder).values() if weight.is_floating_point()} == {torch.float32}
    assert losses(folder) == pytest.approx(losses(plain), rel=0.02)


# ---------------------------------------------------------------------------------------------------------- objectives


def parts_of_first_step(base, **config):
    """UNet, latents, embeddings, draws and alpha of image 0 in epoch 0, from the definitions alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **config)
    drawn = draws(seed=0, epoch=0, index=0)
    latents, embeddings = encode_by_hand(pipeline, make_image(0), caption_of(0), drawn.posterior_noise)
    return pipeline.unet, latents, embeddings, drawn, scheduler.alphas_cumprod[drawn.timestep]


@torch.no_grad()
def encode_by_hand(pipeline, image, caption, posterior_noise):
    """Latents (1, 4, 4, 4) of a 32 x 32 image and the embeddings of its caption."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    posterior = pipeline.vae.encode(pixels).latent_dist
    tokens = pipeline.tokenizer(caption, max_length=77, padding="max_length", return_tensors="pt").input_ids
    embeddings = pipeline.text_encoder(tokens).last_hidden_state
    return (posterior.mean + posterior.std * posterior_noise) * 0.18215, embeddings


OBJECTIVES = [{}, {"noise_offset": 0.5}, {"input_perturbation": 0.5}, {"snr_gamma": 1.0}]


@pytest.mark.parametrize(
    "prediction_type, settings",
    [
        *itertools.product(["epsilon", "v_prediction"], OBJECTIVES),
        ("v_prediction", {"rescale_betas_zero_snr": True}),  # refused for epsilon
    ],
)
def test_first_loss_by_hand(fit, tiny_pipeline, tiny_pipeline_v, tmp_path, prediction_type, settings):
    """One image, one step: its loss from the papers' formulas."""
    predicts_v = prediction_type == "v_prediction"
    base = tiny_pipeline_v if predicts_v else tiny_pipeline
    config = {"rescale_betas_zero_snr": True} if "rescale_betas_zero_snr" in settings else {}
    model, latents, embeddings, drawn, a = parts_of_first_step(base, **config)
    noise = drawn.noise + settings.get("noise_offset", 0) * drawn.offset
    added = noise + settings.get("input_perturbation", 0) * drawn.perturbation
    with torch.no_grad():
        predicted = model(a.sqrt() * latents + (1 - a).sqrt() * added, drawn.timestep, embeddings).sample
    target = a.sqrt() * noise - (1 - a).sqrt() * latents if predicts_v else noise[None]
    expected = F.mse_loss(predicted, target).item()
    if "snr_gamma" in settings:
        snr = (a / (1 - a)).item()
        expected *= min(snr, 1.0) / (snr + 1 if predicts_v else snr)
    data = write_image_folder(tmp_path / "one", 1)
    folder = fit(base=base, data=data, train_batch_size=1, max_train_steps=1, **settings)
    assert losses(folder) == pytest.approx([expected], rel=1e-5)


def test_prediction_type_of_the_base_stays(plain, fit, tiny_pipeline_v):
    assert StableDiffusionPipeline.from_pretrained(plain).scheduler.config.prediction_type == "epsilon"
    folder = fit(base=tiny_pipeline_v)
    assert StableDiffusionPipeline.from_pretrained(folder).scheduler.config.prediction_type == "v_prediction"
    assert losses(folder)[0] != losses(plain)[0]


def test_prediction_type_by_flag_is_saved(fit, tiny_pipeline_v):
    """The result has to be sampled as it was trained, whatever the base said."""
    folder = fit("flag", prediction_type="v_prediction")
    scheduler = StableDiffusionPipeline.from_pretrained(folder).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert losses(folder) == losses(fit("base", base=tiny_pipeline_v))


def test_zero_terminal_snr_is_saved(fit):
    folder = fit(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = StableDiffusionPipeline.from_pretrained(folder).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert scheduler.config.beta_schedule == "scaled_linear"


# ---------------------------------------------------------------------------------------------------------------- plan


def test_plan_gives_the_numbers_of_the_run(train_script, tiny_pipeline, images, tmp_path, capsys):
    """Five of six images in steps of 1 x 3: two steps an epoch."""
    settings = {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "num_validation_samples": 1,
        "use_ema": True,
        "max_train_steps": None,
        "num_train_epochs": 4,
        "dry_run": True,
    }
    before, folder = snapshot(images), tmp_path / "out"
    assert train(train_script, tiny_pipeline, images, folder, **settings) == 0
    said = " ".join(capsys.readouterr().out.split())
    parameters = sum(weight.numel() for weight in unet(tiny_pipeline).values())
    for part in (
        "5 to train on, 1 held out, at 32 x 32 pixels",
        "0 to 8, 4.0 epochs",
        "3 images: 1 a pass x 3 passes x 1 rank",
        f"UNet, {parameters:,} parameters in float32",
        "AdamW at 0.001, constant",
        "; an average of the weights (EMA)",
        str(folder),
    ):
        assert part in said
    assert not folder.exists()
    assert snapshot(images) == before


def test_a_step_of_more_images_than_there_are_is_told_with_those(train_script, tiny_pipeline, tmp_path, capsys):
    """In the plan and on the card: three images in steps of 4, and one, of which no step has more."""
    for number, images, each in ((3, "3 images at most", "3 images each"), (1, "1 image at most", "1 image each")):
        data, folder = write_image_folder(tmp_path / f"{number}", number), tmp_path / f"out_{number}"
        assert train(train_script, tiny_pipeline, data, folder, train_batch_size=4, max_train_steps=2) == 0
        assert f"  per step   {images}: 4 a pass x 1 pass x 1 rank\n" in capsys.readouterr().out
        assert f"- For 2 steps of {each}, which is 2 epochs, at " in (folder / "README.md").read_text()


def test_epochs_are_whole(fit):
    """Six images in steps of four: an epoch is a step of 4 and one of 2."""
    folder = fit(max_train_steps=None, num_train_epochs=3, train_batch_size=4)
    assert [row["step"] for row in read_log(folder)] == list(range(1, 7))


# ---------------------------------------------------------------------------------------------------------- validation

PROMPTS = ["a red circle", "a picture of number one"]


@pytest.fixture(scope="module")
def validated(train_script, tiny_pipeline, images, tmp_path_factory):
    """Four steps with samples at 0, 2 and 4 and a held-out loss on two of six images, in TensorBoard too."""
    folder = tmp_path_factory.mktemp("validated") / "out"
    settings = {
        "validation_prompts": PROMPTS,
        "validation_steps": 2,
        "num_validation_samples": 2,
        "use_ema": True,
        "ema_decay": 0.3,
        "learning_rate": 1e-2,
        "report_to": "tensorboard",
    }
    assert train(train_script, tiny_pipeline, images, folder, **settings) == 0
    return folder


@pytest.fixture(scope="module")
def looked_at(train_script, tiny_pipeline, images, tmp_path_factory):
    """The first two steps of `plain`, with samples before and after each."""
    folder = tmp_path_factory.mktemp("looked_at") / "out"
    settings = {"validation_prompts": PROMPTS, "validation_steps": 1, "max_train_steps": 2}
    assert train(train_script, tiny_pipeline, images, folder, **settings) == 0
    return folder


def test_samples_are_drawn_on_time(validated):
    names = sorted(path.name for path in (validated / "samples").iterdir())
    assert names == [f"step-{step:06d}.png" for step in (0, 2, 4)]
    pictures = [Image.open(validated / "samples" / name).convert("RGB") for name in names]
    assert [picture.size for picture in pictures] == [(2 * 32, 32)] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3


def test_samples_are_those_of_the_saved_weights(validated):
    """The last grid, drawn again by somebody who has only the result: the average's weights, the prompts, the seed."""
    pipeline = StableDiffusionPipeline.from_pretrained(validated)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    grid = np.asarray(Image.open(validated / "samples" / "step-000004.png").convert("RGB"))
    for column, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(column)
        image = pipeline(prompt, height=32, width=32, num_inference_steps=25, generator=generator).images[0]
        assert np.array_equal(grid[:, 32 * column : 32 * (column + 1)], np.asarray(image)), prompt


def test_samples_of_equal_weights_are_equal(looked_at, validated):
    """Other training, same base: the grid before the first step is the same."""
    name = "samples/step-000000.png"
    assert (looked_at / name).read_bytes() == (validated / name).read_bytes()


def test_seven_prompts_fill_two_rows(fit, monkeypatch):
    """In their order, row by row; the sampler is not asked here."""

    def shades_of(pipeline, prompts, width, height, **settings):
        greys = [int(prompt.removeprefix("shade ")) for prompt in prompts]
        return SimpleNamespace(images=[Image.new("RGB", (width, height), (grey, grey, grey)) for grey in greys])

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", shades_of)
    greys = [10, 20, 30, 40, 50, 60, 70]
    folder = fit(validation_prompts=[f"shade {grey}" for grey in greys], max_train_steps=1)
    grid = np.asarray(Image.open(folder / "samples" / "step-000001.png").convert("L"))
    assert grid.shape == (2 * 32, 4 * 32)
    middles = grid[16::32, 16::32]
    assert middles.flatten().tolist() == [*greys, 255]


def test_validation_does_not_change_training(fit, plain, looked_at):
    assert same(unet(looked_at), checkpoint_unet(plain / "checkpoint-2"))
    assert losses(looked_at) == losses(plain)[:2]
    settings = {"num_validation_samples": 2, "use_ema": True, "max_train_steps": 3}
    often, rare = fit("often", validation_steps=1, **settings), fit("rare", validation_steps=100, **settings)
    assert same(unet(often), unet(rare))
    assert losses(often) == losses(rare)


def held_out_names(number):
    """Which of six images are held out for every seed, from the definition alone: the first of a permutation by the
    number of its stream of random numbers, 4."""
    return {f"{index:02d}.png" for index in np.random.default_rng(4).permutation(6)[:number]}


def test_held_out_images_are_never_trained_on(train_script, fit, monkeypatch):
    """Two epochs without the two that are held out, under any seed; these are opened once, for three looks."""
    opened, seen = train_script.CaptionedImages.open, []

    def watch(self, index, row, *view):
        seen.append((len(self), Path(row["image"]["path"]).name))
        return opened(self, index, row, *view)

    monkeypatch.setattr(train_script.CaptionedImages, "open", watch)
    held_out = held_out_names(2)
    everything = {f"{index:02d}.png" for index in range(6)}
    for seed in (0, 5):
        seen.clear()
        fit(f"seed_{seed}", num_validation_samples=2, validation_steps=2, max_train_steps=4, seed=seed)
        trained = [name for size, name in seen if size == 4]
        assert sorted(trained) == sorted([*(everything - held_out)] * 2)
        assert sorted(name for size, name in seen if size == 2) == sorted(held_out)


@torch.no_grad()
def held_out_loss_by_hand(folder, names):
    """The mean loss of a pipeline on images, each at four timesteps, one in each quarter, with draws of their own."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    found = []
    for (index, name), part in itertools.product(enumerate(names), range(4)):
        number = int(name[:2])
        drawn = draws(seed=0, epoch=part, index=index)
        timestep = torch.tensor([(drawn.timestep + part * 1000) // 4])
        assert part * 250 <= timestep < (part + 1) * 250
        image, caption = make_image(number), caption_of(number)
        latents, embeddings = encode_by_hand(pipeline, image, caption, drawn.posterior_noise)
        noise, a = drawn.noise[None], scheduler.alphas_cumprod[timestep]
        predicted = pipeline.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, timestep, embeddings).sample
        found.append(F.mse_loss(predicted, noise).item())
    return np.mean(found)


def test_held_out_loss_by_hand(tiny_pipeline, validated):
    """Before training and after."""
    names = sorted(held_out_names(2))
    before, after = held_out_loss_by_hand(tiny_pipeline, names), held_out_loss_by_hand(validated, names)
    rows = {row["step"]: row for row in read_log(validated) if "held_out_loss" in row}
    assert rows[0]["held_out_loss"] == pytest.approx(before, rel=1e-5)
    assert rows[4]["held_out_loss"] == pytest.approx(after, rel=1e-5)
    assert rows[4]["held_out_gain"] == pytest.approx(before - after, rel=1e-3)
    assert rows[4]["gain_error"] > 0


# --------------------------------------------------------------------------------------------------------- logs


def test_log_gives_means_over_the_steps_since_the_last(fit, plain):
    """Every third step and the last; the mean counts all, not the last one alone."""
    each = losses(plain)
    rows = read_log(fit(logging_steps=3))
    assert [row["step"] for row in rows] == [3, 4]
    assert [row["loss"] for row in rows] == pytest.approx([sum(each[:3]) / 3, each[3]], rel=1e-6)


def test_log_rows(plain):
    rows = [json.loads(line) for line in (plain / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() == {"step", "loss", "lr", "grad_norm", "images_per_second", "process_gb"}
        assert row["lr"] == 1e-3
        assert row["images_per_second"] > 0
        assert 0.1 < row["process_gb"] < 100


def scalars_of(folder):
    """What the one run of TensorBoard in a folder holds that has scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    places = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    runs = [EventAccumulator(str(place), size_guidance={"images": 0}).Reload() for place in places]
    (run,) = [run for run in runs if run.Tags()["scalars"]]
    return run


def test_tensorboard_holds_what_the_log_holds(validated):
    run, log = scalars_of(validated / "logs"), read_log(validated)
    for name in ("loss", "lr", "grad_norm", "held_out_loss"):
        expected = {row["step"]: pytest.approx(row[name], rel=1e-6) for row in log if name in row}
        assert {event.step: event.value for event in run.Scalars(name)} == expected
    images = {tag: [event.step for event in run.Images(tag)] for tag in run.Tags()["images"]}
    assert set(images) == {"samples/0", "samples/1"} or set(images) == {"samples"}
    assert all(steps == [0, 2, 4] for steps in images.values())


@pytest.mark.parametrize(
    "installed, told", [(["tensorboard"], "log.jsonl and tensorboard"), ([], "log.jsonl, no tracker")]
)
def test_the_plan_tells_the_tracker_and_a_run_without_one_logs(
    fit, train_script, monkeypatch, capsys, installed, told
):
    monkeypatch.setattr(train_script, "get_available_trackers", lambda: installed)
    folder = fit(report_to=None, max_train_steps=1)
    assert f"\n  log        {told}\n" in capsys.readouterr().out
    assert bool(list(folder.rglob("events.out.tfevents.*"))) == bool(installed)
    assert len(losses(folder)) == 1


@pytest.mark.slow
def test_wandb_works_offline(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb_files"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb_files").mkdir()
    fit(report_to="wandb", validation_prompts=["a star"], max_train_steps=1, tracker_project_name="a_project")
    (run,) = (tmp_path / "wandb_files").rglob("run-*.wandb")
    missing = {b"a_project", b"grad_norm", b"images_per_second", b"learning_rate"}
    deadline = time.monotonic() + 60
    while missing and time.monotonic() < deadline:  # a process of wandb's own may write after the run has ended
        time.sleep(0.1)
        written = run.read_bytes()
        missing = {word for word in missing if word not in written}
    assert not missing
    assert list((tmp_path / "wandb_files").rglob("media/images/*.png"))


# ------------------------------------------------------------------------------------------------- loading images


@pytest.mark.parametrize(
    "cores, processes, workers",
    [(1, 1, 0), (2, 1, 0), (3, 1, 2), (4, 1, 3), (64, 1, 4), (16, 8, 0), (16, 4, 3), (128, 8, 4)],
)
def test_workers_are_chosen_by_the_cores_of_a_process(monkeypatch, cores, processes, workers):
    """Of those that it may use: a cluster may give it a few of many."""
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert choose_num_workers(None) == workers
    assert [choose_num_workers(wanted) for wanted in (0, 3, 9)] == [0, 3, 9]
    monkeypatch.delattr(os, "sched_getaffinity")  # as on Windows
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert choose_num_workers(None) == workers
