"""Train weights in bfloat16, each updated as soon as its gradient is there: `--full_bf16`."""

import functools
import math
import os

import torch
from accelerate.utils import get_int_from_env, send_to_device

from sdtune.randomness import ROUNDING, random_numbers

UPDATED_AT_ONCE = 2**22  # weights that are updated at once: 16 MB for each of a few tensors in float32


def check_full_bf16(args):
    """Lists what cannot go with weights in bfloat16."""
    if not args.full_bf16:
        return []
    problems = []
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    num_processes = get_int_from_env(["WORLD_SIZE"], 1)
    if precision != "bf16":
        problems.append(f"--mixed_precision={precision}: does not go with --full_bf16; use --mixed_precision=bf16")
    if args.gradient_accumulation_steps > 1:
        problems.append(
            f"--gradient_accumulation_steps={args.gradient_accumulation_steps}: does not go with --full_bf16, which "
            "keeps no gradient; use 1, and a larger --train_batch_size"
        )
    if args.max_grad_norm != math.inf:
        problems.append(
            f"--max_grad_norm={args.max_grad_norm}: does not go with --full_bf16, which knows the norm only after the "
            "step; use --max_grad_norm=inf"
        )
    if args.use_8bit_adam or args.optimizer not in (None, "adamw"):
        given = "--use_8bit_adam=True" if args.use_8bit_adam else f"--optimizer={args.optimizer}"
        problems.append(f"{given}: does not go with --full_bf16, which has an AdamW of its own; drop one")
    if args.max_nan_steps:
        problems.append(
            f"--max_nan_steps={args.max_nan_steps}: does not go with --full_bf16, where a step that is not finite has "
            "changed weights before that shows; drop this"
        )
    if num_processes > 1:
        problems.append(
            f"--full_bf16=True: does not go with {num_processes} processes, which would have to share each gradient; "
            "start one, or drop this"
        )
    return problems


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) that updates each parameter in the backward pass, as soon as its gradient
    is whole, and frees that gradient: there is never more than one. Weights and moments are kept in bfloat16 and
    computed in float32; all three are rounded stochastically (arXiv 2010.06192, section 3), by which they are right in
    the mean. Rounded to nearest, most updates of a weight would be lost, and all of a second moment, which changes by
    a thousandth where bfloat16 has 8 bits.

    `begin_step` comes before the backward pass, `grad_norm` and `step` come after it. Where a gradient is not finite
    its parameter stays as it is.
    """

    def __init__(self, groups, lr, betas, eps, weight_decay, seed):
        # PyTorch keeps the counts of updates as they are, and on the device, where it is told "capturable".
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": True}
        super().__init__(groups, settings)
        self.seed, self.rounding_seeds, self.squared_norms = seed, [], []
        for group_number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),  # of updates: a tensor's may be skipped
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
                update = functools.partial(self.update, group_number, len(self.state) - 1)
                parameter.register_post_accumulate_grad_hook(update)

    def update(self, group_number, number, parameter):
        """Updates a parameter, the `number`-th of all, whose gradient has just become whole, and frees that."""
        group, seed = self.param_groups[group_number], self.rounding_seeds[number]
        self.squared_norms.append(update_parameter(parameter, self.state[parameter], group, seed))
        parameter.grad = None

    def begin_step(self, step):
        """Draws what the roundings of a step begin with: by seed, step and number of the parameter."""
        shape = len(self.state)
        self.rounding_seeds = random_numbers(self.seed, ROUNDING, step).integers(2**63, size=shape).tolist()
        self.squared_norms = []

    def grad_norm(self):
        """The norm of the step's gradients; not finite if one of them is not."""
        return torch.stack(self.squared_norms).sum().sqrt()

    def step(self, closure=None):
        """Does nothing: the backward pass has done it."""


def make_fused_optimizer(args, groups):
    """The optimizer of --full_bf16, for groups of parameters in bfloat16 with their rates."""
    return FusedAdamW(
        groups,
        lr=groups[0]["lr"],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        seed=args.seed,
    )


def update_in_backward(args, accelerator, run, work, passes):
    """The one pass of a step in which weights are updated while gradients come; with a loss that is not finite, or
    without a sample that has weight, there is no backward pass. Returns loss and norm of the gradient, as
    `add_up_gradients` does."""
    optimizer = run.state["optimizer"].optimizer  # inside accelerate's
    ((batch, _),) = passes
    if not batch["weight"].any():  # of a stream
        nothing = torch.zeros((), device=accelerator.device)
        return nothing, nothing
    batch = send_to_device(batch, accelerator.device, non_blocking=True)
    loss = (work.training_loss(batch) * batch["weight"]).sum()
    if not torch.isfinite(loss):  # the one place where the host waits for the device before a step has ended
        return loss.detach(), loss.detach()
    run.is_whole = False
    optimizer.begin_step(run.progress["global_step"])
    accelerator.backward(loss)
    return loss.detach(), optimizer.grad_norm()


@torch.no_grad()
def update_parameter(parameter, state, group, seed):
    """Does one step of AdamW for a parameter with a gradient; returns the gradient's squared norm, in float32."""
    squared_norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
    is_finite = torch.isfinite(squared_norm)  # stays on the device: nobody waits for it here
    state["step"] += is_finite
    generator = torch.Generator(parameter.device).manual_seed(seed)
    tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
    num_rows = max(1, UPDATED_AT_ONCE * len(parameter) // parameter.numel())
    for weight, grad, exp_avg, exp_avg_sq in zip(*[tensor.split(num_rows) for tensor in tensors], strict=True):
        updated = adamw_update(weight.float(), grad.float(), exp_avg.float(), exp_avg_sq.float(), state["step"], group)
        for kept, value in zip((weight, exp_avg, exp_avg_sq), updated, strict=True):
            kept.copy_(torch.where(is_finite, round_stochastically(value, generator), kept))
    return squared_norm


def adamw_update(weight, grad, exp_avg, exp_avg_sq, step, group):
    """The weight and its moments after a step of AdamW (arXiv 1711.05101, algorithm 2), in float32."""
    beta1, beta2 = group["betas"]
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
    mean, variance = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    update = mean / (variance.sqrt() + group["eps"]) + group["weight_decay"] * weight
    return weight - group["lr"] * update, exp_avg, exp_avg_sq


def round_stochastically(values, generator):
    """Rounds float32 to one of the two neighbours in bfloat16, to the nearer one more often, so that the mean is the
    value (arXiv 2010.06192, eq. 1): bfloat16 is the upper half of float32's bits, and to the lower one a random number
    of 16 bits is added, whose carry goes up."""
    noise = torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = (values.contiguous().view(torch.int32) + noise) & -(2**16)
    return bits.view(torch.float32).to(torch.bfloat16)
