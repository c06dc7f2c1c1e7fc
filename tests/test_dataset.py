"""Images and captions are read as they were written, and what cannot be used is named before a model loads."""

import csv
import functools
import hashlib
import json
import os
import re
import tarfile

import datasets
import numpy as np
import pytest
from fake_hub import USER
from image_data import caption_of, encoded, make_image, snapshot, write_metadata
from reach_hub import reaching
from running import run_script
from shards import add_file, make_rows, write_messy_tar, write_shards, write_tar
from tiny import make_tokenizer
from training import parse

from sdtune.dataset import (
    check_data,
    check_places,
    check_rows,
    load_data,
    read_dataset,
    read_folder,
    read_rows,
)
from sdtune.errors import InputError
from sdtune.images import open_image, read_image

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
    assert re.search(
        rf"{folder / 'metadata.jsonl'}: row 3( is not|: has no column file_name but text)", str(caught.value)
    )


@pytest.mark.parametrize("heading, named", [("filename,text", "filename, text"), ("file_name;text", "file_name;text")])
def test_a_table_without_names_of_images_is_told_by_its_columns(heading, named, image_folder):
    folder = image_folder(1, name="photos")
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(f"{heading}\n00.png{heading[-5]}a dog\n")
    with pytest.raises(InputError) as caught:
        read_folder(folder, "text")
    told = f"row 1: has no column file_name but {named}; name it so, and part columns by commas"
    assert str(caught.value) == f"{folder / 'metadata.csv'}: {told}"


@pytest.mark.parametrize("caption, told", [(5, "5"), (0.5, "0.5"), (True, "True"), ([7, None], "7")])
def test_captions_that_are_numbers_are_named(image_folder, caption, told):
    folder = image_folder(2, captions=["one", caption])
    with pytest.raises(InputError) as caught:
        read_folder(folder, "text")
    told = f"row 2: the caption is a number ({told}), not text; name another --caption_column"
    assert str(caught.value) == f"{folder / 'metadata.jsonl'}: {told}"


@pytest.mark.parametrize("caption", [float("nan"), {"a": "b"}, [None, " "]])
def test_captions_that_are_missing_leave_the_image_without(image_folder, caption):
    """Which the check reports by its path."""
    assert as_dict(read_folder(image_folder(2, captions=["one", caption]), "text")) == {
        "00.png": ["one"],
        "01.png": [],
    }


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


def test_text_files_in_other_encodings_are_named_together_with_all_else(tmp_path):
    """As Notepad may write them; and a prompt for all is no answer to a caption that is there."""
    folder = write_images(tmp_path / "images", "a.png", "b.png", "c.png", "d.png")
    (folder / "a.txt").write_bytes("ein Mädchen".encode("latin-1"))
    (folder / "b.txt").write_text("ein Mädchen", encoding="utf-8-sig")
    (folder / "c.txt").write_bytes("ein Mädchen".encode("utf-16"))
    (folder / "e.png").write_bytes(b"")
    told = "its caption, a .txt, is not UTF-8; convert it"
    rows = read_folder(folder, "text")
    assert list(rows["problem"]) == [told, None, told, None, None]
    assert list(rows["captions"]) == [[], ["ein Mädchen"], [], [], []]
    args = parse(f"--train_data_dir={folder}")
    checked = functools.partial(check_rows, memory=tmp_path / "a.json", tokenizer=make_tokenizer(), resolution=32)
    with pytest.raises(InputError) as caught:
        checked(read_rows(args, folder, None), skip_bad_images=False)
    lines = [line.replace(f"{folder}{os.sep}", "") for line in str(caught.value).splitlines()]
    assert lines[0] == "4 of 5 images are unusable, 1 of them for lack of a caption:"
    assert lines[1:4] == [f"  a.png: {told}", f"  c.png: {told}", "  e.png: no image that Pillow knows"]
    assert lines[4].startswith("  d.png: has no caption")
    kept = checked(read_rows(args, folder, "a girl"), skip_bad_images=True)
    assert list(kept.rows["captions"]) == [["ein Mädchen"], ["a girl"]]
    (folder / "a.txt").write_text("a")
    (folder / "c.txt").write_text("c")
    assert read_folder(folder, "text").column_names == ["image", "captions"]


