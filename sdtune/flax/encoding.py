"""What is encoded once, captions and images that stay the same, and the batches made of it."""

import dataclasses
import tempfile
from collections.abc import Callable

import numpy as np
from tqdm.auto import tqdm

from sdtune.dataset import CaptionedImages, unopened
from sdtune.flax.networks import apply_vae_encoder
from sdtune.streaming import StreamedImages


@dataclasses.dataclass
class EncodedImages:
    """A set of images, of which what does not change is encoded."""

    samples: CaptionedImages | StreamedImages  # what a sample draws; not opened any more where images are encoded
    prompt_embeds: np.ndarray | None  # (captions, tokens, channels); None where captions are not known before
    row_of: dict  # of prompt_embeds, by the bytes of a caption's tokens
    moments: np.ndarray | None  # (images, views, 2 x 4, height / 8, width / 8); the second view is mirrored
    vae: Callable | None  # gives the moments of pixels in every step, where they are not encoded once
    text_encoder: Callable | None = None  # gives the embeddings of tokens in every step, where there are none


def stack(samples):
    """A batch of numpy arrays of samples, by name."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def pad(array, length):
    """Repeats the first row at the end, up to `length` rows: compiled programs have one size."""
    return np.concatenate([array, np.repeat(array[:1], length - len(array), axis=0)])


def encode_pixels(weights, pixel_values, config):
    """The moments of the VAE's posterior, as `apply_vae_encoder` gives them, for images of 8 bits."""
    return apply_vae_encoder(weights, pixel_values / 127.5 - 1, config)


def encode_once(images, vae, text_encoder, batch_size, pool):
    """Encodes all captions and, where the crop is the centre, the images, each with its mirror image if these are
    drawn; with random crops they are others in every epoch. `vae` and `text_encoder` take batches of `batch_size`;
    the threads of `pool` load images. Of a stream nothing is encoded before its step."""
    if isinstance(images, StreamedImages):
        return EncodedImages(images, None, {}, None, vae, text_encoder)
    prompt_embeds, row_of = encode_captions(images, text_encoder, batch_size)
    if not images.center_crop:
        return EncodedImages(images, prompt_embeds, row_of, moments=None, vae=vae)
    moments = encode_images(images, vae, batch_size, pool)
    return EncodedImages(unopened(images), prompt_embeds, row_of, moments, vae=None)


def encode_captions(images, text_encoder, batch_size):
    """Returns the embeddings of all captions and of the empty one, and which row is whose, by the bytes of tokens."""
    captions = {""}
    for found in images.rows["captions"]:
        captions.update(found)
    tokens = images.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="np").input_ids
    tokens = np.unique(tokens, axis=0)
    prompt_embeds = encode_rows(tokens.__getitem__, len(tokens), batch_size, text_encoder, "Encoding captions")
    return prompt_embeds, {row.tobytes(): number for number, row in enumerate(tokens)}


def encode_images(images, vae, batch_size, pool):
    """Returns the moments of all images and, if these are drawn, of their mirror images."""
    upright = dataclasses.replace(images, random_flip=False)

    def pixels_of(indices):
        samples = pool.map(upright.__getitem__, [(0, index, 1.0) for index in indices])
        return stack(list(samples))["pixel_values"]

    def moments_of(pixels):
        views = [pixels, pixels[..., ::-1]] if images.random_flip else [pixels]
        return np.stack([vae(view) for view in views], axis=1)

    return encode_rows(pixels_of, len(images), batch_size, moments_of, "Encoding images")


def encode_rows(rows_of, num_rows, batch_size, compute, label):
    """What `compute` gives for `rows_of(indices)`, as an array (num_rows, ...) in a nameless file of the temporary
    folder: it may be larger than the memory."""
    table = None
    for start in tqdm(range(0, num_rows, batch_size), label, unit="batch", disable=None, leave=False):
        indices = range(start, min(start + batch_size, num_rows))
        found = compute(pad(rows_of(indices), batch_size))[: len(indices)]
        if table is None:
            with tempfile.TemporaryFile() as file:  # which stays as long as the table
                table = np.memmap(file, np.float32, "w+", shape=(num_rows, *found.shape[1:]))
        table[indices.start : indices.stop] = found
    return table


def look_up(encoded, batch, batch_size):
    """What a pass needs of a batch of samples, by name and padded by samples of weight 0: the moments of images,
    prompt_embeds, timestep, posterior_noise, noise, added_noise and weight."""
    if encoded.text_encoder:
        prompt_embeds = encoded.text_encoder(pad(batch["input_ids"], batch_size))[: len(batch["input_ids"])]
    else:
        prompt_embeds = encoded.prompt_embeds[[encoded.row_of[tokens.tobytes()] for tokens in batch["input_ids"]]]
    found = {
        "prompt_embeds": prompt_embeds,
        "timestep": batch["timestep"].astype(np.int32),
        "posterior_noise": batch["posterior_noise"],
        "noise": batch["noise"],
        "added_noise": batch["added_noise"],
    }
    if encoded.moments is not None:
        found["moments"] = encoded.moments[batch["index"], batch["is_mirrored"].astype(int)]
    found = {name: pad(array, batch_size) for name, array in found.items()}
    if encoded.moments is None:
        found["moments"] = encoded.vae(pad(batch["pixel_values"], batch_size))
    found["weight"] = np.pad(batch["weight"], (0, batch_size - len(batch["weight"])))
    return found


def step_batches(encoded, counts, sizes, passes, batch_size):
    """Yields what each step needs, arrays (num_passes, images, ...), of `passes`, each a list of samples, of which
    `sizes` say how many a step has. The last step of an epoch, which may have fewer, gets passes of weight 0."""
    most_passes = counts.samples_per_step // counts.samples_per_pass
    for _, num_passes in sizes:
        found = []
        for _ in range(num_passes):
            found.append(look_up(encoded, stack(next(passes)), batch_size))
        unweighted = {**found[0], "weight": np.zeros_like(found[0]["weight"])}
        yield stack(found + [unweighted] * (most_passes - len(found)))
