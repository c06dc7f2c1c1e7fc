"""Trains the miniature's tokenizer and CLIP from nothing, on what render.py draws and its captions.

    python miniature/train_clip.py --output_dir miniature/clip --pipeline_dir miniature/pipeline

Writes a CLIPModel folder with image processor and tokenizer, and into the pipeline folder the same text tower as
`text_encoder` and the `tokenizer`, all in float32. The subject of render.py and its rare word "sks" are never shown.

The objective is the symmetric contrastive one of Radford et al. 2021 (arXiv 2103.00020, section 2.3), with three
departures. The towers are trained one after the other: first the text tower, against an embedding of what is drawn
(the sum of a learnt vector per attribute), which costs little and teaches it whose colour is whose; then the image
tower, against the captions' embeddings, which stay as they are and are computed once, as in arXiv 2111.07991. Each
image comes with several captions, of which most leave out attributes. And since those are true of many images, a
caption's target is shared by all images that it is true of, as in supervised contrastive learning (arXiv 2004.11362).
Batches are made of groups of images that share their two colours, half of them swapped.

`--init_from` trains the CLIP of a folder on, with its tokenizer. The learnt vectors are not kept with it, so they are
first fitted to its text tower as it is: that then moves little, and a UNet that was trained on it stays near.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import measure
import numpy as np
import render
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from train_vae import rate_at
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

NUM_CAPTIONS = 8  # of each image
FAMILIES = {"shapes": 0.37, "creatures": 0.15, "dotted": 0.15, "marked": 0.23, "eyed": 0.1}  # shares of the images
# What a batch is made of: groups of images that share a pair of colours. By what the pair is of, the share of such
# images in the batch, and how many are in a group.
GROUPS = {
    "creatures": (0.14, 2),
    "dotted": (0.12, 4),
    "eyed": (0.08, 4),
    "striped": (0.08, 4),
    "ringed": (0.08, 4),
    "striped and ringed": (0.12, 4),
    "shapes": (0.38, 16),
}

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
    parser.add_argument("--init_from", help="a trained folder: train it on instead of starting from nothing")
    parser.add_argument("--num_images", type=int, default=24_000)
    parser.add_argument("--text_steps", type=int, default=1_500, help="of the text tower, 0 to keep it")
    parser.add_argument(
        "--fit_steps", type=int, default=300, help="of the learnt vectors alone, before a trained text tower goes on"
    )
    parser.add_argument("--num_steps", type=int, default=6_000, help="of the image tower")
    parser.add_argument(
        "--text_minutes", type=float, default=math.inf, help="ends that earlier, the rate decayed in time"
    )
    parser.add_argument("--max_minutes", type=float, default=math.inf, help="the same of the image tower")
    parser.add_argument("--batch_size", type=int, default=64, help="images of a step, or some more: groups are whole")
    parser.add_argument("--text_batch_size", type=int, default=192, help="captions of a step, or some more")
    parser.add_argument("--captions_per_image", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--save_steps", type=int, default=300)
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


def group_by_colours(records):
    """Indices of images by family and pair of colours, (what is drawn, what is around or in it): a dictionary."""
    groups = {}
    for index, record in enumerate(records):
        if "body" in record:
            key = ("creatures", record["body"], record["eyes"])
        elif "eyes" in record:
            key = ("eyed", record["colour"], record["eyes"])
        elif "dots" in record:
            key = ("dotted", record["colour"], record["dots"])
        elif "stripes" in record and "ring" in record:
            key = ("striped and ringed", record["stripes"], record["ring"])
        elif "stripes" in record:
            key = ("striped", record["colour"], record["stripes"])
        elif "ring" in record:
            key = ("ringed", record["colour"], record["ring"])
        else:
            key = ("shapes", record["colour"], record["background"])
        groups.setdefault(key, []).append(index)
    return {key: torch.tensor(indices) for key, indices in groups.items()}


def draw_batch(groups, batch_size):
    """Indices of a batch, in the shares of `GROUPS`: groups that have both colours in common, half of each swapped."""
    chosen = []
    for family, (share, group_size) in GROUPS.items():
        keys = [key for key in groups if key[0] == family]
        for number in torch.randperm(len(keys))[: max(1, round(batch_size * share / group_size))]:
            _, first, second = keys[number]
            swapped = groups.get((family, second, first), groups[keys[number]])
            for group, size in ((groups[keys[number]], (group_size + 1) // 2), (swapped, group_size // 2)):
                chosen.append(group[torch.randint(len(group), (size,))])
    return torch.cat(chosen)


def code(records, names):
    """The attributes of records as numbers, -1 where one has none: (records, attributes). `names` holds the number of
    each value and attribute; new ones are added."""
    rows = []
    for record in records:
        values = [(key, record[key]) if key in record else None for key in render.ATTRIBUTES]
        rows.append([-1 if value is None else names.setdefault(value, len(names)) for value in values])
    return torch.tensor(rows)


def true_of(attributes, said):
    """Which captions are true of which images: bool (images, images), from the images' attributes and which of them
    each one's caption tells, both (images, attributes)."""
    is_equal = attributes[:, None] == attributes[None]
    is_creature = attributes[:, render.ATTRIBUTES.index("body")] >= 0
    return (is_equal | ~said[:, None]).all(-1) & (is_creature[:, None] == is_creature[None])


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