def test_a_photo_of_another_kind_that_metadata_names_is_to_be_converted(tmp_path):
    """Beside others a phone's photos are left aside, but whoever names one wants it."""
    folder = write_images(tmp_path / "images", "a.png")
    (folder / "b.HEIC").write_bytes(b"x")
    (folder / "c.jpg").write_bytes(b"x")
    lines = [json.dumps({"file_name": name, "text": "a cat"}) for name in ("a.png", "b.HEIC", "c.jpg")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    args = parse(f"--train_data_dir={folder}")
    with pytest.raises(InputError) as caught:
        check_rows(
            read_rows(args, folder, None),
            memory=tmp_path / "a.json",
            tokenizer=make_tokenizer(),
            resolution=32,
            skip_bad_images=False,
        )
    lines = [line.replace(f"{folder}{os.sep}", "") for line in str(caught.value).splitlines()]
    assert "  b.HEIC: no image that Pillow knows; convert it to JPEG or PNG" in lines
    assert "  c.jpg: no image that Pillow knows" in lines


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
    assert "1 file of other kinds, such as more." in capsys.readouterr().out


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
    assert "1 file of other kinds, such as notes.docx" in said
    assert "notes.docx" in said
    assert "photo.heic" in said


def test_captions_are_found_whatever_the_case_of_their_suffix(tmp_path, capsys):
    folder = write_images(tmp_path / "images", "a.png", "b.JPG", "c.png", "below/d.png")
    for name in ("a.TXT", "b.Txt", "c.txt", "c.TXT", "below/d.TXT"):
        (folder / name).write_text(f"in {name}")
    assert as_dict(read_folder(folder, "text")) == {
        "a.png": ["in a.TXT"],
        "b.JPG": ["in b.Txt"],
        "c.png": ["in c.txt"],
        "d.png": ["in below/d.TXT"],
    }
    told = f"Left aside in {folder}: 1 .txt without a picture of that name, such as c.TXT.\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    "names, told",
    [
        (["a.png.txt", "a.jpg.txt"], "2 .txt without a picture of that name, such as a.png.txt; call it a.txt."),
        (["LICENSE.txt", "b.JPEG.TXT"], "2 .txt without a picture of that name, such as b.JPEG.TXT; call it b.txt."),
        (["LICENSE.txt"], "1 .txt without a picture of that name, such as LICENSE.txt."),
    ],
)
def test_texts_of_other_names_are_said_to_be_left_aside(tmp_path, capsys, names, told):
    folder = write_images(tmp_path / "images", "a.png", "b.JPEG")
    for name in names:
        (folder / name).write_text("a star")
    assert as_dict(read_folder(folder, "text")) == {"a.png": [], "b.JPEG": []}
    assert capsys.readouterr().out == f"Left aside in {folder}: {told}\n"


def test_nothing_is_said_about_an_ordinary_folder(image_folder, capsys):
    """With what systems and editors leave in it."""
    folder = image_folder(2)
    (folder / "below").mkdir()
    for name in (".DS_Store", "._00.png", "._photo.heic", ".notes.txt", "below/._a.txt"):
        (folder / name).write_bytes(b"x")
    read_folder(folder, "text")
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


# ------------------------------------------------------------------------------- datasets as people have them


def in_words(numbers):
    return [caption_of(number) for number in numbers]


def rows_of(numbers, captions=None):
    """A dataset of these images and their captions."""
    contents = [{"bytes": encoded(make_image(number)), "path": f"{number}.png"} for number in numbers]
    captions = in_words(numbers) if captions is None else captions
    rows = datasets.Dataset.from_dict({"image": contents, "text": captions})
    return rows.cast_column("image", datasets.Image())


def shout(row):
    return {"text": row["text"].upper()}


def captions_in(folder, *words):
    """The captions in the rows of a local dataset, as a command or a script reads them."""
    words = [f"--dataset_name={folder}", f"--cache_dir={folder.parent / 'cache'}", *words]
    return [text for found in read_rows(parse(*words), None, None)["captions"] for text in found]


@pytest.mark.parametrize("kind, options", [("tar", {}), ("tar", {"caption_suffix": "json"}), ("parquet", {})])
def test_a_folder_of_shards_and_a_single_one_are_datasets(tmp_path, kind, options):
    folder = write_shards(tmp_path / "shards", kind, [3, 2], **options)
    rows = read_rows(parse(f"--dataset_name={folder}", f"--cache_dir={tmp_path / 'cache'}"), None, None)
    assert [text for (text,) in rows["captions"]] == in_words(range(5))
    assert [read_image(row["image"]).getpixel((0, 0)) for row in rows] == [
        make_image(number).getpixel((0, 0)) for number in range(5)
    ]
    assert captions_in(folder / f"00001.{kind}") == in_words([3, 4])


