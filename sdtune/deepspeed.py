"""DeepSpeed's ZeRO: processes share out gradients, the optimizer's state, in stage 3 weights."""

import contextlib
import logging
import math
import os
import warnings

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env, send_to_device

from sdtune.optimization import is_installed, optimizer_of


def uses_deepspeed():
    """Whether accelerate's config asks for DeepSpeed."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def asked_of_deepspeed(name, default):
    """What accelerate's config says of DeepSpeed, as a text in small letters."""
    return os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", default).lower()


def check_deepspeed(args):
    """Lists what cannot go with DeepSpeed, if accelerate's config asks for that."""
    if not uses_deepspeed():
        return []
    asked = "accelerate's config asks for DeepSpeed"
    if not is_installed("deepspeed"):
        return [f"{asked}, which is not installed; run `pip install -r requirements_deepspeed.txt`"]
    problems, stage = check_deepspeed_config(args, asked), asked_of_deepspeed("ZERO_STAGE", "2")
    if args.mixed_precision == "fp16" or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        problems.append("--mixed_precision=fp16 (or accelerate's config): does not go with DeepSpeed; use bf16")
    if optimizer_of(args) != "adamw":  # others have to see a weight as a whole, or all weights
        given = "--use_8bit_adam=True" if args.use_8bit_adam else f"--optimizer={args.optimizer}"
        problems.append(f"{given}: does not go with DeepSpeed; use --optimizer=adamw, or choose GPUs alone")
    for flag in ("channels_last", "compile", "full_bf16", "train_text_encoder"):
        if getattr(args, flag, False):
            problems.append(f"--{flag}=True: does not go with DeepSpeed; drop this, or choose GPUs alone")
    if stage == "3" and args.use_ema:
        problems.append("--use_ema=True: does not go with ZeRO-3; use zero_stage: 2, or drop this")
    return problems


def check_deepspeed_config(args, asked):
    """Lists what accelerate's config says of DeepSpeed that cannot be obeyed."""
    problems, stage = [], asked_of_deepspeed("ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        problems.append(f"{asked} with zero_stage: {stage}; use 2 or 3")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        remedy = "give zero_stage and the like in accelerate's config itself"
        problems.append(f"{asked} with deepspeed_config_file: {file}, which is not read; {remedy}")
    for part in ("optimizer", "param"):
        place = asked_of_deepspeed(f"OFFLOAD_{part.upper()}_DEVICE", "none")
        if place not in ("none", "cpu"):
            problems.append(f"{asked} with offload_{part}_device: {place}, which is not obeyed; use cpu or none")
    if stage == "2" and asked_of_deepspeed("OFFLOAD_PARAM_DEVICE", "none") == "cpu":
        problems.append(f"{asked} with offload_param_device: cpu, which needs zero_stage: 3; use that, or none")
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto").lower()
    if clipping != "auto" and float(clipping) != args.max_grad_norm:
        problems.append(f"{asked} with gradient_clipping: {clipping}; give --max_grad_norm={clipping} to this script")
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        problems.append(f"{asked} and for CPUs, which excludes that; drop use_cpu: without GPUs it takes CPUs")
    elif "LOCAL_RANK" not in os.environ:
        problems.append(f"{asked}, which needs a launcher; start this script by accelerate launch or torchrun")
    return problems


class DeepSpeedAccelerator(Accelerator):
    """Accelerate's for DeepSpeed, which keeps weights in float32 and autocasts their passes. Told of bf16 itself,
    accelerate would have DeepSpeed train weights that are rounded to it."""

    def __init__(self, precision, **options):
        self.precision = precision
        super().__init__(mixed_precision="no", **options)

    @property
    def mixed_precision(self):
        """That of passes."""
        return self.precision

    def autocast(self, autocast_handler=None):
        """A context in which passes are in that precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def choose_backend():
    """By what processes send each other tensors: accelerate's default, but DeepSpeed has to be told of CPUs."""
    return "gloo" if uses_deepspeed() and not torch.accelerator.is_available() else "nccl"


def make_deepspeed_accelerator(args, **options):
    """The accelerator for DeepSpeed, with other options of accelerate's."""
    if not torch.accelerator.is_available():
        import deepspeed.ops

        # Or it would compile a sum over processes in shared memory, which takes a minute and a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of old names, each time
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=1,  # passes are counted here
        gradient_clipping=args.max_grad_norm,
        zero3_init_flag=False,  # which would leave frozen models without weights, too
    )
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    config["zero_force_ds_cpu_optimizer"] = False  # PyTorch's is as quick, and needs no compiler
    if precision == "bf16":
        # No layers whose gradients would be summed in bfloat16.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    accelerator = DeepSpeedAccelerator(precision, deepspeed_plugin=plugin, **options)
    transformers.integrations.unset_hf_deepspeed_config()  # by which transformers would load models without weights
    return accelerator


