"""Read shards: parquet, and tar files as WebDataset has them, whose samples are files of one name."""

import contextlib
import itertools
import json
import os
import tarfile
import zlib

import datasets
import pyarrow.parquet

from sdtune.errors import InputError, counted, in_one_line, last_line
from sdtune.images import IMAGE_SUFFIXES

NUM_LOOKED_AT = 100  # samples, for columns of these names
ROW_FORMAT = 1  # to be raised where what rows hold changes
ROW_FEATURES = {
    "image": datasets.Image(decode=False),
    "captions": datasets.List(datasets.Value("string")),
    "problem": datasets.Value("string"),  # what is wrong with the sample, or null
}


def all_captions(captions):
    """The usable captions of a row that holds a string or a list of them. Raises `ValueError` for half a character,
    and `InputError` for numbers."""
    captions = captions if isinstance(captions, list) else [captions]
    usable = [caption for caption in captions if isinstance(caption, str) and caption.encode() and caption.strip()]
    # One that is not equal to itself stands for a caption that is missing.
    numbers = [caption for caption in captions if isinstance(caption, int | float) and caption == caption]
    if numbers and not usable:
        raise InputError(f"the caption is a number ({numbers[0]}), not text; name another --caption_column")
    return usable


def without_empty(data_files, dataset_name):
    """Of local data files those that are no empty shards, which are told. Raises `InputError` for shards that are
    broken, as far as their beginning or, of parquet, their end shows that."""
    kinds = {path.suffix.lower() for path in data_files}
    shards = [path for path in data_files if path.suffix.lower() == (".tar" if ".tar" in kinds else ".parquet")]
    empty, broken = [], []
    for path in shards:
        try:
            if is_empty(path):
                empty.append(path)
        except tarfile.TarError:
            broken.append(f"{in_one_line(path.name)}: is no tar file")
        except (OSError, EOFError, ValueError) as error:  # arrow's are among them
            broken.append(f"{in_one_line(path.name)}: {last_line(error)}")
    told = f"--dataset_name={dataset_name}"
    if broken:
        raise InputError("\n  ".join([f"{told}: shards are broken; mend or remove these", *broken]))
    if shards and len(empty) == len(shards):
        raise InputError(f"{told}: holds nothing but empty shards, such as {in_one_line(empty[0].name)}; name another")
    if empty:
        names = ", ".join(in_one_line(path.name) for path in empty[:5])
        print(f"Left out of {in_one_line(dataset_name)}: {counted(len(empty), 'empty shard')}, such as {names}.")
    return [path for path in data_files if path not in empty]


def is_empty(path):
    """Whether a parquet or tar file has no row or file in it. Raises what a broken one leads to."""
    if os.path.getsize(path) == 0:
        return True
    if path.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    with tarfile.open(path, "r|*") as file:
        return file.next() is None


def find_broken(shards):
    """The name of the first of local parquet files that cannot be read to its end, or None."""
    for path in shards:
        if path.suffix.lower() == ".parquet":
            try:
                for _ in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
                    pass
            except (OSError, ValueError):
                return in_one_line(path.name)
    return None


def read_tars(paths, names, image_column, caption_column, token=None):
    """Yields the samples of tar files, local ones or on the Hub, as rows of ROW_FEATURES. Raises `InputError` for a
    file that cannot be read, by its name."""
    for path, name in zip(paths, names, strict=True):
        number = 0
        try:
            for key, files in samples_of(path, image_column, caption_column, token):
                yield row_of(key, files, image_column, caption_column)
                number += 1
        except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
            told = f"cannot be read beyond row {number} ({last_line(error)}); mend or remove it"
            raise InputError(f"{in_one_line(name)}: {told}") from None


