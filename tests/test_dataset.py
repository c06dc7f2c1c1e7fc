"""Images and captions are read as they were written, and what cannot be used is named before a model loads."""

import json
import os
import re

import datasets
import numpy as np
import pytest
from image_data import caption_of, encoded, make_image, snapshot, write_metadata
from running import run_script
from tiny import make_tokenizer
from training import parse

from sdtune.dataset import (
    check_data,
    check_rows,
    load_data,
    read_dataset,
    read_folder,
)
from sdtune.errors import InputError
from sdtune.images import open_image

RESOLUTION = 32

# ----------------------------------------------------------------------------------------------------- reading data


def as_dict(rows):
    """{file name: captions} of what read_folder returns; the tokenizer makes no difference between blanks."""
    captions = [[" ".join(caption.split()) for caption in row["captions"]] for row in rows]
    return dict(zip([os.path.basename(row["image"]["path"]) for row in rows], captions))


def write_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(number).save(folder / name)
    return folder


def test_read_folder_with_jsonl(image_folder):
    captions = ["a red circle", ["one", "two"], "two words", "one"]
    rows = read_folder(image_folder(4, captions=captions), "text")
    assert as_dict(rows) == {
        "00.png": ["a red circle"],
        "01.png": ["one", "two"],
        "02.png": ["two words"],
        "03.png": ["one"],
    }
    assert all(row["image"]["bytes"] is None for row in rows)


def test_read_folder_with_csv(tmp_path):
    folder = write_images(tmp_path / "images", "a.png", "b.jpg")
    (folder / "metadata.csv").write_text('file_name,note\na.png,"red, with a comma"\nb.jpg,blue\n')
    assert as_dict(read_folder(folder, "note")) == {"a.png": ["red, with a comma"], "b.jpg": ["blue"]}


def test_read_folder_with_text_files(tmp_path):
    folder = write_images(tmp_path / "images", "a.png", "B.JPG", "c.webp")
    (folder / "a.txt").write_text("  a red\n circle \n")
    (folder / "B.txt").write_text("blüe", encoding="utf-8")
    rows = as_dict(read_folder(folder, "text"))
    assert not any(rows.pop("c.webp"))  # a row all the same, so that the check names it
    assert rows == {"a.png": ["a red circle"], "B.JPG": ["blüe"]}


