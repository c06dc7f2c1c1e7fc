"""Train on a dataset that is read while training, shard by shard, and may be larger than the disk."""

import dataclasses
import hashlib
import itertools
import os
import sys

import datasets
import numpy as np
import torch

from sdtune.arguments import NUM_TRAIN_EPOCHS, noise_offset_of
from sdtune.batches import count_steps, count_stream_steps
from sdtune.dataset import (
    SAVED_NAMES,
    SHARDS,
    CaptionedImages,
    check_data_files,
    check_rows,
    columns_of,
    describe_source,
    files_of,
    is_picture_folder,
    load_data,
    names_of_files,
    seen_alike,
)
from sdtune.errors import InputError, counted, fitted, in_one_line, last_line
from sdtune.images import MIN_SIDE, check_image, open_encoded, path_of_findings
from sdtune.models import load_tokenizer, read_latent_layout, read_num_timesteps
from sdtune.randomness import BUFFER, SAMPLE, SHARDS_ORDER, random_numbers
from sdtune.shards import ROW_FEATURES, all_captions, caption_suffixes, check_columns, read_tars, without_empty

ROWS_AT_ONCE = 16  # that are read of a shard
BYTES_OF_PART = 2**14  # of a shard, thrice; there may be thousands of shards
SHUFFLE_BUFFER_SIZE = 1000
MOST_BAD_ROWS = 1000  # one after the other, before a run ends
NUM_TOLD = 100  # samples that are left out, by name


@dataclasses.dataclass
class StreamRow:
    """A row of a shard, undecoded."""

    shard: int
    index: int  # in the shard
    image: dict  # bytes and path
    captions: list
    problem: str | None = None


