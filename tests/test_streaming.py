"""A stream of shards gives every image once an epoch, goes on where it was, and names what it leaves out."""

import itertools
import os
import pickle
import re
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import load_script
from copies import end_of, run_copies, start_copy
from fake_hub import USER
from image_data import caption_of, encoded, make_image
from PIL import Image
from reach_hub import reaching
from running import TRAIN_TEXT_TO_IMAGE_LORA
from safetensors import safe_open
from safetensors.torch import load_file
from shards import make_rows, write_messy_tar, write_parquet, write_shards, write_tar
from training import checkpoint_state, losses, parse, same, train, trains_into, unet, words

from sdtune.batches import step_sizes
from sdtune.errors import InputError
from sdtune.streaming import (
    LeftOut,
    check_streaming,
    count_stream_steps,
    load_stream,
    split_of_stream,
    stream_from,
    without_left_out,
)

RESOLUTION = 32
FLAGS = ["--streaming", f"--resolution={RESOLUTION}", "--max_train_steps=4", "--report_to=none"]


@pytest.fixture
def open_stream(tiny_pipeline, tmp_path):
    """Opens a dataset as `load_stream` does, with more flags as words."""

    def load(dataset, *more):
        places = [f"--pretrained_model_name_or_path={tiny_pipeline}", f"--cache_dir={tmp_path / 'cache'}"]
        return load_stream(parse(*FLAGS, *places, f"--dataset_name={dataset}", *more))

    return load


def keys_of(images, stream, num_streams, num_epochs):
    """(shard, row) of each row that a stream reads, in its order, by epoch."""
    epochs = {epoch: [] for epoch in range(num_epochs)}
    for epoch, row in images.rows(stream, num_streams, 0):
        if epoch >= num_epochs:
            return list(epochs.values())
        epochs[epoch].append((row.shard, row.index))
    raise AssertionError("a stream has no end")


def all_keys(numbers):
    return {(shard, row) for shard, number in enumerate(numbers) for row in range(number)}


# --------------------------------------------------------------------------------------------------- order and shares
@pytest.mark.parametrize("kind, numbers", [("tar", [7, 4, 9]), ("parquet", [8, 5]), ("tar", [3, 2, 4, 3, 5, 3, 2])])
@pytest.mark.parametrize("num_streams", [1, 2, 4])
def test_every_row_is_read_once_an_epoch(open_stream, tmp_path, kind, numbers, num_streams):
    images, _, _ = open_stream(write_shards(tmp_path / "set", kind, numbers), "--shuffle_buffer_size=3")
    shares = [keys_of(images, stream, num_streams, 3) for stream in range(num_streams)]
    for epoch in range(3):
        read = [key for share in shares for key in share[epoch]]
        assert len(read) == sum(numbers)
        assert set(read) == all_keys(numbers)
    assert shares[0][0] != shares[0][1]  # another order in every epoch


def test_shards_are_read_by_one_worker_where_there_are_enough(open_stream, tmp_path):
    """Of five shards four streams read one each, and share the fifth row by row."""
    images, _, _ = open_stream(write_shards(tmp_path / "set", "tar", [4, 4, 4, 4, 4]))
    for epoch in range(3):
        shares = [keys_of(images, stream, 4, epoch + 1)[epoch] for stream in range(4)]
        shards = [sorted(shard for shard, _ in share) for share in shares]
        (shared,) = set(range(5)) - {max(found, key=found.count) for found in shards}
        assert all(found.count(shared) == 1 and len(found) == 5 for found in shards)
        assert sorted(row for share in shares for shard, row in share if shard == shared) == [0, 1, 2, 3]


def test_the_order_is_that_of_seed_epoch_process_and_worker(open_stream, tmp_path):
    folder = write_shards(tmp_path / "set", "tar", [20, 20])
    order = {seed: keys_of(open_stream(folder, f"--seed={seed}")[0], 0, 2, 2) for seed in (0, 1)}
    assert order[0] == keys_of(open_stream(folder)[0], 0, 2, 2)
    assert order[0] != order[1]


def test_rows_wait_in_a_buffer_to_be_drawn(open_stream, tmp_path):
    """From a buffer of four the k-th row out is one of the first k + 4 in; a buffer of one leaves the order."""
    folder = write_shards(tmp_path / "set", "tar", [60])
    (order,) = keys_of(open_stream(folder, "--shuffle_buffer_size=1")[0], 0, 1, 1)
    assert order == [(0, row) for row in range(60)]
    (order,) = keys_of(open_stream(folder, "--shuffle_buffer_size=4")[0], 0, 1, 1)
    places = [row for _, row in order]
    assert all(row <= place + 4 for place, row in enumerate(places))
    assert max(place - row for place, row in enumerate(places)) > 4  # some wait long
    (order,) = keys_of(open_stream(folder, "--shuffle_buffer_size=60")[0], 0, 1, 1)
    assert np.abs(np.diff([row for _, row in order])).mean() > 10  # 20 in the mean, of a permutation


# -------------------------------------------------------------------------------------------------------- samples
def take(images, stream, num_streams, number, skipped=0):
    """The samples of so many batches of a stream."""
    batches = itertools.islice(images.batches(stream, num_streams, skipped), number)
    return [sample for samples, _ in batches for sample in samples]


def same_sample(one, other):
    """Whether two samples are equal in all that they draw and show."""
    names = one.keys() - {"weight"}
    assert names == other.keys() - {"weight"}
    return all(np.array_equal(one[name], other[name]) for name in names)


