"""The networks of Stable Diffusion in JAX, as pure functions of the weights of PyTorch's modules.

Each whole network takes such a state dict, {name: array}, of which it makes a tree by the parts of the names; the
layers take their branch of it. Inside, images and latents are (batch, height, width, channels), which convolutions
prefer on every backend.
"""

import functools
import inspect
import math

import diffusers
import jax
import jax.numpy as jnp
import torch
import transformers
from flax import traverse_util

from sdtune.models import config_source

# Keys of the configs that the networks obey or that do not bear on them; any other must be at its default.
UNDERSTOOD = {
    "unet": set(
        """
        attention_head_dim block_out_channels cross_attention_dim down_block_types flip_sin_to_cos freq_shift
        in_channels layers_per_block norm_eps norm_num_groups out_channels sample_size split_head_dim
        transformer_layers_per_block up_block_types upcast_attention use_linear_projection
        use_memory_efficient_attention
        """.split()
    ),
    "vae": set(
        """
        block_out_channels down_block_types force_upcast in_channels latent_channels layers_per_block norm_num_groups
        out_channels sample_size scaling_factor up_block_types use_post_quant_conv
        """.split()
    ),
    "text_encoder": set(
        """
        architectures attention_dropout bos_token_id dropout dtype eos_token_id hidden_act hidden_size
        initializer_factor initializer_range intermediate_size layer_norm_eps max_position_embeddings
        num_attention_heads num_hidden_layers pad_token_id projection_dim torch_dtype transformers_version vocab_size
        """.split()
    ),
}
BLOCKS = {
    "CrossAttnDownBlock2D",
    "CrossAttnUpBlock2D",
    "DownBlock2D",
    "DownEncoderBlock2D",
    "UpBlock2D",
    "UpDecoderBlock2D",
}
ACTIVATIONS = {"gelu", "quick_gelu"}  # of the text encoder


def check_networks(args):
    """Lists what the networks here would not compute as PyTorch's do: unknown keys and values of the configs."""
    source, where = config_source(args)
    problems = check_blocks("unet", diffusers.UNet2DConditionModel, source, where)
    problems += check_blocks("vae", diffusers.AutoencoderKL, source, where)
    problems += check_text_encoder(source, where)
    return [f"{problem} not known in JAX; use train_text_to_image.py for this model" for problem in problems]


def check_blocks(name, kind, source, where):
    """Lists what is unknown in the config of a UNet or a VAE of the class `kind`."""
    config = kind.load_config(source, subfolder=name, **where)
    parameters = inspect.signature(kind.__init__).parameters
    problems = []
    for key, value in config.items():
        is_default = key in parameters and value == parameters[key].default
        if not (key.startswith("_") or key in UNDERSTOOD[name] or is_default):
            problems.append(f"{name}: {key}={value!r} is")
    types = {*config.get("down_block_types", []), *config.get("up_block_types", [])}
    problems += [f"{name}: blocks of type {block} are" for block in types - BLOCKS]
    width = config.get("cross_attention_dim", 0)
    if not isinstance(width, int):  # one for each level
        problems.append(f"{name}: cross_attention_dim={width!r} is")
    return problems


def check_text_encoder(source, where):
    """Lists what is unknown in the config of a text encoder."""
    config, _ = transformers.CLIPTextConfig.get_config_dict(source, subfolder="text_encoder", **where)
    defaults = transformers.CLIPTextConfig()
    problems = []
    for key, value in config.items():
        is_default = value == getattr(defaults, key, None)
        if not (key.startswith("_") or key in UNDERSTOOD["text_encoder"] or is_default):
            problems.append(f"text_encoder: {key}={value!r} is")
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        problems.append(f"text_encoder: hidden_act={activation!r} is")
    return problems


def in_order(layers):
    """The layers of a list, by their numbers: under `jax.jit` 10 comes before 2."""
    return [layers[str(number)] for number in range(len(layers))]


def dense(weights, x):
    """A linear layer, or a convolution of 1 x 1, over the last axis."""
    kernel = weights["weight"]
    y = x @ kernel.reshape(kernel.shape[:2]).T
    return y + weights["bias"] if "bias" in weights else y


def conv(weights, x, stride=1, padding=(1, 1)):
    """A convolution with the same stride and the same padding (before, after) in both directions."""
    layout = ("NHWC", "OIHW", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, weights["weight"], (stride, stride), [padding, padding], dimension_numbers=layout
    )
    return y + weights["bias"]