@dataclasses.dataclass
class StreamedImages(torch.utils.data.IterableDataset):
    """Yields batches of samples as `CaptionedImages` makes them, each with epoch, shard and row in the place of an
    index, and with `left_out`, a list of what could not be used. They have no end.

    The rows of an epoch are divided among streams, one for each worker of each process. A stream takes `batch_size`
    rows for each batch, good or bad, so that where it is after a step follows from the number of the step alone, and
    no process has to know of another. The batches of a process come from its workers in turn.
    """

    source: datasets.IterableDataset  # undecoded
    columns: tuple  # of `columns_of`: of image, of captions, the field of the latter
    shard_names: list
    num_held_out: dict  # of each shard, by number: so many of its first rows are not trained on
    samples: CaptionedImages  # without rows: how samples are drawn and seen
    batch_size: int
    buffer_size: int  # rows that wait to be shuffled
    no_caption: str  # what is told of a row without one
    rank: int = 0
    num_ranks: int = 1
    weight: float = 1.0  # of a batch in its step
    first_batch: int = 0  # of this process
    num_rows: dict = dataclasses.field(default_factory=dict)  # of shards that were read to their end, without held-out

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The first batch that this loader asks for is that of worker 0.
        turn = (number + self.first_batch) % num_workers
        num_batches = len(range(turn, self.first_batch, num_workers))
        stream = self.rank * num_workers + turn
        for samples, left_out in self.batches(stream, self.num_ranks * num_workers, num_batches):
            yield {**torch.utils.data.default_collate(samples), "left_out": left_out}

    def batches(self, stream, num_streams, num_batches=0, apply=map):
        """Yields of each batch of a stream, from batch `num_batches` on, a list of its samples, and one of what could
        not be used. `apply` maps a function over rows."""
        rows = self.rows(stream, num_streams, num_batches * self.batch_size)
        num_bad, last_told = 0, []  # one after the other; what is told of the last of them
        epoch, is_whole, bad_shards = (
            None,
            num_batches == 0,
            set(),
        )  # read, a whole epoch each, since the last good row
        while True:
            found = list(apply(self.try_sample, itertools.islice(rows, self.batch_size)))
            left_out = [problem for _, problem in found if problem]
            good = [sample for sample, problem in found if not problem]
            num_bad = 0 if good else num_bad + len(found)
            if num_bad >= MOST_BAD_ROWS:
                raise InputError(
                    f"{num_bad:,} rows one after the other cannot be used; mend them ({': '.join(left_out[-1])})"
                )
            for sample, problem in found:
                if sample["epoch"] != epoch:
                    if bad_shards and self.are_all(bad_shards):
                        raise InputError(told_of_useless(last_told))
                    epoch, is_whole = sample["epoch"], is_whole or epoch is not None
                if problem is None:
                    bad_shards, is_whole, last_told = set(), False, []
                else:
                    last_told = [*last_told, problem][-3:]
                    if is_whole:
                        bad_shards.add(sample["shard"])
            # Others carry the weight of those that are left out; where there are none, a picture without weight comes.
            for sample in good:
                sample["weight"] = np.float32(self.weight / len(good))
            yield good or [found[0][0]], left_out

    def rows(self, stream, num_streams, num_done):
        """Yields (epoch, row) of a stream in its order, without the first `num_done`, which are read, where it takes
        that, and not decoded. Raises `InputError` for a stream without a row."""
        for epoch in itertools.count():
            num_rows = self.count_epoch(stream, num_streams, epoch)
            if num_rows is None or num_rows > num_done:
                num_rows = 0
                for num_rows, row in enumerate(self.shuffled(stream, num_streams, epoch), 1):
                    if num_rows > num_done:
                        yield epoch, row
            num_done = max(num_done - num_rows, 0)
            if not num_rows:
                self.check_other_epochs(num_streams)

    def are_all(self, shards):
        """Whether no other shard than these has rows."""
        return all(shard in shards or self.num_rows.get(shard) == 0 for shard in range(len(self.shard_names)))

    def check_other_epochs(self, num_streams):
        """Raises `InputError` if a stream that has no row in an epoch has none in any other."""
        if len(self.num_rows) == len(self.shard_names) and not any(self.num_rows.values()):
            raise InputError("--dataset_name: there are no images in its shards; name another")
        # Where there are more shards than streams, others are whole ones of this stream in another epoch.
        if len(self.shard_names) < num_streams:
            raise InputError(
                f"--streaming=True: there are fewer images than workers of all processes, {num_streams}; use a "
                "smaller --dataloader_num_workers, or drop --streaming"
            )

    def shuffled(self, stream, num_streams, epoch):
        """Yields the rows of a stream in an epoch, each once: `buffer_size` of them wait, of which one is drawn."""
        draw = random_numbers(self.samples.seed, BUFFER, epoch, stream)
        buffer = []
        for row in self.share(stream, num_streams, epoch):
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            place = int(draw.integers(self.buffer_size))
            yield buffer[place]
            buffer[place] = row
        for place in draw.permutation(len(buffer)).tolist():
            yield buffer[place]

    def share(self, stream, num_streams, epoch):
        """Yields the rows of an epoch that a stream reads, in the order of shards: whole shards, as many for each
        stream, and of those that are left every `num_streams`-th row."""
        whole, striped = self.divide(stream, num_streams, epoch)
        for shard in whole:
            yield from self.read_shard(shard)
        for shard in striped:
            yield from itertools.islice(self.read_shard(shard), (stream + shard) % num_streams, None, num_streams)

    def divide(self, stream, num_streams, epoch):
        """The shards of an epoch that a stream reads alone, and those that it shares with all others."""
        num_shards = len(self.shard_names)
        order = random_numbers(self.samples.seed, SHARDS_ORDER, epoch).permutation(num_shards).tolist()
        num_whole = num_shards // num_streams * num_streams
        return order[stream:num_whole:num_streams], order[num_whole:]

    def count_epoch(self, stream, num_streams, epoch):
        """How many rows a stream has in an epoch; None where not all of its shards were read to their end yet."""
        whole, striped = self.divide(stream, num_streams, epoch)
        if any(shard not in self.num_rows for shard in [*whole, *striped]):
            return None
        shared = [len(range((stream + shard) % num_streams, self.num_rows[shard], num_streams)) for shard in striped]
        return sum(self.num_rows[shard] for shard in whole) + sum(shared)

    def read_shard(self, shard):
        """Yields the rows of a shard, but those that are held out. Raises `InputError` where it cannot be read."""
        number = 0
        for row in itertools.islice(self.read_rows(shard), self.num_held_out.get(shard, 0), None):
            number += 1
            yield row
        if not number and not self.num_held_out.get(shard) and shard not in self.num_rows:
            print(f"\nLeft out: {self.shard_names[shard]}: is empty", file=sys.stderr, flush=True)
        self.num_rows[shard] = number

    def read_rows(self, shard):
        """Yields all rows of a shard. Raises `InputError` where it cannot be read."""
        image_column, caption_column, field = self.columns
        index = 0
        # Not row by row: `datasets` would divide them among workers again.
        batches = self.source.shard(len(self.shard_names), shard).iter(ROWS_AT_ONCE)
        try:
            for batch in batches:
                problems = batch.get("problem") or [None] * len(batch[image_column])
                for image, captions, problem in zip(batch[image_column], batch[caption_column], problems, strict=True):
                    captions = captions and captions.get(field) if field else captions
                    yield StreamRow(shard, index, image, captions, problem)
                    index += 1
        except (MemoryError, InputError):
            raise
        except Exception as error:  # of the network, the file, arrow
            told = f"cannot be read beyond row {index} ({last_line(error)}); mend or remove it"
            raise InputError(f"{self.shard_names[shard]}: {told}") from None

    def try_sample(self, item):
        """The sample of an (epoch, row), and its shard, its name there and what is wrong with it, or None. If
        something is, the sample is one without weight, of a white picture."""
        epoch, row = item
        captions, problem = self.captions_of(row)
        captions = captions or [""]
        draw = random_numbers(self.samples.seed, SAMPLE, epoch, row.shard, row.index)
        read = {"image": row.image, "captions": captions}
        sample, place = self.samples.draw_sample(0, read, draw)
        sample |= {"epoch": epoch, "shard": row.shard, "row": row.index, "weight": np.float32(0)}
        width, height = self.samples.sizes[0].tolist()
        sample["pixel_values"] = np.full((3, height, width), 255, np.uint8)
        if not problem:
            problem = self.add_pixels(sample, read, place)
        return sample, (*self.name_of(row), problem) if problem else None

    def captions_of(self, row):
        """The captions of a row, and what is wrong with it as far as that shows without its pixels, or None."""
        if row.problem:
            return [], row.problem
        try:
            captions = all_captions(with_names(row.captions, self.source.features[self.columns[1]]))
        except ValueError as error:
            return [], str(error)
        return captions, None if captions else self.no_caption

    def add_pixels(self, sample, row, place):
        """Adds the pixels of a row to its sample, or returns what is wrong with them."""
        if row["image"] and row["image"]["bytes"] is None:
            return f"the row names a file ({row['image']['path']}), and does not hold the image"
        try:
            if min(open_encoded(row["image"]["bytes"]).size) < MIN_SIDE:
                return check_image(row["image"], {})[1][-1]
            image = self.samples.fit(0, row, place, sample["is_mirrored"])
        except MemoryError:  # which is not the image's fault
            raise
        except Exception as error:  # whatever a decoder stumbles over
            return check_image(row["image"], {})[1][-1] or last_line(error)
        sample["pixel_values"] = np.array(image).transpose(2, 0, 1)
        return None

    def name_of(self, row):
        """What a row is called: its shard, and its file in that or its number."""
        path = (row.image or {}).get("path")
        return in_one_line(self.shard_names[row.shard]), in_one_line(path) if path else f"row {row.index}"


