"""FSDP2: what is trained is shared out over processes, each of which holds a shard of each tensor."""

import copy
import os
import warnings

import torch
import torch.distributed.checkpoint
from accelerate.utils import disable_fsdp_ram_efficient_loading, parse_flag_from_env
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sdtune.deepspeed import gather_for_good
from sdtune.errors import InputError
from sdtune.optimization import optimizer_of

SHARDS_FOLDER = "shards"  # a folder of a checkpoint, in the place of weights and optimizer
AVERAGE = "ema."  # begins the names of averaged weights among shards


def check_sharding(args):
    """Lists what cannot go with FSDP, if accelerate's config asks for that."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return []
    problems, asked = [], "accelerate's config asks for FSDP"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        problems.append(f"{asked} {os.environ.get('FSDP_VERSION', 1)}, which is not obeyed; use fsdp_version: 2")
    if not hasattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter"):
        problems.append(f"{asked}, which needs torch 2.8 or newer, not {torch.__version__}; install that")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        problems.append(f"{asked} with fsdp_offload_params, which is not obeyed; use false, and more processes")
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        remedy = "use false, and --gradient_checkpointing"
        problems.append(f"{asked} with fsdp_activation_checkpointing, which is not obeyed; {remedy}")
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if kind != "SHARDED_STATE_DICT":
        problems.append(f"{asked} with fsdp_state_dict_type: {kind}; use SHARDED_STATE_DICT")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16":
        problems.append("--mixed_precision=fp16 (or accelerate's config): does not go with FSDP; use bf16")
    if optimizer_of(args) != "adamw":
        given = "--use_8bit_adam=True" if args.use_8bit_adam else f"--optimizer={args.optimizer}"
        problems.append(f"{given}: does not go with FSDP; use --optimizer=adamw")
    for flag in ("channels_last", "compile", "full_bf16", "offload_ema", "train_text_encoder"):
        if getattr(args, flag, False):
            problems.append(f"--{flag}=True: does not go with FSDP; drop this, or choose GPUs alone")
    return problems


def set_up_sharding(accelerator):
    """Has accelerate share out the weights in float32, if its config asks for FSDP: passes are autocast as they are
    elsewhere, and gradients are added up in float32. Raises `InputError` where it does not share them out."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if not accelerator.is_fsdp2:
        raise InputError("accelerate's config asks for FSDP, which needs GPUs; choose CPUs alone")
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    # Else transformers leaves models empty in all processes but one, frozen ones too, which are not shared out.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    disable_fsdp_ram_efficient_loading()


def has_shared_passes(accelerator):
    """Whether processes can only make passes together, since each of them has but a shard of the weights."""
    return accelerator.is_fsdp2


def skeleton_of(model):
    """A copy of a model, with its adapters, in which nothing but the weights is missing."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): empty_like(tensor) for tensor in tensors})


def empty_like(tensor):
    """A tensor, or a parameter, without storage."""
    empty = tensor.detach().to("meta")
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def held_here(parameters):
    """What this process holds of parameters: a shard of each that is shared out, else all of it. Changed in place, the
    parameters change."""
    with torch.no_grad():
        return [value.to_local() if isinstance(value, DTensor) else value for value in parameters]


def forget_gathered(models):
    """Frees what passes without a backward pass have gathered of models, by name: the next pass would use it, though
    the shards have changed."""
    for model in models.values():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole_tensor(value):
    """A tensor that may be shared out, as all processes have it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_models(weights):
    """The models that are trained, by name, with whole weights, in the first process. All processes have to call
    this: what is shared out is gathered, of FSDP2 in the CPU's memory."""
    for name, skeleton in weights.skeletons.items():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        values = get_model_state_dict(weights.models[name], options=options)  # of other processes it has nothing
        skeleton.load_state_dict(values, strict=False, assign=True)
    gather_for_good(weights.parameters)
    return weights.skeletons or weights.models


def write_shards(run, folder):
    """Writes what this process holds of the run's weights, average and moments, in safetensors."""
    writer = torch.distributed.checkpoint.HuggingFaceStorageWriter(folder, save_distributed=True)
    torch.distributed.checkpoint.save(shared_tensors(run), storage_writer=writer)


def read_shards(run, folder):
    """Reads what `write_shards` wrote, as any number of processes, into the run's weights, average and moments."""
    reader = torch.distributed.checkpoint.HuggingFaceStorageReader(folder)
    torch.distributed.checkpoint.load(shared_tensors(run), storage_reader=reader)


def shared_tensors(run):
    """The tensors of a run that are shared out, by name: what changes in them changes the run."""
    options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
    tensors = {}
    for name, model in run.weights.models.items():
        weights = get_model_state_dict(model, options=options)
        moments = get_optimizer_state_dict(model, run.state["optimizer"], options=options)
        tensors |= {f"{name}.{key}": value for key, value in weights.items()}
        tensors |= {f"optimizer.{name}.{key}": moment for key, moment in moments.items() if torch.is_tensor(moment)}
    if "ema" in run.state:
        own = trained_tensors(run.weights.models).items()
        for (name, parameter), shard in zip(own, run.state["ema"].shadow_params, strict=True):
            tensors[AVERAGE + name] = shared_like(parameter, shard)
    return tensors


def trained_tensors(models):
    """The parameters of models, by name, that are trained, by their names with the model's."""
    return {
        f"{name}.{key}": parameter
        for name, model in models.items()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def read_whole(models, folder, start=""):
    """Reads what shards hold together, weights or what begins with `start`, into models in one process."""
    tensors = {start + name: parameter.data for name, parameter in trained_tensors(models).items()}
    reader = torch.distributed.checkpoint.HuggingFaceStorageReader(folder)
    with warnings.catch_warnings(action="ignore"):  # that this is one process
        torch.distributed.checkpoint.load(tensors, storage_reader=reader, no_dist=True)


def shared_like(parameter, shard):
    """A tensor that is shared out as a parameter is, of which this process holds `shard`."""
    layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, **layout)
