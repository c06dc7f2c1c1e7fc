"""Stable Diffusion pipelines with random weights, as small as the classes allow: right in every shape, wrong in what
they draw. A training step takes a few tens of milliseconds on one core."""

import json
import shutil
from collections import Counter
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77
HIDDEN_SIZE = 32

# What the tests' captions are made of; anything else is spelled in single characters.
WORDS = """
    a an the of on and with in at to small large red green blue yellow orange purple black white grey picture drawing
    photo image square circle star rectangle background left right creature eyes body number zero one two three four
    five six seven eight nine ten
"""


def train_bpe(words, num_merges):
    """Returns the merges of byte-pair encoding, each the most frequent pair of its turn.

    Ten lines instead of tokenizers' BpeTrainer, which numbers the same tokens differently from run to run.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    for _ in range(num_merges):
        counts = Counter()
        for word in pieces:
            counts.update(pairwise(word))
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        for word in pieces:
            for i in range(len(word) - 2, -1, -1):  # from the end, so that places before it stay
                if tuple(word[i : i + 2]) == pair:
                    word[i : i + 2] = ["".join(pair)]
    return merges


def make_tokenizer():
    """Returns a CLIP tokenizer with a byte-pair vocabulary of about 300 tokens and a limit of 77 tokens."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    last_characters = [character + "</w>" for character in characters]
    merges = train_bpe(WORDS.split(), num_merges=160)
    merged = ["".join(pair) for pair in merges]
    tokens = [BOS, EOS, *characters, *last_characters, *dict.fromkeys(merged)]
    # vocab= and merges=: with file names instead, transformers 5 silently makes a tokenizer of two tokens.
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_LENGTH,
    )


def make_text_encoder(tokenizer):
    """Returns a one-layer CLIP text model for the tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=HIDDEN_SIZE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_vae():
    """Returns an autoencoder with SD's factor of 8 and 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def make_unet(num_blocks=2, layers_per_block=1, use_linear_projection=False):
    """Returns a conditional UNet; as in SD 1 every level has cross-attention but the last.

    num_blocks: 2 (latents of at least 2 x 2) to 4 (at least 8 x 8).
    """
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64)[:num_blocks],
        down_block_types=("CrossAttnDownBlock2D",) * (num_blocks - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (num_blocks - 1),
        layers_per_block=layers_per_block,
        norm_num_groups=8,
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=4,
        use_linear_projection=use_linear_projection,
    )


def make_scheduler(prediction_type="epsilon"):
    """Returns the scheduler with the settings of SD 1."""
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def make_pipeline(prediction_type="epsilon", seed=0, **unet_options):
    """Returns a StableDiffusionPipeline whose weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        text_encoder = make_text_encoder(tokenizer)
        vae = make_vae()
        unet = make_unet(**unet_options)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def changed_pipeline(folder, target, file, changes):
    """Copies a pipeline's folder to `target`, with other values in one of its JSON files; returns `target`."""
    shutil.copytree(folder, target)
    config = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**config, **changes}))
    return target


def make_captioner(seed=0):
    """Returns (model, processor) of a BLIP for 32 x 32 pixels that says words of WORDS, other ones for every image,
    until --max_new_tokens end it: its weights depend on `seed` alone."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    tokens = [*special, *dict.fromkeys(WORDS.split())]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = BertTokenizer(vocab=vocab, extra_special_tokens={"dec_token": "[DEC]"})
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "initializer_range": 1.0,  # else it says the same of all images
    }
    text_config = {
        **size,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 512,
        "bos_token_id": vocab["[DEC]"],
        "eos_token_id": vocab["[SEP]"],
        "sep_token_id": vocab["[SEP]"],
        "pad_token_id": vocab["[PAD]"],
    }
    config = BlipConfig(
        text_config=text_config,
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[: len(special)] = -1e4  # it says none of these
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    return model.eval(), processor