def test_read_folder_goes_into_subfolders(tmp_path):
    folder = write_images(tmp_path / "images", "top.png", "one/a.png", "one/b.png", "two/deep/c.png")
    write_metadata(folder, [{"file_name": "top.png", "text": "top"}, {"file_name": "one/a.png", "text": "from above"}])
    write_metadata(folder / "two", [{"file_name": "deep/c.png", "text": "deep"}])
    (folder / "one" / "b.txt").write_text("beside")
    rows = read_folder(folder, "text")
    assert as_dict(rows) == {"top.png": ["top"], "a.png": ["from above"], "b.png": ["beside"], "c.png": ["deep"]}
    assert all(os.path.exists(row["image"]["path"]) for row in rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_byte_order_mark_is_no_part_of_a_caption_or_column(tmp_path, kind):
    folder = write_images(tmp_path / "images", "a.png")
    text = {"jsonl": '{"file_name": "a.png", "text": "rød"}\n', "csv": "file_name,text\na.png,rød\n", "txt": "rød"}
    (folder / ("a.txt" if kind == "txt" else f"metadata.{kind}")).write_text(text[kind], encoding="utf-8-sig")
    assert as_dict(read_folder(folder, "text")) == {"a.png": ["rød"]}


def test_order_is_that_of_the_paths_wherever_the_metadata_stands(tmp_path):
    folder = write_images(tmp_path / "images", "c.png", "a.png", "b.png")
    write_metadata(folder, [{"file_name": f"{name}.png", "text": name} for name in "bca"])
    assert list(as_dict(read_folder(folder, "text"))) == ["a.png", "b.png", "c.png"]


def test_bad_json_is_named_with_its_row(image_folder):
    folder = image_folder(3)
    path = folder / "metadata.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = '{"file_name": "01.png", "text": '
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        read_folder(folder, "text")
    assert str(path) in str(caught.value)
    assert "row 2 is not" in str(caught.value)


def test_line_ends_of_unicode_inside_of_a_caption_end_no_line(tmp_path):
    folder = write_images(tmp_path / "images", "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": "one\u2028two"}, {"file_name": "b.png", "text": "a\x85b"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
    assert as_dict(read_folder(folder, "text")) == {"a.png": ["one two"], "b.png": ["a b"]}


@pytest.mark.parametrize("line", ['"just a string"', '{"text": "no file name"}', "[1, 2]", "null"])
def test_metadata_of_another_form_is_named(image_folder, line):
    folder = image_folder(2)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="file_name") as caught:
        read_folder(folder, "text")
    assert f"{folder / 'metadata.jsonl'}: row 3 is not" in str(caught.value)


@pytest.mark.parametrize("caption", [5, 0.5, True])
def test_captions_that_are_no_text_are_named(image_folder, caption):
    """The image is left without a caption, which the check reports by its path."""
    rows = read_folder(image_folder(2, captions=["one", caption]), "text")
    assert as_dict(rows) == {"00.png": ["one"], "01.png": []}


def test_rows_of_one_image_are_its_captions(image_folder):
    folder = image_folder(2, captions=["one", "two"])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "00.png", "text": "another"}\n')
    assert as_dict(read_folder(folder, "text")) == {"00.png": ["one", "another"], "01.png": ["two"]}


def test_csv_with_commas_outside_of_quotes_is_refused(image_folder):
    """The cut caption would pass for a whole one."""
    folder = image_folder(2)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n00.png,a cat, sitting\n01.png,a dog\n")
    with pytest.raises(InputError, match=r"metadata\.csv: row 1 .*too many cells"):
        read_folder(folder, "text")


def test_an_open_quote_in_a_csv_is_refused(image_folder):
    """Else one caption takes in all rows that follow."""
    folder = image_folder(2)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\n00.png,"a cat\n01.png,a dog\n')
    with pytest.raises(InputError, match=r"metadata\.csv: row 1 .*unexpected end of data"):
        read_folder(folder, "text")


def test_half_a_character_is_refused(image_folder):
    folder = image_folder(1)
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a cat \\ud83d"}\n')
    with pytest.raises(InputError, match=r"metadata\.jsonl: row 1 .*surrogates not allowed"):
        read_folder(folder, "text")


def test_file_name_in_another_encoding_is_named(image_folder):
    folder = image_folder()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(InputError, match=r"caf.udce9.png'?: its name is not UTF-8; rename it"):
        read_folder(folder, "text")


def test_text_file_in_another_encoding_is_named(image_folder):
    folder = image_folder(1)
    (folder / "metadata.jsonl").unlink()
    (folder / "00.txt").write_bytes("ein Mädchen".encode("latin-1"))
    with pytest.raises(InputError, match=r"00\.txt: cannot be read as UTF-8"):
        read_folder(folder, "text")


def test_folder_is_found_however_it_is_written(image_folder, monkeypatch):
    folder = image_folder(2, captions=["one", "two"])
    monkeypatch.chdir(folder.parent)
    for way in (folder.name, f"../{folder.parent.name}/{folder.name}", f"./{folder.name}/."):
        assert as_dict(read_folder(way, "text")) == {"00.png": ["one"], "01.png": ["two"]}


def test_broken_link_is_a_row_too(image_folder):
    """So that the check names it."""
    folder = image_folder(1)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    assert as_dict(read_folder(folder, "text")) == {"00.png": [caption_of(0)], "gone.png": []}


