"""The optimizer, its learning rate, and the average of the weights."""

import pkgutil
import re

import diffusers
import torch

from sdtune.arguments import ADAM_DEFAULTS

OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "8-bit AdamW", "adafactor": "Adafactor", "prodigy": "Prodigy"}
NEEDED_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
# What Prodigy learns about the size of its steps; it stands among the settings of its groups.
PRODIGY_PROGRESS = {"d", "d_max", "d_hat", "d_numerator", "d_denom", "k"}
POLYNOMIAL_END = 1e-7  # the rate at which diffusers' polynomial schedule ends
AVERAGED_AT_ONCE = 2**24  # weights whose average is updated at once: 64 MB of differences


def check_optimization(args):
    """Lists which flags of the learning rate contradict each other."""
    problems, schedule = [], args.lr_scheduler
    if args.lr_warmup_steps and schedule in ("constant", "piecewise_constant"):
        problems.append(
            f"--lr_warmup_steps={args.lr_warmup_steps}: does nothing without constant_with_warmup or the like; add "
            "that or drop this"
        )
    number = r"\d*\.?\d+(e-?\d+)?"
    rules = re.fullmatch(rf"({number}:\d+,)+{number}", args.lr_step_rules or "")
    if schedule == "piecewise_constant" and not rules:
        given = f"--lr_step_rules={args.lr_step_rules}" if args.lr_step_rules else "--lr_step_rules is missing"
        problems.append(f"{given}: give rules such as 1:10,0.1:20,0.01")
    if schedule == "polynomial" and args.learning_rate <= POLYNOMIAL_END:
        problems.append(f"--learning_rate={args.learning_rate}: must be above 1e-7, its end")
    used_by = {
        "lr_num_cycles": "cosine_with_restarts",
        "lr_power": "polynomial",
        "lr_step_rules": "piecewise_constant",
    }
    for flag, kind in used_by.items():
        value = getattr(args, flag)
        if value is not None and schedule != kind:
            problems.append(f"--{flag}={value}: does nothing without --lr_scheduler={kind}; add that or drop this")
    return problems


def optimizer_of(args):
    """The name of the optimizer that the flags ask for."""
    return "adamw8bit" if args.use_8bit_adam else args.optimizer or "adamw"


def is_installed(package):
    """Whether a package of that name can be imported; it is not."""
    return any(module.name == package for module in pkgutil.iter_modules())


def check_optimizer(args):
    """Lists what is wrong with the optimizer: another one beside --use_8bit_adam, one that is not installed, or flags
    that it does not have."""
    problems, name = [], optimizer_of(args)
    if args.use_8bit_adam and args.optimizer not in (None, "adamw8bit"):
        problems.append(f"--use_8bit_adam=True: contradicts --optimizer={args.optimizer}; drop one")
    package = NEEDED_PACKAGES.get(name)
    if package and not is_installed(package):
        given = "--use_8bit_adam=True" if args.use_8bit_adam else f"--optimizer={name}"
        problems.append(f"{given}: needs {package}; run `pip install {package}`, or drop this")
    for flag in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        value = getattr(args, flag)
        if name == "adafactor" and value != ADAM_DEFAULTS[flag]:
            problems.append(f"--{flag}={value}: does nothing with --optimizer=adafactor; drop this")
    text_encoder_lr = getattr(args, "text_encoder_lr", None)
    if name == "prodigy" and text_encoder_lr not in (None, args.learning_rate):
        problems.append(
            f"--text_encoder_lr={text_encoder_lr}: Prodigy has one rate for all that it trains; drop this, or use "
            "--optimizer=adamw"
        )
    return problems


def check_layout(args):
    """Lists whether the weights that are trained would not keep their layout."""
    if args.channels_last and optimizer_of(args) == "adamw8bit":
        return ["--channels_last=True: 8-bit AdamW undoes it in its first step; drop one"]
    return []


def warn_of_rate(args, peak):
    """Lists whether Prodigy's factor is another than the one that it is made for."""
    if optimizer_of(args) != "prodigy" or peak == 1:
        return []
    return [f"--learning_rate={args.learning_rate:g}: Prodigy finds the rate, and multiplies it by {peak:g}; use 1"]


def peak_learning_rate(args, counts):
    """The learning rate after warm-up, scaled by the samples of a step if that is asked for."""
    return args.learning_rate * counts.samples_per_step if args.scale_lr else args.learning_rate


