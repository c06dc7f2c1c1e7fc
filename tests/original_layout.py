"""Writes a pipeline as one file in the layout of the original Stable Diffusion 1 code: the inverse of what
`from_single_file` reads. General in the number of blocks and of layers per block.

A UNet of that code is three lists: input_blocks (the first convolution, then each layer and each downsampling a
number of its own), middle_block and output_blocks (an upsampling is the last part of the layer before it).
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

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
UNET_MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_key(key, layers_per_block, attention_blocks):
    """Returns the original name of one UNet weight.

    attention_blocks: the numbers of the up blocks that have attention, for there the upsampling stands third.
    """
    module, _, leaf = key.rpartition(".")
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{leaf}"
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", module)
    side, block, kind, layer, rest = match.groups()
    if kind == "resnets":
        rest = UNET_RESNET[rest]
    if side is None:
        return f"middle_block.{UNET_MIDDLE[f'{kind}.{layer}']}.{rest}.{leaf}"
    block, layer = int(block), int(layer)
    per_block = layers_per_block + 1  # down: the layers and the downsampling; up: one layer more than down
    if kind == "downsamplers":
        return f"input_blocks.{1 + block * per_block + layers_per_block}.0.op.{leaf}"
    if kind == "upsamplers":
        part = 2 if block in attention_blocks else 1
        return f"output_blocks.{block * per_block + layers_per_block}.{part}.{rest}.{leaf}"
    part = {"resnets": 0, "attentions": 1}[kind]
    if side == "down":
        return f"input_blocks.{1 + block * per_block + layer}.{part}.{rest}.{leaf}"
    return f"output_blocks.{block * per_block + layer}.{part}.{rest}.{leaf}"


def vae_key(key, num_blocks):
    """Returns the original name of one VAE weight; the original counts the decoder's levels from the image."""
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{num_blocks - 1 - int(match[1])}", key)
    key = re.sub(r"(up\.\d+)\.resnets\.(\d+)", r"\1.block.\2", key)
    key = re.sub(r"(up\.\d+)\.upsamplers\.0", r"\1.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    match = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", key)
    if match:
        key = f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def original_state_dict(pipeline):
    """Returns {original name: weight} of the pipeline's UNet, VAE and text encoder."""
    unet, vae = pipeline.unet, pipeline.vae
    attention_blocks = {i for i, kind in enumerate(unet.config.up_block_types) if "CrossAttn" in kind}
    state = {}
    for key, weight in unet.state_dict().items():
        name = unet_key(key, unet.config.layers_per_block, attention_blocks)
        state[f"model.diffusion_model.{name}"] = weight
    for key, weight in vae.state_dict().items():
        name = vae_key(key, len(vae.config.block_out_channels))
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            weight = weight[:, :, None, None]  # the original's linear maps are 1x1 convolutions
        state[f"first_stage_model.{name}"] = weight
    for key, weight in pipeline.text_encoder.state_dict().items():
        # transformers 5 dropped the prefix that files of the original still have.
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = weight
    # Published files have these as well.
    limit = pipeline.text_encoder.config.max_position_embeddings
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    state[position_ids] = torch.arange(limit)[None]
    state["alphas_cumprod"] = pipeline.scheduler.alphas_cumprod
    return {name: weight.detach().clone().contiguous() for name, weight in state.items()}


def save_original(pipeline, path):
    """Writes the pipeline's weights to one `.safetensors` or `.ckpt` file; returns the path."""
    state, path = original_state_dict(pipeline), Path(path)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 0}, path)
    return path
