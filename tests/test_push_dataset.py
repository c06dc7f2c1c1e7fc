"""tools/push_dataset.py sends what training would read, and the training script reads it back."""

import hashlib
import json
import subprocess
import sys

import pytest
from conftest import load_script
from fake_hub import USER
from huggingface_hub import DatasetCard
from image_data import caption_of, make_image, snapshot, write_metadata
from PIL import Image
from running import REPO, TRAIN_TEXT_TO_IMAGE, environment, kill_when, run_script, start_script

TOOL = REPO / "tools" / "push_dataset.py"
NAME = f"{USER}/pictures"
# Reads datasets as the training script does; prints [captions, digest of the pixels] of each row.
READ = """
import hashlib, importlib.util, json, pathlib, sys
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
for name in sys.argv[2:]:
    rows = script.read_dataset(name, None, "image", "text", None, None, "a photo of sks")
    files = [row["bytes"] or pathlib.Path(row["path"]).read_bytes() for row in rows["image"]]
    pixels = [script.open_image(file).tobytes() for file in files]
    print(json.dumps([[caption, hashlib.sha256(data).hexdigest()] for caption, data in zip(rows["captions"], pixels)]))
"""


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    return load_script(TOOL)


def run(tool, *args):
    """Runs the tool in this process, where the Hub is out of reach; returns its exit status."""
    try:
        tool.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code
    return 0


def push(hub, folder, *flags, name=NAME):
    return run_script([folder, name, *flags], env=hub.env, script=TOOL)


