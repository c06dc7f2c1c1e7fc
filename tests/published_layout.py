"""The keys and shapes of the published single files of Stable Diffusion 1.5 and 2.1, made from published settings.

Source of the settings: v1-inference.yaml of CompVis/stable-diffusion (21f890f) and v2-inference.yaml of
Stability-AI/stablediffusion (cf1d67a), read with the model code beside them (openaimodel.py, model.py of the
autoencoder, register_schedule in ddpm.py), transformers' CLIP ViT-L/14 and OpenCLIP's ViT-H/14 text towers.

Source of the check: the components of published files as arenasys/stable-diffusion-webui-model-toolkit (e19dd46) lists
them, a line `key [sizes]` per tensor. Of each of its lists DIGESTS has the number of lines and the SHA-256 of the file
without a newline at its end, so that a list that was generated here is compared with what was published.
"""

import hashlib

DIGESTS = {
    "UNET-v1-SD": (686, "0a32647aed4bb212446e9e375fac2dd5772d5be1c772a0b06f58610a786aea6c"),
    "UNET-v2-SD": (686, "ddc5d94a25ab77b273c0f210b0417838ffbc0c7ab648e9dfce75cd056d7839ba"),
    "VAE-v1-SD": (248, "240432d78215782456548801f5ad9d65371e87418c0228981c16434327af7890"),
    "CLIP-v1-SD": (197, "9108aaedac707a081ee413323093355cb8dfac175a6057ecb4adcd570711ddac"),
    "CLIP-v2-SD": (294, "905cc8eaf7c1815eacd452cfdda8d8520727ca85b039723da7b19ff8614e5662"),
}
# Buffers of the noise schedule, from register_schedule in ddpm.py; none of the lists has them.
SCHEDULE = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]
# What a folder of diffusers cannot hold: its text encoder ends before OpenCLIP's last block, and has no projection.
NOT_IN_A_FOLDER = ("transformer.resblocks.23.", "text_projection", "logit_scale")