def test_only_texts_of_a_list_are_captions(image_folder):
    rows = read_folder(image_folder(2, captions=["one", ["two", 3, None, " ", "four"]]), "text")
    assert as_dict(rows) == {"00.png": ["one"], "01.png": ["two", "four"]}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_wrong_caption_column_is_named_with_those_that_are_there(image_folder, kind):
    folder = image_folder(2)
    if kind == "csv":
        (folder / "metadata.jsonl").unlink()
        (folder / "metadata.csv").write_text("file_name,text\n00.png,a\n01.png,b\n")
    with pytest.raises(InputError) as caught:
        read_folder(folder, "prompt")
    message = str(caught.value)
    assert all(word in message for word in (f"metadata.{kind}", "'prompt'", "--caption_column", "text"))


def test_linked_folders_are_said_to_be_left_aside(image_folder, capsys):
    folder = image_folder(2)
    (folder / "more").symlink_to(image_folder(1, name="elsewhere"), target_is_directory=True)
    assert len(read_folder(folder, "text")) == 2
    assert "1 files of other kinds, such as more." in capsys.readouterr().out


def test_a_second_table_may_hold_other_columns_only(image_folder):
    folder = image_folder(2, captions=["one", "two"])
    (folder / "metadata.csv").write_text("file_name,label\n00.png,a\n01.png,b\n")
    assert as_dict(read_folder(folder, "text")) == {"00.png": ["one"], "01.png": ["two"]}


def test_unknown_files_are_said_to_be_left_aside(image_folder, capsys):
    folder = image_folder(2)
    (folder / "notes.docx").write_text("x")
    (folder / "photo.heic").write_bytes(b"x")
    assert len(read_folder(folder, "text")) == 2
    said = capsys.readouterr().out
    assert "2 files" in said
    assert "notes.docx" in said
    assert "photo.heic" in said


def test_nothing_is_said_about_an_ordinary_folder(image_folder, capsys):
    read_folder(image_folder(2), "text")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("there", [True, False])
def test_empty_or_missing_folder(tmp_path, there):
    folder = tmp_path / "images"
    if there:
        folder.mkdir()
        (folder / "note.txt").write_text("no image")
    with pytest.raises(InputError, match="holds no images" if there else "No such file"):
        read_folder(folder, "text")


def make_parquet(folder, num_images=3):
    """A dataset as `push_to_hub` would store it: the images inside of the parquet file."""
    folder.mkdir()
    images = [{"bytes": encoded(make_image(index)), "path": f"{index}.png"} for index in range(num_images)]
    columns = {"picture": images, "words": [caption_of(index) for index in range(num_images)], "n": [0] * num_images}
    features = datasets.Features(picture=datasets.Image(), words=datasets.Value("string"), n=datasets.Value("int64"))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def columns(tmp_path, image_column, caption_column):
    """Flags that name the columns of a dataset, and a folder for what is read of it."""
    return parse(
        f"--image_column={image_column}", f"--caption_column={caption_column}", f"--cache_dir={tmp_path / 'cache'}"
    )


def test_read_dataset_from_parquet(tmp_path):
    folder = make_parquet(tmp_path / "set")
    rows = read_dataset(columns(tmp_path, "picture", "words"), str(folder))
    assert rows.column_names == ["image", "captions"]
    assert rows["captions"][:] == [caption_of(index) for index in range(3)]
    for index, row in enumerate(rows):
        seen = open_image(row["image"]["bytes"])
        assert np.array_equal(np.asarray(seen), np.asarray(make_image(index)))


@pytest.mark.parametrize("image_column, caption_column", [("image", "words"), ("picture", "text")])
def test_read_dataset_names_missing_columns_and_those_that_are_there(tmp_path, image_column, caption_column):
    folder = make_parquet(tmp_path / "set")
    with pytest.raises(InputError) as caught:
        read_dataset(columns(tmp_path, image_column, caption_column), str(folder))
    assert f"--image_column={image_column} and --caption_column={caption_column} (" in str(caught.value)
    assert re.search("columns .*picture.*words.*n", str(caught.value)), str(caught.value)


