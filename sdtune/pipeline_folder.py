"""Pipeline folders of Stable Diffusion 1 and 2: whether one is whole, its configs and weights as they are on disk, and
whether one may be written to a place."""

import contextlib
import re

import diffusers
import torch
import transformers
from safetensors import safe_open
from tqdm.auto import tqdm

from sdtune.errors import InputError, last_line
from sdtune.files import read_json

PIPELINES = ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}  # with weights
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of early folders


def class_of(index, part):
    """The class of a part by a pipeline's model_index.json, or None."""
    entry = index.get(part)  # [library, class]
    return entry[-1] if isinstance(entry, list) and entry else None


def check_folder(folder, variant, with_weights):
    """Lists what a folder lacks to be a pipeline of Stable Diffusion 1 or 2, its weights if `with_weights`."""
    try:
        index = read_json(folder / "model_index.json")
    except InputError as error:
        return [f"{error}; give a pipeline folder"]
    kind = str(index.get("_class_name"))
    is_strange = kind not in PIPELINES
    for part, known in PARTS.items():
        found = class_of(index, part)
        if found not in (known, None):
            is_strange = True
            kind += f" with a {part} of class {found}"
    if is_strange:
        return [f"{folder}: is a {kind}; only Stable Diffusion 1 and 2 are converted"]

    needed = [*[f"{part}/config.json" for part in PARTS], "scheduler/scheduler_config.json"]
    missing = [file for file in needed if not (folder / file).is_file()]
    if with_weights:
        for part in PARTS:
            if not weight_files(folder / part, variant):
                missing.append(f"{part}/{weights_name(part, variant)}.safetensors")
    elif not (folder / "tokenizer").is_dir():
        missing.append("tokenizer")
    return [f"{folder}: lacks {', '.join(missing)}"] if missing else []


def check_place(output, sources, is_folder, overwrite):
    """Lists what forbids writing a file, or a pipeline folder, to `output`; `sources` are the paths that are read."""
    place = output.resolve()
    for source in sources:
        if place == source.resolve() or place in source.resolve().parents:
            return [f"{output}: holds what is read; write the result somewhere else"]
    if not output.exists():
        return []
    if not overwrite:
        return [f"{output}: exists; give another name, or --overwrite to replace it"]
    if output.is_dir() != is_folder:
        return [f"{output}: is a {'folder' if output.is_dir() else 'file'}; give another name"]
    if is_folder:
        parts = {"model_index.json"}
        with contextlib.suppress(InputError):
            parts |= read_json(output / "model_index.json").keys()
        others = sorted({path.name for path in output.iterdir()} - parts)
        if others:
            return [f"{output}: holds {others[0]}, which is no part of a pipeline; move it, or give another name"]
    return []


def weights_name(part, variant=None):
    """The name of a part's file of weights, without its suffix."""
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return f"{name}.{variant}" if variant else name


def weight_files(folder, variant):
    """The files with the weights of the part in `folder`: one, or several shards; none if they are missing."""
    name = weights_name(folder.name, variant)
    pickled = f"pytorch_{name}.bin" if folder.name == "text_encoder" else f"{name}.bin"
    for path in (folder / f"{name}.safetensors", folder / pickled):
        if path.is_file():
            return [path]
    return sorted(folder.glob(f"{name}-*-of-*.safetensors"))


def read_models(folder):
    """The UNet, VAE and text encoder of a pipeline's configs, {part: model}, without weights (on the meta device).
    Raises `InputError`."""
    models = {}
    for part in PARTS:
        config = read_json(folder / part / "config.json")
        try:
            with torch.device("meta"):
                if part == "text_encoder":
                    models[part] = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
                elif part == "vae":
                    models[part] = diffusers.AutoencoderKL.from_config(config)
                else:
                    models[part] = diffusers.UNet2DConditionModel.from_config(config)
        except Exception as error:  # of the settings, or of how they fit together
            raise InputError(f"{folder / part}: its config.json makes no model ({last_line(error)})") from None
    return models


def read_tensors(path):
    """Returns ({name: tensor}, header) of a .safetensors file, or of a pickled one, of which only weights are read.
    Raises `InputError`."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = tqdm(file.keys(), desc=path.name, unit="tensor", disable=None)
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = state.get("state_dict", state)
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}, {}
    except Exception as error:  # a pickle can fail in any way
        told = f"cannot be read as weights ({last_line(error)}); get the file again, best as .safetensors"
        raise InputError(f"{path}: {told}") from None


def read_weights(folder, variant):
    """Reads the weights of a pipeline folder: {(part, name): tensor}, named as diffusers and transformers do today.
    Raises `InputError`."""
    weights = {}
    for part in PARTS:
        for path in weight_files(folder / part, variant):
            for name, tensor in read_tensors(path)[0].items():
                name = name.removeprefix("text_model.")  # which transformers 5 dropped
                if part == "vae":
                    name = new_vae_name(name)
                if name != "embeddings.position_ids":  # which it does not save
                    weights[part, name] = tensor
    return weights


def new_vae_name(name):
    """Today's name of a VAE's weight, whose attention early folders named otherwise."""
    old = re.search(r"attentions\.0\.(query|key|value|proj_attn)\.", name)
    if not old:
        return name
    return f"{name[: old.start(1)]}{OLD_VAE_ATTENTION[old[1]]}{name[old.end(1) :]}"
