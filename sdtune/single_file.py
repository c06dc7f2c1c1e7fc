"""Stable Diffusion 1 and 2 as one file in the original layout, which A1111, Forge and ComfyUI read: the names of its
weights, the buffers of its noise schedule, its header."""

import re

import diffusers
import torch

from sdtune.errors import InputError, counted, last_line
from sdtune.models import DTYPES
from sdtune.pipeline_folder import read_tensors

# How the names of each part's weights begin; the text encoder of SD 1 is CLIP's, of SD 2 OpenCLIP's.
UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_ENCODER = "cond_stage_model."
CLIP = f"{TEXT_ENCODER}transformer.text_model."
OPEN_CLIP = f"{TEXT_ENCODER}model."

ZERO_SNR = "ztsnr"  # A1111 and Forge take a tensor of this name, whatever it holds, for zero terminal SNR
POSITIONS = f"{CLIP}embeddings.position_ids"
# What files have and folders do not, besides the blocks of OpenCLIP after the last one that folders have.
UNUSED = [POSITIONS, f"{OPEN_CLIP}logit_scale", f"{OPEN_CLIP}text_projection", f"{OPEN_CLIP}attn_mask"]

# What else comes as one file, by a pattern of its keys.
OTHER_FILES = {
    r"(^|\.)joint_blocks\.": "Stable Diffusion 3",
    r"(^|\.)double_blocks\.": "Flux",
    r"^conditioner\.": "Stable Diffusion XL or a relative",
    r"^(control_model|controlnet_\w+)\.": "a ControlNet",
    r"(^lora_|\.lora_?(A|B|up|down|linear))": "a LoRA, which sdtune convert-lora converts",
    r"^depth_model\.": "Stable Diffusion 2 with depth",
    r"^embedder\.": "Stable unCLIP",
    r"^(down_blocks|encoder|decoder|text_model)\.": "a single part of a pipeline",
}

# Names of modules, and of the parts of a block: {diffusers' module: the original's}.
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ENDS = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}
VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP_MODULES = {"embeddings": "embeddings", "encoder": "encoder", "final_layer_norm": "final_layer_norm"}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    # One tensor for queries, keys and values.
    "self_attn.q_proj.weight": "attn.in_proj_weight",
    "self_attn.k_proj.weight": "attn.in_proj_weight",
    "self_attn.v_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.k_proj.bias": "attn.in_proj_bias",
    "self_attn.v_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
}

# What interfaces take for granted, because a file does not say it: {part: {setting: value}}.
SETTINGS_OF_BOTH = {
    "unet": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4},
    "text_encoder": {"vocab_size": 49408, "max_position_embeddings": 77},
}
SETTINGS_BY_VERSION = {
    1: {
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
        "text_encoder": {"hidden_act": "quick_gelu", "hidden_size": 768, "num_hidden_layers": 12},
    },
    2: {
        "unet": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        "text_encoder": {"hidden_act": "gelu", "hidden_size": 1024, "num_hidden_layers": 23},
    },
}


def read_single(path):
    """Returns ({original name: tensor}, header) of a single file. Raises `InputError` for one of something else."""
    weights, header = read_tensors(path)
    for name in weights:
        for pattern, kind in OTHER_FILES.items():
            if re.search(pattern, name):
                raise InputError(f"{path}: is {kind} ({name}); only Stable Diffusion 1 and 2 are converted")
    # Early files were also written without the level text_model.
    without_level = r"^cond_stage_model\.transformer\.(?!text_model\.)"
    return {re.sub(without_level, CLIP, name): value for name, value in weights.items()}, header


