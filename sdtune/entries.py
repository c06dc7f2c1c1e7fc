"""Entries of the cache: a file per encoded image or caption, named by a digest of what made it."""

import dataclasses
import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from sdtune.errors import InputError, last_line
from sdtune.files import beside

ENTRY_FORMAT = 1  # to be raised where what an entry holds, or how an image is decoded, changes
NOT_OF_THE_WEIGHTS = {"architectures", "dtype", "torch_dtype", "transformers_version"}  # in a model's config


@dataclasses.dataclass
class Cache:
    """Where encoded images and captions lie."""

    folder: Path
    images: str | None  # digest of what the entries of all images have in common; None where none are cached
    captions: str | None  # likewise
    prompt_channels: int  # of the embeddings


def digest_of(*values):
    """A SHA-256 of values that JSON can write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_of_model(model):
    """A SHA-256 of a model's weights and of its config."""
    weights = model.state_dict()
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        digests = list(pool.map(digest_of_tensor, weights.values()))
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    plain = {
        key: str(value) for key, value in config.items() if not key.startswith("_") and key not in NOT_OF_THE_WEIGHTS
    }
    return digest_of(plain, list(zip(weights, digests, strict=True)))


def digest_of_tensor(tensor):
    """A SHA-256 of a tensor's bytes and shape."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def path_of_image(cache, content, width, height, is_mirrored):
    """The file of an encoded image, of the SHA-256 of its file, fitted to so many pixels."""
    name = hashlib.sha256(f"{cache.images} {content} {width} {height} {bool(is_mirrored)}".encode()).hexdigest()
    return f"{cache.folder}/latents/{name[:2]}/{name}.safetensors"


def path_of_caption(cache, input_ids):
    """The file of an encoded caption, of its padded tokens (tokens,)."""
    name = hashlib.sha256(f"{cache.captions} ".encode() + input_ids.astype("<i8").tobytes()).hexdigest()
    return f"{cache.folder}/captions/{name[:2]}/{name}.safetensors"


def checksum(arrays):
    """A checksum of arrays by name."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(arrays[name], total)
    return f"{total:08x}"


def write_entry(path, arrays):
    """Writes arrays in float32, by name, so that the file appears when it is complete."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # safetensors takes any for such
    with beside(path) as new:
        new.write_bytes(safetensors.numpy.save(arrays, {"crc32": checksum(arrays)}))


def read_entry(path, shapes):
    """Reads an entry through the memory map of its file; its arrays, in float32, have to be of the `shapes`, by name.
    Raises `OSError`, or `ValueError` for one that is broken."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            wanted = (file.metadata() or {}).get("crc32")
    except SafetensorError as error:
        raise ValueError(last_line(error)) from None
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes or any(array.dtype.name != "float32" for array in arrays.values()):
        raise ValueError("it holds other tensors")
    if checksum(arrays) != wanted:
        raise ValueError("its checksum is not that of its content")
    return arrays


def check_entry(path, shapes):
    """Raises `OSError` or `ValueError` for an entry that `read_entry` would refuse; its tensors lie by their names."""
    with open(path, "rb") as file:
        content = file.read()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])  # UnicodeDecodeError and JSONDecodeError are a ValueError
    wanted = header.pop("__metadata__", {}).get("crc32")
    found = {name: tuple(tensor["shape"]) for name, tensor in header.items() if tensor["dtype"] == "F32"}
    if found != shapes or f"{zlib.crc32(memoryview(content)[start:]):08x}" != wanted:
        raise ValueError("its content is another")


def read_whole_entry(path, shapes):
    """As `read_entry`, in the middle of a run. Raises `InputError`."""
    try:
        return read_entry(path, shapes)
    except (OSError, ValueError) as error:
        told = f"this entry of the cache was removed or broken meanwhile ({last_line(error)}); start again"
        raise InputError(f"{path}: {told}, which makes it anew") from None
