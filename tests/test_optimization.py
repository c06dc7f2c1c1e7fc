"""Flags of the learning rate that contradict each other are refused; optimizer, schedule and average obey them."""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from running import REPO, TRAIN_TEXT_TO_IMAGE
from training import parse, read_log, train

from sdtune import optimization
from sdtune.optimization import (
    check_optimization,
    check_optimizer,
    keep_embeddings_whole,
    make_average,
    make_optimizer,
    make_schedule,
    optimizer_of,
    peak_learning_rate,
    step_average,
    update_on_cpu,
    warn_of_rate,
)


@pytest.mark.parametrize(
    "flag, needed, instead",
    [
        ("--lr_num_cycles=2", "--lr_scheduler=cosine_with_restarts", "--lr_scheduler=cosine"),
        ("--lr_power=2", "--lr_scheduler=polynomial", "--lr_scheduler=linear"),
        ("--lr_step_rules=1:10,0.1", "--lr_scheduler=piecewise_constant", "--lr_scheduler=constant"),
    ],
)
def test_flag_that_is_for_another_schedule(flag, needed, instead):
    assert check_optimization(parse(flag, needed)) == []
    (problem,) = check_optimization(parse(flag, instead))
    assert problem == f"{flag.replace('=2', '=2.0') if 'power' in flag else flag}: does nothing without {needed}; " + (
        "add that or drop this"
    )


@pytest.mark.parametrize("schedule", ["constant", "piecewise_constant"])
def test_schedules_that_do_not_warm_up(schedule):
    words = [f"--lr_scheduler={schedule}"]
    if schedule == "piecewise_constant":
        words.append("--lr_step_rules=1:10,0.1")
    (problem,) = check_optimization(parse(*words, "--lr_warmup_steps=3"))
    assert "--lr_warmup_steps=3: does nothing without constant_with_warmup or the like" in problem
    assert check_optimization(parse(*words)) == []


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"]
)
def test_schedules_that_warm_up(schedule):
    assert check_optimization(parse(f"--lr_scheduler={schedule}", "--lr_warmup_steps=1")) == []


@pytest.mark.parametrize("rules", [None, "1", "10:1", "1:10,0.1:20", "ten:1,2", "1:10 0.1", ""])
def test_piecewise_constant_needs_rules_that_can_be_read(rules):
    words = [] if rules is None else [f"--lr_step_rules={rules}"]
    (problem,) = check_optimization(parse("--lr_scheduler=piecewise_constant", *words))
    flag = f"--lr_step_rules={rules}" if rules else "--lr_step_rules is missing"
    assert f"{flag}: give rules such as 1:10,0.1:20,0.01" in problem


@pytest.mark.parametrize("rules", ["1:10,0.1", "1:10,0.1:20,1e-2", ".5:3,2"])
def test_rules_of_piecewise_constant(rules):
    assert check_optimization(parse("--lr_scheduler=piecewise_constant", f"--lr_step_rules={rules}")) == []


def test_a_polynomial_needs_room_above_its_end():
    (problem,) = check_optimization(parse("--lr_scheduler=polynomial", "--learning_rate=1e-7"))
    assert "--learning_rate=1e-07: must be above 1e-7" in problem
    assert check_optimization(parse("--lr_scheduler=polynomial", "--learning_rate=2e-7")) == []


@pytest.mark.parametrize(
    "word, told, package",
    [
        ("--use_8bit_adam", "--use_8bit_adam=True", "bitsandbytes"),
        ("--optimizer=adamw8bit", "--optimizer=adamw8bit", "bitsandbytes"),
        ("--optimizer=prodigy", "--optimizer=prodigy", "prodigyopt"),
    ],
)
def test_an_optimizer_needs_its_package(monkeypatch, word, told, package):
    assert check_optimizer(parse(word)) == []
    monkeypatch.setattr(optimization, "is_installed", lambda package: False)
    assert check_optimizer(parse(word)) == [f"{told}: needs {package}; run `pip install {package}`, or drop this"]
    assert check_optimizer(parse()) == []