def test_read_dataset_of_a_local_image_folder_keeps_images_without_caption(messy_folder):
    messy = messy_folder(missing_caption="no_row")
    rows = as_dict(read_dataset(parse(), str(messy.path)))
    assert rows == as_dict(read_folder(messy.path, "text"))
    assert not any(rows["no_caption.png"])
    assert "no_file.png" in rows


def test_read_dataset_that_is_nowhere(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        read_dataset(parse(f"--cache_dir={tmp_path}"), "nobody/nothing")


def save_set(folder, **captions):
    """A dataset as `save_to_disk` stores it: two or three images and a column of captions."""
    ((column, texts),) = captions.items()
    images = [{"bytes": encoded(make_image(number)), "path": None} for number in range(len(texts))]
    rows = datasets.Dataset.from_dict({"image": images, column: texts})
    rows.cast_column("image", datasets.Image()).save_to_disk(folder)
    return folder


def test_captions_without_a_letter_are_left_out_of_a_list(tiny_pipeline, tmp_path):
    captions = [["two", "", None, "  ", "four"], ["x"], [None, ""]]
    name = save_set(tmp_path / "set", text=captions)
    words = [f"--dataset_name={name}", "--skip_bad_images", "--max_train_samples=3", "--resolution=32"]
    args = parse(*words, f"--pretrained_model_name_or_path={tiny_pipeline}", f"--cache_dir={tmp_path / 'cache'}")
    loaded, _, _ = load_data(args, args.train_data_dir)
    assert list(loaded.rows["captions"]) == [["two", "four"], ["x"]]


def read_captions(name, *words, default_caption=None):
    """The captions of a dataset on disk."""
    args = parse(f"--cache_dir={name.parent / 'cache'}", *words)
    return list(read_dataset(args, str(name), default_caption)["captions"])


def test_captions_come_from_their_column_or_are_the_default(tmp_path):
    name = save_set(tmp_path / "set", caption=["one", "two"])
    assert read_captions(name, "--caption_column=caption") == ["one", "two"]
    assert read_captions(name, default_caption="a sks star") == ["a sks star"] * 2


@pytest.mark.parametrize(
    "words, default_caption",
    [
        ([], None),
        (["--caption_column=captoin"], None),
        (["--caption_column=captoin"], "a sks star"),
        (["--caption_column=caption", "--dataset_config_name=small"], None),
    ],
)
def test_columns_and_configurations_that_a_dataset_lacks_are_refused(tmp_path, words, default_caption):
    name = save_set(tmp_path / "set", caption=["one", "two"])
    with pytest.raises(InputError, match="set: cannot be loaded; check it, --dataset_config_name"):
        read_captions(name, *words, default_caption=default_caption)


@pytest.mark.parametrize("flag", ["--dataset_config_name=default", "--image_column=picture"])
def test_a_folder_of_images_has_no_configurations_and_columns(image_folder, flag):
    with pytest.raises(InputError, match="holds images; drop --dataset_config_name and --image_column"):
        read_captions(image_folder(2), flag)


@pytest.mark.parametrize("needed", ["--dataset_name", "--train_data_dir"])
def test_images_come_from_a_folder_or_a_dataset(tmp_path, needed):
    both = ["--dataset_name=a/b", f"--train_data_dir={tmp_path}"]
    for words in (both, []):
        (problem,) = check_data(parse(*words), "train_data_dir")
        assert needed in problem
        assert "not both" in problem
    assert check_data(parse(*[word for word in both if word.startswith(needed)]), "train_data_dir") == []


def test_columns_of_images_are_for_datasets(tmp_path):
    (problem,) = check_data(parse("--image_column=picture", f"--train_data_dir={tmp_path}"), "train_data_dir")
    assert "--image_column=picture: does nothing without --dataset_name" in problem


def test_a_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        (problem,) = check_data(parse(f"--train_data_dir={tmp_path / name}"), "train_data_dir")
        assert f"--train_data_dir={tmp_path / name}: does not exist, or is no folder" in problem


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_output_among_the_images_is_refused(image_folder, flag):
    """Its samples would be taken for images that lack a caption."""
    folder = image_folder(2)
    for output in (folder, folder / "out", folder / ".." / folder.name / "out"):
        (problem,) = check_data(parse(f"--{flag}={folder}", f"--output_dir={output}"), "train_data_dir")
        assert "lies in the folder of the images" in problem
    assert check_data(parse(f"--{flag}={folder}", f"--output_dir={folder}_out"), "train_data_dir") == []


def test_no_more_than_five_are_named_in_a_warning(image_folder, tmp_path, capsys):
    rows = read_folder(image_folder(8, size=20), "text")
    good, _ = check_rows(rows, tmp_path / "checked.json", False, make_tokenizer(), 32)
    said = capsys.readouterr().out
    assert len(good) == 8
    assert "8 images are smaller" in said
    assert said.count(".png") == 5


def test_digest_of_a_row_follows_content_and_captions_but_not_the_path(image_folder, tmp_path):
    def digests(folder):
        rows = read_folder(folder, "text")
        return check_rows(rows, tmp_path / "checked.json", False, make_tokenizer(), 32)[1]

    here, there = image_folder(3, name="here"), image_folder(3, name="there")
    assert digests(here) == digests(there)
    first = digests(here)
    captions = [caption_of(0), "other", caption_of(2)]
    write_metadata(here, [{"file_name": f"0{index}.png", "text": text} for index, text in enumerate(captions)])
    assert [a == b for a, b in zip(first, digests(here))] == [True, False, True]


# -------------------------------------------------------------------------------------------------- training set


def arguments(model, folder, output_dir, *more):
    """The command line of a training of two steps."""
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={folder}",
        f"--output_dir={output_dir}",
        f"--resolution={RESOLUTION}",
        "--train_batch_size=2",
        "--max_train_steps=2",
        "--report_to=none",
        *more,
    ]