def told_of_useless(problems):
    """What is told of shards in which nothing could be used; `problems` are the last ones."""
    remedy = "mend or remove these, or name other columns by --image_column and --caption_column"
    return f"shards in none of which an image can be used ({'; '.join(map(': '.join, problems))}); {remedy}"


@dataclasses.dataclass
class LeftOut:
    """What a process leaves out of a stream, and tells."""

    told: set = dataclasses.field(default_factory=set)  # what was told at once
    # By shard and what is wrong: how often, in all epochs, and the first name.
    numbers: dict = dataclasses.field(default_factory=dict)

    def note(self, problems):
        """Counts what has a shard, a name in that, and a problem; tells the first ones at once, each once."""
        for problem in problems:
            shard, name, reason = problem = tuple(problem)  # of which a loader makes lists
            number, first = self.numbers.get((shard, reason.split(" (")[0]), (0, name))
            self.numbers[shard, reason.split(" (")[0]] = (number + 1, first)
            if problem in self.told or len(self.told) == NUM_TOLD:
                continue
            self.told.add(problem)
            print(f"\nLeft out: {': '.join(problem)}", file=sys.stderr, flush=True)
            if len(self.told) == NUM_TOLD:
                print("Left out: what comes from now on is told at the end alone", file=sys.stderr, flush=True)

    def tell(self, told_as=""):
        """Sums up, at the end, what was left out, in few lines: first what came most often."""
        total = sum(number for number, _ in self.numbers.values())
        if not total:
            return
        times = f"{total:,} times" if total > 1 else "once"
        lines = [f"{told_as}Left out of the stream, {times} in all epochs:"]
        for (shard, reason), (number, name) in sorted(self.numbers.items(), key=lambda item: -item[1][0]):
            lines.append(f"{shard}: {name}: {reason}" if number == 1 else f"{shard}: {number:,} x {reason}: {name}")
        told = fitted("\n  ".join(lines))
        print(f"\n{told}", file=sys.stderr, flush=True)


