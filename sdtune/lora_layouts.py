"""LoRA files in diffusers' and kohya's layouts: read, renamed, written; tensors keep their bits.

diffusers' layout names tensors as peft does, unet.<layer>.lora_A.weight, with rank and alpha in the header; kohya's is
lora_unet_<layer>.lora_down.weight with a tensor .alpha per layer, as A1111, Forge and ComfyUI read it. In between,
adapters are (weights, alphas): tensors as peft names them, such as unet.mid_block.<...>.to_q.lora_A.weight
(rank, in, ...) and .lora_B.weight (out, rank, ...), and {layer: alpha}, such as unet.mid_block.<...>.to_q; the effect
of a layer is lora_B @ lora_A * alpha / rank.
"""

import json
import math
import re
from collections import Counter

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdtune.errors import InputError, last_line
from sdtune.files import beside

LORA_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_NAME = re.compile(
    r"(?P<model>unet|text_encoder)\.(?:text_model\.)?(?P<layer>.+?)\."
    r"(?:(?P<down>(?:lora_A|lora\.down|lora_linear_layer\.down)\.weight)"
    r"|(?P<up>(?:lora_B|lora\.up|lora_linear_layer\.up)\.weight)"
    r"|(?P<length>lora_magnitude_vector(?:\.weight)?))"
)
KOHYA_NAME = re.compile(
    r"lora_(?P<model>unet|te_text_model)_(?P<layer>.+)\."
    r"(?P<kind>lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
# peft's name of DoRA's lengths, but transformers 5 loads those of the text encoder by the second name only.
LENGTH_NAMES = {"unet": "lora_magnitude_vector", "text_encoder": "lora_magnitude_vector.weight"}
LAYER_ROOTS = {"conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out", "encoder"}
# Parts of layers' names that contain underscores: kohya's layout writes them like the dots between names.
UNDERSCORED = [
    "down_blocks",
    "up_blocks",
    "mid_block",
    "transformer_blocks",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "proj_in",
    "proj_out",
    "time_emb_proj",
    "conv_shortcut",
    "time_embedding",
    "linear_1",
    "linear_2",
    "conv_in",
    "conv_out",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
]
# What else has such files, by a pattern of its tensors' names.
OTHER_ADAPTERS = {
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_": "OFT",
    r"\.lora_mid": "LoCon with three factors",
    r"^(lora_te[12]_|text_encoder_[23]\.|lora_unet_(input|middle|output)_block)": "Stable Diffusion XL",
    r"^(lora_transformer_|transformer\.)": "a transformer",
}


def read_adapters(path):
    """Reads a LoRA file; returns (its layout, diffusers or kohya, weights, alphas). Raises `InputError`."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            settings = dict(json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}")))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: is no LoRA in a .safetensors file ({last_line(error)})") from None
    layout = layout_of(path, tensors)
    if layout == "kohya":
        weights, alphas = from_kohya(tensors)
    else:
        weights, alphas = from_diffusers(tensors, settings)
    check_layers(path, weights, alphas)
    return layout, weights, alphas


def layout_of(path, names):
    """The layout, diffusers or kohya, in which all the `names` of a file's tensors are. Raises `InputError`."""
    for name in names:
        for pattern, kind in OTHER_ADAPTERS.items():
            if re.search(pattern, name):
                told = f"is of {kind} ({name}); only LoRA and DoRA of Stable Diffusion 1 and 2 convert"
                raise InputError(f"{path}: {told}")
    diffusers_names = [name for name in names if DIFFUSERS_NAME.fullmatch(name)]
    kohya_names = [name for name in names if KOHYA_NAME.fullmatch(name)]
    others = [name for name in names if name not in {*diffusers_names, *kohya_names}]
    if others or not names:
        found = others[0] if others else "nothing"
        raise InputError(f"{path}: holds {found}, which is in neither diffusers' nor kohya's layout of LoRA weights")
    if diffusers_names and kohya_names:
        examples = f"{diffusers_names[0]}, {kohya_names[-1]}"
        raise InputError(f"{path}: mixes diffusers' and kohya's layout ({examples}); split it in two")
    return "kohya" if kohya_names else "diffusers"


def ranks(weights):
    """{layer: rank} of tensors as peft names them."""
    end = ".lora_A.weight"
    return {name.removesuffix(end): value.shape[0] for name, value in weights.items() if name.endswith(end)}


def from_diffusers(tensors, settings):
    """Returns (weights, alphas) of tensors in diffusers' layout, of today or before, given peft's `settings` in the
    file's header."""
    weights, alphas = {}, {}
    for name, tensor in tensors.items():
        match = DIFFUSERS_NAME.fullmatch(name)
        if match["down"]:
            kind = "lora_A.weight"
        elif match["up"]:
            kind = "lora_B.weight"
        else:
            kind = LENGTH_NAMES[match["model"]]
        weights[f"{match['model']}.{match['layer']}.{kind}"] = tensor
    for layer, rank in ranks(weights).items():
        alphas[layer] = alpha_in_settings(layer, rank, settings)
    return weights, alphas


def alpha_in_settings(layer, rank, settings):
    """The alpha of a layer by peft's settings, the rank if they say nothing; rsLoRA, which scales by alpha /
    sqrt(rank), becomes the alpha that gives the same scale."""
    model, name = layer.split(".", 1)
    alpha = settings.get(f"{model}.lora_alpha", rank)
    for pattern, own_alpha in settings.get(f"{model}.alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern.removeprefix('text_model.')})$", name):  # as peft matches them
            alpha = own_alpha
            break
    scale = math.sqrt(rank) if settings.get(f"{model}.use_rslora") else 1
    return float(alpha) * scale


def from_kohya(tensors):
    """Returns (weights, alphas) of tensors in kohya's layout; where a layer has no alpha, it is the rank."""
    weights, alphas = {}, {}
    for name, tensor in tensors.items():
        match = KOHYA_NAME.fullmatch(name)
        model = "unet" if match["model"] == "unet" else "text_encoder"
        layer = f"{model}.{layer_name(match['layer'])}"
        if match["kind"] == "alpha":
            alphas[layer] = tensor.item() if tensor.numel() == 1 else math.nan
        elif match["kind"] == "dora_scale":
            # (out, 1), of a convolution (out, 1, 1, 1); peft has (out,) and (1, out, 1, 1).
            length = tensor.transpose(0, 1) if tensor.ndim == 4 else tensor.squeeze(-1)
            weights[f"{layer}.{LENGTH_NAMES[model]}"] = length
        else:
            side = "lora_A" if match["kind"] == "lora_down.weight" else "lora_B"
            weights[f"{layer}.{side}.weight"] = tensor
    for layer, rank in ranks(weights).items():
        alphas.setdefault(layer, float(rank))
    return weights, alphas


def layer_name(flat):
    """The name of a layer whose dots kohya's layout made underscores: mid_block.resnets.0 for mid_block_resnets_0."""
    names = "|".join(name.replace("_", r"\.") for name in UNDERSCORED)
    return re.sub(rf"\b({names})\b", lambda match: match[0].replace(".", "_"), flat.replace("_", "."))


def check_layers(path, weights, alphas):
    """Raises `InputError` for a layer that is not whole or that Stable Diffusion 1 and 2 do not have."""
    layers = {name.split(".lora_")[0] for name in weights} | alphas.keys()
    for layer in sorted(layers):
        model, root = layer.split(".")[:2]
        down = weights.get(f"{layer}.lora_A.weight")
        up = weights.get(f"{layer}.lora_B.weight")
        length = weights.get(f"{layer}.{LENGTH_NAMES[model]}")
        if root not in LAYER_ROOTS:
            raise InputError(f"{path}: has a layer {layer}, which Stable Diffusion 1 and 2 do not have")
        if down is None or up is None or not fit_together(down, up):
            raise InputError(f"{path}: lacks a part of {layer}, or its parts do not fit; get the file again")
        if not math.isfinite(alphas[layer]):
            raise InputError(f"{path}: the alpha of {layer} is not a number; get the file again")
        length_shape = (1, len(up), 1, 1) if up.ndim == 4 else (len(up),)
        if length is not None and length.shape != length_shape:
            raise InputError(f"{path}: its DoRA has a length per input of {layer}; only one per output converts")


def fit_together(down, up):
    """Whether the two matrices, or kernels of convolutions, of an adapter have a product."""
    return down.ndim == up.ndim >= 2 and down.shape[0] == up.shape[1]


def to_kohya(weights, alphas):
    """Renames adapters to kohya's layout: lora_unet_ or lora_te_text_model_, the layer's name with underscores, and
    .lora_down.weight (rank, in, ...), .lora_up.weight (out, rank, ...), .alpha, with DoRA .dora_scale (out, 1, ...).
    A layer's effect is lora_up @ lora_down * alpha / rank, with its alpha in `alphas`, {layer: alpha}."""
    renamed = {}
    for key, weight in weights.items():
        layer, kind = split_weight_name(key)
        name = layer.replace("text_encoder.", "lora_te_text_model.", 1).replace("unet.", "lora_unet.", 1)
        name = name.replace(".", "_")
        if kind == "lora_magnitude_vector":
            ones = [1] * (weights[f"{layer}.lora_A.weight"].ndim - 1)
            renamed[f"{name}.dora_scale"] = weight.reshape(-1, *ones).contiguous()
            continue
        side = "lora_down" if kind == "lora_A" else "lora_up"
        renamed[f"{name}.{side}.weight"] = weight.contiguous()
        exact = torch.tensor(float(alphas[layer]))
        short = exact.to(weight.dtype)
        renamed[f"{name}.alpha"] = short if short == exact else exact  # half precision rounds what rsLoRA needs
    return renamed


def split_weight_name(key):
    """The layer, and which of its tensors, of a name that `lora_weights` gives: lora_A, lora_B or
    lora_magnitude_vector."""
    return re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", key).groups()


def write_kohya(path, weights, alphas):
    """Writes a file in kohya's layout, with what interfaces show of it in the header."""
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(most_common(ranks(weights))),
        "ss_network_alpha": str(most_common(alphas)),
        "ss_output_name": path.stem,
        "modelspec.title": path.stem,
    }
    with beside(path) as unfinished:
        save_file(to_kohya(weights, alphas), unfinished, header)


