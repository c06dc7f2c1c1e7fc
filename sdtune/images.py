"""Decode images as a viewer shows them, and check every one before training."""

import contextlib
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
from filelock import FileLock
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from sdtune.errors import InputError, last_line

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
NO_CAPTION = "has no caption, in metadata or a .txt beside it"
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file


def is_image_file(path, folder):
    """Whether the path below `folder` has an image's suffix and is not hidden."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def open_image(encoded):
    """Decodes an image to 8-bit sRGB as a viewer shows it: upright, by its colour profile, 16-bit greys scaled, alpha
    over white. Raises `OSError`, `ValueError` or `SyntaxError` if Pillow cannot read it to the end."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    profile = image.info.get("icc_profile") or b""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # Pillow would saturate 16-bit greys
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    profiled_mode = {"CMYK": "CMYK", "L": "L", "LA": "L"}.get(image.mode, "RGB")  # which the profile is for
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(profiled_mode)
    is_srgb = b"sRGB IEC61966" in profile.replace(b"\0", b"")  # as most are named, in letters of 1 or 2 bytes
    if profile and not is_srgb:
        with contextlib.suppress(ImageCms.PyCMSError):  # a viewer, too, ignores a profile that does not fit
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), 0, "RGB")
    return image.convert("RGB")


def read_image(image):
    """Opens an image of a dataset's undecoded column, a dictionary of `bytes` or `path`, as `open_image` does."""
    return open_image(image["bytes"] or Path(image["path"]).read_bytes())


@contextlib.contextmanager
def still_readable(name):
    """Raises `InputError`, which names the image, where one that was checked cannot be decoded any more."""
    try:
        yield
    except Exception as error:  # whatever a decoder stumbles over
        told = f"changed since it was checked, and cannot be read now ({last_line(error)}); put it back or start again"
        raise InputError(f"{name}: {told}") from None


def check_image(image, known):
    """Opens one image, unless `known` has it; returns a key, of path, size and time or of the content where a dataset
    holds it, and [sha256, width, height, what is wrong or ""]."""
    try:
        encoded = image["bytes"]
        if encoded:
            key = hashlib.sha256(encoded).hexdigest()
        else:
            status = os.stat(image["path"])
            key = f"{os.path.abspath(image['path'])}|{status.st_size}|{status.st_mtime_ns}"
        if key in known:
            return key, known[key]
        encoded = encoded or Path(image["path"]).read_bytes()
        width, height = open_image(encoded).size
        problem = ""
        if min(width, height) < MIN_SIDE:
            problem = f"{width} x {height} pixels; a side needs at least {MIN_SIDE}"
        return key, [hashlib.sha256(encoded).hexdigest(), width, height, problem]
    except FileNotFoundError:
        problem = "there is no such file"
    except TypeError:
        problem = "the row holds no image"
    except UnidentifiedImageError:
        problem = "no image that Pillow knows"
    except Exception as error:  # damaged files raise whatever a decoder stumbles over
        problem = f"cannot be read: {error}"
    return None, ["", 0, 0, problem]


def path_of_findings(place, cache_dir):
    """The file that remembers the check of the images in `place`, a folder or a dataset's name."""
    name = hashlib.sha256(os.path.abspath(place).encode()).hexdigest()[:16]
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{name}.json"


def check_images(rows, memory):
    """Opens every image once, in parallel, and remembers `check_image`'s findings, which it returns, in the file
    `memory`. Of several processes the first one does it, the others read what it remembers. Raises `InputError`."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{memory}.lock").acquire()
    except OSError as error:
        raise InputError(f"--cache_dir: {memory.parent} cannot be used ({error.strerror}); name another") from None
    with lock, ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        known = {}
        with contextlib.suppress(OSError, ValueError):  # not there yet, or half written
            known = json.loads(memory.read_text(encoding="utf-8"))
        results = pool.map(lambda index: check_image(rows[index]["image"], known), range(len(rows)))
        results = list(tqdm(results, "Checking images", len(rows), unit="image", disable=None, leave=False))
        found = {key: finding for key, finding in results if key}
        memory.write_text(json.dumps({**known, **found}), encoding="utf-8")
    return [finding for _, finding in results]


def leave_out(bad, num_images, may_leave_out, remedy=""):
    """Tells which of so many images are left out: `bad` are lines of a path and what is wrong. Raises `InputError`
    with these, and one more `remedy`, unless images may be left out."""
    if not bad:
        return
    unusable = "\n  ".join([f"{len(bad)} of {num_images} images are unusable:", *bad[:100]])
    if not may_leave_out:
        raise InputError(f"{unusable}\nMend or remove them, or add --skip_bad_images{remedy}.")
    print(f"Left out (--skip_bad_images): {unusable}")