def test_a_sample_draws_the_same_whoever_reads_it(open_stream, tmp_path):
    options = ["--random_flip", "--caption_dropout=0.3", "--noise_offset=0.1", "--input_perturbation=0.1"]
    for shard, number in enumerate((5, 4)):
        write_tar(tmp_path / "set" / f"{shard}.tar", make_rows(number, 5 * shard, (48, 40)))
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=1", *options)
    alone, shared = {}, {}
    for num_streams, found in ((1, alone), (3, shared)):
        for stream in range(num_streams):
            for sample in take(images, stream, num_streams, 27 // num_streams):
                found[sample["epoch"], sample["shard"], sample["row"]] = sample
    assert len(alone) == len(shared) == 27
    both = alone.keys() & shared.keys()
    assert {key for key in alone if key[0] < 2} <= both
    assert all(same_sample(alone[key], shared[key]) for key in both)


def test_a_sample_draws_by_seed_epoch_shard_and_row(open_stream, tmp_path):
    """The numbers come from the definition alone: a generator by (seed, 0, epoch, shard, row)."""
    images, _, _ = open_stream(write_shards(tmp_path / "set", "tar", [3, 3]), "--seed=7", "--train_batch_size=1")
    for sample in take(images, 0, 1, 8):
        generator = np.random.default_rng((7, 0, sample["epoch"], sample["shard"], sample["row"]))
        generator.random(5)
        assert sample["timestep"] == generator.integers(1000)
        normal = generator.standard_normal((3, *sample["noise"].shape), np.float32)
        assert np.array_equal(sample["posterior_noise"], normal[0])
        assert np.array_equal(sample["noise"], normal[1])
        picture = np.array(make_image(3 * sample["shard"] + sample["row"])).transpose(2, 0, 1)
        assert np.array_equal(sample["pixel_values"], picture)


def loaded(images, num_workers, number, step=0, rank=0, num_ranks=2, passes=2, **options):
    """(epoch, shard, row) of so many batches, as a process loads them with workers from a step on."""
    args = parse("--train_batch_size=2", f"--gradient_accumulation_steps={passes}")
    stream = stream_from(images, args, rank, num_ranks, 2, step)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers, **options)
    batches = itertools.islice(without_left_out(loader, LeftOut()), number)
    return [list(zip(*(batch[name].tolist() for name in ("epoch", "shard", "row")))) for batch in batches]


@pytest.mark.parametrize("kind, numbers", [("tar", [9, 4, 8]), ("parquet", [12, 9])])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_stream_goes_on_without_repeat_or_gap(open_stream, tmp_path, kind, numbers, num_workers):
    """Stopped after six batches of two, after seven, when another worker has its turn, and in the second epoch: of 21
    rows four workers of two processes have five or six each."""
    images, _, _ = open_stream(write_shards(tmp_path / "set", kind, numbers), "--shuffle_buffer_size=3")
    read = []
    for rank in range(2):
        whole = loaded(images, num_workers, 14, rank=rank)
        assert loaded(images, num_workers, 8, step=3, rank=rank) == whole[6:]
        assert loaded(images, num_workers, 4, step=5, rank=rank) == whole[10:]
        assert loaded(images, num_workers, 7, step=7, rank=rank, passes=1) == whole[7:]
        read += [key for batch in whole for key in batch]
    first_epoch = [key[1:] for key in read if key[0] == 0]
    assert len(first_epoch) == len(set(first_epoch)) == sum(numbers)


@pytest.mark.slow
def test_a_stream_goes_on_in_workers_that_are_spawned(open_stream, tmp_path):
    images, _, _ = open_stream(write_shards(tmp_path / "set", "tar", [9, 4]))
    assert pickle.loads(pickle.dumps(images)).shard_names == ["00000.tar", "00001.tar"]
    spawned = loaded(images, 2, 3, step=1, multiprocessing_context="spawn")
    assert spawned == loaded(images, 2, 3, step=1)


def test_what_is_read_again_is_not_decoded(open_stream, tmp_path, monkeypatch):
    images, _, _ = open_stream(write_shards(tmp_path / "set", "tar", [7, 6]), "--train_batch_size=2")
    opened = []
    monkeypatch.setattr(type(images.samples), "fit", lambda self, *what: opened.append(what) or make_image(1))
    whole = [(sample["shard"], sample["row"]) for sample in take(images, 0, 1, 12)]
    assert len(opened) == 24
    rest = [(sample["shard"], sample["row"]) for sample in take(images, 0, 1, 2, skipped=10)]
    assert rest == whole[20:]
    assert len(opened) == 24 + 4