def check_streaming(args):
    """Lists what a stream needs, and what there cannot be with one."""
    if not args.streaming:
        return []
    problems, is_set = [], "cannot be with --streaming"
    if not args.dataset_name:
        problems.append("--streaming=True: reads a dataset; give --dataset_name, or drop this")
    if not args.max_train_steps:
        problems.append("--streaming=True: nobody knows how many images there are; give --max_train_steps")
    if args.num_train_epochs != NUM_TRAIN_EPOCHS:
        problems.append(f"--num_train_epochs={args.num_train_epochs}: {is_set}; use --max_train_steps instead")
    if args.validation_epochs:
        problems.append(f"--validation_epochs={args.validation_epochs}: {is_set}; use --validation_steps instead")
    if args.max_train_samples:
        told = "which would have to read all to draw some; name fewer files, or drop one"
        problems.append(f"--max_train_samples={args.max_train_samples}: {is_set}, {told}")
    if args.skip_bad_images:
        problems.append("--skip_bad_images=True: a stream leaves unusable images out anyway; drop this")
    for flag, why in {
        "aspect_ratio_buckets": "which does not know the shapes of its images",
        "cache_latents": "whose images do not stay",
        "cache_text_embeddings": "whose captions do not stay",
    }.items():
        if getattr(args, flag, False):
            problems.append(f"--{flag}=True: {is_set}, {why}; drop one")
    return problems


def load_images(args, fit=None):
    """As `load_data`, or with --streaming its training images as a stream. Raises `InputError`."""
    return load_stream(args) if args.streaming else load_data(args, args.train_data_dir, fit=fit)