def unet_modules(config):
    """Where a UNet's modules stand in the original: {diffusers' module: the original's}.

    There a UNet is three lists: input_blocks (the first convolution, then each layer and each downsampling a number
    of its own), middle_block and output_blocks (an upsampling is the last part of the layer before it).
    """
    layers = config["layers_per_block"]
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for level, up_block_type in enumerate(config["up_block_types"]):
        down, first = f"down_blocks.{level}", 1 + level * (layers + 1)
        for layer in range(layers):
            blocks[f"{down}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            blocks[f"{down}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        blocks[f"{down}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"

        up, first = f"up_blocks.{level}", level * (layers + 1)
        for layer in range(layers + 1):  # one more than on the way down
            blocks[f"{up}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            blocks[f"{up}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        after_layer = 2 if "Attn" in up_block_type else 1
        blocks[f"{up}.upsamplers.0"] = f"output_blocks.{first + layers}.{after_layer}"
    return {**UNET_ENDS, **parts_of(blocks, UNET_RESNET, "resnets")}


def vae_modules(config):
    """Where a VAE's modules stand in the original, which counts the decoder's levels from the image."""
    layers, num_levels = config["layers_per_block"], len(config["block_out_channels"])
    blocks = {}
    for side in ("encoder", "decoder"):
        blocks[f"{side}.mid_block.resnets.0"] = f"{side}.mid.block_1"
        blocks[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        blocks[f"{side}.mid_block.resnets.1"] = f"{side}.mid.block_2"
    for level in range(num_levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{num_levels - 1 - level}"
        for layer in range(layers):
            blocks[f"{down}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
        for layer in range(layers + 1):
            blocks[f"{up}.resnets.{layer}"] = f"decoder.up.{level}.block.{layer}"
        blocks[f"{down}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        blocks[f"{up}.upsamplers.0"] = f"decoder.up.{level}.upsample"
    blocks = parts_of(blocks, VAE_RESNET, "resnets")
    return {**VAE_ENDS, **parts_of(blocks, VAE_ATTENTION, "attentions")}


def text_modules(config):
    """Where a text encoder's modules stand in the original: named alike in CLIP's (SD 1), not in OpenCLIP's (SD 2)."""
    if config["hidden_act"] == "quick_gelu":
        return CLIP_MODULES
    modules = dict(OPEN_CLIP_ENDS)
    for number in range(config["num_hidden_layers"]):
        for ours, theirs in OPEN_CLIP_LAYER.items():
            modules[f"encoder.layers.{number}.{ours}"] = f"transformer.resblocks.{number}.{theirs}"
    return modules


def parts_of(blocks, parts, kind):
    """Replaces each block of a `kind`, such as resnets, by its parts, each with a name of its own."""
    modules = {}
    for name, place in blocks.items():
        if f"{kind}." not in name:
            modules[name] = place
            continue
        for ours, theirs in parts.items():
            modules[f"{name}.{ours}"] = f"{place}.{theirs}"
    return modules


def original_name(name, modules):
    """The original name of a weight, by the longest beginning of its name that is one of `modules`; None without."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        module = modules.get(".".join(words[:length]))
        if module:
            return ".".join([module, *words[length:]])
    return None


def original_names(models):
    """Returns {original name: [(part, name), ...]} of all weights that the models have: one each, but three (of
    queries, keys and values, in this order) where OpenCLIP keeps them in one. Raises `InputError`."""
    unet, vae, text_encoder = [models[part].config for part in ("unet", "vae", "text_encoder")]
    if text_encoder.hidden_act not in ("quick_gelu", "gelu"):
        told = f"has the activation {text_encoder.hidden_act}, which Stable Diffusion 1 and 2 do not"
        raise InputError(f"text_encoder: {told}")
    if not isinstance(unet.layers_per_block, int) or not isinstance(vae.layers_per_block, int):
        raise InputError("unet: has layers_per_block of several numbers, which Stable Diffusion 1 and 2 do not have")
    modules = {
        "unet": (UNET, unet_modules(unet)),
        "vae": (VAE, vae_modules(vae)),
        "text_encoder": (
            CLIP if text_encoder.hidden_act == "quick_gelu" else OPEN_CLIP,
            text_modules(text_encoder.to_dict()),
        ),
    }
    places = {}
    for part, (prefix, names) in modules.items():
        # By the alphabet, but with q before k and v: their order where OpenCLIP keeps them in one tensor.
        for name in sorted(models[part].state_dict(), key=lambda name: name.replace(".q_proj.", ".a_proj.")):
            place = original_name(name, names)
            if place is None:
                raise InputError(f"{part}: has {name}, which Stable Diffusion 1 and 2 do not have")
            places.setdefault(prefix + place, []).append((part, name))
    return places


def weight_shapes(models):
    """The shapes of all weights that the models have: {(part, name): shape}."""
    shapes = {}
    for part, model in models.items():
        for name, value in model.state_dict().items():
            shapes[part, name] = value.shape
    return shapes


def reshape_weight(name, tensor, shape):
    """Gives a weight its shape, where linear maps and 1 x 1 convolutions differ. Raises `InputError`."""
    if tensor.dtype not in DTYPES.values():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name}: is {dtype}; only weights in float32, float16 and bfloat16 are converted")
    if [size for size in tensor.shape if size > 1] != [size for size in shape if size > 1]:
        raise InputError(f"{name}: has the shape {tuple(tensor.shape)}, its config says {tuple(shape)}")
    return tensor.reshape(shape)


def check_names(source, needed, given, remedy, allowed=()):
    """Raises `InputError` unless the names in `given` are those needed and, at most, those `allowed` besides."""
    missing, surplus = needed - given, given - needed - set(allowed)
    if missing:
        raise InputError(f"{source}: lacks {counted(len(missing), 'tensor')}, such as {min(missing)}; {remedy}")
    if surplus:
        told = f"has, unlike its config, {counted(len(surplus), 'tensor')}, such as {min(surplus)}"
        raise InputError(f"{source}: {told}; {remedy}")


def to_original(weights, models, source):
    """Renames the weights of a pipeline, {(part, name): tensor}, to the original layout, {name: tensor}; `source` is
    what messages call it. Raises `InputError`."""
    places, shapes = original_names(models), weight_shapes(models)
    needed, given = [{".".join(key) for key in keys} for keys in (shapes, weights)]
    check_names(source, needed, given, "get the folder again")
    result = {}
    for place, keys in places.items():
        tensors = [reshape_weight("/".join(key), weights[key], shapes[key]) for key in keys]
        tensor = tensors[0] if len(keys) == 1 else torch.cat(tensors)
        if place.startswith(VAE) and ".attn_1." in place and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # there attention's linear maps are convolutions
        result[place] = tensor.contiguous()
    text_config = models["text_encoder"].config
    if text_config.hidden_act == "quick_gelu":
        result[POSITIONS] = torch.arange(text_config.max_position_embeddings)[None]
    return result


def to_parts(weights, models, source):
    """Takes what the models need out of `weights`, those of the file `source` in the original layout, so that what is
    left in it has no place in a pipeline. Returns {part: {name: tensor}}. Raises `InputError`."""
    places, shapes = original_names(models), weight_shapes(models)
    last_block = f"{OPEN_CLIP}transformer.resblocks.{models['text_encoder'].config.num_hidden_layers}."
    given = {name for name in weights if name.startswith((UNET, VAE, TEXT_ENCODER))}
    unused = [name for name in given if name in UNUSED or name.startswith(last_block)]
    remedy = "give a whole file, and a --config_folder of its architecture"
    check_names(source, places.keys(), given, remedy, allowed=unused)
    parts = {part: {} for part in models}
    for place, keys in places.items():
        tensor = weights.pop(place)
        pieces = tensor.chunk(len(keys)) if len(keys) > 1 else [tensor]
        for (part, name), piece in zip(keys, pieces):
            # A clone, because a file has no place for tensors that share memory.
            parts[part][name] = reshape_weight(place, piece, shapes[part, name]).clone()
    return parts


def schedule(config):
    """The buffers of the original code's noise schedule, {name: (timesteps,)}: float32, from float64 as there.

    The posterior's are those of DDPM (arXiv 2006.11239, equations 6 and 7). Rescaling to zero terminal SNR is left to
    whoever samples: it makes some of them infinite. Raises `InputError`.
    """
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    settings = {name: config[name] for name in names if name in config}
    try:
        scheduler = diffusers.DDPMScheduler(**settings)
    except Exception as error:  # of the settings, or of how they fit together
        raise InputError(f"scheduler_config.json: makes no schedule of noise ({last_line(error)})") from None
    betas, config = scheduler.betas.double(), scheduler.config
    if config.beta_schedule == "scaled_linear" and config.trained_betas is None:
        first, last = config.beta_start**0.5, config.beta_end**0.5
        betas = torch.linspace(first, last, len(betas), dtype=torch.float64) ** 2
    alphas = 1 - betas
    product = alphas.cumprod(0)
    previous = torch.cat([product.new_ones(1), product[:-1]])
    variance = betas * (1 - previous) / (1 - product)
    buffers = {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": product.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - product).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - product).log(),
        "sqrt_recip_alphas_cumprod": (1 / product).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / product - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - product),
        "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - product),
    }
    return {name: value.float() for name, value in buffers.items()}


def version_of(models):
    """The version of Stable Diffusion, 1 or 2, whose settings the models have; None if they have others."""
    for version, settings in SETTINGS_BY_VERSION.items():
        if have_settings(models, SETTINGS_OF_BOTH) and have_settings(models, settings):
            return version
    return None


def have_settings(models, settings):
    """Whether the models' configs have the `settings`, {part: {setting: value}}."""
    for part, wanted in settings.items():
        for setting, value in wanted.items():
            found = getattr(models[part].config, setting)
            if isinstance(found, list):
                found = tuple(found)
            if found != value:
                return False
    return True


def make_header(models, prediction_type, title):
    """The file's header, by Stability AI's ModelSpec 1.0.0 if it is for an architecture that has a name there."""
    version, config = version_of(models), models["unet"].config
    prediction = "v" if prediction_type == "v_prediction" else prediction_type
    header = {"format": "pt", "modelspec.title": title, "modelspec.prediction_type": prediction}
    if version is None:
        return header
    if version == 1:
        architecture = "stable-diffusion-v1"
        implementation = "https://github.com/CompVis/stable-diffusion"
    else:
        architecture = "stable-diffusion-v2-768-v" if prediction == "v" else "stable-diffusion-v2-512"
        implementation = "https://github.com/Stability-AI/stablediffusion"
    if config.in_channels == 9:
        architecture += "-inpainting"
    side = 8 * config.sample_size
    return {
        **header,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.resolution": f"{side}x{side}",
    }
