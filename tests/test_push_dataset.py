"""`sdtune push-dataset` sends what training would read, and training reads it back."""

import argparse
import functools
import hashlib
import json

import pytest
from fake_hub import USER
from huggingface_hub import DatasetCard
from image_data import caption_of, make_image, snapshot, write_metadata
from PIL import Image
from reach_hub import push_to, reaching
from running import kill_copy_when, status_of

from sdtune.commands import push_dataset as command
from sdtune.dataset import read_dataset
from sdtune.images import read_image

NAME = f"{USER}/pictures"
HUB_COLUMNS = argparse.Namespace(
    dataset_config_name=None,
    image_column="image",
    caption_column="text",
    follow_symlinks=False,
    cache_dir=None,
    hub_token=None,
)


def run(*words):
    """Runs the command in this process, where the Hub is out of reach; returns its exit status."""
    return status_of(command.main, *words)


@pytest.fixture
def push(fake_hub, monkeypatch):
    """Factory: push(folder, *flags, name=NAME) runs the command against the stand-in; returns its exit status."""
    return functools.partial(push_to, fake_hub, monkeypatch, command.main, NAME)


def read_back(name):
    """What training reads from a dataset on the Hub: {digest of the pixels: caption}."""
    rows = read_dataset(HUB_COLUMNS, name, "a photo of sks")
    return {digest(read_image(row["image"])): row["captions"] for row in rows}


def digest(image):
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def metadata(repo):
    """{file_name: row} of a repository's metadata.jsonl."""
    rows = map(json.loads, repo.files["metadata.jsonl"].decode().splitlines())
    return {row["file_name"]: row for row in rows}