def read_back(hub, *names):
    """What the training script reads from each dataset: {digest of the pixels: caption}."""
    ran = subprocess.run([sys.executable, "-c", READ, TRAIN_TEXT_TO_IMAGE, *names], env=environment(hub.env),
                         text=True, capture_output=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return [{digest: caption for caption, digest in json.loads(line)} for line in ran.stdout.splitlines()]


def digest(path):
    return hashlib.sha256(Image.open(path).convert("RGB").tobytes()).hexdigest()


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
        make_image(index).save(folder / name, **({"quality": 95} if name.endswith("JPG") else {}))
    write_metadata(folder, [{"file_name": "00.png", "text": "of a row", "score": 3},
                            {"file_name": "test.png", "score": 4, "tags": ["a"]}])
    (folder / "test.txt").write_text("of a text\n")
    (folder / "sub" / "of #1 [x] 50%.txt").write_text("of a text below")
    table = 'file_name,text,artist\nünï.JPG,"of a table, with umlauts: ü",ann\n'
    (folder / "val" / "metadata.csv").write_text(table, encoding="utf-8")
    for name in (".env", "notes.pdf", ".cache/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("PASSWORD=1")
    return folder


CAPTIONS = {"00.png": "of a row", "test.png": "of a text", "sub/of #1 [x] 50%.png": "of a text below",
            "val/ünï.JPG": "of a table, with umlauts: ü"}


@pytest.mark.slow
def test_what_is_pushed_can_be_trained_on(fake_hub, folder, tmp_path):
    before = snapshot(folder)
    ran = push(fake_hub, folder, "--private", "--hub_token=hf_other")
    assert ran.returncode == 0, ran.stderr
    assert "go into metadata.jsonl on the Hub" in ran.stdout
    assert f"--dataset_name={NAME}" in ran.stdout
    assert fake_hub.tokens == {"hf_other"}
    repo = fake_hub.repos[NAME]
    assert repo.type == "dataset"
    assert repo.private
    assert set(repo.files) == {*CAPTIONS, "metadata.jsonl", "README.md"}
    for name in CAPTIONS:
        assert repo.files[name] == (folder / name).read_bytes()
    assert [commit.message for commit in repo.commits] == ["Add 4 images"] * 2
    assert repo.commits[1].paths == ["metadata.jsonl", "README.md"]  # after the images
    nothing = dict.fromkeys(["score", "tags", "artist"])
    assert metadata(repo) == {name: {"file_name": name, "text": text, **nothing, **more} for (name, text), more in zip(
        CAPTIONS.items(), [{"score": 3}, {"score": 4, "tags": ["a"]}, {}, {"artist": "ann"}])}
    assert "4 images, each with a caption" in repo.files["README.md"].decode()
    assert snapshot(folder) == before

    # The same again sends nothing, a new image that alone; a card that was edited on the Hub stays.
    assert push(fake_hub, folder, "--private").returncode == 0
    assert len(repo.commits) == 2
    repo.files["README.md"] += b"\nEdited.\n"
    make_image(9).save(folder / "new.png")
    (folder / "new.txt").write_text("new")
    ran = push(fake_hub, folder, "--commit_message=More")
    assert [(commit.message, commit.paths) for commit in repo.commits[2:]] == [
        ("More", ["new.png"]), ("More", ["metadata.jsonl"])]
    assert repo.files["README.md"].endswith(b"\nEdited.\n")
    assert "is kept; --overwrite_card" in ran.stdout

    photos = tmp_path / "photos"
    photos.mkdir()
    make_image(20).save(photos / "a.png")
    ran = push(fake_hub, photos, "--without_captions", name="photos")
    assert ran.returncode == 0, ran.stderr
    assert set(fake_hub.repos[f"{USER}/photos"].files) == {"a.png", "README.md"}
    assert not fake_hub.repos[f"{USER}/photos"].private

    captioned, subject = read_back(fake_hub, NAME, f"{USER}/photos")
    assert captioned == {digest(folder / name): text for name, text in {**CAPTIONS, "new.png": "new"}.items()}
    assert subject == {digest(photos / "a.png"): "a photo of sks"}


@pytest.mark.slow
@pytest.mark.parametrize("stage, answered", [("upload", 3), ("commit", 0), ("commit", 1)])
def test_killed_upload_goes_on(fake_hub, folder, stage, answered):
    """Nothing arrives twice, and nobody reads captions before their images."""
    for index in range(4, 12):
        make_image(index).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(caption_of(index))
    before = snapshot(folder)
    fake_hub.hang[stage] = answered
    process = start_script([folder, NAME], env=fake_hub.env, script=TOOL)
    kill_when(process, lambda: fake_hub.waiting)
    assert "metadata.jsonl" not in fake_hub.repos[NAME].files
    arrived = fake_hub.answered["upload"]
    assert arrived == (3 if stage == "upload" else 11)  # of 12 images; the one named .JPG is no large file here
    fake_hub.hang.clear()
    ran = push(fake_hub, folder)
    assert ran.returncode == 0, ran.stderr
    assert fake_hub.answered["upload"] == 11
    repo = fake_hub.repos[NAME]
    assert {name: data for name, data in repo.files.items() if not name.startswith(("metadata", "README"))} == {
        name: (folder / name).read_bytes() for name in metadata(repo)}
    assert len(metadata(repo)) == 12
    assert len(repo.commits) == 2
    assert snapshot(folder) == before


@pytest.mark.slow
def test_failures_say_how_to_go_on(fake_hub, folder):
    fake_hub.fail["create"] = 403
    ran = push(fake_hub, folder)
    assert ran.returncode == 2
    assert f"REPO_ID={NAME}: cannot be made; log in with `hf auth login` or --hub_token" in ran.stderr
    fake_hub.fail = {"commit": 403}
    ran = push(fake_hub, folder)
    assert ran.returncode == 1
    assert "The upload failed" in ran.stderr
    assert f"{folder} is as it was" in ran.stderr
    assert "the same command goes on" in ran.stderr
    assert "Traceback" not in ran.stderr
    fake_hub.fail = {}
    ran = push(fake_hub, folder, "--private")  # it was made public above
    assert ran.returncode == 2
    assert f"--private: {NAME} exists and is public" in ran.stderr
    assert not fake_hub.repos[NAME].files


@pytest.mark.slow
def test_what_is_there_may_not_spoil_what_is_read(fake_hub, folder):
    fake_hub.add_repo(NAME, {"old/metadata.csv": b"file_name,text\n"}, "dataset")
    ran = push(fake_hub, folder)
    assert ran.returncode == 2
    assert "holds old/metadata.csv, which would be read too" in ran.stderr
    fake_hub.add_repo(NAME, {"README.md": b"---\nlicense: mit\n---\n# Mine\n"}, "dataset")
    ran = push(fake_hub, folder)
    assert ran.returncode == 2
    assert "the dataset card has no `configs`" in ran.stderr
    assert "- split: train\n" in ran.stderr
    assert set(fake_hub.repos[NAME].files) == {"README.md"}
    assert push(fake_hub, folder, "--overwrite_card").returncode == 0
    card = DatasetCard(fake_hub.repos[NAME].files["README.md"].decode())
    assert card.data.configs == [{"config_name": "default", "data_files": [{"split": "train", "path": "**"}]}]
    for name in ("test.png", "val/ünï.JPG"):  # names that need no card
        (folder / name).unlink()
    (folder / "val" / "metadata.csv").unlink()
    write_metadata(folder, [{"file_name": "00.png", "text": "mine"}])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    ran = push(fake_hub, folder, name="another")
    assert ran.returncode == 0, ran.stderr
    assert fake_hub.repos[f"{USER}/another"].files["README.md"] == (folder / "README.md").read_bytes()


# ---- Without the Hub


def test_bad_images_are_named(tool, messy_folder, capsys):
    messy = messy_folder()
    before = snapshot(messy.path)
    assert run(tool, messy.path, NAME) == 2
    message = capsys.readouterr().err
    assert "5 of 9 images are unusable" in message
    assert all(f"  {path}: " in message for path in messy.bad.values())
    assert f"{messy.bad['no_caption']}: has no caption" in message
    assert run(tool, messy.path, NAME, "--skip_bad_images", "--dry_run") == 0
    assert "Would send 4 images, metadata.jsonl and a card" in capsys.readouterr().out
    assert snapshot(messy.path) == before


def test_captions_are_not_asked_for_photos_of_a_subject(tool, tmp_path, capsys):
    make_image(0).save(tmp_path / "a.png")
    assert run(tool, tmp_path, NAME, "--dry_run") == 2
    assert "caption_images.py or sent --without_captions" in capsys.readouterr().err
    assert run(tool, tmp_path, NAME, "--dry_run", "--without_captions") == 0
    assert "Would send 1 images and a card" in capsys.readouterr().out


@pytest.mark.parametrize("name, problem", [
    ("__a.png", "datasets skips names that start with . or __"), ("a::b.png", "misreads ::"),
    ("a.avif", "datasets reads no .avif files"), ("../outside.png", "lies outside the folder")])
def test_names_that_are_not_read_back(tool, image_folder, capsys, name, problem):
    folder = image_folder(2)
    make_image(5).save(folder / name)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    write_metadata(folder, [*rows, {"file_name": name, "text": "odd"}])
    assert run(tool, folder, NAME, "--dry_run") == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("rows, problem", [
    ([{"file_name": "00.png", "text": "a", "original_file_name": "x"}], "takes the column 'original_file_name'"),
    ([{"file_name": "00.png", "text": "a", "n": 1}, {"file_name": "01.png", "text": "b", "n": "x"}],
     "columns n hold values of several kinds"),
    ([{"file_name": "00.png"}], "has no 'text'"),
    ([{"text": "a"}], "row 1 is not a file_name")])
def test_metadata_that_is_not_read_back(tool, image_folder, capsys, rows, problem):
    folder = image_folder(2)
    write_metadata(folder, rows)
    assert run(tool, folder, NAME, "--dry_run", "--skip_bad_images") == 2
    assert problem in capsys.readouterr().err


def test_several_captions_become_lists(tool, image_folder):
    folder = image_folder(2, captions=[["one", "two"], "three"])
    captions = tool.usable_rows(folder, "text", False, None, False)
    text = tool.make_metadata(captions, tool.other_columns(folder, "text"), "text")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"file_name": "00.png", "text": ["one", "two"]}, {"file_name": "01.png", "text": ["three"]}]


@pytest.mark.parametrize("number, size", [(999, "n<1K"), (1000, "1K<n<10K"), (99999, "10K<n<100K"),
                                          (100000, "100K<n<1M")])
def test_card(tool, number, size):
    card = DatasetCard(tool.make_card(NAME, number, "caption", False))
    assert card.data.size_categories == [size]
    assert card.data.task_categories == ["text-to-image"]
    assert "in the column `caption`" in card.text
    assert f'load_dataset("{NAME}", split="train")' in card.text


def test_wrong_words_are_listed_together(tool, tmp_path, capsys):
    assert run(tool, tmp_path / "nowhere", "a/b/c", "--caption_column=image") == 2
    message = capsys.readouterr().err
    for part in (f"FOLDER={tmp_path / 'nowhere'}", "REPO_ID=a/b/c", "--caption_column=image"):
        assert part in message
    assert run(tool) == 2
    assert "REPO_ID=None: give your_name/its_name" in capsys.readouterr().err


def test_without_a_connection(tool, image_folder, capsys):
    folder = image_folder(2)
    assert run(tool, folder, NAME) == 2
    assert "cannot be made; log in" in capsys.readouterr().err