def write_diffusers(path, weights, alphas):
    """Writes a file in diffusers' layout, with peft's settings of each model's adapters in the header."""
    settings = {}
    for model in models_of(alphas):
        for name, value in lora_config(weights, alphas, model).to_dict().items():
            settings[f"{model}.{name}"] = value
    settings = json.dumps(settings, default=sorted, sort_keys=True)  # default: of sets
    with beside(path) as unfinished:
        save_file(published_names(weights), unfinished, {"format": "pt", "lora_adapter_metadata": settings})


def published_names(weights):
    """Adapters by the names of published files, text_encoder.text_model.encoder and so on, which libraries before
    transformers 5 need; later ones read both."""
    return {re.sub(r"^text_encoder\.", "text_encoder.text_model.", key): value for key, value in weights.items()}


def models_of(alphas):
    """The names of the models that have adapters: unet, text_encoder or both."""
    return sorted({layer.split(".")[0] for layer in alphas})


def own_part(values, model):
    """What a dictionary by layer or tensor has of one model, whose name is taken off."""
    start = f"{model}."
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def lora_config(weights, alphas, model):
    """peft's settings for the adapters of a model, by which each layer gets its rank and alpha."""
    from peft import LoraConfig  # here, since it takes seconds that reading a file need not

    own_ranks, own_alphas = own_part(ranks(weights), model), own_part(alphas, model)
    rank, alpha = most_common(own_ranks), most_common(own_alphas)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(own_ranks),
        rank_pattern={layer: value for layer, value in own_ranks.items() if value != rank},
        alpha_pattern={layer: value for layer, value in own_alphas.items() if value != alpha},
        use_dora=any(name.endswith(LENGTH_NAMES[model]) for name in own_part(weights, model)),
    )


def most_common(values):
    """The commonest of the dictionary's values."""
    return Counter(values.values()).most_common(1)[0][0]
