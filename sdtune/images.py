"""Decode images as a viewer shows them, and check every one before training."""

import contextlib
import hashlib
import io
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
from filelock import FileLock
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from sdtune.errors import InputError, counted, last_line, printable
from sdtune.files import beside
from sdtune.metadata import EXIF, PROFILE, TEXT, without_metadata

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# Of pictures from phones and cameras, and for programs, that Pillow does not read or not as they are seen.
FOREIGN_SUFFIXES = set(".arw .cr2 .cr3 .dng .heic .heif .jxl .nef .orf .psd .raf .rw2 .svg".split())
# What is looked for in a file, whatever its suffix. Pillow knows more, and runs Ghostscript for some.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
NO_CAPTION = "has no caption, in metadata or a .txt beside it"
HOW_TO_CAPTION = "`sdtune caption FOLDER` writes captions"
MAX_FILE_BYTES = 2**32  # of 16-bit pixels as many as are opened have a third
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
LISTINGS = "listings"  # the place, in what is remembered, of the keys of datasets that hold their images
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image_file(path, folder):
    """Whether the path below `folder` has an image's suffix and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path, folder)


def is_hidden(path, folder):
    """Whether the path below `folder`, or a folder on the way to it, has a name that starts with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def open_image(encoded):
    """Decodes an image to 8-bit sRGB as a viewer shows it: upright, by its colour profile, 16-bit greys scaled, alpha
    over white. Raises `OSError`, `ValueError` or `SyntaxError` if Pillow cannot read it to the end."""
    return in_srgb(*open_pixels(encoded))


def open_fitted(encoded, size, resample, place):
    """As `open_image`, scaled so that it covers `size`, a width and a height in pixels, and cropped to that at a
    `place`, which is (0, 0) for the upper left corner and (1, 1) for the lower right one."""
    # Twice the side leaves the resampling its work: measured, pixels of photos change by 0.2 of 255 in the mean.
    enough = None if resample == Image.Resampling.NEAREST else 2 * max(size)
    image, profile = open_pixels(encoded, enough)
    if image.mode == "CMYK":  # where shares of ink do not mix as light does
        image, profile = in_srgb(image, profile), b""
    # Colours are converted last: at full size a profile costs as much time as decoding.
    return in_srgb(ImageOps.fit(image, size, resample, centering=place), profile)


def open_pixels(encoded, enough=None):
    """Decodes an image to its own colours of 8 bits, RGB, L or CMYK, upright and alpha over white; returns it and its
    colour profile, or b"". A JPEG may come in half its size or less, if no side is then below `enough` pixels."""
    image = load_pixels(encoded, enough)
    profile, turn = image.info.get("icc_profile"), ORIENTATIONS.get(orientation_of(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # Pillow would saturate 16-bit greys
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    profiled_mode = {"CMYK": "CMYK", "L": "L", "LA": "L"}.get(image.mode, "RGB")  # which the profile is for
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != profiled_mode:
        image = image.convert(profiled_mode)
    return image, profile if isinstance(profile, bytes) else b""


def in_srgb(image, profile):
    """Converts an image of `open_pixels` from the colours of its profile to sRGB."""
    is_srgb = b"sRGB IEC61966" in profile.replace(b"\0", b"")  # as most are named, in letters of 1 or 2 bytes
    if profile and not is_srgb:
        with contextlib.suppress(ImageCms.PyCMSError):  # a viewer, too, ignores a profile that does not fit
            return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), 0, "RGB")
    return image.convert("RGB")


def load_pixels(encoded, enough):
    """Pillow's image, decoded to the end. Metadata that Pillow stumbles over is left out, as little as will do."""
    try:
        return decode_file(encoded, enough)
    except Exception:  # whatever a decoder stumbles over
        for kinds in ({TEXT}, {TEXT, PROFILE}, {TEXT, EXIF}, {TEXT, PROFILE, EXIF}):
            bare = without_metadata(encoded, kinds)
            if bare != encoded:
                with contextlib.suppress(Exception):
                    return decode_file(bare, enough)
        raise


def open_encoded(encoded):
    """Opens a file, which is not decoded yet, if it is of a format for images."""
    Image.init()
    return Image.open(io.BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])