def test_the_captions_of_shards_come_from_the_field_that_is_named(tmp_path):
    folder = write_shards(tmp_path / "shards", "tar", [2], caption_suffix="json")
    assert captions_in(folder, "--caption_column=caption") == in_words(range(2))
    with pytest.raises(InputError, match=r"cannot be loaded; check it.*--caption_column=alt"):
        captions_in(folder, "--caption_column=alt")


def test_names_with_dots_in_a_tar_are_told(tmp_path):
    """They would be one sample, by WebDataset's rule, of whose images but one was used."""
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for number, name in enumerate(["plain", "2021.01", "2021.02"]):
            add_file(file, f"{name}.png", encoded(make_image(number)))
            add_file(file, f"{name}.txt", b"a day")
    args = parse(f"--dataset_name={tmp_path / 'a.tar'}", f"--cache_dir={tmp_path / 'cache'}")
    told = "2 images are one sample, whose name ends at the first dot; rename files with dots in names"
    assert read_rows(args, None, None)["problem"] == [None, told]


def test_bad_samples_of_a_tar_are_named_and_the_others_used(tmp_path):
    """Each by itself: neither do samples have to be alike, nor is one that cannot be decoded the end of others."""
    told = write_messy_tar(tmp_path / "mess" / "a.tar")
    args = parse(f"--dataset_name={tmp_path / 'mess'}", f"--cache_dir={tmp_path / 'cache'}")
    rows = read_rows(args, None, None)
    problems = {row["image"]["path"]: row["problem"] for row in rows if row["problem"]}
    assert problems == told
    checked = functools.partial(check_rows, tokenizer=make_tokenizer(), resolution=32)
    with pytest.raises(InputError) as caught:
        checked(rows, tmp_path / "checked.json", False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 of 7 images are unusable, 1 of them for lack of a caption:"
    bad = [*sorted(told.items()), ("0.png", "has no caption, in metadata or a .txt beside it")]
    assert lines[1:-1] == [f"  {name}: {problem}" for name, problem in bad]
    kept = checked(rows, tmp_path / "checked.json", True)
    assert list(kept.rows["captions"]) == [["one"], ["five", "and more"]]
    assert kept.contents.tolist() == [hashlib.sha256(encoded(make_image(1), "jpg", quality=95)).hexdigest()] * 2
    assert read_rows(args, None, "a star")["captions"][0] == ["a star"]
    with pytest.raises(
        InputError, match=r"samples none has a column 'alt', but png, pth, jpg, txt, json, jpeg, caption\)"
    ):
        captions_in(tmp_path / "mess", "--caption_column=alt")
    with pytest.raises(InputError, match=r"samples none has a column 'webp', but png"):
        captions_in(tmp_path / "mess", "--image_column=webp")


def test_tar_shards_of_the_hub_are_stored_and_read(tmp_path, fake_hub, monkeypatch):
    folder = write_shards(tmp_path / "shards", "tar", [2, 0, 1])
    files = {f"data/train-{path.name}": path.read_bytes() for path in folder.iterdir()}
    fake_hub.add_repo(f"{USER}/shards", files, "dataset")
    with reaching(fake_hub, monkeypatch):
        args = parse(f"--dataset_name={USER}/shards", f"--cache_dir={tmp_path / 'cache'}")
        assert read_rows(args, None, None)["captions"] == [[text] for text in in_words(range(3))]


def test_a_shard_that_changed_is_read_again(tmp_path):
    folder = write_shards(tmp_path / "set", "tar", [3])
    assert captions_in(folder) == in_words(range(3))
    write_tar(folder / "00000.tar", make_rows(2, 5))
    assert captions_in(folder) == in_words([5, 6])


def test_a_broken_shard_is_named(tmp_path):
    """What ends in its middle, what is none from the start, and pages that are overwritten."""
    cut = write_shards(tmp_path / "cut", "tar", [6, 6])
    content = (cut / "00001.tar").read_bytes()
    (cut / "00001.tar").write_bytes(content[: len(content) // 2 + 700])
    with pytest.raises(InputError, match=r"cut: 00001.tar: cannot be read beyond row \d \(unexpected end of data\)"):
        captions_in(cut)
    text = write_shards(tmp_path / "text", "tar", [1, 1])
    (text / "00000.tar").write_bytes(b"a note" * 200)
    with pytest.raises(
        InputError, match=r"text: shards are broken; mend or remove these\n  00000.tar: is no tar file$"
    ):
        captions_in(text)
    short = write_shards(tmp_path / "short", "parquet", [1, 1])
    (short / "00001.parquet").write_bytes((short / "00001.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"are broken; mend or remove these\n  00001.parquet: Parquet magic bytes"):
        captions_in(short)
    pages = write_shards(tmp_path / "pages", "parquet", [60, 60])
    content = bytearray((pages / "00001.parquet").read_bytes())
    content[300:2500] = b"\xff" * 2200
    (pages / "00001.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"\(00001.parquet: Invalid or truncated .*; mend or remove it\)$"):
        captions_in(pages)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_shard_is_left_out_and_named(tmp_path, capsys, kind, empty):
    """One of no bytes, or with no row in it."""
    numbers = [2, 2, 2]
    numbers[empty] = 0
    folder = write_shards(tmp_path / "set", kind, numbers)
    (folder / f"none.{kind}").write_bytes(b"")
    assert captions_in(folder) == in_words(range(4))
    told = f"Left out of {folder}: 2 empty shards, such as {empty:05d}.{kind}, none.{kind}.\n"
    assert told in capsys.readouterr().out
    with pytest.raises(InputError, match=f"holds nothing but empty shards, such as none.{kind}; name another"):
        captions_in(folder / f"none.{kind}")


def test_tables_beside_tar_shards_are_left_aside(tmp_path):
    """As img2dataset writes them: 00000.tar, 00000.parquet of what it knows of each image, 00000_stats.json."""
    folder = write_shards(tmp_path / "shards", "tar", [2, 1])
    for shard in range(2):
        datasets.Dataset.from_dict({"url": ["http://a/1.jpg"]}).to_parquet(str(folder / f"{shard:05d}.parquet"))
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 2}')
    assert captions_in(folder) == in_words(range(3))
    rows_of([4]).to_parquet(str(folder / "others.parquet"))
    with pytest.raises(InputError, match=r"holds tar shards, such as 00000.tar, and others.parquet; move the ones aw"):
        captions_in(folder)


def test_a_file_of_another_kind_is_no_dataset(tmp_path):
    for name in ("images.zip", "photo.png"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=rf"{name}: is no file that is read \(.tar, .parquet, .*\); name another"):
            captions_in(tmp_path / name)
    single = write_shards(tmp_path / "shards", "parquet", [1]) / "00000.parquet"
    with pytest.raises(InputError, match="is a file, which has no configurations; drop --dataset_config_name"):
        captions_in(single, "--dataset_config_name=small")


def test_pictures_are_read_where_a_tar_file_lies_beside_them(image_folder):
    folder = image_folder(2)
    write_shards(folder / "backup", "tar", [3])
    assert captions_in(folder) == in_words(range(2))


def test_caches_of_later_work_are_no_data(tmp_path):
    """`map` writes them into the folder that a dataset was loaded from."""
    folder = tmp_path / "set"
    datasets.DatasetDict(train=rows_of(range(4)), test=rows_of([7])).save_to_disk(folder)
    datasets.load_from_disk(folder).map(shout)
    assert list(folder.glob("train/cache-*.arrow"))
    assert captions_in(folder) == in_words(range(4))
    assert captions_in(folder / "train") == in_words(range(4))
    (folder / "train" / "state.json").unlink()  # as in `datasets`' own cache
    (folder / "train" / "dataset_info.json").unlink()
    assert captions_in(folder / "train") == in_words(range(4))


def test_a_saved_dataset_with_other_splits_is_named(tmp_path):
    datasets.DatasetDict(all=rows_of(range(2)), test=rows_of([7])).save_to_disk(tmp_path / "set")
    with pytest.raises(
        InputError, match=r"set: cannot be loaded.*no train split; name the folder of one of its splits, all, test"
    ):
        captions_in(tmp_path / "set")
    for folder, words in ((tmp_path, ()), (tmp_path / "set", ("--dataset_config_name=default",))):
        with pytest.raises(InputError, match="was written by save_to_disk: name the folder that was, without a conf"):
            captions_in(folder, *words)


def test_data_files_win_over_stray_pictures(tmp_path, capsys):
    """However many these are: `datasets` would take what there is most of."""
    folder = tmp_path / "cloned"
    write_images(folder / "assets", "preview.png", "one.png", "two.png")
    (folder / "data").mkdir()
    rows_of(range(3)).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    rows_of(range(3, 5)).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    rows_of([8]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert captions_in(folder) == in_words(range(5))
    told = (
        f"Left aside in {folder}: 3 pictures, such as {os.path.join('assets', 'one.png')}; its data files are read.\n"
    )
    assert told in capsys.readouterr().out
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/test-*}\n---\n"
    (folder / "README.md").write_text(card)
    assert captions_in(folder) == in_words([8])


def test_arrow_at_the_top_wins_too(tmp_path, capsys):
    folder = write_images(tmp_path / "set", "preview.png")
    rows_of(range(2)).save_to_disk(folder)
    assert captions_in(folder) == in_words(range(2))
    assert "1 picture, such as preview.png; its data files are read" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train.csv", "captions.jsonl"])
def test_tables_and_pictures_together_are_refused(tmp_path, name):
    """Unless the pictures have captions of their own."""
    folder = write_images(tmp_path / "set", "a.png", "b.png")
    (folder / name).write_text("image,text\nhttps://example.org/a.png,a\n")
    with pytest.raises(InputError) as caught:
        captions_in(folder)
    told = f"holds 1 data file, such as {name}, and 2 pictures, such as a.png; move the ones away that are not meant"
    assert str(caught.value) == f"--dataset_name={folder}: {told}"
    (folder / "a.txt").write_text("beside")
    assert captions_in(folder) == ["beside"]
    (folder / "a.txt").unlink()
    write_metadata(folder, [{"file_name": "a.png", "text": "of its own"}])
    assert captions_in(folder) == ["of its own"]


def test_hidden_folders_are_never_searched(image_folder, tmp_path, capsys):
    folder = image_folder(2, captions=["one", "two"])
    for name in (".git", ".cache"):
        write_images(folder / name, "stray.png")
        write_metadata(folder / name, [{"file_name": "stray.png", "text": "stray"}])
    assert captions_in(folder) == ["one", "two"]
    assert as_dict(read_folder(folder, "text")) == {"00.png": ["one"], "01.png": ["two"]}
    data = tmp_path / "data"
    write_images(data / ".git", "stray.png")
    rows_of(range(2)).to_parquet(data / "train.parquet")
    assert captions_in(data) == in_words(range(2))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("train, other", [("train", "test"), ("Training", "val")])
def test_the_train_folder_of_a_dataset_is_taken(tmp_path, capsys, train, other):
    folder = write_images(tmp_path / "set", f"{train}/a.png", f"{train}/deep/b.png", f"{other}/c.png", "top.png")
    rows = [{"file_name": name, "text": name} for name in (f"{train}/a.png", f"{other}/c.png", "top.png")]
    write_metadata(folder, rows)
    (folder / train / "deep" / "b.txt").write_text("b")
    assert sorted(captions_in(folder)) == sorted([f"{train}/a.png", "b"])
    told = f"Left aside in {folder}: 2 images that are not in its train folder, as a dataset's.\n"
    assert capsys.readouterr().out == told
    assert len(read_folder(folder, "text")) == 4  # as --train_data_dir
    told = f"1 image is trained on although its folder is named for validation or tests, such as\n  {other}/\n"
    assert capsys.readouterr().out == f"Warning: {told}"


@pytest.mark.parametrize("names", [("test/a.png", "eval/b.png"), ("train/a.png", "train/b.png"), ("testing.png",)])
def test_folders_of_one_kind_are_taken_as_they_are(tmp_path, capsys, names):
    folder = write_images(tmp_path / "set", *names)
    write_metadata(folder, [{"file_name": name, "text": name} for name in names])
    assert sorted(captions_in(folder)) == sorted(names)
    assert len(read_folder(folder, "text")) == len(names)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["a[1]", "[new] set", "plain"])
def test_brackets_in_a_path_are_no_pattern(tmp_path, name):
    folder = tmp_path / name / "set"
    folder.mkdir(parents=True)
    rows_of(range(3)).to_parquet(folder / "train-00000-of-00001.parquet")
    rows_of([8]).to_parquet(folder / "test-00000-of-00001.parquet")
    assert captions_in(folder) == in_words(range(3))
    picture = write_images(tmp_path / name / "pictures", "a.png") / "a.png"
    table = tmp_path / name / "table"
    table.mkdir()
    (table / "data.csv").write_text(f"image,text\n{picture},a\n")
    with pytest.raises(InputError, match="leads out of the dataset"):
        captions_in(table)


@pytest.mark.parametrize("place, picture", [("a[1]", None), ("plain", "preview.png")])
def test_configurations_that_are_hidden_are_refused(tmp_path, place, picture):
    """Of a folder with pictures `datasets` would take those, if there are more."""
    folder = write_images(tmp_path / place, *([picture] if picture else []))
    rows_of(range(3)).to_parquet(folder / "train.parquet")
    with pytest.raises(
        InputError, match=r"a bracket .* pictures, caches or empty shards hide its configurations; rename"
    ):
        captions_in(folder, "--dataset_config_name=default")


@pytest.mark.parametrize("name", ["dataset_infos.json", "config.json"])
def test_what_a_repository_says_of_itself_is_no_data(tmp_path, name):
    folder = write_images(tmp_path / "cloned", "a.png", "b.png")
    (folder / name).write_text("{}")
    rows = read_rows(parse(f"--dataset_name={folder}"), None, "a photo of sks")
    assert as_dict(rows) == {"a.png": ["a photo of sks"], "b.png": ["a photo of sks"]}


@pytest.mark.parametrize("numbers", [[1, 5, 2], [0.5, 1.5, 2.5]])
def test_a_column_of_numbers_is_no_caption(tmp_path, numbers):
    rows_of(range(3), numbers).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError) as caught:
        captions_in(tmp_path / "set")
    told = f"row 0: the caption is a number ({numbers[0]}), not text; name another --caption_column"
    assert str(caught.value) == f"{tmp_path / 'set'}: {told}"


def test_class_labels_are_their_names(tmp_path):
    label = datasets.ClassLabel(names=["a cat", "a dog"])
    rows_of(range(4), [1, 0, None, -1]).cast_column("text", label).save_to_disk(tmp_path / "one")
    assert captions_in(tmp_path / "one") == ["a dog", "a cat"]
    rows = rows_of(range(2), [[1, 0], [0]]).cast_column("text", datasets.List(label))
    rows.save_to_disk(tmp_path / "list")
    assert captions_in(tmp_path / "list") == ["a dog", "a cat", "a cat"]


@pytest.mark.parametrize("address", ["https://example.org/a.png", "s3://bucket/a.png"])
def test_addresses_of_images_are_to_be_downloaded_first(tmp_path, address):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"image": address, "text": "a"}) + "\n")
    with pytest.raises(InputError) as caught:
        captions_in(folder)
    told = f"row 0: the image is an address ({address}); download the images first, into a folder"
    assert str(caught.value) == f"--dataset_name={folder}: {told}"