def load_stream(args):
    """Opens --dataset_name as a stream and reads the first rows, which are held out; returns (stream, held-out images,
    fingerprint of both), the fingerprint by files and what `tell_files` says of each, since nobody reads all. Raises
    `InputError`."""
    source, columns, files = open_source(args)
    tokenizer = load_tokenizer(args)
    latent_channels, pixels_per_latent = read_latent_layout(args)
    samples = CaptionedImages(
        rows=datasets.Dataset.from_dict({"image": [], "captions": []}),
        contents=np.array([]),
        sizes=np.full((1, 2), args.resolution),
        tokenizer=tokenizer,
        latent_channels=latent_channels,
        pixels_per_latent=pixels_per_latent,
        num_timesteps=read_num_timesteps(args),
        seed=args.seed,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        image_interpolation_mode=args.image_interpolation_mode,
        caption_dropout=args.caption_dropout,
        noise_offset=noise_offset_of(args),
        input_perturbation=args.input_perturbation,
    )
    names = list(files)
    if len(names) != source.num_shards:
        names = [f"shard {number}" for number in range(source.num_shards)]
    buffer_size = args.shuffle_buffer_size or SHUFFLE_BUFFER_SIZE
    place = f"in its column {columns[1]!r}"
    if "problem" in source.features:  # of tar shards
        place = f"in a .{caption_suffixes(args.caption_column)[-1]} or .json beside it"
    told = f"has no caption {place}"
    stream = StreamedImages(source, columns, names, {}, samples, args.train_batch_size, buffer_size, told)
    first_rows = read_first_rows(args, stream)
    stream.num_held_out = count_by_shard(first_rows)
    flags = ("image_column", "caption_column", "num_validation_samples")
    fingerprint = {**{f"--{flag}": getattr(args, flag) for flag in flags}, **files}
    return stream, hold_out(args, stream, first_rows), fingerprint


def open_source(args):
    """Opens --dataset_name; returns the undecoded stream of its train split, the columns as `columns_of` does, and
    what tells of each file, by name. Raises `InputError`."""
    name = args.dataset_name
    files, pictures, data_files = files_of(name)
    if pictures and is_picture_folder(name, files, pictures, data_files):
        raise InputError(f"--dataset_name={name}: holds pictures, which are read without --streaming; drop that")
    if any(path.name in SAVED_NAMES for path in files):
        raise InputError(
            f"--dataset_name={name}: save_to_disk wrote this, which is read without --streaming; drop that"
        )
    check_data_files(data_files, name, args.follow_symlinks)
    whole = without_empty(data_files, name)
    try:
        told = describe_source(args, name, whole, are_aside=bool(pictures) or len(whole) < len(data_files))
        builder = datasets.load_dataset_builder(**told)
        names = names_of_files(name, builder)
        files = tell_files(names, builder)
        if builder.name == SHARDS:
            return open_tars(args, names), ("image", "captions", None), files
        if builder.name == "parquet":
            builder.config.batch_size = ROWS_AT_ONCE  # else as many as a file's first group has, which may be empty
        source = builder.as_streaming_dataset(split="train")
        columns = columns_of(source.features or {}, args.image_column, args.caption_column)
        if missing := [column for column in columns[:2] if column not in source.column_names]:
            raise ValueError(f"there is no column {missing[0]!r}, but {', '.join(source.column_names)}")
        source = source.select_columns(list(columns[:2])).cast_column(columns[0], datasets.Image(decode=False))
        return source, columns, files
    except Exception as error:  # as many as there are kinds of files and places
        raise InputError(
            f"--dataset_name={name}: cannot be streamed; check it, --dataset_config_name, "
            f"--image_column={args.image_column} and --caption_column={args.caption_column} ({last_line(error)})"
        ) from None


def open_tars(args, names):
    """Tar shards as a stream with ROW_FEATURES; `names` as `names_of_files` gives them. Raises `ValueError` for
    columns that are not there."""
    read = {"image_column": args.image_column, "caption_column": args.caption_column, "token": args.hub_token}
    check_columns(list(names), **read)
    files = {"paths": list(names), "names": list(names.values())}
    return datasets.IterableDataset.from_generator(read_tars, datasets.Features(ROW_FEATURES), {**files, **read})


def tell_files(names, builder):
    """What is known of a dataset's files without reading all of them, by name: size and digest of a local one, else
    what the Hub says."""
    told = {}
    for path, origin in zip(names, builder.config.data_files["train"].origin_metadata, strict=True):
        told[names[path]] = digest_of_parts(path) if os.path.exists(path) else " ".join(map(str, origin))
    return told


