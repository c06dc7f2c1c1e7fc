"""Image folders for the tests, good and bad, and a way to see that nobody touched them."""

import colorsys
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def make_image(index, size=(32, 32)):
    """Returns an RGB image that differs from that of every other index below 61: a colour with a square on it."""
    width, height = size
    hue = index * 0.618034 % 1  # golden ratio steps never come close to an earlier hue
    image = Image.new("RGB", size, tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.7, 0.9)))
    side = max(1, min(size) // 3)
    left, top = index * 5 % max(1, width - side), index * 3 % max(1, height - side)
    square = tuple(round(255 * c) for c in colorsys.hsv_to_rgb((hue + 0.5) % 1, 0.9, 0.4))
    ImageDraw.Draw(image).rectangle([left, top, left + side - 1, top + side - 1], fill=square)
    return image


def caption_of(index):
    """Returns the caption of make_image(index), different for every index."""
    return "a picture of number " + " ".join(NUMBERS[int(digit)] for digit in str(index))


def write_metadata(folder, rows):
    """Writes metadata.jsonl, one JSON object per line."""
    (Path(folder) / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
        row = {"file_name": path.name, "text": f"a picture with a defect {kind}"}
        if kind == "no_caption":
            if missing_caption == "no_row":
                continue
            row["text"] = {"null": None, "empty": "", "absent": None}[missing_caption]
            if missing_caption == "absent":
                del row["text"]
        rows.append(row)
    write_metadata(folder, rows)
    return MessyFolder(folder, [folder / f"{index:02d}.png" for index in range(num_good)], bad)


def snapshot(folder):
    """Returns {relative path: (size in bytes, time of change in ns, SHA-256)} of all files under the folder."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_size,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in files
    }