def affine(name, *shape):
    """Weight and bias of a linear map, a convolution or, with one size, a norm."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def unet_resnet(name, inputs, outputs, time):
    """ResBlock, with its projection of the timestep's `time` numbers."""
    keys = affine(f"{name}.in_layers.0", inputs)
    keys |= affine(f"{name}.in_layers.2", outputs, inputs, 3, 3)
    keys |= affine(f"{name}.emb_layers.1", outputs, time)
    keys |= affine(f"{name}.out_layers.0", outputs)
    keys |= affine(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        keys |= affine(f"{name}.skip_connection", outputs, inputs, 1, 1)
    return keys


def unet_transformer(name, size, context_size, linear):
    """SpatialTransformer of one block; its ends are linear maps or 1 x 1 convolutions."""
    block = f"{name}.transformer_blocks.0"
    kernel = () if linear else (1, 1)
    keys = affine(f"{name}.norm", size)
    keys |= affine(f"{name}.proj_in", size, size, *kernel)
    keys |= affine(f"{name}.proj_out", size, size, *kernel)
    for attention, source_size in (("attn1", size), ("attn2", context_size)):
        keys[f"{block}.{attention}.to_q.weight"] = (size, size)
        keys[f"{block}.{attention}.to_k.weight"] = (size, source_size)
        keys[f"{block}.{attention}.to_v.weight"] = (size, source_size)
        keys |= affine(f"{block}.{attention}.to_out.0", size, size)
    for norm in ("norm1", "norm2", "norm3"):
        keys |= affine(f"{block}.{norm}", size)
    keys |= affine(f"{block}.ff.net.0.proj", 8 * size, size)
    return keys | affine(f"{block}.ff.net.2", size, 4 * size)


def unet(context_size, linear, channels=320, factors=(1, 2, 4, 4), layers=2, attention_levels=(0, 1, 2)):
    """UNetModel: in- and output of 4 channels, one transformer block per attention."""
    time = 4 * channels
    keys = affine("time_embed.0", time, channels) | affine("time_embed.2", time, time)
    keys |= affine("input_blocks.0.0", channels, 4, 3, 3)
    size, number = channels, 1
    sizes = [size]  # of what the way up takes from the way down
    for level, factor in enumerate(factors):
        for _ in range(layers):
            keys |= unet_resnet(f"input_blocks.{number}.0", size, factor * channels, time)
            size = factor * channels
            if level in attention_levels:
                keys |= unet_transformer(f"input_blocks.{number}.1", size, context_size, linear)
            number += 1
            sizes.append(size)
        if level < len(factors) - 1:
            keys |= affine(f"input_blocks.{number}.0.op", size, size, 3, 3)
            number += 1
            sizes.append(size)
    keys |= unet_resnet("middle_block.0", size, size, time)
    keys |= unet_transformer("middle_block.1", size, context_size, linear)
    keys |= unet_resnet("middle_block.2", size, size, time)
    number = 0
    for level, factor in reversed(list(enumerate(factors))):
        for layer in range(layers + 1):
            keys |= unet_resnet(f"output_blocks.{number}.0", size + sizes.pop(), factor * channels, time)
            size = factor * channels
            part = 1
            if level in attention_levels:
                keys |= unet_transformer(f"output_blocks.{number}.1", size, context_size, linear)
                part = 2
            if level > 0 and layer == layers:
                keys |= affine(f"output_blocks.{number}.{part}.conv", size, size, 3, 3)
            number += 1
    return keys | affine("out.0", channels) | affine("out.2", 4, channels, 3, 3)


def vae_resnet(name, inputs, outputs):
    """ResnetBlock of the autoencoder."""
    keys = affine(f"{name}.norm1", inputs)
    keys |= affine(f"{name}.conv1", outputs, inputs, 3, 3)
    keys |= affine(f"{name}.norm2", outputs)
    keys |= affine(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        keys |= affine(f"{name}.nin_shortcut", outputs, inputs, 1, 1)
    return keys


def vae_middle(name, size):
    """The middle of encoder and decoder: the only attention between two blocks."""
    keys = vae_resnet(f"{name}.block_1", size, size) | vae_resnet(f"{name}.block_2", size, size)
    keys |= affine(f"{name}.attn_1.norm", size)
    for part in ("q", "k", "v", "proj_out"):
        keys |= affine(f"{name}.attn_1.{part}", size, size, 1, 1)
    return keys


def vae(channels=128, factors=(1, 2, 4, 4), layers=2, latents=4):
    """AutoencoderKL of RGB images."""
    size, top = channels, factors[-1] * channels
    keys = affine("encoder.conv_in", channels, 3, 3, 3) | affine("decoder.conv_in", top, latents, 3, 3)
    for level, factor in enumerate(factors):
        for layer in range(layers):
            keys |= vae_resnet(f"encoder.down.{level}.block.{layer}", size, factor * channels)
            size = factor * channels
        if level < len(factors) - 1:
            keys |= affine(f"encoder.down.{level}.downsample.conv", size, size, 3, 3)
    for level, factor in reversed(list(enumerate(factors))):
        for layer in range(layers + 1):
            keys |= vae_resnet(f"decoder.up.{level}.block.{layer}", size, factor * channels)
            size = factor * channels
        if level > 0:
            keys |= affine(f"decoder.up.{level}.upsample.conv", size, size, 3, 3)
    keys |= vae_middle("encoder.mid", top) | vae_middle("decoder.mid", top)
    keys |= affine("encoder.norm_out", top) | affine("encoder.conv_out", 2 * latents, top, 3, 3)
    keys |= affine("decoder.norm_out", channels) | affine("decoder.conv_out", 3, channels, 3, 3)
    keys |= affine("quant_conv", 2 * latents, 2 * latents, 1, 1)
    return keys | affine("post_quant_conv", latents, latents, 1, 1)


def clip(size=768, layers=12):
    """CLIPTextModel of transformers 4, for ViT-L/14."""
    keys = {
        "embeddings.position_embedding.weight": (77, size),
        "embeddings.position_ids": (1, 77),
        "embeddings.token_embedding.weight": (49408, size),
    }
    keys |= affine("final_layer_norm", size)
    for layer in range(layers):
        name = f"encoder.layers.{layer}"
        keys |= affine(f"{name}.layer_norm1", size) | affine(f"{name}.layer_norm2", size)
        keys |= affine(f"{name}.mlp.fc1", 4 * size, size) | affine(f"{name}.mlp.fc2", size, 4 * size)
        for part in ("k", "q", "v", "out"):
            keys |= affine(f"{name}.self_attn.{part}_proj", size, size)
    return keys


def open_clip(size=1024, layers=24):
    """The text tower of OpenCLIP's ViT-H/14."""
    keys = {
        "positional_embedding": (77, size),
        "text_projection": (size, size),
        "logit_scale": (),
        "token_embedding.weight": (49408, size),
    }
    keys |= affine("ln_final", size)
    for layer in range(layers):
        name = f"transformer.resblocks.{layer}"
        keys |= affine(f"{name}.ln_1", size) | affine(f"{name}.ln_2", size)
        keys |= affine(f"{name}.mlp.c_fc", 4 * size, size) | affine(f"{name}.mlp.c_proj", size, 4 * size)
        keys[f"{name}.attn.in_proj_weight"] = (3 * size, size)
        keys[f"{name}.attn.in_proj_bias"] = (3 * size,)
        keys |= affine(f"{name}.attn.out_proj", size, size)
    return keys


COMPONENTS = {
    "UNET-v1-SD": unet(768, linear=False),
    "UNET-v2-SD": unet(1024, linear=True),
    "VAE-v1-SD": vae(),
    "CLIP-v1-SD": clip(),
    "CLIP-v2-SD": open_clip(),
}


def digest(component):
    """Number of lines and SHA-256 of a component, written as the source of DIGESTS does."""
    lines = []
    for key, shape in COMPONENTS[component].items():
        sizes = ",".join(map(str, shape))
        lines.append(f"{key} [{sizes}]")
    return len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def published(version):
    """{key: shape} of the whole file of version 1 (1.5) or 2 (2.1), without averaged weights (model_ema)."""
    text_encoder = "cond_stage_model.transformer.text_model." if version == 1 else "cond_stage_model.model."
    components = {
        "model.diffusion_model.": f"UNET-v{version}-SD",
        "first_stage_model.": "VAE-v1-SD",
        text_encoder: f"CLIP-v{version}-SD",
    }
    keys = dict.fromkeys(SCHEDULE, (1000,))
    for prefix, component in components.items():
        for key, shape in COMPONENTS[component].items():
            keys[prefix + key] = shape
    return keys