def digest_of_parts(path):
    """The size of a file and a digest of its beginning, middle and end."""
    size, digest = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file:
        for start in (0, size // 2, max(size - BYTES_OF_PART, 0)):
            file.seek(start)
            digest.update(file.read(BYTES_OF_PART))
    return f"{size} {digest.hexdigest()[:16]}"


def read_first_rows(args, stream):
    """The first rows, which are held out. Raises `InputError` if none is left, or if rows do not hold images."""
    number = args.num_validation_samples
    everything = itertools.chain.from_iterable(map(stream.read_rows, range(len(stream.shard_names))))
    rows = list(itertools.islice(everything, number + 1))
    if len(rows) <= number:
        raise InputError(
            f"--num_validation_samples={number}: must leave some of {counted(len(rows), 'image')}; use fewer"
        )
    image = rows[0].image or {}
    if image.get("bytes") is None and image.get("path"):
        raise InputError(
            f"--dataset_name={args.dataset_name}: its rows name files ({image['path'][:80]}) instead of holding "
            "images, and cannot be streamed; drop --streaming"
        )
    return rows[:number]


def count_by_shard(rows):
    """How many of the rows are of which shard."""
    numbers = {}
    for row in rows:
        numbers[row.shard] = numbers.get(row.shard, 0) + 1
    return numbers


def hold_out(args, stream, rows):
    """Those of the rows that can be used, as `CaptionedImages`."""
    found = [stream.captions_of(row) for row in rows]
    columns = {
        "image": [{"bytes": (row.image or {}).get("bytes"), "path": ": ".join(stream.name_of(row))} for row in rows],
        "captions": [captions for captions, _ in found],
        "problem": [problem for _, problem in found],
    }
    table = datasets.Dataset.from_dict(columns, datasets.Features(ROW_FEATURES))
    memory = path_of_findings(args.dataset_name, args.cache_dir)
    checked = check_rows(table, memory, True, stream.samples.tokenizer, args.resolution, are_of_stream=True)
    held_out = dataclasses.replace(
        stream.samples,
        rows=checked.rows,
        contents=checked.contents,
        sizes=np.full((len(checked.rows), 2), args.resolution),
        picture_sizes=checked.sizes,
    )
    return seen_alike(held_out)


def with_names(captions, feature):
    """The captions of a row, with their names in the place of numbers of classes."""
    label = getattr(feature, "feature", feature)  # of a list of them
    if not isinstance(label, datasets.ClassLabel):
        return captions
    names = dict(enumerate(label.names))  # a class that is not known has the number -1
    return [names.get(number) for number in captions] if isinstance(captions, list) else names.get(captions)


def count_steps_of(args, images, num_processes):
    """Counts the samples of a step and the steps of a run, of images that may be a stream."""
    if args.streaming:
        return count_stream_steps(args, num_processes)
    return count_steps(args, len(images), num_processes, images.sizes)


def split_of_stream(args, num_processes, num_workers, batch_size):
    """How a stream is divided and shuffled, which decides where it is after a step; None without one."""
    if not args.streaming:
        return None
    passes = f"{batch_size} a pass x {args.gradient_accumulation_steps} passes"
    buffer_size = args.shuffle_buffer_size or SHUFFLE_BUFFER_SIZE
    return f"{passes} x {num_processes} processes x {num_workers or 1} workers, a buffer of {buffer_size} rows"


def stream_from(images, args, rank, num_ranks, batch_size, step):
    """The stream of a process, whose passes are of `batch_size`, from a step on."""
    passes = args.gradient_accumulation_steps
    return dataclasses.replace(
        images,
        batch_size=batch_size,
        rank=rank,
        num_ranks=num_ranks,
        weight=1 / (passes * num_ranks),
        first_batch=step * passes,
    )


def describe_stream(args, images, num_processes, num_workers):
    """What the plan says of a stream; None without one."""
    if not args.streaming:
        return None
    shards, processes = counted(len(images.shard_names), "shard"), counted(num_processes, "process", "processes")
    shards = f"{shards} for {processes} x {counted(num_workers or 1, 'worker')}"
    return f"{shards}, buffers of {counted(images.buffer_size, 'row')}; unusable images are left out"


def without_left_out(batches, left_out):
    """Yields batches, and notes in `left_out` what could not be used of each."""
    for batch in batches:
        left_out.note(batch.pop("left_out"))
        yield batch