def test_optimizers_by_their_flags():
    assert optimizer_of(parse()) == optimizer_of(parse("--optimizer=adamw")) == "adamw"
    assert optimizer_of(parse("--use_8bit_adam")) == optimizer_of(parse("--optimizer=adamw8bit")) == "adamw8bit"
    assert check_optimizer(parse("--use_8bit_adam", "--optimizer=adamw8bit")) == []
    for other in ("adamw", "adafactor"):
        assert check_optimizer(parse("--use_8bit_adam", f"--optimizer={other}")) == [
            f"--use_8bit_adam=True: contradicts --optimizer={other}; drop one"
        ]


@pytest.mark.parametrize("word", ["--adam_beta1=0.5", "--adam_beta2=0.99", "--adam_epsilon=1e-06"])
def test_adafactor_has_not_all_flags_of_adamw(word):
    assert check_optimizer(parse("--optimizer=adafactor", word)) == [
        f"{word}: does nothing with --optimizer=adafactor; drop this"
    ]
    for name in ("adamw", "adamw8bit", "prodigy"):
        assert check_optimizer(parse(f"--optimizer={name}", word)) == []
    assert check_optimizer(parse("--optimizer=adafactor", "--adam_weight_decay=0.1")) == []


def test_prodigy_has_one_rate():
    for rate, refused in (("1", False), ("0.5", True), ("2", True)):
        args = parse("--optimizer=prodigy", "--learning_rate=1")
        args.text_encoder_lr = float(rate)
        told = (
            f"--text_encoder_lr={float(rate)}: Prodigy has one rate for all that it trains; drop this, or use "
            "--optimizer=adamw"
        )
        assert check_optimizer(args) == ([told] if refused else [])


def test_a_factor_of_prodigy_is_warned_of():
    args = parse("--optimizer=prodigy", "--learning_rate=0.0001")
    assert warn_of_rate(args, 0.0004) == [
        "--learning_rate=0.0001: Prodigy finds the rate, and multiplies it by 0.0004; use 1"
    ]
    assert warn_of_rate(args, 1.0) == []
    assert warn_of_rate(parse("--learning_rate=0.1"), 0.1) == []


def test_learning_rate_is_scaled_on_demand():
    counts = SimpleNamespace(samples_per_step=12)
    assert peak_learning_rate(parse("--learning_rate=1e-5"), counts) == 1e-5
    assert peak_learning_rate(parse("--learning_rate=1e-5", "--scale_lr"), counts) == pytest.approx(1.2e-4)


def rates_of(num_steps, *words):
    """The learning rates of the steps, relative to the peak of 0.5."""
    args = parse(*words)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5}]
    optimizer = make_optimizer(args, groups)
    lr_scheduler = make_schedule(args, optimizer, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(lr_scheduler.get_last_lr()[0] / 0.5)
        optimizer.step()
        lr_scheduler.step()
    return rates


def test_schedules_by_their_formulas():
    steps = range(8)
    assert rates_of(8, "--lr_scheduler=constant") == [1] * 8
    assert rates_of(8, "--lr_scheduler=linear") == pytest.approx([1 - step / 8 for step in steps])
    warm = rates_of(8, "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=4")
    assert warm == pytest.approx([min(1, step / 4) for step in steps])
    cosine = [(1 + math.cos(math.pi * step / 8)) / 2 for step in steps]
    assert rates_of(8, "--lr_scheduler=cosine") == pytest.approx(cosine)
    twice = [(1 + math.cos(math.pi * (step % 4) / 4)) / 2 for step in steps]
    assert rates_of(8, "--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=2") == pytest.approx(twice)
    square = [(1 - step / 8) ** 2 for step in steps]
    assert rates_of(8, "--lr_scheduler=polynomial", "--lr_power=2") == pytest.approx(square, abs=1e-6)
    pieces = rates_of(8, "--lr_scheduler=piecewise_constant", "--lr_step_rules=1:3,0.1:5,0.01")
    assert pieces == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_optimizer_is_adamw_by_its_formula():
    """One step of arXiv 1711.05101, algorithm 2, with the flags' constants."""
    parameter = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    parameter.grad = torch.tensor([0.5, 4.0])
    flags = ["--adam_beta1=0.8", "--adam_beta2=0.9", "--adam_epsilon=0.01", "--adam_weight_decay=0.1"]
    make_optimizer(parse(*flags), [{"params": [parameter], "lr": 0.25}]).step()
    weight, grad = torch.tensor([2.0, -3.0]), torch.tensor([0.5, 4.0])
    expected = weight - 0.25 * (grad / (grad.abs() + 0.01) + 0.1 * weight)  # both moments' corrections cancel here
    torch.testing.assert_close(parameter.data, expected)


def adafactor_by_hand(weight, grads, rate, decay):
    """Steps of arXiv 1804.04235, algorithm 4, with d = 1 and beta2 = 1 - t ** -0.8, for a matrix."""
    rows, columns = 0.0, 0.0
    for step, grad in enumerate(grads, 1):
        beta2 = 1 - step**-0.8
        square = grad.double() ** 2
        rows = beta2 * rows + (1 - beta2) * square.mean(1)
        columns = beta2 * columns + (1 - beta2) * square.mean(0)
        update = grad.double() / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update /= update.square().mean().sqrt().clamp(min=1)
        weight = weight - rate * (decay * weight + update)
    return weight


@pytest.mark.parametrize("seed", [0, 1])
def test_adafactor_by_its_formula(seed):
    torch.manual_seed(seed)
    parameter, grads = torch.nn.Parameter(torch.randn(3, 5)), [torch.randn(3, 5) for _ in range(3)]
    expected = adafactor_by_hand(parameter.data.double(), grads, 0.25, 0.1)
    args = parse("--optimizer=adafactor", "--adam_weight_decay=0.1")
    optimizer = make_optimizer(args, [{"params": [parameter], "lr": 0.25}])
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.data.double(), expected, rtol=1e-5, atol=1e-6)