# --------------------------------------------------------------------------- files that metadata may not name


def named(folder, kind, file_name):
    """Puts one row with this file_name into a folder's metadata."""
    if kind == "jsonl":
        write_metadata(folder, [{"file_name": file_name, "text": "a"}])
    else:
        with (folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["file_name", "text"], [file_name, "a"]])
    return folder / f"metadata.{kind}"


@pytest.fixture
def private(tmp_path):
    """A folder of pictures `open` beside one of private pictures, with links to the second one in it."""
    write_images(tmp_path / "secret", "s.png")
    folder = write_images(tmp_path / "open", "a.png", "below/b.png")
    (folder / "link").symlink_to(tmp_path / "secret", target_is_directory=True)
    (folder / "linked.png").symlink_to(tmp_path / "secret" / "s.png")
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(
    "name",
    [
        "../secret/s.png",
        "below/../../secret/s.png",
        "{secret}/s.png",
        "link/s.png",
        "linked.png",
        "C:\\pictures\\s.png",
        "c:/pictures/s.png",
        "\\\\server\\share\\s.png",
        "../nowhere.png",
    ],
)
def test_metadata_cannot_name_pictures_elsewhere(private, kind, name):
    is_link = name.startswith("link")
    name = name.format(secret=private.parent / "secret")
    (private / "linked.png").rename(private / "linked")  # else the link itself is what is told of
    name = name.replace("linked.png", "linked")
    path = named(private, kind, name)
    for read in (lambda: read_folder(private, "text"), lambda: captions_in(private)):
        with pytest.raises(InputError) as caught:
            read()
        told = f"row 1: the file_name {name!r} leads out of {private}"
        told += ", by a link; copy the image, or add --follow_symlinks" if is_link else "; copy the image into that"
        assert str(caught.value) == f"{path}: {told}"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("name", ["a.png", "./below/../a.png", "{folder}/a.png", "../open/a.png"])