@pytest.fixture
def folder(tmp_path):
    """Images with captions of every kind, names that `datasets` would sort into splits, and files of other kinds."""
    folder = tmp_path / "pictures"
    for index, name in enumerate(("00.png", "test.png", "sub/of #1 [x] 50%.png", "val/ünï.JPG")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(index).save(folder / name)
    of_a_row = {"file_name": "00.png", "text": "of a row", "score": 3}
    write_metadata(folder, [of_a_row, {"file_name": "test.png", "score": 4, "tags": ["a"]}])
    (folder / "test.txt").write_text("of a text\n")
    (folder / "sub" / "of #1 [x] 50%.txt").write_text("of a text below")
    table = 'file_name,text,artist\nünï.JPG,"of a table, with umlauts: ü",ann\n'
    (folder / "val" / "metadata.csv").write_text(table, encoding="utf-8")
    for name in (".env", "notes.pdf", ".cache/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("PASSWORD=1")
    return folder


NO_COLUMNS = {"score": None, "tags": None, "artist": None}
ROWS = [
    {**NO_COLUMNS, "file_name": "00.png", "text": "of a row", "score": 3},
    {**NO_COLUMNS, "file_name": "test.png", "text": "of a text", "score": 4, "tags": ["a"]},
    {**NO_COLUMNS, "file_name": "sub/of #1 [x] 50%.png", "text": "of a text below"},
    {**NO_COLUMNS, "file_name": "val/ünï.JPG", "text": "of a table, with umlauts: ü", "artist": "ann"},
]


def test_what_is_pushed_can_be_trained_on(fake_hub, push, folder, tmp_path, monkeypatch, capsys):
    before = snapshot(folder)
    assert push(folder, "--private", "--hub_token=hf_other") == 0
    said = capsys.readouterr().out
    assert "go into metadata.jsonl on the Hub" in said
    assert f"--dataset_name={NAME}" in said
    assert fake_hub.tokens == {"hf_other"}
    repo = fake_hub.repos[NAME]
    assert repo.type == "dataset"
    assert repo.private
    names = [row["file_name"] for row in ROWS]
    assert set(repo.files) == {*names, "metadata.jsonl", "README.md"}
    for name in names:
        assert repo.files[name] == (folder / name).read_bytes()
    assert [commit.message for commit in repo.commits] == ["Add 4 images"] * 2
    assert repo.commits[1].paths == ["metadata.jsonl", "README.md"]  # after the images
    assert metadata(repo) == {row["file_name"]: row for row in ROWS}
    assert "4 images, each with a caption" in repo.files["README.md"].decode()
    assert snapshot(folder) == before

    # The same again sends nothing, a new image that alone; a card that was edited on the Hub stays.
    assert push(folder, "--private") == 0
    assert len(repo.commits) == 2
    repo.files["README.md"] += b"\nEdited.\n"
    make_image(9).save(folder / "new.png")
    (folder / "new.txt").write_text("new")
    capsys.readouterr()
    assert push(folder, "--commit_message=More") == 0
    new = [(commit.message, commit.paths) for commit in repo.commits[2:]]
    assert new == [("More", ["new.png"]), ("More", ["metadata.jsonl"])]
    assert repo.files["README.md"].endswith(b"\nEdited.\n")
    assert "is kept; --overwrite_card" in capsys.readouterr().out

    photos = tmp_path / "photos"
    photos.mkdir()
    make_image(20).save(photos / "a.png")
    (photos / "a.txt").write_bytes(b"caf\xe9")  # which is not sent
    assert push(photos, "--without_captions", name="photos") == 0
    assert set(fake_hub.repos[f"{USER}/photos"].files) == {"a.png", "README.md"}
    assert not fake_hub.repos[f"{USER}/photos"].private

    with reaching(fake_hub, monkeypatch):
        captioned, subject = read_back(NAME), read_back(f"{USER}/photos")
    expected = {row["file_name"]: row["text"] for row in ROWS} | {"new.png": "new"}
    assert captioned == {digest(Image.open(folder / name)): text for name, text in expected.items()}
    assert subject == {digest(Image.open(photos / "a.png")): "a photo of sks"}


@pytest.mark.parametrize("stage, answered", [("upload", 3), ("commit", 0), ("commit", 1)])
def test_killed_upload_goes_on(fake_hub, push, folder, stage, answered, monkeypatch):
    """Nothing arrives twice, and nobody reads captions before their images."""
    for index in range(4, 12):
        make_image(index).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(caption_of(index))
    before = snapshot(folder)
    fake_hub.hang[stage] = answered
    with reaching(fake_hub, monkeypatch):
        kill_copy_when(lambda: fake_hub.waiting, command.main, folder, NAME)
    repo = fake_hub.repos[NAME]
    assert "metadata.jsonl" not in repo.files
    num_large = 11  # of 12 images; the one named .JPG is no large file here
    assert fake_hub.answered["upload"] == (3 if stage == "upload" else num_large)
    fake_hub.hang.clear()
    assert push(folder) == 0
    assert fake_hub.answered["upload"] == num_large
    assert len(metadata(repo)) == 12
    assert set(repo.files) == {*metadata(repo), "metadata.jsonl", "README.md"}
    for name in metadata(repo):
        assert repo.files[name] == (folder / name).read_bytes()
    assert len(repo.commits) == 2
    assert snapshot(folder) == before


def test_failures_say_how_to_go_on(fake_hub, push, folder, capsys):
    fake_hub.fail["create"] = 403
    assert push(folder) == 2
    wanted = f"REPO_ID={NAME}: cannot be made; log in with `hf auth login` or --hub_token"
    assert wanted in capsys.readouterr().err
    fake_hub.fail = {"commit": 403}
    assert push(folder) == 1
    message = capsys.readouterr().err
    assert "The upload failed" in message
    assert f"{folder} is as it was" in message
    assert "the same command goes on" in message
    assert "Traceback" not in message
    fake_hub.fail = {}
    assert push(folder, "--private") == 2  # it was made public above
    assert f"--private: {NAME} exists and is public" in capsys.readouterr().err
    assert not fake_hub.repos[NAME].files


def test_what_is_there_may_not_spoil_what_is_read(fake_hub, push, folder, capsys):
    fake_hub.add_repo(NAME, {"old/metadata.csv": b"file_name,text\n"}, "dataset")
    assert push(folder) == 2
    assert "holds old/metadata.csv, which would be read too" in capsys.readouterr().err
    fake_hub.add_repo(NAME, {"README.md": b"---\nlicense: mit\n---\n# Mine\n"}, "dataset")
    assert push(folder) == 2
    message = capsys.readouterr().err
    assert "the dataset card has no `configs`" in message
    assert "- split: train\n" in message
    assert set(fake_hub.repos[NAME].files) == {"README.md"}
    assert push(folder, "--overwrite_card") == 0
    card = DatasetCard(fake_hub.repos[NAME].files["README.md"].decode())
    assert card.data.configs == [{"config_name": "default", "data_files": [{"split": "train", "path": "**"}]}]
    for name in ("test.png", "val/ünï.JPG"):  # names that need no card
        (folder / name).unlink()
    (folder / "val" / "metadata.csv").unlink()
    write_metadata(folder, [{"file_name": "00.png", "text": "mine"}])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert push(folder, name="another") == 0
    assert fake_hub.repos[f"{USER}/another"].files["README.md"] == (folder / "README.md").read_bytes()


# ---- Without the Hub


def test_bad_images_are_named(messy_folder, capsys):
    messy = messy_folder()
    before = snapshot(messy.path)
    assert run(messy.path, NAME) == 2
    message = capsys.readouterr().err
    assert "5 of 9 images are unusable" in message
    assert all(f"  {path}: " in message for path in messy.bad.values())
    assert f"{messy.bad['no_caption']}: has no caption" in message
    assert run(messy.path, NAME, "--skip_bad_images", "--dry_run") == 0
    assert "Would send 4 images, metadata.jsonl and a card" in capsys.readouterr().out
    assert snapshot(messy.path) == before


def test_captions_are_not_asked_for_photos_of_a_subject(tmp_path, capsys):
    make_image(0).save(tmp_path / "a.png")
    assert run(tmp_path, NAME, "--dry_run") == 2
    assert "`sdtune caption` or sent --without_captions" in capsys.readouterr().err
    assert run(tmp_path, NAME, "--dry_run", "--without_captions") == 0
    assert "Would send 1 image and a card" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, problem",
    [
        ("__a.png", "datasets skips names that start with . or __"),
        ("a::b.png", "misreads ::"),
        ("a.avif", "datasets reads no .avif files"),
    ],
)
def test_names_that_are_not_read_back(image_folder, capsys, name, problem):
    folder = image_folder(2)
    make_image(5).save(folder / name)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    write_metadata(folder, [*rows, {"file_name": name, "text": "odd"}])
    assert run(folder, NAME, "--dry_run") == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([{"file_name": "00.png", "text": "a", "original_file_name": "x"}], "takes the column 'original_file_name'"),
        (
            [{"file_name": "00.png", "text": "a", "n": 1}, {"file_name": "01.png", "text": "b", "n": "x"}],
            "columns n hold values of several kinds",
        ),
        ([{"file_name": "00.png"}], "has no 'text'"),
        ([{"text": "a"}], "row 1: has no column file_name but text"),
    ],
)
def test_metadata_that_is_not_read_back(image_folder, capsys, rows, problem):
    folder = image_folder(2)
    write_metadata(folder, rows)
    assert run(folder, NAME, "--dry_run", "--skip_bad_images") == 2
    assert problem in capsys.readouterr().err