def test_prodigy_finds_the_distance(capsys):
    """From 5 to the minimum of |x - 7|: the estimate D is below the distance (arXiv 2306.06101, section 3), and comes
    near it, whatever the distance is. Nothing is printed of a decay."""
    for unit in (1.0, 0.1):
        parameter = torch.nn.Parameter(torch.tensor([5.0 * unit]))
        args = parse("--optimizer=prodigy", "--adam_weight_decay=0", "--learning_rate=1")
        optimizer = make_optimizer(args, [{"params": [parameter], "lr": 1.0}])
        for _ in range(1000):
            parameter.grad = (parameter.data - 7 * unit).sign()
            optimizer.step()
        assert 0.1 * 2 * unit < optimizer.param_groups[0]["d"] <= 2 * unit
    group = make_optimizer(parse("--optimizer=prodigy", "--lr_warmup_steps=2"), [{"params": [parameter], "lr": 1.0}])
    group = group.param_groups[0]
    assert (group["weight_decay"], group["safeguard_warmup"], group["use_bias_correction"]) == (0.01, True, True)
    assert group["decouple"]
    assert not optimizer.param_groups[0]["safeguard_warmup"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shape", [(128, 64), (77, 60)])
def test_embeddings_keep_32_bits_in_8bit_adam(shape):
    """By what two steps leave, and by AdamW in 32 bits; a linear layer of the same size is in 8."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(*shape), "layer": torch.nn.Linear(*shape)})
    whole = copy.deepcopy(model)
    optimizers = []
    for trained, words in ((model, ["--use_8bit_adam"]), (whole, [])):
        groups = [{"params": list(trained.parameters()), "lr": 0.1}]
        optimizers.append(make_optimizer(parse(*words), groups))
    keep_embeddings_whole(optimizers[0], [model])
    for _ in range(2):
        for own, other in zip(model.parameters(), whole.parameters(), strict=True):
            own.grad = torch.randn(own.shape)
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[0].state
    dtypes = {name: state[parameter]["state1"].dtype for name, parameter in model.named_parameters()}
    assert dtypes == {"table.weight": torch.float32, "layer.weight": torch.uint8, "layer.bias": torch.float32}
    torch.testing.assert_close(model["table"].weight, whole["table"].weight, rtol=0, atol=1e-6)
    assert (model["layer"].weight - whole["layer"].weight).abs().max() > 1e-4
    # A process that trains again is not bound by it.
    again = make_optimizer(parse("--use_8bit_adam"), [{"params": list(model.parameters()), "lr": 0.1}])
    again.step()
    assert again.state[model["table"].weight]["state1"].dtype == torch.uint8


def test_average_takes_its_decay_from_the_flags():
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert make_average(parse("--use_ema"), [parameter]).decay == 0.9999
    assert make_average(parse("--use_ema", "--ema_decay=0"), [parameter]).decay == 0
    average = make_average(parse("--use_ema", "--ema_decay=0.5", "--ema_warmup"), [parameter])
    assert (average.decay, average.use_ema_warmup) == (0.5, True)


@pytest.mark.parametrize("decay", ["0.5", "0.9999"])
@pytest.mark.parametrize("foreach, offload", [(True, False), (False, True), (True, True)])
def test_average_has_the_bits_of_diffusers_loop_however_it_is_updated(monkeypatch, foreach, offload, decay):
    """EMAModel's own foreach has not. Chunks hold one tensor, several, or one that is larger than they are."""
    monkeypatch.setattr(optimization, "AVERAGED_AT_ONCE", 100)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (120,), (2, 3, 3, 3), (), (60, 3), (1,)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    args = parse("--use_ema", f"--ema_decay={decay}")
    expected, average = make_average(args, parameters), make_average(args, parameters)
    for _ in range(20):
        for parameter in parameters:
            parameter.data += torch.randn(parameter.shape, generator=generator)
        expected.step(parameters)
        step_average(average, parameters, foreach, offload)
    assert all(map(torch.equal, average.shadow_params, expected.shadow_params))
    assert not any(map(torch.equal, average.shadow_params, parameters))
    own, other = average.state_dict(), expected.state_dict()
    assert {**own, "shadow_params": None} == {**other, "shadow_params": None}
    assert average.cur_decay_value == expected.cur_decay_value


@pytest.mark.parametrize("shapes", [[(3, 5), (7,), (120,)], [(1,), (2, 2)]], ids=str)
def test_an_offloaded_average_gets_each_parameter_once_through_one_buffer(monkeypatch, shapes):
    """Parameters of another device, for which a subclass of tensors stands here, and their copies are counted."""
    moved = []

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    def empty(size, pin_memory):
        moved.append((size, pin_memory))
        return torch.zeros(size)

    monkeypatch.setattr(optimization.torch, "empty", empty)
    parameters = [torch.ones(shape).as_subclass(Elsewhere) for shape in shapes]
    averages = [torch.zeros(shape) for shape in shapes]
    update_on_cpu(averages, parameters, 0.25)
    assert moved == [(max(torch.Size(shape).numel() for shape in shapes), True)]
    assert all(torch.equal(average, torch.full(shape, 0.25)) for average, shape in zip(averages, shapes, strict=True))


@pytest.fixture(scope="module")
def gain(tmp_path_factory):
    """By which share the miniature's held-out loss of creatures falls in 100 steps with these settings."""
    script, folder = load_script(TRAIN_TEXT_TO_IMAGE), tmp_path_factory.mktemp("creatures")
    load_script(REPO / "miniature" / "render.py").write_folder("creatures", folder / "images", 64, seed=0)

    @functools.cache
    def measure(**settings):
        settings = {
            "resolution": 64,
            "max_train_steps": 100,
            "train_batch_size": 8,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 5,
            "learning_rate": 1.5e-3,
            "snr_gamma": 5,
            "num_validation_samples": 8,
            "checkpointing_steps": 200,
            "overwrite_output_dir": True,
            **settings,
        }
        assert train(script, REPO / "miniature" / "pipeline", folder / "images", folder / "out", **settings) == 0
        first, *_, last = [row for row in read_log(folder / "out") if "held_out_loss" in row]
        return last["held_out_gain"] / first["held_out_loss"]

    return measure


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"full_bf16": True, "mixed_precision": "bf16", "max_grad_norm": "inf"}, {"optimizer": "adafactor"}],
    ids=lambda settings: next(iter(settings)),
)
def test_other_optimizers_learn_as_adamw_does(gain, settings):
    """At least 80 % of what AdamW in float32 gains in the same steps."""
    assert gain() > 0.5
    assert gain(**settings) >= 0.8 * gain()