def load(model, folder, tmp_path, **options):
    """What `load_data` makes of a folder: images to train on, images held out, and their fingerprint."""
    flags = [f"--{key}={value}" for key, value in options.items()]
    args = parse(*arguments(model, folder, tmp_path / "out", *flags))
    return load_data(args, args.train_data_dir)


def names(images):
    return [os.path.basename(row["image"]["path"]) for row in images.rows]


def test_held_out_images_are_apart_and_the_same_for_every_seed(tiny_pipeline, image_folder, tmp_path):
    folder = image_folder(8)
    training, held_out, fingerprint = load(tiny_pipeline, folder, tmp_path, num_validation_samples=3)
    assert len(held_out) == 3
    assert sorted(names(training) + names(held_out)) == [f"0{index}.png" for index in range(8)]
    again = load(tiny_pipeline, folder, tmp_path, num_validation_samples=3, seed=5)
    assert names(again[1]) == names(held_out)
    assert again[2] == fingerprint
    item, again_item = held_out[0, 0, 1], again[1][0, 0, 1]
    assert item.keys() == again_item.keys()
    assert all(np.array_equal(item[name], again_item[name]) for name in item)
    assert load(tiny_pipeline, folder, tmp_path)[2] != fingerprint


def test_max_train_samples_draws_by_the_seed(tiny_pipeline, image_folder, tmp_path):
    folder = image_folder(8)
    drawn = {
        seed: names(load(tiny_pipeline, folder, tmp_path, max_train_samples=4, seed=seed)[0]) for seed in range(3)
    }
    assert all(len(set(chosen)) == 4 for chosen in drawn.values())
    assert len({tuple(chosen) for chosen in drawn.values()}) > 1
    assert names(load(tiny_pipeline, folder, tmp_path, max_train_samples=4, seed=2)[0]) == drawn[2]
    assert len(load(tiny_pipeline, folder, tmp_path, max_train_samples=100)[0]) == 8


