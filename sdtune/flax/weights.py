"""Weights on their way between PyTorch's modules, JAX and Flax's files (.msgpack)."""

import re
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import serialization, traverse_util
from huggingface_hub import HfApi, snapshot_download
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdtune.errors import InputError, last_line
from sdtune.models import how_to_reach, parts_instead

FLAX_FILES = {
    "unet": "diffusion_flax_model.msgpack",
    "vae": "diffusion_flax_model.msgpack",
    "text_encoder": "flax_model.msgpack",
}
# The lists of modules, of which Flax writes `name_0` where PyTorch writes `name.0`.
FLAX_LISTS = "attentions|down_blocks|downsamplers|net|resnets|to_out|transformer_blocks|up_blocks|upsamplers"
# Flax's older names in the VAE's attention, and PyTorch's.
FLAX_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What makes a kernel of Flax's one of PyTorch's, by its number of axes: dense (in, out), convolution (height, width,
# in, out).
TORCH_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
FLAX_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}


def check_flax(args):
    """Lists what is wrong between --from_flax or --from_pt and the weights that the base has."""
    problems = []
    has_flax, has_torch = kinds_of_weights(args)
    if reads_flax(args) and args.variant:
        problems.append(
            f"--variant={args.variant}: does nothing without a PyTorch pipeline folder or Hub id; drop this"
        )
    if args.from_flax and args.from_pt:
        problems.append("--from_pt=True: contradicts --from_flax; drop one")
    if args.from_flax and args.single_file_config:
        problems.append("--from_flax=True: a single file is PyTorch's; drop this")
    if args.from_flax and has_torch and not has_flax:
        problems.append(f"--from_flax=True: the model has no unet/{FLAX_FILES['unet']}; drop this")
    if args.from_pt and has_flax and not has_torch:
        problems.append("--from_pt=True: the model has Flax weights alone; drop this")
    return problems


def reads_flax(args):
    """Whether Flax's weights of the base are read: if --from_flax says so, or where there are no others."""
    if args.from_flax or args.from_pt or args.single_file_config:
        return args.from_flax
    has_flax, has_torch = kinds_of_weights(args)
    return has_flax and not has_torch


def kinds_of_weights(args):
    """Whether the base has a UNet of Flax's, and one of PyTorch's, by the names of its files."""
    files = list_base_files(args)
    has_flax = f"unet/{FLAX_FILES['unet']}" in files
    return has_flax, any(re.match(r"unet/diffusion_pytorch_model.*\.(bin|safetensors)$", file) for file in files)


def list_base_files(args):
    """The files of the base, a folder or a repository on the Hub; of a repository that cannot be reached those in the
    cache, and none if there are none."""
    base = args.pretrained_model_name_or_path or ""
    if not Path(base).exists():
        try:
            return HfApi(token=args.hub_token).list_repo_files(base, revision=args.revision)
        except Exception:  # no connection, or no such name, which `check_model` tells
            try:
                base = snapshot_download(base, revision=args.revision, **how_to_reach(args), local_files_only=True)
            except Exception:
                return []
    return [path.relative_to(base).as_posix() for path in Path(base).glob("*/*")]


def load_flax(args):
    """Loads the base's pipeline from Flax's weights, of a folder or Hub id, into PyTorch's modules in float32. Raises
    `InputError`."""
    source = args.pretrained_model_name_or_path
    try:
        folder = Path(source)
        if not folder.is_dir():
            wanted = ["*.json", "tokenizer/*", "*/*.msgpack"]
            where = {"revision": args.revision, **how_to_reach(args)}
            folder = snapshot_download(source, **where, allow_patterns=wanted)
        pipeline = read_flax(Path(folder))
    except Exception as error:  # every format has its own way of being broken
        raise InputError(f"{source}: cannot be loaded ({last_line(error)})") from None
    pipeline.register_modules(**parts_instead(args))
    return pipeline