def test_metadata_may_name_a_picture_of_its_folder_in_any_way(private, kind, name):
    (private / "linked.png").unlink()
    named(private, kind, name.format(folder=private))
    assert as_dict(read_folder(private, "text")) == {"a.png": ["a"], "b.png": []}


def test_metadata_below_may_name_pictures_above_it_in_the_same_folder(private):
    (private / "linked.png").unlink()
    named(private / "below", "jsonl", "../a.png")
    assert as_dict(read_folder(private, "text"))["a.png"] == ["a"]


def test_linked_pictures_are_used_with_a_text_beside_them_where_that_is_asked_for(private):
    (private / "linked.txt").write_text("mine")
    assert as_dict(read_folder(private, "text", follows_links=True))["linked.png"] == ["mine"]
    with pytest.raises(InputError):
        read_folder(private, "text")


def test_links_of_the_hubs_cache_are_read(tmp_path):
    """There a snapshot is links to files of a common folder, metadata and pictures alike."""
    blobs, snapshot_folder = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    write_images(blobs, "0123.png").joinpath("0123.png").rename(blobs / "0123")
    (snapshot_folder / "train").mkdir(parents=True)
    (snapshot_folder / "train" / "a.png").symlink_to("../../../blobs/0123")
    write_metadata(blobs, [{"file_name": "train/a.png", "text": "of the Hub"}])
    (blobs / "metadata.jsonl").rename(blobs / "4567")
    (snapshot_folder / "metadata.jsonl").symlink_to("../../blobs/4567")
    assert as_dict(read_folder(snapshot_folder, "text")) == {"a.png": ["of the Hub"]}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("name", ["{secret}/s.png", "{folder}/../secret/s.png", "{folder}/link/s.png"])
