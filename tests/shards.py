"""Datasets in shards: tar files as WebDataset has them, and parquet."""

import io
import json
import tarfile
from pathlib import Path

import datasets
from image_data import caption_of, encoded, make_image


def make_rows(number, first=0, size=(32, 32)):
    """So many rows of an image's file, its name and a caption: the pictures of `make_image` from `first` on."""
    return [
        (encoded(make_image(index % 61, size)), f"{index:05d}.png", caption_of(index))
        for index in range(first, first + number)
    ]


def write_tar(path, rows, caption_suffix="txt"):
    """Writes one shard; a caption that is None has no file. With `caption_suffix` json it is in the field caption."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for content, name, caption in rows:
            add_file(file, name, content)
            if caption is not None:
                text = json.dumps({"caption": caption, "similarity": 0.3}) if caption_suffix == "json" else caption
                add_file(file, f"{Path(name).stem}.{caption_suffix}", text.encode())
    return Path(path)


def write_messy_tar(path):
    """Writes a shard of samples that all differ; returns what is wrong with the bad ones, by their image's name."""
    picture, other = encoded(make_image(0)), encoded(make_image(1), "jpg", quality=95)
    files = {
        "0.png": picture,
        "0.pth": b"no tensors",  # nobody opens it
        "1.jpg": other,
        "1.txt": b"one",
        "2.png": picture,
        "2.txt": b"caf\xe9",
        "3.jpg": other,
        "3.json": b'{"caption": "half',
        "4.png": picture,
        "4.json": b'{"caption": 4}',
        "below/5.jpeg": other,
        "below/5.json": b'{"caption": ["five", "and more"]}',
        "6.txt": b"six",
        "README": b"no sample",
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            add_file(file, name, content)
    return {
        "2.png": "its caption, a .txt, is not UTF-8; convert it",
        "3.jpg": "its .json cannot be read (Unterminated string starting at: line 1 column 13 (char 12))",
        "4.png": "the caption is a number (4), not text; name another --caption_column",
        "6.txt": "there is no image to it, but .txt; files of a sample have to follow each other",
    }


def add_file(file, name, content):
    """Adds a file to an open tar file."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    file.addfile(entry, io.BytesIO(content))


def write_parquet(path, rows, keep_names=True):
    """Writes one shard with the columns image and text."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table = {
        "image": [{"bytes": content, "path": name if keep_names else None} for content, name, _ in rows],
        "text": [caption for _, _, caption in rows],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features).to_parquet(str(path))
    return Path(path)


def write_shards(folder, kind, numbers, **options):
    """Writes shards of so many rows each, numbered on from 0, and returns the folder; `kind` is tar or parquet."""
    first = 0
    for shard, number in enumerate(numbers):
        write = write_tar if kind == "tar" else write_parquet
        write(Path(folder) / f"{shard:05d}.{kind}", make_rows(number, first), **options)
        first += number
    return Path(folder)
