"""What CLIP sees in images and reads in prompts, as features that can be compared."""

import dataclasses

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sdtune.errors import InputError, last_line, remedy_for_missing
from sdtune.models import foreign_kernel, tell_unread

PATCHES = 8  # patch features are averaged down to so many a side: enough to tell a copy, and small enough to compare


@dataclasses.dataclass
class Clip:
    """A CLIP that measures, in float32."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessorPil


def check_clip(source, token=None):
    """Lists whether a folder or Hub id, reached by a `token`, is no CLIP; reads no weights."""
    if remedy := remedy_for_missing(source):
        return [f"--clip_model={source}: does not exist; {remedy}"]
    try:
        if strange := foreign_kernel(CLIPConfig.get_config_dict(source, token=token)[0]):
            return [f"--clip_model={source}: {strange}"]
        for part in (CLIPConfig, CLIPTokenizer, CLIPImageProcessorPil):
            part.from_pretrained(source, token=token)
    except (OSError, ValueError) as error:
        return [f"--clip_model={source}: {tell_unread('whole CLIP', source, error)}"]
    return []


def load_clip(source, device, token=None):
    """Loads a CLIP with its tokenizer and its image processor; a `token` reaches a private one on the Hub. Raises
    `InputError`."""
    try:
        model = CLIPModel.from_pretrained(source, dtype=torch.float32, token=token).eval().to(device)
    except Exception as error:  # every format has its own way of being broken
        raise InputError(f"--clip_model={source}: cannot be loaded ({last_line(error)})") from None
    tokenizer = CLIPTokenizer.from_pretrained(source, token=token)
    return Clip(model, tokenizer, CLIPImageProcessorPil.from_pretrained(source, token=token))


@torch.no_grad()
def image_features(clip, images):
    """Returns CLIP's embeddings of PIL images (n, d), of length 1, and the patch features of its last layer, averaged
    over at most PATCHES x PATCHES places (n, f), of length 1; both in float32 on the CPU."""
    pixel_values = clip.processor(images, return_tensors="pt").pixel_values.to(clip.model.device)
    output = clip.model.vision_model(pixel_values)
    embeds = clip.model.visual_projection(output.pooler_output)
    patches = output.last_hidden_state[:, 1:].transpose(1, 2)  # (n, width, places), without the class token
    side = round(patches.shape[-1] ** 0.5)
    patches = F.adaptive_avg_pool2d(patches.unflatten(2, (side, side)), min(side, PATCHES)).flatten(1)
    return F.normalize(embeds).cpu(), F.normalize(patches).cpu()


@torch.no_grad()
def text_features(clip, prompts):
    """Returns CLIP's embeddings of texts (n, d), of length 1, in float32 on the CPU."""
    limit = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    output = clip.model.text_model(**tokens.to(clip.model.device))
    return F.normalize(clip.model.text_projection(output.pooler_output)).cpu()