def contrastive_loss(image_embeds, text_embeds, true, scale):
    """Mean cross entropy of images among captions and captions among images.

    `text_embeds` (slots, batch, width) are several captions of each image (batch, width), all of length 1; `true`
    (slots, batch, batch) marks which of them (rows) are true of which images (columns). Captions of one slot are told
    apart from one another.
    """
    is_own = torch.eye(len(image_embeds), dtype=torch.bool)
    loss = 0.0
    for embeds, is_true in zip(text_embeds, true, strict=True):
        logits = scale * embeds @ image_embeds.T
        among_images = logits.log_softmax(1).masked_fill(~is_true, 0).sum(1) / is_true.sum(1)
        among_captions = logits.masked_fill(is_true & ~is_own, -1e4).log_softmax(0).diagonal()
        loss = loss - (among_images.mean() + among_captions.mean()) / 2
    return loss / len(true)


class Attributes(torch.nn.Module):
    """An embedding of what is drawn, in the image tower's place: the sum of a vector for each attribute's value."""

    def __init__(self, width, number=96):  # render.py has 74 values; few images may show not all of them
        super().__init__()
        self.table = torch.nn.Embedding(number + 1, width)
        self.table.weight.data.mul_(0.2)

    def forward(self, attributes):
        """Numbers (n, attributes), -1 for none -> (n, width) of length 1."""
        return F.normalize(self.table(attributes + 1).sum(1), dim=-1)


def embed_captions(model, tokens):
    """Ids (n, 77) -> embeddings (n, width) of length 1."""
    # Attention is causal, so what follows the longest caption's end changes nothing before it.
    length = int((tokens == model.config.text_config.eos_token_id).int().argmax(-1).max()) + 1
    output = model.text_model(tokens[:, :length])
    return F.normalize(model.text_projection(output.pooler_output).float(), dim=-1)