def test_rows_of_a_dataset_cannot_name_pictures_elsewhere(private, kind, name):
    folder = private.parent / "set"
    folder.mkdir()
    (folder / "link").symlink_to(private.parent / "secret", target_is_directory=True)
    inside = folder / ".mine.png"
    make_image(0).save(inside)
    paths = [str(inside), name.format(secret=private.parent / "secret", folder=folder)]
    rows = datasets.Dataset.from_dict({"image": paths, "text": ["a", "b"]})
    rows.to_parquet(folder / "train.parquet") if kind == "parquet" else rows.to_csv(folder / "train.csv")
    with pytest.raises(InputError) as caught:
        captions_in(folder)
    told = f"row 1: the image {paths[1]!r} leads out of the dataset; copy it into a folder with metadata.jsonl"
    assert str(caught.value) == f"--dataset_name={folder}: {told}"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_relative_paths_of_a_dataset_start_from_its_folder(tmp_path, kind, monkeypatch):
    folder = tmp_path / "set"
    (folder / "below").mkdir(parents=True)
    make_image(3).save(folder / "below" / ".mine.png")
    other = tmp_path / "elsewhere"
    (other / "below").mkdir(parents=True)
    make_image(4).save(other / "below" / ".mine.png")
    monkeypatch.chdir(other)
    rows = datasets.Dataset.from_dict(
        {"image": ["below/.mine.png", str(folder / "below" / ".mine.png")], "text": "ab"}
    )
    rows.to_parquet(folder / "train.parquet") if kind == "parquet" else rows.to_json(folder / "train.jsonl")
    found = read_dataset(parse(f"--dataset_name={folder}"), str(folder))
    assert found["captions"] == ["a", "b"]
    assert [image["path"] for image in found["image"]] == [str(folder / "below" / ".mine.png")] * 2