def test_whole_epochs_are_counted_once_and_not_read_again(open_stream, tmp_path, monkeypatch):
    images, _, _ = open_stream(write_shards(tmp_path / "set", "tar", [7, 6]), "--train_batch_size=13")
    read = []
    of_shard = type(images).read_rows
    monkeypatch.setattr(type(images), "read_rows", lambda self, shard: read.append(shard) or of_shard(self, shard))
    samples = take(images, 0, 1, 1, skipped=50)
    assert {sample["epoch"] for sample in samples} == {50}
    assert len(read) == 4  # each shard in the first epoch and in the last one


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_empty_shard_of_the_hub_is_left_out_and_named(open_stream, tmp_path, fake_hub, monkeypatch, capsys, kind):
    folder = write_shards(tmp_path / "set", kind, [0, 4, 0, 3])
    files = {f"data/train-{path.name}": path.read_bytes() for path in folder.iterdir()}
    fake_hub.add_repo(f"{USER}/shards", files, "dataset")
    with reaching(fake_hub, monkeypatch):
        images, _, _ = open_stream(f"{USER}/shards")
        assert set(keys_of(images, 0, 1, 2)[1]) == all_keys([0, 4, 0, 3])
    error = capsys.readouterr().err
    assert [error.count(f"\nLeft out: data/train-0000{shard}.{kind}: is empty\n") for shard in range(4)] == [
        1,
        0,
        1,
        0,
    ]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_empty_shard_is_no_shard_and_a_broken_one_is_named(open_stream, tmp_path, capsys, kind):
    """Wherever it is: one huge shard and several empty ones are shared row by row."""
    folder = write_shards(tmp_path / "set", kind, [0, 6, 0])
    (folder / f"none.{kind}").write_bytes(b"")
    images, _, _ = open_stream(folder)
    assert f"Left out of {folder}: 3 empty shards, such as 00000.{kind}, 00002." in capsys.readouterr().out
    assert images.shard_names == [f"00001.{kind}"]
    shares = [keys_of(images, stream, 2, 1)[0] for stream in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    (folder / f"none.{kind}").write_bytes(b"some text" * 100)
    with pytest.raises(InputError, match=rf"set: shards are broken; mend or remove these\n  none.{kind}: "):
        open_stream(folder)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_dataset_of_the_hub_is_streamed(open_stream, tmp_path, fake_hub, monkeypatch, kind):
    folder = write_shards(tmp_path / "set", kind, [4, 3])
    files = {f"data/train-{path.name}": path.read_bytes() for path in folder.iterdir()}
    fake_hub.add_repo(f"{USER}/shards", files, "dataset")
    with reaching(fake_hub, monkeypatch):
        images, held_out, fingerprint = open_stream(f"{USER}/shards", "--num_validation_samples=1")
        assert images.shard_names == [f"data/train-00000.{kind}", f"data/train-00001.{kind}"]
        assert set(keys_of(images, 0, 1, 1)[0]) == all_keys([4, 3]) - {(0, 0)}
        assert list(held_out.rows["captions"]) == [[caption_of(0)]]
        assert open_stream(f"{USER}/shards", "--num_validation_samples=1")[2] == fingerprint
    assert images.num_rows == {0: 3, 1: 3}


# ------------------------------------------------------------------------------------------- held-out and bad rows
def test_the_first_rows_are_held_out(open_stream, tmp_path):
    images, held_out, _ = open_stream(write_shards(tmp_path / "set", "tar", [3, 4]), "--num_validation_samples=5")
    assert [text for (text,) in held_out.rows["captions"]] == [caption_of(index) for index in range(5)]
    assert np.array_equal(held_out[0, 4, 1.0]["pixel_values"], np.array(make_image(4)).transpose(2, 0, 1))
    assert set(keys_of(images, 0, 1, 1)[0]) == {(1, 2), (1, 3)}
    assert set(keys_of(images, 0, 1, 2)[1]) == {(1, 2), (1, 3)}
    _, none, _ = open_stream(tmp_path / "set")
    assert len(none) == 0
    with pytest.raises(InputError, match="--num_validation_samples=7: must leave some of 7 images"):
        open_stream(tmp_path / "set", "--num_validation_samples=7")


def write_bad_shards(folder):
    """Two shards with eight good rows and one of each defect among them; returns what is told of these."""
    rows, more = make_rows(4), make_rows(4, 4)
    large = encoded(make_image(50, (256, 256)), "jpg", quality=95)
    rows.insert(1, (large[: len(large) // 2], "cut.png", "half of a picture"))
    rows.insert(3, (b"This is a note.", "note.png", "no picture"))
    more.insert(2, (encoded(make_image(52, (100, 3))), "small.png", "an icon"))
    more.insert(4, (encoded(make_image(53)), "silent.png", "  "))
    write_tar(folder / "a.tar", rows)
    write_tar(folder / "b.tar", more)
    return {
        "a.tar: cut.png: cannot be read: image file is truncated",
        "a.tar: note.png: no image that Pillow knows",
        "b.tar: small.png: 100 x 3 pixels; a side needs at least 16",
        "b.tar: silent.png: has no caption in a .txt or .json beside it",
    }


def test_bad_rows_are_left_out_and_named(open_stream, tmp_path, capsys):
    told = write_bad_shards(tmp_path / "set")
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=3")
    left_out, keys, told_now = LeftOut(), [], set()
    for samples, problems in itertools.islice(images.batches(0, 1), 8):  # two epochs of twelve rows
        left_out.note(problems)
        told_now |= {": ".join(problem) for problem in problems}
        good = [sample for sample in samples if sample["weight"]]
        assert sum(sample["weight"] for sample in good) == pytest.approx(1, abs=1e-6)
        assert len(good) + len(problems) == 3
        keys += [(sample["epoch"], sample["shard"], sample["row"]) for sample in good]
    assert len(keys) == len(set(keys)) == 16
    assert {line.split(" (")[0] for line in told_now} == told
    assert capsys.readouterr().err.count("Left out: ") == 4
    left_out.tell("Rank 1: ")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["", "Rank 1: Left out of the stream, 8 times in all epochs:"]
    assert sorted(lines[2:]) == summed_up(told, 2)


def summed_up(told, number):
    """The lines at the end of a run that left out each of these so many times."""
    parts = [line.split(": ", 2) for line in told]
    return sorted(f"  {shard}: {number} x {reason}: {name}" for shard, name, reason in parts)


def test_bad_samples_of_a_messy_tar_are_left_out_and_the_others_used(open_stream, tmp_path):
    """Each by itself, by its name, whatever else its shard holds; samples do not have to be alike."""
    told = write_messy_tar(tmp_path / "set" / "mess.tar")
    told["0.png"] = "has no caption in a .txt or .json beside it"
    write_tar(tmp_path / "set" / "other.tar", make_rows(1))
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=8", "--caption_dropout=0")
    ((samples, problems),) = itertools.islice(images.batches(0, 1), 1)
    assert sorted(problems) == [("mess.tar", name, problem) for name, problem in sorted(told.items())]
    assert {(sample["shard"], sample["row"]) for sample in samples} == {(0, 1), (0, 5), (1, 0)}
    pixels = {sample["row"]: sample["pixel_values"] for sample in samples if sample["shard"] == 0}
    assert np.array_equal(pixels[1], pixels[5])
    assert abs(pixels[1].astype(int) - np.array(make_image(1)).transpose(2, 0, 1)).mean() < 8  # a JPEG
    with pytest.raises(InputError, match=r"cannot be streamed; .*a column 'alt', but png, pth, jpg, txt, json"):
        open_stream(tmp_path / "set", "--caption_column=alt")


def test_captions_that_are_numbers_are_told_as_such(open_stream, tmp_path):
    """Among those held out, too."""
    table = {"image": [{"bytes": content, "path": None} for content, _, _ in make_rows(3)], "text": [3, 4, 5]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "set" / "a.parquet"))
    told = "the caption is a number ({}), not text; name another --caption_column"
    with pytest.raises(InputError) as caught:
        open_stream(tmp_path / "set", "--num_validation_samples=2")
    lines = [f"  a.parquet: row {row}: {told.format(row + 3)}" for row in range(2)]
    remedy = "Mend or remove them, or use a larger --num_validation_samples."
    assert str(caught.value).splitlines() == ["2 of 2 images are unusable:", *lines, remedy]
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=3")
    ((_, problems),) = itertools.islice(images.batches(0, 1), 1)
    assert sorted(problems) == [("a.parquet", f"row {row}", told.format(row + 3)) for row in range(3)]


def test_what_is_left_out_of_those_held_out_is_told(open_stream, tmp_path, capsys):
    write_tar(tmp_path / "set" / "a.tar", [(b"note", "n.png", "words"), *make_rows(3)])
    _, held_out, _ = open_stream(tmp_path / "set", "--num_validation_samples=2")
    assert [text for (text,) in held_out.rows["captions"]] == [caption_of(0)]
    told = "Left out of what is held out: 1 of 2 images is unusable:\n  a.tar: n.png: no image that Pillow knows\n"
    assert told in capsys.readouterr().out


def test_a_hundred_of_those_left_out_are_named_at_once_and_all_summed_up(capsys):
    """In at most twelve lines, by shard and reason, what came most often first; numbers in brackets are no reason."""
    left_out = LeftOut()
    left_out.tell()
    assert capsys.readouterr().err == ""
    left_out.note([("a.tar", f"{number}.png", f"no image ({number} bytes)") for number in range(130)])
    error = capsys.readouterr().err
    assert error.count("\nLeft out: a.tar: ") == 100
    assert error.endswith("Left out: what comes from now on is told at the end alone\n")
    left_out.note([("b.tar", "one.png", "no caption")])
    left_out.tell()
    assert capsys.readouterr().err == (
        "\nLeft out of the stream, 131 times in all epochs:\n  a.tar: 130 x no image: 0.png\n"
        "  b.tar: one.png: no caption\n"
    )
    left_out.note([(f"{number}.tar", "one.png", "no caption") for number in range(40)])
    left_out.tell()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 12
    assert lines[-1] == "  and 32 more"


def test_a_pass_of_bad_rows_has_no_weight(open_stream, tmp_path):
    write_bad_shards(tmp_path / "set")
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=1")
    weights = [sample["weight"] for sample in take(images, 0, 1, 12)]
    assert sorted(weights) == [0] * 4 + [1] * 8
    blank = [sample for sample in take(images, 0, 1, 12) if not sample["weight"]]
    assert all((sample["pixel_values"] == 255).all() for sample in blank)


def test_a_bad_shard_ends_no_stream_that_gets_others_later(open_stream, tmp_path):
    """Here each of four streams has a whole shard an epoch, and one of the shards is bad throughout."""
    write_tar(tmp_path / "set" / "a.tar", [(b"note", f"{number}.png", "words") for number in range(2)])
    for number, name in enumerate("bcd"):
        write_tar(tmp_path / "set" / f"{name}.tar", make_rows(2, 2 * number))
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=1")
    for stream in range(4):
        shards = [(sample["shard"], bool(sample["weight"])) for sample in take(images, stream, 4, 40)]
        assert {shard for shard, _ in shards} == {0, 1, 2, 3}
        assert all(is_good == (shard != 0) for shard, is_good in shards)


def test_a_stream_without_a_good_row_ends(open_stream, tmp_path):
    write_tar(tmp_path / "set" / "a.tar", [(b"note", f"{number}.png", "words") for number in range(3)])
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=4")
    told = (
        r"^shards in none of which an image can be used \((a.tar: \d.png: no image that Pillow knows(; )?){3}\); mend "
        "or remove these, or name other columns by --image_column and --caption_column$"
    )
    with pytest.raises(InputError, match=told):
        take(images, 0, 1, 1)  # which has the first row of the second epoch
    with pytest.raises(InputError, match=r"^shards in none of which an image can be used"):
        take(images, 1, 2, 1)
    write_tar(tmp_path / "set" / "a.tar", [(b"note", f"{number}.png", "words") for number in range(1100)])
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=4")
    with pytest.raises(InputError, match=r"1,000 rows one after the other cannot be used; .*no image that Pillow"):
        take(images, 0, 1, 1000)


def test_an_epoch_with_a_good_row_goes_on(open_stream, tmp_path):
    """Also where a resume begins behind that."""
    write_tar(
        tmp_path / "set" / "a.tar", [*make_rows(1), *[(b"note", f"n{number}.png", "words") for number in (1, 2)]]
    )
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=1", "--shuffle_buffer_size=1")
    assert [sample["weight"] for sample in take(images, 0, 1, 7)] == [1, 0, 0, 1, 0, 0, 1]
    assert [sample["weight"] for sample in take(images, 0, 1, 5, skipped=1)] == [0, 0, 1, 0, 0]


def test_a_shard_that_breaks_off_is_named(open_stream, tmp_path):
    folder = write_shards(tmp_path / "set", "tar", [6, 6])
    content = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(content[: len(content) // 2 + 700])
    images, _, _ = open_stream(folder)
    with pytest.raises(InputError, match=r"^00001.tar: cannot be read beyond row \d"):
        keys_of(images, 0, 1, 1)


def test_more_workers_than_rows_are_refused(open_stream, tmp_path):
    images, _, _ = open_stream(write_shards(tmp_path / "set", "tar", [3]))
    with pytest.raises(InputError, match="fewer images than workers of all processes, 4; use a smaller --dataloader"):
        keys_of(images, 3, 4, 1)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_stream_without_a_row_in_an_epoch_goes_on_to_the_next(open_stream, tmp_path, kind):
    """Of two streams one has the shard with images in an epoch, and the other one in another; wherever it goes on."""
    images, _, _ = open_stream(write_shards(tmp_path / "set", kind, [6, 1, 1]), "--num_validation_samples=0")
    images.num_held_out = {1: 1, 2: 1}  # they are empty so, and not known to be
    shares = [keys_of(images, stream, 3, 12) for stream in range(3)]
    for epoch in range(12):
        assert sorted(len(share[epoch]) for share in shares) == [0, 0, 6]
        assert {key for share in shares for key in share[epoch]} == {(0, row) for row in range(6)}
    for stream in range(3):
        images.num_rows.clear()
        whole = [(epoch, row.index) for epoch, row in itertools.islice(images.rows(stream, 3, 0), 20)]
        for num_done in (0, 1, 6, 7, 12, 14):
            rest = [(epoch, row.index) for epoch, row in itertools.islice(images.rows(stream, 3, num_done), 4)]
            assert rest == whole[num_done : num_done + 4]
    images.num_held_out[0] = 6
    with pytest.raises(InputError, match="there are no images in its shards; name another"):
        next(images.rows(0, 3, 0))


def test_the_fingerprint_is_of_names_and_contents(open_stream, tmp_path):
    folder = write_shards(tmp_path / "set", "tar", [3, 3])
    first = open_stream(folder)[2]
    assert open_stream(folder)[2] == first
    assert open_stream(folder, "--num_validation_samples=1")[2] != first
    moved = folder.rename(tmp_path / "moved")
    assert open_stream(moved)[2] == first
    for rows in (make_rows(30, 3), [(content, name, "other words") for content, name, _ in make_rows(3, 3)]):
        write_tar(moved / "00001.tar", rows)
        changed = open_stream(moved)[2]
        assert [name for name in first if changed[name] != first[name]] == ["00001.tar"]
    assert (moved / "00001.tar").stat().st_size == (moved / "00000.tar").stat().st_size  # as it was


def test_a_changed_file_is_named_on_resume_and_may_be_gone_on_with(fit, tmp_path, settings, capsys):
    """As after mending a shard: it has its size from before, and the columns are others."""
    assert fit(tmp_path / "run", max_train_steps=2) == 0
    shard = settings["dataset_name"] / "00001.tar"
    size = shard.stat().st_size
    write_tar(shard, make_rows(6, 27))
    assert shard.stat().st_size == size
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    assert fit(tmp_path / "run", **resumed) == 2
    error = capsys.readouterr().err
    assert "use those, or add --allow_changed_resume" in " ".join(error.split())
    assert "\n  captioned_images: other images or captions now than there: 00001.tar\n" in error
    assert fit(tmp_path / "run", **resumed, caption_column="txt") == 2
    assert (
        "\n  captioned_images: other images or captions now than there: --caption_column, 00001.tar\n"
        in capsys.readouterr().err
    )
    assert fit(tmp_path / "run", **resumed, allow_changed_resume=True) == 0
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_goes_on_after_a_broken_shard_was_mended(fit, tmp_path, settings, capsys, num_workers):
    """As told: it ends with a checkpoint where the shard breaks off, and is then what it would have been without."""
    settings |= {"shuffle_buffer_size": 1, "num_validation_samples": 0, "dataloader_num_workers": num_workers}
    assert fit(tmp_path / "whole", **settings) == 0
    shard = settings["dataset_name"] / "00001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2 + 700])
    assert fit(tmp_path / "parts", **settings) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(r"Stopped after step [1-3] by 00001.tar: cannot be read beyond row \d \(unexpected end of", error)
    shard.write_bytes(content)
    assert fit(tmp_path / "parts", resume_from_checkpoint="latest", **settings) == 2
    assert "captioned_images: other images or captions now than there: 00001.tar" in capsys.readouterr().err
    resumed = {"resume_from_checkpoint": "latest", "allow_changed_resume": True}
    assert fit(tmp_path / "parts", **resumed, **settings) == 0
    assert same(unet(tmp_path / "parts"), unet(tmp_path / "whole"))


def resident_bytes():
    """The memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="is read where Linux tells it")
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_memory_stays_as_it_is_over_20000_samples(open_stream, tmp_path, kind):
    """Measured when the buffer has been full for a while, and again 27 MB of images later."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), np.uint8)
    contents = [encoded(Image.fromarray(pixels)) for pixels in noise]
    write = write_tar if kind == "tar" else write_parquet
    for shard in range(10):
        rows = [(contents[row % 40], f"{row:05d}.png", f"a picture of number {row}") for row in range(2000)]
        write(tmp_path / "set" / f"{shard}.{kind}", rows)
    images, _, _ = open_stream(tmp_path / "set", "--train_batch_size=50", "--shuffle_buffer_size=500")
    used, keys = {}, set()
    for number, (samples, left_out) in enumerate(itertools.islice(images.batches(0, 1), 400), 1):
        assert not left_out
        keys |= {(sample["shard"], sample["row"]) for sample in samples}
        if number in (100, 400):
            used[number] = resident_bytes()
    assert len(keys) == 20000
    assert used[400] - used[100] < 8e6


# ---------------------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_streamed_is_refused_at_once(tmp_path):
    args = parse(
        "--streaming",
        "--max_train_samples=3",
        "--aspect_ratio_buckets",
        "--cache_latents",
        "--cache_text_embeddings",
        "--num_train_epochs=2",
        "--validation_epochs=1",
        "--skip_bad_images",
    )
    assert check_streaming(args) == [
        "--streaming=True: reads a dataset; give --dataset_name, or drop this",
        "--streaming=True: nobody knows how many images there are; give --max_train_steps",
        "--num_train_epochs=2: cannot be with --streaming; use --max_train_steps instead",
        "--validation_epochs=1: cannot be with --streaming; use --validation_steps instead",
        "--max_train_samples=3: cannot be with --streaming, which would have to read all to draw some; name fewer "
        "files, or drop one",
        "--skip_bad_images=True: a stream leaves unusable images out anyway; drop this",
        "--aspect_ratio_buckets=True: cannot be with --streaming, which does not know the shapes of its images; drop "
        "one",
        "--cache_latents=True: cannot be with --streaming, whose images do not stay; drop one",
        "--cache_text_embeddings=True: cannot be with --streaming, whose captions do not stay; drop one",
    ]
    assert check_streaming(parse("--streaming", "--dataset_name=some", "--max_train_steps=2")) == []
    assert check_streaming(parse("--max_train_samples=3")) == []


def test_what_is_no_stream_is_named(open_stream, image_folder, tmp_path):
    with pytest.raises(InputError, match="images: holds pictures, which are read without --streaming; drop that"):
        open_stream(image_folder(2))
    write_parquet(tmp_path / "set" / "a.parquet", make_rows(2))
    with pytest.raises(InputError, match=r"set: cannot be streamed; .*there is no column 'words', but image, text"):
        open_stream(tmp_path / "set", "--caption_column=words")
    with pytest.raises(InputError, match="nothing: cannot be streamed; check it, --dataset_config_name"):
        open_stream("nobody/nothing")


def test_rows_that_name_files_are_refused(open_stream, tmp_path):
    write_parquet(tmp_path / "set" / "a.parquet", [(None, "/etc/hostname", "words")] * 3)
    with pytest.raises(InputError, match=r"its rows name files \(/etc/hostname\) instead of holding images"):
        open_stream(tmp_path / "set")
    write_parquet(tmp_path / "mixed" / "a.parquet", [*make_rows(2), (None, "/etc/hostname", "words")])
    images, _, _ = open_stream(tmp_path / "mixed", "--train_batch_size=3")
    ((_, problems),) = itertools.islice(images.batches(0, 1), 1)
    assert problems == [
        ("a.parquet", "/etc/hostname", "the row names a file (/etc/hostname), and does not hold the image")
    ]


def test_steps_of_a_stream_are_all_whole():
    counts = count_stream_steps(parse("--train_batch_size=3", "--gradient_accumulation_steps=2", *FLAGS), 2)
    assert list(step_sizes(counts, 0, 1)) == [(12, 2)] * 3
    args = parse("--streaming", "--train_batch_size=3", "--gradient_accumulation_steps=2")
    assert split_of_stream(args, 2, 0, 3) == split_of_stream(args, 2, 1, 3)
    assert split_of_stream(parse(), 2, 0, 3) is None


# --------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture
def settings(tmp_path):
    """Flags of a run on two shards of thirteen images, of which two are held out."""
    folder = tmp_path / "set"
    if not folder.exists():
        write_shards(folder, "tar", [7, 6])
    return {
        "dataset_name": folder,
        "streaming": True,
        "num_validation_samples": 2,
        "shuffle_buffer_size": 4,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 8,  # almost three epochs
        "checkpointing_steps": 1,
        "cache_dir": tmp_path / "cache",
        "random_flip": True,
        "use_ema": True,
    }


@pytest.fixture
def fit(train_script, tiny_pipeline, settings):
    """Trains on the stream into a folder, with more settings, and returns the exit status."""
    run = trains_into(train_script, tiny_pipeline, None)
    return lambda output_dir, **more: run(output_dir, **{**settings, **more})


def test_a_run_that_was_stopped_ends_in_the_same_bits(fit, tmp_path, capsys):
    assert fit(tmp_path / "whole") == 0
    told = capsys.readouterr().out
    assert "images     streamed, their number is not known, 2 held out, at 32 x 32 pixels" in told
    assert "stream     2 shards for 1 process x 1 worker, buffers of 4 rows; unusable images are left out" in told
    assert "steps      0 to 8\n" in told
    assert fit(tmp_path / "parts", max_train_steps=3) == 0
    assert fit(tmp_path / "parts", max_train_steps=5, resume_from_checkpoint="latest") == 0
    assert "The stream is read again, and not decoded, up to step 3.\n" in capsys.readouterr().out
    assert fit(tmp_path / "parts", resume_from_checkpoint="latest", dataloader_num_workers=1) == 0
    assert same(unet(tmp_path / "parts"), unet(tmp_path / "whole"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for step in (4, 8):
        states = [checkpoint_state(tmp_path / name / f"checkpoint-{step}") for name in ("parts", "whole")]
        assert same(*states)


@pytest.mark.slow
def test_a_run_with_workers_that_was_killed_ends_in_the_same_bits(
    fit, train_script, tiny_pipeline, settings, tmp_path
):
    settings["dataloader_num_workers"] = 2
    assert fit(tmp_path / "whole", **settings) == 0
    line = words(tiny_pipeline, None, tmp_path / "killed", **settings)
    copy = start_copy(train_script, line, tmp_path / "said")
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoint-3" / "progress.json").exists():
        assert copy.is_alive(), (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    copy.kill()
    assert end_of(copy) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model_index.json").exists()
    assert fit(tmp_path / "killed", resume_from_checkpoint="latest", **settings) == 0
    assert same(unet(tmp_path / "killed"), unet(tmp_path / "whole"))


def test_a_resume_that_would_go_on_elsewhere_is_refused(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", max_train_steps=2) == 0
    capsys.readouterr()
    for changed, told in (
        ({"dataloader_num_workers": 2}, "1 processes x 2 workers, a buffer of 4 rows now"),
        ({"shuffle_buffer_size": 5}, "1 processes x 1 workers, a buffer of 5 rows now"),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 4}, "1 a pass x 4 passes x"),
        ({"streaming": None, "shuffle_buffer_size": None}, "stream: 2 a pass x 2 passes x 1 processes"),
    ):
        resumed = {"resume_from_checkpoint": "latest", "allow_changed_resume": True, **changed}
        assert fit(tmp_path / "run", **resumed) == 2
        error = capsys.readouterr().err
        assert "was made under other settings; use those\n" in error
        assert told in error


def test_flags_that_a_stream_cannot_have_end_a_run_before_it_starts(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", max_train_steps=None, max_train_samples=3, cache_latents=True) == 2
    error = capsys.readouterr().err
    for told in ("give --max_train_steps", "--max_train_samples=3: cannot be", "--cache_latents=True: cannot be with"):
        assert told in error
    assert fit(tmp_path / "run", streaming=None) == 2
    assert (
        "--shuffle_buffer_size=4: does nothing without --streaming; add that or drop this" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_takes_two_steps_of_a_stream(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", dry_run=True) == 0
    assert re.search(r"time       \S+ s per step, \S+ images/s; 8 steps take", capsys.readouterr().out)
    assert not (tmp_path / "run").exists()


def test_a_run_lists_what_it_left_out(fit, tmp_path, capsys):
    told = write_bad_shards(tmp_path / "bad")
    assert fit(tmp_path / "run", dataset_name=tmp_path / "bad", num_validation_samples=0) == 0
    error = capsys.readouterr().err
    assert error.count("\nLeft out: ") == 4
    _, total, listed = re.split(r"Left out of the stream, (\d+) times in all epochs:\n", error)
    listed = listed.splitlines()[:4]
    counted = [re.fullmatch(r"  (\S+): (\d) x (.+): (\S+)", line).groups() for line in listed]
    assert {f"{shard}: {name}: {reason}" for shard, _, reason, name in counted} == told
    assert sum(int(number) for _, number, _, _ in counted) == int(total) >= 8  # of two epochs and 8 rows more
    assert all(loss > 0 for loss in losses(tmp_path / "run"))


SINGLE = {"train_batch_size": 1, "shuffle_buffer_size": 1, "num_validation_samples": 0, "report_to": "none"}


@pytest.mark.parametrize("case", [{}, {"full_bf16": True, "mixed_precision": "bf16", "max_grad_norm": "inf"}])
def test_a_step_of_which_nothing_has_weight_changes_nothing(fit, tiny_pipeline, tmp_path, capsys, case):
    """No decay of weights or moments, and no average, of two bad rows among good ones."""
    rows = [(b"note", f"n{number}.png", "words") for number in range(2)]
    write_tar(tmp_path / "bad" / "a.tar", [*rows[:1], *make_rows(2), *rows[1:], *make_rows(1, 2)])
    settings = {**SINGLE, "dataset_name": tmp_path / "bad", "adam_weight_decay": 0.9, **case, "learning_rate": 1e-3}
    settings |= {"gradient_accumulation_steps": 1, "logging_steps": 1, "max_train_steps": 1}
    assert fit(tmp_path / "first", **settings) == 0
    before = {name: weight.to(torch.bfloat16 if case else torch.float32) for name, weight in unet_of(tiny_pipeline)}
    assert all(
        torch.equal(weight.to(before[name].dtype), before[name]) for name, weight in unet_of(tmp_path / "first")
    )
    assert losses(tmp_path / "first") == [None]
    assert "Step 1: of its images none can be used; passed over." in capsys.readouterr().out
    assert fit(tmp_path / "more", **{**settings, "max_train_steps": 4}) == 0
    assert [loss is None for loss in losses(tmp_path / "more")] == [True, False, False, True]
    third, fourth = (tmp_path / "more" / f"checkpoint-{step}" for step in (3, 4))
    states = [checkpoint_state(folder) for folder in (third, fourth)]
    assert states[0].keys() == states[1].keys()
    assert all(same(state, states[1][name]) for name, state in states[0].items() if name != "progress")
    assert not same(dict(unet_of(third)), dict(unet_of(tmp_path / "first")))


def unet_of(folder):
    """The weights of the UNet in a pipeline or a checkpoint, by name."""
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items()


def test_a_pass_without_weight_leaves_the_logged_loss_alone(fit, tmp_path):
    """The second pass is of a row that cannot be used: the loss is that of the first one alone."""
    write_tar(tmp_path / "half" / "a.tar", [*make_rows(1), (b"note", "note.png", "words"), *make_rows(2, 1)])
    settings = {**SINGLE, "dataset_name": tmp_path / "half", "max_train_steps": 1}
    assert fit(tmp_path / "half_run", **settings, gradient_accumulation_steps=2) == 0
    assert fit(tmp_path / "one_run", **settings, gradient_accumulation_steps=1) == 0
    (loss,) = losses(tmp_path / "one_run")
    assert losses(tmp_path / "half_run") == [pytest.approx(loss, rel=1e-6)]
    assert loss > 0.1


def test_a_run_without_a_usable_image_ends_and_writes_no_model(fit, tmp_path, capsys):
    write_tar(tmp_path / "bad" / "a.tar", [(b"note", f"{number}.png", "words") for number in range(3)])
    assert fit(tmp_path / "run", dataset_name=tmp_path / "bad", num_validation_samples=0) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "Stopped after step 0 by shards in none of which an image can be used (a.tar: " in error
    assert not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_adapters_are_trained_on_a_stream(tiny_pipeline, settings, tmp_path, kind):
    """Stopped and not; their file does not say how many images there were, which nobody knows."""
    script = load_script(TRAIN_TEXT_TO_IMAGE_LORA)
    folder = write_shards(tmp_path / "more", kind, [7, 6])
    settings |= {"dataset_name": folder, "use_ema": None, "output_kohya_format": True, "max_train_steps": 5}
    fit = trains_into(script, tiny_pipeline, None)
    assert fit(tmp_path / "whole", **settings) == 0
    assert fit(tmp_path / "parts", **{**settings, "max_train_steps": 3}) == 0
    assert fit(tmp_path / "parts", resume_from_checkpoint="latest", **settings) == 0
    name = "pytorch_lora_weights.safetensors"
    assert same(load_file(tmp_path / "parts" / name), load_file(tmp_path / "whole" / name))
    with safe_open(tmp_path / "whole" / "whole.safetensors", "pt") as file:
        assert "ss_num_train_images" not in file.metadata()
        assert file.metadata()["ss_steps"] == "5"


def run_ranks(script, base, output_dir, settings, said, **more):
    """Trains with two processes; returns their exit statuses."""
    return run_copies(script, words(base, None, output_dir, **{**settings, **more}), said)


@pytest.mark.slow
def test_two_processes_with_two_workers_share_a_stream(train_script, tiny_pipeline, settings, tmp_path):
    """Three tar shards of 21 images, three of which are held out: 18 for four workers, each stopped in its second
    epoch. What each process reads stands in the test of the loader above."""
    write_shards(tmp_path / "more", "tar", [7, 6, 8])
    settings |= {"dataset_name": tmp_path / "more", "num_validation_samples": 3, "dataloader_num_workers": 2}
    ranks = (train_script, tiny_pipeline)
    assert run_ranks(*ranks, tmp_path / "whole", settings, tmp_path / "said") == [0, 0]
    assert run_ranks(*ranks, tmp_path / "parts", settings, tmp_path / "said", max_train_steps=3) == [0, 0]
    resumed = {"resume_from_checkpoint": "latest"}
    assert run_ranks(*ranks, tmp_path / "parts", settings, tmp_path / "said", **resumed) == [0, 0]
    assert same(unet(tmp_path / "parts"), unet(tmp_path / "whole"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # One process alone would go on somewhere else.
    assert train(*ranks, None, tmp_path / "parts", **settings, resume_from_checkpoint="latest") == 2