def embed_images(model, images):
    """uint8 (n, 64, 64, 3) -> embeddings (n, width) of length 1."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output).float(), dim=-1)


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
    """Images uint8 (n, 64, 64, 3), their records and attributes, the tokenizer, and of `NUM_CAPTIONS` captions of each
    image the ids (n, captions), which attributes they tell, bool (n, captions, attributes), and the tokens by id
    (ids, 77): a dictionary."""
    jobs = []
    for family, share in FAMILIES.items():
        jobs += [(family, args.seed + 2000, index) for index in range(round(args.num_images * share))]
    images, records = render.make_images(jobs)
    rng, number = np.random.default_rng(args.seed), {}
    caption_ids, said = [], []
    for record in records:
        varied = [render.full_caption(rng, record)]
        varied += [render.varied_caption(rng, record) for _ in range(NUM_CAPTIONS - 1)]
        caption_ids.append([number.setdefault(text, len(number)) for text, _ in varied])
        said.append([[key in keys for key in render.ATTRIBUTES] for _, keys in varied])
    if args.init_from:
        tokenizer = CLIPTokenizer.from_pretrained(args.init_from)
    else:
        # The vocabulary must not depend on which captions the split happened to draw.
        tokenizer = train_tokenizer([*number, *render.COLOURS, *render.SHAPES], args.output_dir)
    tokens = tokenizer(list(number), padding="max_length", max_length=77, return_tensors="pt").input_ids
    return {
        "images": torch.from_numpy(images),
        "records": records,
        "attributes": code(records, {}),
        "tokenizer": tokenizer,
        "caption_ids": torch.tensor(caption_ids),
        "said": torch.tensor(said),
        "tokens": tokens,
    }


@torch.no_grad()
def measure_text(model, oracle, tokenizer, data, number=256):
    """Share of held-out records whose own caption scores highest among those of so many, and the reverse."""
    names = {}
    code(data["records"], names)
    records = [render.make("shapes", 12, index, "held_out")[1] for index in range(number)]
    for family in ("creatures", "dotted", "marked", "eyed"):
        records += [render.make(family, 12, index, "held_out")[1] for index in range(number // 8)]
    records = list({record["text"]: record for record in records}.values())
    texts = [record["text"] for record in records]
    tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    logits = oracle(code(records, names)) @ embed_captions(model, tokens).T
    own = torch.arange(len(logits))
    found = [(logits.argmax(dim) == own).float().mean().item() for dim in (1, 0)]
    return {"captions": len(logits), "record_to_text": found[0], "text_to_record": found[1]}


def train_tower(args, data, model, parameters, embed, batch_size, num_steps, max_minutes, report):
    """Trains one tower: `embed` gives the embeddings of images and captions, from the images' numbers (batch) and the
    captions' (slots, batch); `report` saves and measures."""
    groups, attributes = group_by_colours(data["records"]), data["attributes"]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    start = time.time()
    bar = tqdm(range(num_steps), mininterval=5)
    for step in bar:
        progress = max(step / num_steps, (time.time() - start) / 60 / max_minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate_at(progress)
        chosen = draw_batch(groups, batch_size)
        # The first caption tells everything; the other slots take any.
        slots = [torch.zeros(len(chosen), dtype=torch.long)]
        slots += [torch.randint(NUM_CAPTIONS, (len(chosen),)) for _ in range(args.captions_per_image - 1)]
        true = torch.stack([true_of(attributes[chosen], data["said"][chosen, slot]) for slot in slots])
        ids = torch.stack([data["caption_ids"][chosen, slot] for slot in slots])
        with torch.autocast("cpu", torch.bfloat16):
            image_embeds, text_embeds = embed(chosen, ids)
        loss = contrastive_loss(image_embeds, text_embeds, true, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # As CLIP does: the temperature's inverse stays at 100 or less.
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 20 == 0:
            speed = len(chosen) * (step + 1) / (time.time() - start)
            bar.set_postfix(loss=f"{loss.item():.3f}", images_per_s=f"{speed:.0f}")
        if (step + 1) % args.save_steps == 0:
            report(f"step {step + 1}")
    report(f"trained in {(time.time() - start) / 60:.1f} minutes")


def train(args):
    """Trains tokenizer and CLIP, and saves them."""
    torch.manual_seed(args.seed)
    data = load_data(args)
    tokenizer, tokens = data["tokenizer"], data["tokens"]
    model = CLIPModel.from_pretrained(args.init_from) if args.init_from else build_model(args, tokenizer)
    model.set_attn_implementation("eager")  # under autocast, backward through SDPA takes twice as long on a CPU
    model.train()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters:,} parameters, {len(tokenizer)} tokens, {len(tokens):,} distinct captions")
    oracle = Attributes(model.projection_dim)
    text_parts = [*model.text_model.parameters(), *model.text_projection.parameters(), model.logit_scale]

    def embed_records(chosen, ids):
        text_embeds = embed_captions(model, tokens[ids].flatten(0, 1)).unflatten(0, ids.shape)
        return oracle(data["attributes"][chosen]), text_embeds

    def report_text(when):
        save(model, tokenizer, args)
        tqdm.write(f"{when}: text tower {measure_text(model, oracle, tokenizer, data)}")

    if args.text_steps:
        vectors = list(oracle.parameters())
        if args.init_from:
            settings = (args.text_batch_size, args.fit_steps, math.inf, report_text)
            train_tower(args, data, model, vectors, embed_records, *settings)
        settings = (args.text_batch_size, args.text_steps, args.text_minutes, report_text)
        train_tower(args, data, model, [*text_parts, *vectors], embed_records, *settings)
    with torch.no_grad():
        text_table = torch.cat([embed_captions(model, chunk) for chunk in tokens.split(500)])

    def embed_pictures(chosen, ids):
        return embed_images(model, data["images"][chosen]), text_table[ids]

    def report_images(when):
        save(model, tokenizer, args)
        tqdm.write(f"{when}: {measure.measure_clip(args.output_dir)}")

    image_parts = [*model.vision_model.parameters(), *model.visual_projection.parameters(), model.logit_scale]
    settings = (args.batch_size, args.num_steps, args.max_minutes, report_images)
    train_tower(args, data, model, image_parts, embed_pictures, *settings)


if __name__ == "__main__":
    train(parse_args())
