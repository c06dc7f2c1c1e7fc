"""Trains the miniature's tokenizer and CLIP from nothing, on rendered shapes and creatures and their captions.

    python miniature/train_clip.py --output_dir miniature/clip --pipeline_dir miniature/pipeline

Writes a CLIPModel folder with image processor and tokenizer, and into the pipeline folder the same text tower as
`text_encoder` and the `tokenizer`, all in float32. The subject of render.py and its rare word "sks" are never shown.

The objective is the symmetric contrastive one of Radford et al. 2021 (arXiv 2103.00020, section 2.3), with a
departure: pairs off the diagonal that are true as well (equal captions, or one that leaves out size and position)
are masked instead of being pushed apart. Batches are made of groups of images that share their two colours, so that
shape, size and position must be told apart.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import render
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

COMMON_WORDS = """
an the and in on of with at to from by for is are one two three four five photo picture image painting drawing sketch
portrait cartoon big little tiny large bright dark light black white grey brown gold silver color colour line dot dots
stripe stripes striped ring rings round plain dog cat bird fish tree flower house car boat ball hat face person man
woman child robot monster toy food water grass sand snow sun moon night day green blue red old new happy sad style art
high quality detailed front side over under next left right top bottom middle center behind
""".split()


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="miniature/clip")
    parser.add_argument("--pipeline_dir", default="miniature/pipeline")
    parser.add_argument("--num_images", type=int, default=20_000)
    parser.add_argument("--num_steps", type=int, default=1_000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--text_layers", type=int, default=2)
    parser.add_argument("--vision_layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def train_tokenizer(captions, folder):
    """Learns a byte-pair encoding on the words of the captions and a few common ones, in the layout of CLIP's.

    Every byte is a token, alone and at the end of a word, so nothing is ever unknown.
    """
    words = set(COMMON_WORDS)
    for caption in captions:
        words.update(caption.lower().split())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=1_400, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(sorted(words), trainer)
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    at_end = [f"{letter}</w>" for letter in alphabet]
    merged = ["".join(pair) for pair in merges]
    tokens = [*alphabet, *at_end, *merged, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: k for k, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    # Read back, so that training uses what users will load.
    return CLIPTokenizer.from_pretrained(folder)


def wordings(record):
    """All captions that are true of an image."""
    if "shape" not in record:
        return [record["text"]] * 4
    return render.shape_captions(record)


def group_by_colours(records):
    """Indices of the images of shapes by (colour, background), and those of the creatures: tensors."""
    groups, creatures = {}, []
    for index, record in enumerate(records):
        if "shape" in record:
            groups.setdefault((record["colour"], record["background"]), []).append(index)
        else:
            creatures.append(index)
    return [torch.tensor(indices) for indices in groups.values()], torch.tensor(creatures)


def draw_batch(groups, creatures, batch_size, group_size=8):
    """Indices of a batch: a quarter creatures, the rest groups of 8 shapes that share both colours."""
    num_creatures = batch_size // 4
    num_groups = (batch_size - num_creatures) // group_size
    chosen = [creatures[torch.randint(len(creatures), (num_creatures,))]]
    for number in torch.randperm(len(groups))[:num_groups]:
        group = groups[number]
        chosen.append(group[torch.randint(len(group), (group_size,))])
    return torch.cat(chosen)


def build_model(args, tokenizer):
    """The CLIP to be trained."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": args.width,
        "intermediate_size": args.width * 4,
        "num_attention_heads": 4,
        "projection_dim": args.width,
    }
    text = {
        **tower,
        **ids,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": args.text_layers,
        "max_position_embeddings": 77,
    }
    vision = {**tower, "num_hidden_layers": args.vision_layers, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=args.width))


def contrastive_loss(model, pixels, tokens, true):
    """Symmetric cross entropy over a batch; `true` (batch, batch) marks captions (rows) true of images (columns)."""
    # Attention is causal, so what follows the longest caption's end changes nothing before it.
    length = int((tokens == model.config.text_config.eos_token_id).int().argmax(1).max()) + 1
    logits = model(input_ids=tokens[:, :length], pixel_values=pixels).logits_per_text.float()
    is_own = torch.eye(len(true), dtype=torch.bool)
    logits = logits.masked_fill(true & ~is_own, -1e4)
    target = torch.arange(len(true))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def save(model, tokenizer, args):
    """Writes the CLIP's folder, and text encoder and tokenizer into the pipeline's."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    text_encoder = CLIPTextModel(model.config.text_config)
    text_encoder.load_state_dict(model.text_model.state_dict())
    for part in (model, tokenizer, processor):
        part.save_pretrained(args.output_dir)
    text_encoder.save_pretrained(f"{args.pipeline_dir}/text_encoder")
    tokenizer.save_pretrained(f"{args.pipeline_dir}/tokenizer")
    for folder in (args.output_dir, f"{args.pipeline_dir}/text_encoder"):
        os.chmod(Path(folder) / "model.safetensors", 0o644)  # safetensors ignores the umask


def load_data(args):
    """Images uint8 (n, 64, 64, 3), their records, the tokenizer, ids of each image's four captions (n, 4), and tokens
    by id (captions, 77)."""
    num_creatures = args.num_images // 3
    jobs = [("shapes", args.seed + 2000, index) for index in range(args.num_images - num_creatures)]
    jobs += [("creatures", args.seed + 2000, index) for index in range(num_creatures)]
    images, records = render.make_images(jobs)
    captions = [wordings(record) for record in records]
    distinct = sorted({caption for group in captions for caption in group})
    # The vocabulary must not depend on which captions the split happened to draw.
    tokenizer = train_tokenizer([*distinct, *render.COLOURS, *render.SHAPES], args.output_dir)
    number = {caption: k for k, caption in enumerate(distinct)}
    caption_ids = torch.tensor([[number[caption] for caption in group] for group in captions])
    tokens = tokenizer(distinct, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return torch.from_numpy(images), records, tokenizer, caption_ids, tokens


def train(args):
    """Trains tokenizer and CLIP, and saves them."""
    torch.manual_seed(args.seed)
    images, records, tokenizer, caption_ids, tokens = load_data(args)
    model = build_model(args, tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters:,} parameters, {len(tokenizer)} tokens, {len(tokens):,} distinct captions")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.num_steps))
    )
    groups, creatures = group_by_colours(records)
    start = time.time()
    bar = tqdm(range(args.num_steps), mininterval=5)
    for step in bar:
        chosen = draw_batch(groups, creatures, args.batch_size)
        pixels = images[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1
        # The first two wordings say everything, the others leave out the position, or also the size.
        wording = torch.multinomial(torch.tensor([0.4, 0.3, 0.15, 0.15]), len(chosen), replacement=True)
        said = caption_ids[chosen].gather(1, wording[:, None])
        true = (said[:, :, None] == caption_ids[chosen][None]).any(-1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = contrastive_loss(model, pixels, tokens[said[:, 0]], true)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # As CLIP does: the temperature's inverse stays at 100 or less.
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 20 == 0:
            speed = args.batch_size * (step + 1) / (time.time() - start)
            bar.set_postfix(loss=f"{loss.item():.3f}", images_per_s=f"{speed:.0f}")
        if (step + 1) % 500 == 0:
            save(model, tokenizer, args)
    save(model, tokenizer, args)
    print(f"trained in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    train(parse_args())