@pytest.mark.parametrize(
    "place, is_taken", [("cache/downloads/0123", True), ("secret/s.png", False), ("s.png", False)]
)
def test_rows_of_the_hub_may_name_what_was_downloaded_alone(tmp_path, place, is_taken):
    paths = [str(tmp_path / place)]
    rows = datasets.Dataset.from_dict({"image": paths, "captions": ["a"]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    if is_taken:
        check_places(rows, "user/set", tmp_path / "cache")
        return
    with pytest.raises(InputError, match=f"row 0: the image '{paths[0]}' leads out of the dataset; copy it"):
        check_places(rows, "user/set", tmp_path / "cache")


@pytest.mark.parametrize("name", ["below\\b.png", "below\\more/c.png"])
def test_backslashes_in_metadata_are_named_with_what_helps(private, name):
    (private / "linked.png").unlink()
    write_images(private, "below/more/c.png")
    path = named(private, "jsonl", name)
    with pytest.raises(InputError) as caught:
        read_folder(private, "text")
    slashes = name.replace("\\", "/")
    told = f"row 1: the file_name {name!r} names no file; write it with slashes, {slashes!r}"
    assert str(caught.value) == f"{path}: {told}"
    write_images(private, name)  # where that is a name
    found = {row["image"]["path"]: row["captions"] for row in read_folder(private, "text")}
    assert found[str(private / name)] == ["a"]
    assert found[str(private / slashes)] == []


@pytest.mark.parametrize("needed", ["--dataset_name", "--train_data_dir"])
def test_images_come_from_a_folder_or_a_dataset(tmp_path, needed):
    both = ["--dataset_name=a/b", f"--train_data_dir={tmp_path}"]
    for words in (both, []):
        (problem,) = check_data(parse(*words), "train_data_dir")
        assert needed in problem
        assert ("not both" if words else "is missing") in problem
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
    good = check_rows(rows, tmp_path / "checked.json", False, make_tokenizer(), 32)
    said = capsys.readouterr().out
    assert len(good.rows) == 8
    assert "8 images are smaller" in said
    assert said.count(".png") == 5


def test_digest_of_a_row_follows_content_and_captions_but_not_the_path(image_folder, tmp_path):
    def digests(folder):
        rows = read_folder(folder, "text")
        return check_rows(rows, tmp_path / "checked.json", False, make_tokenizer(), 32).digests

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
    said = " ".join(said.split())  # in rows of the plan
    assert "2 images are smaller than --resolution=32" in said
    assert f"{folder / '01.png'}: 20 x 32" in said
    assert f"{folder / '03.png'}: 200 x 24" in said
    assert "1 caption has more than 77 tokens and is cut" in said
    assert "word word" in said
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2
    assert np.isfinite(log[-1]["loss"])


@pytest.mark.parametrize("follows_links", [True, False])
def test_links_that_lead_out_of_a_folder_are_refused_or_warned_of(tmp_path, image_folder, capsys, follows_links):
    """Of pictures and of captions; those within the folder are not."""
    folder = image_folder(2)
    (tmp_path / "secret.png").write_bytes((folder / "00.png").read_bytes())
    (tmp_path / "private.txt").write_text("private words")
    (folder / "linked.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked.txt").symlink_to(tmp_path / "private.txt")
    (folder / "again.png").symlink_to(folder / "00.png")
    (folder / "again.txt").write_text("again")
    (folder / "notes.txt").symlink_to(tmp_path / "private.txt")  # which is nothing's caption
    names = [f"  {folder / 'linked.png'}", f"  {folder / 'linked.txt'}"]
    if follows_links:
        rows = as_dict(read_folder(folder, "text", follows_links=True))
        assert rows["linked.png"] == ["private words"]
        (warning,) = capsys.readouterr().out.split("Warning: ")[1:]
        told = "pictures, captions or data files are links that lead out of the folder, and are used"
        aside = f"Left aside in {folder}: 1 .txt without a picture of that name, such as notes.txt."
        assert warning.splitlines() == [f"2 {told}, such as", *names, aside]
        return
    with pytest.raises(InputError) as caught:
        read_folder(folder, "text")
    assert str(caught.value).splitlines() == [
        f"{folder}: 2 files in it are links that lead out of it, such as",
        *names,
        "Copy what they lead to, or add --follow_symlinks if you trust whoever made them.",
    ]
    (folder / "linked.png").unlink()
    (folder / "linked.txt").unlink()
    assert as_dict(read_folder(folder, "text"))["again.png"] == ["again"]
