"""Weights in bfloat16: one update by its formula, rounding, gradients that go at once, refusals, and a whole run."""

import contextlib
import functools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from image_data import write_image_folder
from running import TRAIN_DREAMBOOTH, TRAIN_TEXT_TO_IMAGE
from training import checkpoint_state, losses, parse, read_log, same, text_encoder, train, unet

from sdtune import full_bf16
from sdtune.full_bf16 import (
    FusedAdamW,
    adamw_update,
    check_full_bf16,
    round_stochastically,
    update_in_backward,
    update_parameter,
)

FLAGS = {"full_bf16": True, "mixed_precision": "bf16", "max_grad_norm": "inf"}
EPSILON = 2.0**-8  # the distance of neighbours in bfloat16 from 1 downwards; 2 ** -7 upwards


def flags(**settings):
    """The flags of text-to-image with --full_bf16, which is the recipe's own."""
    args = parse(*[f"--{name}={value}" for name, value in settings.items()])
    args.full_bf16 = True
    return args


def fused(parameters, seed=0, **settings):
    """The optimizer with AdamW's usual constants, or others."""
    settings = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, **settings}
    return FusedAdamW([{"params": parameters}], seed=seed, **settings)


# ------------------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize("value", [1.0, -3.5, 0.0, 2.0**-100, -0.15625])
def test_what_bfloat16_has_stays(value):
    values = torch.full((1000,), value)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.float(), values)