def test_holding_everything_out_is_refused(tiny_pipeline, image_folder, tmp_path):
    with pytest.raises(InputError, match="must leave some of 3 images"):
        load(tiny_pipeline, image_folder(3), tmp_path, num_validation_samples=3)


# ------------------------------------------------------------------------------------- what a training says


DEFECTS = {  # what the message says of each
    "truncated": "truncated",
    "not_an_image": "no image",
    "no_caption": "no caption",
    "no_file": "no such file",
    "too_small": "100 x 3 pixels",
}


@pytest.mark.parametrize("missing_caption", ["null", "empty", "absent", "no_row"])
def test_all_bad_images_are_named_in_one_message_before_a_model_loads(
    train_script, tiny_pipeline, messy_folder, tmp_path, monkeypatch, capsys, missing_caption
):
    messy = messy_folder(missing_caption=missing_caption)
    before = snapshot(messy.path)
    monkeypatch.setattr(train_script, "load_models", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as caught:
        train_script.main(arguments(tiny_pipeline, messy.path, tmp_path / "out"))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("--skip_bad_images") == 1
    for kind, path in messy.bad.items():
        (line,) = [line for line in message.splitlines() if str(path) in line]
        assert DEFECTS[kind] in line
    assert not any(str(path) in message for path in messy.good)
    assert "Traceback" not in message
    assert snapshot(messy.path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_say_it_once(tiny_pipeline, messy_folder, tmp_path):
    """The second waits for the first to check: it has to hear of the error, not of a lost connection."""
    messy = messy_folder()
    result = run_script(arguments(tiny_pipeline, messy.path, tmp_path / "out"), nproc=2)
    assert result.returncode == 1  # torchrun's
    assert "[rank1]" not in result.stderr
    assert all(result.stderr.count(str(path)) == 1 for path in messy.bad.values())


def test_skip_bad_images_trains_on_the_good_ones(train_script, tiny_pipeline, messy_folder, tmp_path, capsys):
    messy = messy_folder(num_good=4)
    before, seen = snapshot(messy.path), []
    original = train_script.CaptionedImages.__getitem__

    def noted(self, item):
        seen.append(self.rows[item[1]]["image"]["path"])
        return original(self, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_script.CaptionedImages, "__getitem__", noted)
        train_script.main(arguments(tiny_pipeline, messy.path, tmp_path / "out", "--skip_bad_images"))
    assert sorted(seen) == sorted(map(str, messy.good))  # two steps of two images are one epoch
    said = capsys.readouterr().out
    assert "5 of 9" in said
    assert all(str(path) in said for path in messy.bad.values())
    assert snapshot(messy.path) == before
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_only_bad_images_are_an_error_even_when_skipped(train_script, tiny_pipeline, messy_folder, tmp_path, capsys):
    messy = messy_folder(num_good=1)
    messy.good[0].unlink()
    with pytest.raises(SystemExit) as caught:
        train_script.main(arguments(tiny_pipeline, messy.path, tmp_path / "out", "--skip_bad_images"))
    assert caught.value.code == 2
    assert "6 of 6" in capsys.readouterr().err


def test_long_captions_and_small_images_are_warned_of_and_trained_on(
    train_script, tiny_pipeline, image_folder, tmp_path, capsys
):
    sizes = [(32, 32), (20, 32), (32, 32), (200, 24)]
    captions = ["a red circle", "two", ["short", "word " * 200], "three"]
    folder = image_folder(4, size=sizes, captions=captions)
    train_script.main(arguments(tiny_pipeline, folder, tmp_path / "out"))
    said = capsys.readouterr().out
    assert "2 images are smaller than --resolution=32" in said
    assert f"{folder / '01.png'}: 20 x 32" in said
    assert f"{folder / '03.png'}: 200 x 24" in said
    assert "1 captions have more than 77 tokens" in said
    assert "word word" in said
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2
    assert np.isfinite(log[-1]["loss"])