def read_flax(folder):
    """A pipeline of PyTorch's modules in float32, with the Flax weights of a pipeline folder. Raises `RuntimeError`
    for a name or shape too many or too few."""
    unet_config = diffusers.UNet2DConditionModel.load_config(folder, subfolder="unet")
    vae_config = diffusers.AutoencoderKL.load_config(folder, subfolder="vae")
    text_config = transformers.CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
    models = {
        "unet": diffusers.UNet2DConditionModel.from_config(unet_config),
        "vae": diffusers.AutoencoderKL.from_config(vae_config),
        "text_encoder": transformers.CLIPTextModel(text_config).float(),
    }
    for name, model in models.items():
        tree = serialization.msgpack_restore((folder / name / FLAX_FILES[name]).read_bytes())
        arrays = traverse_util.flatten_dict(tree)
        model.load_state_dict(dict(torch_weight(name, path, array) for path, array in arrays.items()))
    scheduler_config = diffusers.DDPMScheduler.load_config(folder, subfolder="scheduler")
    kind = scheduler_config.get("_class_name", "").removeprefix("Flax")
    return diffusers.StableDiffusionPipeline(
        **models,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        scheduler=getattr(diffusers, kind, diffusers.PNDMScheduler).from_config(scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def torch_weight(model, path, array):
    """PyTorch's name of a weight and its value in float32, from Flax's path, a tuple, and array, which may be in
    bfloat16. `model` is unet, vae or text_encoder."""
    words = [word for word in path if word != "text_model"]
    if model == "vae":
        words = [FLAX_NAMES.get(word, word) for word in words]
    *words, kind = words
    array = np.asarray(array, np.float32)
    if kind == "kernel":
        array = array.transpose(TORCH_AXES[array.ndim])
    name = re.sub(rf"\b({FLAX_LISTS})_(\d+)", r"\1.\2", ".".join(words))
    suffix = "bias" if kind == "bias" else "weight"  # which is a kernel, scale or embedding
    return f"{name}.{suffix}", torch.tensor(np.ascontiguousarray(array))


def write_flax(pipeline, output_dir):
    """Writes the weights of UNet, VAE and text encoder as Flax's classes had them, in the precision that they have."""
    for name, file in FLAX_FILES.items():
        weights = getattr(pipeline, name).state_dict()
        arrays = dict(flax_weight(name, key, value) for key, value in weights.items())
        content = serialization.msgpack_serialize(traverse_util.unflatten_dict(arrays))
        Path(output_dir, name, file).write_bytes(content)


def flax_weight(model, name, value):
    """Flax's path of a weight, a tuple, and its array, from PyTorch's name and value; the reverse of
    `torch_weight`."""
    *words, kind = re.sub(rf"\b({FLAX_LISTS})\.(\d+)", r"\1_\2", name).split(".")
    if model == "vae":
        old_names = {new.replace(".", "_"): old for old, new in FLAX_NAMES.items()}
        words = [old_names.get(word, word) for word in words]
    if model == "text_encoder":
        words = ["text_model", *words]
    array = value.float().numpy()
    if kind == "weight" and array.ndim == 1:
        kind = "scale"
    elif kind == "weight":
        kind = "embedding" if words[-1].endswith("embedding") else "kernel"
    if kind == "kernel":
        array = array.transpose(FLAX_AXES[array.ndim])
    dtype = str(value.dtype).removeprefix("torch.")  # by its name: JAX gives NumPy a bfloat16
    return (*words, kind), array.astype(dtype)


def arrays_of(model):
    """The weights of a module of PyTorch's as arrays, by name."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def result_weights(run):
    """The weights of the UNet that are the result: the averaged ones, if there are any."""
    return run.state["ema"] if "ema" in run.state else run.state["unet"]


def copy_weights(weights, model):
    """Copies weights of JAX into a module of PyTorch's, whose names and shapes have to be the same."""
    model.load_state_dict({name: torch.tensor(np.asarray(weight)) for name, weight in weights.items()})


def frozen(function, model, dtype):
    """`function(weights, inputs, config)` as a function of numpy inputs, with the weights of a module of PyTorch's in
    `dtype`: splits the inputs, a multiple of this host's devices, over these, and returns outputs in float32."""
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    config = dict(model.config) if hasattr(model.config, "items") else model.config.to_dict()
    weights = {name: jnp.asarray(array, dtype) for name, array in arrays_of(model).items()}
    weights = jax.device_put(weights, everywhere)

    def program(weights, inputs):
        return function(weights, inputs, config).astype(jnp.float32)

    compiled = jax.jit(program, out_shardings=split)

    def apply(inputs):
        return np.asarray(compiled(weights, jax.device_put(inputs, split)))

    return apply