@pytest.mark.parametrize(
    "value, low, high",
    [
        (1 + 0.25 * 2**-7, 1.0, 1 + 2**-7),
        (-1 - 0.9 * 2**-7, -1 - 2**-7, -1.0),
        (2 - 0.3 * 2**-7, 2 - 2**-7, 2.0),  # the carry reaches the exponent
        (100.15, 100.0, 100.5),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_rounding_goes_to_both_neighbours_and_is_right_in_the_mean(value, low, high, seed):
    number = 100_000
    rounded = round_stochastically(torch.full((number,), value), torch.Generator().manual_seed(seed)).double()
    assert set(rounded.tolist()) == {low, high}
    share = (value - low) / (high - low)
    error = (high - low) * math.sqrt(share * (1 - share) / number)
    assert abs(rounded.mean().item() - value) < 4 * error + 1e-7 * abs(value)


# ---------------------------------------------------------------------------------------------------------- one update


def adamw_by_torch(weight, grad, exp_avg, exp_avg_sq, num_steps):
    """The weight after a step of torch's AdamW in float32 that goes on from moments after `num_steps` steps."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    moments = {"exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
    optimizer.state[parameter] = {"step": torch.tensor(float(num_steps)), **moments}
    parameter.grad = grad
    optimizer.step()
    return parameter.detach(), optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]


def numbers_in_bfloat16(seed, num=40):
    """Weight, gradient and moments that bfloat16 has, in float32."""
    generator = torch.Generator().manual_seed(seed)
    weight, grad, exp_avg = torch.randn(3, num, generator=generator).bfloat16().float()
    exp_avg_sq = torch.rand(num, generator=generator).bfloat16().float()
    return weight, grad, exp_avg, exp_avg_sq


@pytest.mark.parametrize("seed, num_steps", [(0, 0), (1, 7), (2, 1000)])
def test_an_update_before_rounding_is_that_of_adamw(seed, num_steps):
    numbers = numbers_in_bfloat16(seed)
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    updated = adamw_update(*numbers, torch.tensor(num_steps + 1.0), group)
    for own, expected in zip(updated, adamw_by_torch(*numbers, num_steps), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed, num_steps", [(0, 0), (1, 7), (2, 1000)])
def test_an_update_is_that_of_adamw_in_the_mean(seed, num_steps):
    """Weights and moments, over 2,000 seeds, within four standard errors of the mean."""
    weight, grad, exp_avg, exp_avg_sq = numbers_in_bfloat16(seed)
    number, results = 2000, []
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    for rounding in range(number):
        parameter = torch.nn.Parameter(weight.bfloat16())
        parameter.grad = grad.bfloat16()
        state = {
            "step": torch.tensor(float(num_steps)),
            "exp_avg": exp_avg.bfloat16(),
            "exp_avg_sq": exp_avg_sq.bfloat16(),
        }
        update_parameter(parameter, state, group, 1000 * seed + rounding)
        assert state["step"] == num_steps + 1
        results.append(torch.stack([parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]))
    results = torch.stack(results).double()
    expected = torch.stack(adamw_by_torch(weight, grad, exp_avg, exp_avg_sq, num_steps)).double()
    error = results.std(dim=0) / math.sqrt(number)
    assert (error > 0).float().mean() > 0.9
    assert ((results.mean(dim=0) - expected).abs() <= 4 * error + 1e-6).float().mean() > 0.99


def test_a_second_moment_does_not_stall():
    """Under constant gradients of 2 from 1: after 1,000 steps 4 - 3 * 0.999 ** 1000, where rounding to nearest would
    have left 1."""
    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    ones = torch.ones(1000, dtype=torch.bfloat16)
    state = {"step": torch.tensor(5000.0), "exp_avg": ones.clone(), "exp_avg_sq": ones.clone()}
    group = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for step in range(1000):
        parameter.grad = torch.full_like(parameter, 2.0)
        update_parameter(parameter, state, group, step)
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(4 - 3 * 0.999**1000, rel=0.01)
    assert torch.equal((ones.float() * 0.999 + 0.001 * 2**2).bfloat16(), ones)


def test_parts_of_a_large_parameter_are_updated_as_the_whole_is_but_for_its_roundings(monkeypatch):
    """The parts are of the first dimension."""
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    results = []
    for size in (2**22, 12):
        monkeypatch.setattr(full_bf16, "UPDATED_AT_ONCE", size)
        parameter = torch.nn.Parameter(torch.ones(7, 3, 2, dtype=torch.bfloat16))
        parameter.grad = torch.full_like(parameter, 0.5)
        zeros = torch.zeros_like(parameter)
        state = {"step": torch.zeros(()), "exp_avg": zeros.clone(), "exp_avg_sq": zeros.clone()}
        squared = update_parameter(parameter, state, group, 3)
        assert squared.item() == pytest.approx(42 * 0.25)
        results.append([parameter.detach(), state["exp_avg"], state["exp_avg_sq"]])
    for whole, parts in zip(*results, strict=True):
        assert ((whole.float() - parts.float()).abs() <= 2 * EPSILON * whole.float().abs()).all()


# ----------------------------------------------------------------------------------------------------- backward passes


def layers(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).to(torch.bfloat16)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_backward_pass_updates_every_parameter_and_leaves_no_gradient(seed):
    """By AdamW in float32 from the same gradients, up to one rounding; at most one gradient is there at a time."""
    model, twin = layers(seed), layers(seed)
    optimizer = fused(list(model.parameters()))
    held = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: held.append(sum(p.grad is not None for p in model.parameters())))
    pixels = torch.randn(3, 4).bfloat16()
    twin(pixels).square().sum().backward()
    optimizer.begin_step(0)
    model(pixels).square().sum().backward()
    assert [parameter.grad for parameter in model.parameters()] == [None] * 4
    assert held == [0] * 4
    norm = torch.stack([parameter.grad.float().square().sum() for parameter in twin.parameters()]).sum().sqrt()
    torch.testing.assert_close(optimizer.grad_norm(), norm)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        weight, grad = other.detach().float(), other.grad.float()
        expected = weight - 0.01 * (grad / (grad.abs() + 1e-8) + 0.01 * weight)
        assert (own.float() - expected).abs().max() <= 2 * EPSILON * expected.abs().max()
        assert not torch.equal(own, other)


def test_roundings_depend_on_seed_step_and_parameter_alone():
    def step_from(seed, step, rate=1e-3):
        model = layers()
        optimizer = fused(list(model.parameters()), seed=seed, lr=rate)
        optimizer.begin_step(step)
        torch.rand(step + 1)  # of other use of the generator
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        return [parameter.detach() for parameter in model.parameters()]

    once = step_from(0, 5)
    assert all(map(torch.equal, once, step_from(0, 5)))
    assert not all(map(torch.equal, once, step_from(1, 5)))
    assert not all(map(torch.equal, once, step_from(0, 6)))


def test_a_gradient_that_is_not_finite_leaves_its_parameter_and_only_that():
    model = layers()
    optimizer = fused(list(model.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model[0].bias.register_hook(lambda grad: torch.full_like(grad, math.nan))
    optimizer.begin_step(0)
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    same_as_before = [torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert same_as_before == [False, True, False, False]
    state = optimizer.state[model[0].bias]
    assert state["step"] == 0
    assert not state["exp_avg"].any()
    assert not torch.isfinite(optimizer.grad_norm())
    assert optimizer.state[model[2].bias]["step"] == 1


def test_a_loss_that_is_not_finite_has_no_backward_pass():
    model = layers()
    optimizer = fused(list(model.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accelerator = SimpleNamespace(device=torch.device("cpu"), backward=lambda loss: loss.backward())
    run = SimpleNamespace(
        state={"optimizer": SimpleNamespace(optimizer=optimizer)}, progress={"global_step": 3}, is_whole=True
    )
    for value, is_changed in ((math.inf, False), (1.0, True)):
        batch = {"x": torch.full((2, 4), value, dtype=torch.bfloat16), "weight": torch.full((2,), 0.5)}
        work = SimpleNamespace(training_loss=lambda batch: model(batch["x"]).float().square().sum(dim=1))
        loss, norm = update_in_backward(None, accelerator, run, work, iter([(batch, True)]))
        assert math.isfinite(loss) == math.isfinite(norm) == is_changed
        assert run.is_whole != is_changed
        assert all(map(torch.equal, before, model.parameters())) != is_changed


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_go_with_it_is_refused(monkeypatch):
    good = {"mixed_precision": "bf16", "max_grad_norm": "inf"}
    assert check_full_bf16(flags(**good)) == []
    assert check_full_bf16(flags(**good, optimizer="adamw")) == []
    for settings, told in (
        ({"max_grad_norm": "1"}, "--max_grad_norm=1.0: does not go with --full_bf16, which knows the norm only after "
         "the step; use --max_grad_norm=inf"),
        ({"mixed_precision": "fp16"}, "--mixed_precision=fp16: does not go with --full_bf16; use "
         "--mixed_precision=bf16"),
        ({"mixed_precision": "no"}, "--mixed_precision=no: does not go with --full_bf16; use --mixed_precision=bf16"),
        ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps=2: does not go with --full_bf16, which "
         "keeps no gradient; use 1, and a larger --train_batch_size"),
        ({"optimizer": "prodigy"}, "--optimizer=prodigy: does not go with --full_bf16, which has an AdamW of its own; "
         "drop one"),
    ):  # fmt: skip
        assert check_full_bf16(flags(**{**good, **settings})) == [told]
    args = flags(**good)
    args.use_8bit_adam = True
    assert check_full_bf16(args) == [
        "--use_8bit_adam=True: does not go with --full_bf16, which has an AdamW of its own; drop one"
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    (told,) = check_full_bf16(flags(**good))
    assert told == (
        "--full_bf16=True: does not go with 2 processes, which would have to share each gradient; start one, or drop "
        "this"
    )
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert check_full_bf16(flags(max_grad_norm="inf")) == []
    args.full_bf16 = False
    assert check_full_bf16(args) == []


# ---------------------------------------------------------------------------------------------------------- whole runs

SETTINGS = {
    "full_bf16": True,
    "mixed_precision": "bf16",
    "max_grad_norm": "inf",
    "use_ema": True,
    "ema_decay": 0.5,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "checkpointing_steps": 2,
    "num_validation_samples": 1,
    "validation_prompt": "a circle",
    "num_validation_images": 1,
    "validation_num_inference_steps": 2,
}
TEXT_TO_IMAGE = (TRAIN_TEXT_TO_IMAGE, {})
DREAMBOOTH = (
    TRAIN_DREAMBOOTH,
    {"train_data_dir": None, "instance_prompt": "a sks circle", "train_text_encoder": True},
)


@pytest.fixture(scope="module", params=[TEXT_TO_IMAGE, DREAMBOOTH], ids=["text_to_image", "dreambooth"])
def fit(request, tiny_pipeline, tmp_path_factory):
    """Trains by one of the scripts, into a folder; returns the exit status."""
    (path, own), images = request.param, write_image_folder(tmp_path_factory.mktemp("data") / "images", 5)
    if path == TRAIN_DREAMBOOTH:
        own = {**own, "instance_data_dir": images}
    return functools.partial(train, load_script(path), tiny_pipeline, images, **own)


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    """The output of four steps without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert fit(folder, **SETTINGS) == 0
    return folder


def moments(folder, name):
    """The moments of that name in a checkpoint, by parameter."""
    return [state[name] for state in checkpoint_state(folder)["optimizer"]["state"].values()]


def test_checkpoints_hold_bfloat16_and_the_average_in_float32(straight, tiny_pipeline):
    checkpoint = straight / "checkpoint-4"
    weights = unet(checkpoint)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert {moment.dtype for name in ("exp_avg", "exp_avg_sq") for moment in moments(checkpoint, name)} == {
        torch.bfloat16
    }
    assert {step.item() for step in moments(checkpoint, "step")} == {4}
    average = checkpoint_state(checkpoint)["unet_ema/diffusion_pytorch_model.safetensors"]
    assert {weight.dtype for weight in average.values()} == {torch.float32}
    # It has moved, by no more than a rate of 1e-3 and a rounding in each of four steps.
    start = {name: weight.bfloat16().float() for name, weight in unet(tiny_pipeline).items()}
    for name, weight in average.items():
        moved = (weight - start[name]).abs()
        assert moved.any()
        assert (moved <= 4 * (2e-3 + 2 * EPSILON * start[name].abs())).all()
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in average.values())


def test_the_result_is_the_average_in_float32(straight):
    result = unet(straight)
    average = checkpoint_state(straight / "checkpoint-4")["unet_ema/diffusion_pytorch_model.safetensors"]
    assert same(result, average)
    assert {weight.dtype for weight in text_encoder(straight).values()} == {torch.float32}
    assert (straight / "samples" / "step-000004.png").exists()


def test_a_resumed_run_ends_in_the_same_bits(fit, straight, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "unet")
    (folder / "README.md").unlink()
    assert fit(folder, **SETTINGS, resume_from_checkpoint="latest") == 0
    assert same(unet(folder), unet(straight))
    assert same(checkpoint_state(folder / "checkpoint-4"), checkpoint_state(straight / "checkpoint-4"))
    assert read_log(folder) == read_log(straight)


def test_losses_are_those_of_float32_weights_but_for_rounding(fit, straight, tmp_path):
    """The first in full, before any update."""
    settings = {**SETTINGS, "full_bf16": False, "checkpointing_steps": 100}
    assert fit(tmp_path / "out", **settings) == 0
    assert losses(straight)[0] == pytest.approx(losses(tmp_path / "out")[0], rel=0.01)
    assert losses(straight) == pytest.approx(losses(tmp_path / "out"), rel=0.05)
    norms = [
        [row["grad_norm"] for row in read_log(folder) if "grad_norm" in row] for folder in (straight, tmp_path / "out")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_a_checkpoint_of_another_precision_is_refused(fit, straight, tmp_path, capsys):
    folder = tmp_path / "out"
    settings = {**SETTINGS, "full_bf16": False, "resume_from_checkpoint": straight / "checkpoint-2"}
    assert fit(folder, **settings, allow_changed_resume=True) == 2
    assert "full_bf16: True there, False now" in capsys.readouterr().err


def test_plan_and_size_of_a_checkpoint(fit, tmp_path, capsys):
    assert fit(tmp_path / "out", **SETTINGS, dry_run=True) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "parameters in bfloat16, passes in bfloat16" in said


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_that_breaks_says_what_there_is_to_go_on_from(tiny_pipeline, tmp_path, monkeypatch, capsys, where):
    """A loss that is not finite is found before anything changes; a gradient when other weights have changed."""
    script, steps = load_script(TRAIN_TEXT_TO_IMAGE), []
    images, folder = write_image_folder(tmp_path / "images", 3), tmp_path / "out"
    diffusion_losses = script.diffusion_losses

    def broken_losses(unet, *rest):
        steps.append(unet)
        result = diffusion_losses(unet, *rest)
        if len(steps) < 3:
            return result
        if where == "loss":
            return result * math.nan
        result.register_hook(lambda grad: grad * math.nan)
        return result

    monkeypatch.setattr(script, "diffusion_losses", broken_losses)
    flags = {"full_bf16": True, "mixed_precision": "bf16", "max_grad_norm": "inf", "checkpointing_steps": 1}
    with contextlib.suppress(SystemExit):
        assert train(script, tiny_pipeline, images, folder, **flags) == 1
    said = capsys.readouterr().err
    assert "Stopped by a loss or gradient that is not finite, in step 3. " in said
    if where == "loss":
        assert f"{folder / 'checkpoint-2'} holds the state after step 2; go on with" in said
    else:
        assert "holds its state; go on with --resume_from_checkpoint=latest" in said
    assert not (folder / "checkpoint-3").exists()