def norm(weights, x, eps, groups=None):
    """Layer normalization (arXiv 1607.06450), or group normalization (1803.08494) of x (batch, ..., channels) in so
    many `groups`, with statistics in float32."""
    if groups is None:
        shape, axes = (len(x), -1, 1, x.shape[-1]), 3
    else:
        shape, axes = (len(x), -1, groups, x.shape[-1] // groups), (1, 3)
    grouped = x.astype(jnp.float32).reshape(shape)
    centred = grouped - grouped.mean(axes, keepdims=True)
    variance = jnp.square(centred).mean(axes, keepdims=True)
    normal = (centred * jax.lax.rsqrt(variance + eps)).reshape(x.shape)
    return (normal * weights["weight"] + weights["bias"]).astype(x.dtype)


def attention(projections, x, context, num_heads, is_causal=False):
    """Attention of x (batch, length, channels) to `context`; `projections` are the weights of those to queries, keys
    and values and of the last one. The softmax is float32 in every precision."""
    query, key, value, out = projections
    heads = [dense(query, x), dense(key, context), dense(value, context)]
    heads = [head.reshape(*head.shape[:2], num_heads, -1) for head in heads]
    if x.dtype == jnp.float16:  # of which neither CPUs nor TPUs have the products that JAX asks for
        heads = [head.astype(jnp.float32) for head in heads]
    attended = jax.nn.dot_product_attention(*heads, is_causal=is_causal).astype(x.dtype)
    return dense(out, attended.reshape(*x.shape[:2], -1))


def diffusers_attention(weights, x, context, num_heads):
    """Attention by the names that UNet and VAE have for its projections; the last one is the first of a list."""
    projections = [weights["to_q"], weights["to_k"], weights["to_v"], weights["to_out"]["0"]]
    return attention(projections, x, context, num_heads)


def residual_block(weights, x, time_embedding, groups, eps):
    """Two convolutions beside a shortcut, with the time embedding (batch, channels) between them if there is one."""
    hidden = conv(weights["conv1"], jax.nn.silu(norm(weights["norm1"], x, eps, groups)))
    if time_embedding is not None:
        hidden += dense(weights["time_emb_proj"], jax.nn.silu(time_embedding))[:, None, None]
    hidden = conv(weights["conv2"], jax.nn.silu(norm(weights["norm2"], hidden, eps, groups)))
    shortcut = dense(weights["conv_shortcut"], x) if "conv_shortcut" in weights else x
    return shortcut + hidden


def transformer_block(weights, x, context, num_heads):
    """Self-attention, cross-attention and a gated feed-forward layer; the gate is the exact GELU."""
    normal = norm(weights["norm1"], x, 1e-5)
    x += diffusers_attention(weights["attn1"], normal, normal, num_heads)
    x += diffusers_attention(weights["attn2"], norm(weights["norm2"], x, 1e-5), context, num_heads)
    widen, narrow = weights["ff"]["net"]["0"]["proj"], weights["ff"]["net"]["2"]
    hidden, gate = jnp.split(dense(widen, norm(weights["norm3"], x, 1e-5)), 2, axis=-1)
    return x + dense(narrow, hidden * jax.nn.gelu(gate, approximate=False))


def transformer(weights, x, context, groups, block):
    """Adds to x (batch, height, width, channels) what transformer blocks, by the function `block`, make of it."""
    hidden = norm(weights["norm"], x, 1e-6, groups).reshape(len(x), -1, x.shape[-1])
    hidden = dense(weights["proj_in"], hidden)
    for layer in in_order(weights["transformer_blocks"]):
        hidden = block(layer, hidden, context)
    return x + dense(weights["proj_out"], hidden).reshape(x.shape)


def embed_timesteps(weights, config, timesteps):
    """The embedding (batch, 4 x channels of the first level) of timesteps (arXiv 1706.03762, section 3.5)."""
    half = config["block_out_channels"][0] // 2
    # By PyTorch, since timesteps of up to 999 enlarge what another exp would round otherwise.
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - config["freq_shift"]))
    angles = timesteps[:, None].astype(jnp.float32) * rates.numpy()
    waves = [jnp.cos(angles), jnp.sin(angles)] if config["flip_sin_to_cos"] else [jnp.sin(angles), jnp.cos(angles)]
    waves = jnp.concatenate(waves, axis=-1).astype(weights["linear_1"]["weight"].dtype)
    return dense(weights["linear_2"], jax.nn.silu(dense(weights["linear_1"], waves)))