def decode_file(encoded, enough):
    """Opens a file and decodes it to the end; a JPEG in reduced size, if no side is then below `enough` pixels."""
    image = open_encoded(encoded)
    width, height = image.size
    for scale in (8, 4, 2):
        # Only where it divides both sides do the edges stay where they are.
        if enough and width % scale == height % scale == 0 and min(width, height) >= scale * enough:
            image.draft(None, (width // scale, height // scale))
            break
    image.load()
    return image


def orientation_of(image):
    """How the image is to be turned, a number in [1, 8] (Exif 2.32, section 4.6.4 A); 1, not at all, where the
    metadata does not tell."""
    with contextlib.suppress(Exception):  # broken EXIF raises whatever it likes
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def read_image(image):
    """Opens an image of a dataset's undecoded column, a dictionary of `bytes` or `path`, as `open_image` does."""
    return open_image(read_content(image))


def read_content(image):
    """The file of an image of a dataset's undecoded column, a dictionary of `bytes` or `path`."""
    content = image["bytes"]
    return Path(image["path"]).read_bytes() if content is None else content


@contextlib.contextmanager
def still_readable(name):
    """Raises `InputError`, which names the image, where one that was checked cannot be decoded any more."""
    try:
        yield
    except MemoryError:  # which is not the image's fault
        raise
    except Exception as error:  # whatever a decoder stumbles over
        told = f"changed since it was checked, and cannot be read now ({last_line(error)}); put it back or start again"
        raise InputError(f"{name}: {told}") from None


def check_image(image, known):
    """Opens one image, unless `known` has it; returns a key, of path, size and time or of the content where a dataset
    holds it, and [sha256, width, height, what is wrong or ""]."""
    try:
        encoded = image["bytes"]
        if encoded is not None:
            key = hashlib.sha256(encoded).hexdigest()
        else:
            status = os.stat(image["path"])
            if not stat.S_ISREG(status.st_mode):  # a reader of a pipe would wait for ever
                return None, ["", 0, 0, "is no regular file; remove it"]
            if status.st_size > MAX_FILE_BYTES:  # which may have a hole, and take no place on the disk
                return None, ["", 0, 0, f"{status.st_size:,} bytes, more than any picture that is opened; shrink it"]
            key = f"{os.path.abspath(image['path'])}|{status.st_size}|{status.st_mtime_ns}"
        if key in known:
            return key, known[key]
        encoded = read_content(image)
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
        if Path(image["path"] or "").suffix.lower() in FOREIGN_SUFFIXES:
            problem += "; convert it to JPEG or PNG"
    except Image.DecompressionBombError as error:
        pixels, limit = [int(number) for number in re.findall(r"\d+", str(error))]
        problem = f"{pixels:,} pixels, more than the {limit:,} that are opened; shrink it"
    except Exception as error:  # damaged files raise whatever a decoder stumbles over
        problem = f"cannot be read: {error}"
    return None, ["", 0, 0, problem]


def path_of_findings(place, cache_dir):
    """The file that remembers the check of the images in `place`, a folder or a dataset's name."""
    name = hashlib.sha256(os.path.abspath(place).encode()).hexdigest()[:16]
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{name}.json"


def check_images(rows, memory):
    """Opens every image once, in parallel, and remembers `check_image`'s findings in the file `memory`; returns them,
    with what was wrong with a row as it was read, its `problem`, if it has that column. Of several processes the first
    one does it, the others read what it remembers. Raises `InputError`."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{memory}.lock").acquire()
    except OSError as error:
        raise InputError(f"--cache_dir: {memory.parent} cannot be used ({error.strerror}); name another") from None
    with lock:
        known = {}
        with contextlib.suppress(OSError, TypeError, ValueError):  # not there yet, or broken
            known = dict(json.loads(memory.read_text(encoding="utf-8")))
        findings, new = look_at_all(rows, known)
        if new:
            with contextlib.suppress(OSError), beside(memory) as unfinished:  # a full disk only costs time
                unfinished.write_text(json.dumps({**known, **new}), encoding="utf-8")
    if "problem" not in getattr(rows, "column_names", ()):
        return findings
    return [[*found, told or problem] for (*found, problem), told in zip(findings, rows["problem"], strict=True)]


def look_at_all(rows, known):
    """Returns `check_image`'s findings of all rows, and what of them is to be added to `known`. A dataset that holds
    its images is known as a whole, by its fingerprint, so that nothing of it is read again."""
    listings, name = known.get(LISTINGS, {}), getattr(rows, "_fingerprint", None)
    keys = listings.get(name) or [None] * len(rows)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        results = pool.map(lambda index: check_row(rows, index, keys[index], known), range(len(rows)))
        results = list(tqdm(results, "Checking images", len(rows), unit="image", disable=None, leave=False))
    new = {key: finding for key, finding in results if key and key not in known}
    by_content = [key if key == finding[0] else None for key, finding in results]  # other keys are paths
    if name and any(by_content) and by_content != keys:
        latest = list({**listings, name: by_content}.items())[-4:]  # other choices of rows may be in use too
        new[LISTINGS] = dict(latest)
    return [finding for _, finding in results], new


def check_row(rows, index, key, known):
    """As `check_image`; does not read the row where `known` has its key."""
    return (key, known[key]) if key in known else check_image(rows[index]["image"], known)


def leave_out(bad, num_images, may_leave_out, remedy="", are_of_stream=False):
    """Tells which of so many images are left out: `bad` are lines of a path and what is wrong. Raises `InputError`
    with these, and one more `remedy`, unless images may be left out; those that are held out of a stream always
    may."""
    if not bad:
        return
    without = [line for line in bad if line.endswith(NO_CAPTION)]
    others = [line for line in bad if not line.endswith(NO_CAPTION)]  # first: a list is cut, and one of them may stop
    are = "is" if len(bad) == 1 else "are"
    number = f"{len(bad)} of {counted(num_images, 'image')} {are} unusable"
    if without:
        number += f", {len(without)} of them for lack of a caption"
    unusable = "\n  ".join([f"{number}:", *map(printable, (others + without)[:100])])
    if not may_leave_out:
        choice = "use a larger --num_validation_samples" if are_of_stream else "add --skip_bad_images"
        mend = f"{HOW_TO_CAPTION}; mend" if without else "Mend"
        raise InputError(f"{unusable}\n{mend} or remove them, or {choice}{remedy}.")
    why = "of what is held out" if are_of_stream else "(--skip_bad_images)"
    print(f"Left out {why}: {unusable}")