def test_several_captions_become_lists(image_folder):
    folder = image_folder(2, captions=[["one", "two"], "three"])
    captions = command.usable_rows(folder, "text", False, None, False, False)
    text = command.make_metadata(captions, command.other_columns(folder, "text", False), "text")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"file_name": "00.png", "text": ["one", "two"]},
        {"file_name": "01.png", "text": ["three"]},
    ]


@pytest.mark.parametrize(
    "number, size", [(999, "n<1K"), (1000, "1K<n<10K"), (99999, "10K<n<100K"), (100000, "100K<n<1M")]
)
def test_card(number, size):
    card = DatasetCard(command.make_card(NAME, number, "caption", False))
    assert card.data.size_categories == [size]
    assert card.data.task_categories == ["text-to-image"]
    assert "in the column `caption`" in card.text
    assert f'load_dataset("{NAME}", split="train")' in card.text


def test_wrong_words_are_listed_together(tmp_path, capsys):
    assert run(tmp_path / "nowhere", "a/b/c", "--caption_column=image") == 2
    message = capsys.readouterr().err
    for part in (f"FOLDER={tmp_path / 'nowhere'}", "REPO_ID=a/b/c", "--caption_column=image"):
        assert part in message
    assert run() == 2
    assert "REPO_ID is missing: give your_name/its_name" in capsys.readouterr().err


def test_without_a_connection(image_folder, capsys):
    assert run(image_folder(2), NAME) == 2
    assert "cannot be made; log in" in capsys.readouterr().err