def samples_of(path, image_column, caption_column, token=None):
    """Yields of each sample of a tar file its name without suffix, and its files: their content by suffix, or None
    for those that neither column needs. Raises what a broken file leads to."""
    wanted = [*caption_suffixes(caption_column), "json"]
    manager = datasets.StreamingDownloadManager(download_config=datasets.DownloadConfig(token=token))
    key, files = None, {}
    try:
        for name, file in manager.iter_archive(path):
            folder, _, base = name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not (stem and dot):
                continue
            if key != (folder, stem):
                if files:
                    yield "/".join(filter(None, key)), files
                key, files = (folder, stem), {}
            is_needed = suffix in wanted or is_image(suffix, image_column)
            files[suffix] = file.read() if is_needed else None
    except tarfile.ReadError as error:
        if str(error) != "empty file":
            raise
    if files:
        yield "/".join(filter(None, key)), files


def is_image(suffix, image_column):
    """Whether a file with this suffix is what --image_column means: by default any image."""
    is_any = image_column == "image" and f".{suffix.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
    return is_any or suffix == image_column


def caption_suffixes(caption_column):
    """The suffixes that --caption_column means, but for fields of a .json."""
    return ("text", "txt") if caption_column == "text" else (caption_column,)


def caption_fields(caption_column):
    """The fields of a .json that --caption_column means."""
    return ("text", "caption") if caption_column == "text" else (caption_column,)


def row_of(key, files, image_column, caption_column):
    """A sample as a row of ROW_FEATURES."""
    images = [suffix for suffix in files if is_image(suffix, image_column)]
    suffix = images[0] if images else next(iter(files))
    row = {"image": {"bytes": files[suffix] if images else b"", "path": f"{key}.{suffix}"}}
    try:
        row["captions"] = captions_of(files, caption_column)
    except ValueError as error:  # `InputError` is one
        return {**row, "captions": [], "problem": str(error)}
    if len(images) > 1 and all("." in suffix for suffix in images):
        told = (
            f"{len(images)} images are one sample, whose name ends at the first dot; rename files with dots in names"
        )
        return {**row, "problem": told}
    if not images:
        there = ", ".join(f".{suffix}" for suffix in files)
        told = f"there is no image to it, but {there}; files of a sample have to follow each other"
        return {**row, "problem": told}
    return {**row, "problem": None}


def captions_of(files, caption_column):
    """The captions of a sample. Raises `ValueError` for those that are not text."""
    for suffix in caption_suffixes(caption_column):
        if suffix in files:
            try:
                return all_captions(files[suffix].decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"its caption, a .{suffix}, is not UTF-8; convert it") from None
    fields = fields_of(files)
    found = [fields[name] for name in caption_fields(caption_column) if fields.get(name) is not None]
    return all_captions(found[0]) if found else []


def fields_of(files):
    """The fields of a sample's .json, if there is one. Raises `ValueError` if it cannot be read."""
    try:
        fields = json.loads(files.get("json") or b"{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read ({last_line(error)})") from None
    return fields if isinstance(fields, dict) else {}


def check_columns(paths, image_column, caption_column, needs_caption=True, token=None):
    """Looks at the first samples of tar files until an image is found, and a caption if it needs one. Raises
    `ValueError` if none has what the columns mean, and lists what there is; a file that is broken is told when it is
    read."""
    samples = itertools.chain.from_iterable(samples_of(path, image_column, caption_column, token) for path in paths)
    suffixes, fields, has_image, has_caption = {}, {}, False, False
    number = 0
    with contextlib.suppress(OSError, EOFError, zlib.error, tarfile.TarError):
        for _, files in itertools.islice(samples, NUM_LOOKED_AT):
            number += 1
            suffixes |= files
            with contextlib.suppress(ValueError):
                fields |= fields_of(files)
            has_image = any(is_image(suffix, image_column) for suffix in suffixes)
            has_caption = suffixes.keys() & {*caption_suffixes(caption_column)}
            has_caption = not needs_caption or has_caption or fields.keys() & {*caption_fields(caption_column)}
            if has_image and has_caption:
                return
        there = ", ".join(map(in_one_line, [*suffixes, *fields]))
        missing = caption_column if has_image else image_column
        told = f"of the first {number} samples none has a column {missing!r}, but {there or 'nothing'}"
        raise ValueError(told if number else f"there is no column {missing!r}: there are no samples")
