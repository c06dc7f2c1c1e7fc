"""Image folders for the tests, good and bad, and a way to see that nobody touched them."""

import colorsys
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def make_image(index, size=(32, 32)):
    """Returns an RGB image that differs from that of every other index below 61: a colour with a square on it."""
    width, height = size
    hue = index * 0.618034 % 1  # golden ratio steps never come close to an earlier hue
    image = Image.new("RGB", size, rgb(hue, 0.7, 0.9))
    side = max(1, min(size) // 3)
    left = index * 5 % max(1, width - side)
    top = index * 3 % max(1, height - side)
    square = [left, top, left + side - 1, top + side - 1]
    ImageDraw.Draw(image).rectangle(square, fill=rgb((hue + 0.5) % 1, 0.9, 0.4))
    return image


def rgb(hue, saturation, value):
    """The colour as three whole numbers in [0, 255]."""
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def encoded(image, suffix="png", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format={"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
    return buffer.getvalue()


def caption_of(index):
    """Returns the caption of make_image(index), different for every index."""
    words = [NUMBERS[int(digit)] for digit in str(index)]
    return f"a picture of number {' '.join(words)}"


def write_metadata(folder, rows):
    """Writes metadata.jsonl, one JSON object per line."""
    lines = [json.dumps(row) + "\n" for row in rows]
    (Path(folder) / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def write_image_folder(folder, num_images=6, size=32, captions=None):
    """Writes PNG files 00.png, 01.png, ... and metadata.jsonl (`file_name`, `text`); returns the folder.

    size: the side of all images, one (width, height) for all, or a list of (width, height), one per image.
    captions: None for caption_of(index), or a list with a string or a list of strings per image.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(size, int):
        size = (size, size)
    sizes = size if isinstance(size, list) else [size] * num_images
    captions = captions or [caption_of(index) for index in range(num_images)]
    rows = []
    for index in range(num_images):
        name = f"{index:02d}.png"
        make_image(index, sizes[index]).save(folder / name)
        rows.append({"file_name": name, "text": captions[index]})
    write_metadata(folder, rows)
    return folder


@dataclass
class MessyFolder:
    """A folder with good and bad images. `bad` maps the kind of defect to the path of its file."""

    path: Path
    good: list
    bad: dict


def write_messy_folder(folder, num_good=4, size=32, missing_caption="null"):
    """Writes an image folder with one of each: a truncated JPEG, a text file named .jpg, an image without caption,
    a row without file, an image with a side of 3 pixels.

    missing_caption: "null" (JSON null), "empty" (""), "absent" (no such key) or "no_row" (not in metadata.jsonl).
    """
    folder = write_image_folder(folder, num_good, size)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    bad = {
        "truncated": folder / "truncated.jpg",
        "not_an_image": folder / "not_an_image.jpg",
        "no_caption": folder / "no_caption.png",
        "no_file": folder / "no_file.png",
        "too_small": folder / "too_small.png",
    }
    # Large enough that half of the file still has a whole header and some of the pixels.
    make_image(50, (256, 256)).save(bad["truncated"], quality=95)
    data = bad["truncated"].read_bytes()
    bad["truncated"].write_bytes(data[: len(data) // 2])
    bad["not_an_image"].write_text("This is a note, not a photo.\n" * 20)
    make_image(51, (size, size)).save(bad["no_caption"])
    make_image(52, (100, 3)).save(bad["too_small"])
    for kind, path in bad.items():
        if kind != "no_caption":
            rows.append({"file_name": path.name, "text": f"a picture with a defect {kind}"})
        elif missing_caption == "null":
            rows.append({"file_name": path.name, "text": None})
        elif missing_caption == "empty":
            rows.append({"file_name": path.name, "text": ""})
        elif missing_caption == "absent":
            rows.append({"file_name": path.name})
        elif missing_caption != "no_row":
            raise ValueError(f"unknown way to miss a caption {missing_caption!r}")
    write_metadata(folder, rows)
    good = [folder / f"{index:02d}.png" for index in range(num_good)]
    return MessyFolder(folder, good, bad)


def snapshot(folder):
    """Returns {relative path: (size in bytes, time of change in ns, SHA-256)} of all files under the folder."""
    folder = Path(folder)
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status, digest = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns, digest)
    return found