def apply_unet(weights, latents, timesteps, prompt_embeds, config, gradient_checkpointing=False):
    """The prediction (batch, 4, height / 8, width / 8) of a UNet2DConditionModel for latents of this shape, timesteps
    (batch,) and prompt embeddings (batch, tokens, channels), in the precision of the weights."""
    weights, dtype = traverse_util.unflatten_dict(weights, sep="."), weights["conv_in.weight"].dtype
    groups, num_levels = config["norm_num_groups"], len(weights["down_blocks"])
    num_heads = config["attention_head_dim"]  # so called since the first releases, it is the number of heads
    if not isinstance(num_heads, list | tuple):
        num_heads = [num_heads] * num_levels
    residual = functools.partial(residual_block, groups=groups, eps=config["norm_eps"])
    blocks_of_level = [functools.partial(transformer_block, num_heads=number) for number in num_heads]
    if gradient_checkpointing:
        residual, blocks_of_level = jax.checkpoint(residual), [jax.checkpoint(block) for block in blocks_of_level]

    def attend(block, index, x, level):
        """x after the transformer that follows residual block `index`, if that has one."""
        if "attentions" not in block:
            return x
        return transformer(block["attentions"][str(index)], x, context, groups, blocks_of_level[level])

    context = prompt_embeds.astype(dtype)
    time_embedding = embed_timesteps(weights["time_embedding"], config, timesteps)
    x = conv(weights["conv_in"], latents.transpose(0, 2, 3, 1).astype(dtype))

    # Down: what each layer gives is kept for the way up.
    skipped = [x]
    for level, block in enumerate(in_order(weights["down_blocks"])):
        for index, layer in enumerate(in_order(block["resnets"])):
            x = attend(block, index, residual(layer, x, time_embedding), level)
            skipped.append(x)
        if "downsamplers" in block:
            x = conv(block["downsamplers"]["0"]["conv"], x, stride=2)
            skipped.append(x)

    # Middle
    first, *others = in_order(weights["mid_block"]["resnets"])
    x = residual(first, x, time_embedding)
    for index, layer in enumerate(others):
        x = residual(layer, attend(weights["mid_block"], index, x, -1), time_embedding)

    # Up
    for level, block in enumerate(in_order(weights["up_blocks"])):
        for index, layer in enumerate(in_order(block["resnets"])):
            x = residual(layer, jnp.concatenate([x, skipped.pop()], -1), time_embedding)
            x = attend(block, index, x, -1 - level)
        if "upsamplers" in block:
            height, width = skipped[-1].shape[1:3]  # odd sides lose a row that the way down did not have
            x = conv(block["upsamplers"]["0"]["conv"], x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width])
    x = jax.nn.silu(norm(weights["conv_norm_out"], x, config["norm_eps"], groups))
    return conv(weights["conv_out"], x).transpose(0, 3, 1, 2)


def apply_vae_encoder(weights, pixel_values, config):
    """Mean and log-variance (batch, 2 x 4, height / 8, width / 8) of an AutoencoderKL's posterior, in float32, for
    pixels (batch, 3, height, width) in [-1, 1]."""
    weights, groups = traverse_util.unflatten_dict(weights, sep="."), config["norm_num_groups"]
    encoder = weights["encoder"]
    x = conv(encoder["conv_in"], pixel_values.transpose(0, 2, 3, 1).astype(encoder["conv_in"]["weight"].dtype))
    for block in in_order(encoder["down_blocks"]):
        for layer in in_order(block["resnets"]):
            x = residual_block(layer, x, None, groups, 1e-6)
        if "downsamplers" in block:
            x = conv(block["downsamplers"]["0"]["conv"], x, stride=2, padding=(0, 1))

    first, last = in_order(encoder["mid_block"]["resnets"])
    middle = encoder["mid_block"]["attentions"]["0"]
    x = residual_block(first, x, None, groups, 1e-6)
    hidden = norm(middle["group_norm"], x, 1e-6, groups).reshape(len(x), -1, x.shape[-1])
    x += diffusers_attention(middle, hidden, hidden, 1).reshape(x.shape)
    x = residual_block(last, x, None, groups, 1e-6)
    x = conv(encoder["conv_out"], jax.nn.silu(norm(encoder["conv_norm_out"], x, 1e-6, groups)))
    return dense(weights["quant_conv"], x).transpose(0, 3, 1, 2).astype(jnp.float32)


def apply_text_encoder(weights, input_ids, config):
    """The last hidden states (batch, tokens, channels) of a CLIPTextModel (arXiv 2103.00020) for tokens."""
    weights = traverse_util.unflatten_dict(weights, sep=".")
    normal = functools.partial(norm, eps=config["layer_norm_eps"])
    x = weights["embeddings"]["token_embedding"]["weight"][input_ids]
    x += weights["embeddings"]["position_embedding"]["weight"][: input_ids.shape[1]]
    for layer in in_order(weights["encoder"]["layers"]):
        projections = [layer["self_attn"][name] for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        hidden = normal(layer["layer_norm1"], x)
        x += attention(projections, hidden, hidden, config["num_attention_heads"], is_causal=True)
        hidden = dense(layer["mlp"]["fc1"], normal(layer["layer_norm2"], x))
        x += dense(layer["mlp"]["fc2"], activate(hidden, config["hidden_act"]))
    return normal(weights["final_layer_norm"], x)


def activate(x, activation):
    """GELU (arXiv 1606.08415), exact or in the quick form that OpenAI's CLIP was trained with."""
    if activation == "gelu":
        return jax.nn.gelu(x, approximate=False)
    return x * jax.nn.sigmoid(1.702 * x)