def name_of_zero(accelerator):
    """What the state in a checkpoint can be read by again: a stage of ZeRO and a number of processes. None without
    DeepSpeed."""
    if not uses_deepspeed():
        return None
    return f"ZeRO-{accelerator.deepspeed_plugin.zero_stage} of {accelerator.num_processes} processes"


def set_up_engine(engine):
    """Has checkpoints of DeepSpeed's engine hold no weights but those that its optimizer keeps, and run nothing."""
    engine.module_state_dict = no_weights
    engine.checkpoint_engine.load = load_tensors


def no_weights(exclude_frozen_parameters=False):
    """The weights in DeepSpeed's own file: those that are trained are in others, and the base is in none."""
    return {}


def load_tensors(path, map_location=None):
    """Loads a file of a checkpoint, which may be anybody's: DeepSpeed would run what is pickled in it. Raises
    `pickle.UnpicklingError` for other objects than those of its own that it writes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)


def step_by_engine(args, accelerator, run, work, passes):
    """Forward, backward and the optimizer's step: the passes of a step add up their gradients in DeepSpeed's engine,
    which averages them over processes, clips them and changes the weights, unless a loss or a gradient is not finite
    in some process, or no sample of a stream has weight. Returns the step's loss in this process, and the norm of its
    gradient."""
    (engine,) = run.weights.prepared.values()
    engine.optimizer.clip_grad = args.max_grad_norm  # a checkpoint brings its own
    step_loss, weight = torch.zeros((), device=accelerator.device), torch.zeros((), device=accelerator.device)
    for batch, is_last in passes:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        engine.set_gradient_accumulation_boundary(is_last)
        loss = (work.training_loss(batch) * batch["weight"]).sum()
        # The engine looks at gradients alone, which may be finite where a loss is not.
        factor = torch.where(torch.isfinite(loss.detach()), float(accelerator.num_processes), math.nan)
        weight += batch["weight"].sum()
        if is_last and getattr(args, "streaming", False) and accelerator.reduce(weight) == 0:
            factor.fill_(math.nan)  # else it would decay weights and moments
        engine.backward(loss * factor, scale_wrt_gas=False)  # gradients are averaged over processes
        step_loss += loss.detach()
    run.is_whole = False
    engine.step()
    run.is_whole = not engine.was_step_applied()
    return step_loss, torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=accelerator.device)


def is_partitioned(parameter):
    """Whether a parameter is shared out over processes by ZeRO-3, and empty between its passes."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def held_whole(parameters):
    """Has parameters that ZeRO-3 shares out be whole for a while, in all processes, which have to call this together.
    What is changed in them is lost."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(partitioned):
        yield


@contextlib.contextmanager
def passing_alone(model):
    """Has a model that ZeRO-3 shares out be whole for a while, in all processes, which have to call this together; in
    between each does passes without gradients that wait for no other process, as many as it likes."""
    modules = list(model.modules()) if any(map(is_partitioned, model.parameters())) else []
    # DeepSpeed's, which gather the weights of a module before its pass, and give them away after it.
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    with held_whole(model.parameters()):
        try:
            for module in modules:
                module._forward_pre_hooks, module._forward_hooks = {}, {}
            yield
        finally:
            for module, before, after in hooks:
                module._forward_pre_hooks, module._forward_hooks = before, after


def gather_for_good(parameters):
    """Has parameters that ZeRO-3 shares out be whole from now on, in all processes, which have to call this
    together: at the end of a run."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if partitioned:
        partitioned[0].all_gather(param_list=partitioned)