def group_parameters(args, models, learning_rate):
    """The parameters of each model that are trained, with their learning rates: the UNet's first."""
    asked = args.text_encoder_lr or args.learning_rate
    rates = {"unet": learning_rate, "text_encoder": learning_rate * asked / args.learning_rate}  # both are scaled
    groups = []
    for name, model in models.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups.append({"params": trained, "lr": rates[name]})
    return groups


def make_optimizer(args, groups):
    """The optimizer for groups of parameters with their rates: AdamW (arXiv 1711.05101), its 8-bit form (2110.02861),
    Adafactor with rates that are given (1804.04235), or Prodigy (2306.06101)."""
    name, lr = optimizer_of(args), groups[0]["lr"]
    # Beside each group's parameters, since Prodigy's constructor prints a line if it is told of a decay.
    groups = [{**group, "weight_decay": args.adam_weight_decay} for group in groups]
    adam_flags = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=lr, **adam_flags)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)
    if name == "prodigy":
        from prodigyopt import Prodigy

        has_warm_up = args.lr_warmup_steps > 0
        return Prodigy(groups, lr=lr, use_bias_correction=True, safeguard_warmup=has_warm_up, **adam_flags)
    return torch.optim.AdamW(groups, lr=lr, fused=True, **adam_flags)


def keep_embeddings_whole(optimizer, models):
    """Gives the embeddings of models moments in 32 bits, where an 8-bit AdamW trains them: their gradients differ too
    much in size from token to token (arXiv 2110.02861, section 2.3). bitsandbytes' own way, `GlobalOptimManager`,
    would hold for the whole process, and for any parameter that later comes to lie in the same place."""
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                weight = module.weight
                moments = {"state1": torch.zeros_like(weight), "state2": torch.zeros_like(weight)}
                optimizer.state[weight] = {"step": 0, **moments}


def make_schedule(args, optimizer, last_step):
    """The learning rate's schedule, to be stepped once per optimizer step. It must not be prepared by accelerate,
    which would count processes."""
    return diffusers.optimization.get_scheduler(
        args.lr_scheduler,
        optimizer,  # whose default rate is where the polynomial starts
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=last_step,
        num_cycles=args.lr_num_cycles or 1,
        power=args.lr_power or 1.0,
    )


def make_average(args, parameters):
    """The average of the weights, in float32, with the decay that the flags ask for."""
    decay = 0.9999 if args.ema_decay is None else args.ema_decay
    average = diffusers.training_utils.EMAModel(parameters, decay=decay, use_ema_warmup=args.ema_warmup)
    average.shadow_params = [value.float() for value in average.shadow_params]  # of weights in bfloat16, too
    return average


@torch.no_grad()
def step_average(average, parameters, foreach, offload):
    """Moves an average of the weights one step towards the parameters: average -= (1 - decay) (average - parameter).

    `foreach` updates many tensors at once; `offload` updates an average in the CPU's memory, wherever the parameters
    are. `EMAModel` can do neither in the operations of its loop over tensors, which give the same bits here.
    """
    if not (foreach or offload):
        average.step(parameters)
        return
    average.optimization_step += 1
    average.cur_decay_value = average.get_decay(average.optimization_step)
    rate = 1 - average.cur_decay_value
    if offload:
        update_on_cpu(average.shadow_params, parameters, rate)
        return
    for averages, current in chunks_of(average.shadow_params, parameters):
        differences = torch._foreach_sub(averages, current)
        torch._foreach_mul_(differences, rate)
        torch._foreach_sub_(averages, differences)


def chunks_of(averages, parameters):
    """Yields lists of averages and of their parameters, as many as `AVERAGED_AT_ONCE` allows, or one larger tensor."""
    start, size = 0, 0
    for end, parameter in enumerate(parameters):
        if end > start and size + parameter.numel() > AVERAGED_AT_ONCE:
            yield averages[start:end], parameters[start:end]
            start, size = end, 0
        size += parameter.numel()
    yield averages[start:], parameters[start:]


def update_on_cpu(averages, parameters, rate):
    """Updates averages in the CPU's memory; each parameter goes there once, through a buffer as large as the largest,
    pinned if they come from another device. Such memory is kept by PyTorch from step to step."""
    largest = max(parameter.numel() for parameter in parameters)
    buffer = torch.empty(largest, pin_memory=parameters[0].device.type != "cpu")
    for average, parameter in zip(averages, parameters, strict=True):
        difference = buffer[: parameter.numel()].view_as(average)
        difference.copy_(parameter)
        torch.sub(average, difference, out=difference).mul_(rate)
        average.sub_(difference)
