"""`sdtune caption` captions what has no caption, changes nothing else, and goes on where it was stopped."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from image_data import make_image, snapshot, write_metadata
from PIL import Image
from running import kill_copy_when, status_of
from tiny import make_captioner

from sdtune.commands import caption as command
from sdtune.dataset import read_folder

JOURNAL = ".caption_images.jsonl"
NAMES = ["00.png", "01.png", "02.png", "03.png", "04.png", "05.png", "06.png", "below/07.png"]


@pytest.fixture
def images(tmp_path):
    """Folder with 00.png to 06.png and below/07.png, without captions."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for index, name in enumerate(NAMES):
        make_image(index).save(folder / name)
    (folder / ".hidden.png").write_bytes(b"not to be opened")
    return folder


captioner = cache(make_captioner)


@cache
def said_of(pixels, max_new_tokens, num_beams):
    """What the tiny captioner says of one image of 32 x 32 pixels, alone."""
    model, processor = captioner()
    inputs = processor(images=Image.frombytes("RGB", (32, 32), pixels), return_tensors="pt")
    limits = {"num_beams": num_beams} if num_beams else {}
    tokens = model.generate(pixel_values=inputs.pixel_values, max_new_tokens=max_new_tokens, **limits)
    return processor.decode(tokens[0], skip_special_tokens=True)


def said(folder, names=NAMES, max_new_tokens=5, num_beams=None):
    """What the tiny captioner says of each image, by name, asked for one after the other."""
    return {name: said_of(Image.open(folder / name).tobytes(), max_new_tokens, num_beams) for name in names}


def run(folder, model, *flags, max_new_tokens=5):
    """Runs the command in this process; returns its exit status."""
    return status_of(command.main, folder, f"--model={model}", f"--max_new_tokens={max_new_tokens}", *flags)


def rows(folder):
    """{file_name: row} of metadata.jsonl."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row for row in map(json.loads, lines)}


def captions(folder, column="text"):
    """{file_name: caption} of metadata.jsonl."""
    return {name: row[column] for name, row in rows(folder).items()}


def captions_beside(folder):
    """{file_name: caption} of the .txt files."""
    return {name: (folder / name).with_suffix(".txt").read_text().strip() for name in NAMES}


def seen_by_training(folder):
    """{path: captions} as the training scripts read the folder."""
    return {row["image"]["path"]: row["captions"] for row in read_folder(folder, "text")}


# ---------------------------------------------------------------------------------------------------------- captions


def test_captions_of_all_images(images, tiny_captioner, capsys):
    """In batches they are what the model says of each image alone, and training reads them."""
    before = snapshot(images)
    assert run(images, tiny_captioner, "--batch_size=3") == 0
    expected = said(images)
    assert captions(images) == expected
    assert len(set(expected.values())) == 8
    assert all(len(caption.split()) == 5 for caption in expected.values())
    assert seen_by_training(images) == {str(images / name): [caption] for name, caption in expected.items()}
    after = snapshot(images)
    assert after.pop("metadata.jsonl")
    assert after == before
    assert capsys.readouterr().out.splitlines() == [
        "8 images: 0 keep their captions, 8 to be captioned.",
        f"Wrote {images / 'metadata.jsonl'}: 8 new captions.",
    ]
    assert run(images, tiny_captioner) == 0
    assert capsys.readouterr().out.splitlines() == [
        "8 images: 8 keep their captions, 0 to be captioned.",
        f"Nothing was written in {images}.",
    ]


def test_beams_and_words_around(images, tiny_captioner):
    words = ["--trigger_word=sks", "--prefix=a photo of ", "--suffix=, on white"]
    assert run(images, tiny_captioner, "--num_beams=3", "--caption_column=caption", *words) == 0
    by_beams = said(images, num_beams=3)
    assert by_beams != said(images)
    expected = {name: f"sks, a photo of {caption}, on white" for name, caption in by_beams.items()}
    assert captions(images, "caption") == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"said": "a  cat ,  a dog"}, "a cat, a dog"),
        ({"said": "a cat", "trigger_word": "sks"}, "sks, a cat"),
        ({"said": "a sks cat", "trigger_word": "sks"}, "a sks cat"),
        ({"said": "a sksy cat", "trigger_word": "sks"}, "sks, a sksy cat"),
        ({"said": "a cat", "prefix": "a photo of", "suffix": ". On white"}, "a photo of a cat. On white"),
        ({"said": "a cat", "suffix": "in C++", "trigger_word": "C++"}, "a cat in C++"),
        ({"said": " ", "prefix": "a photo of", "trigger_word": "sks"}, ""),
    ],
)
def test_words_around_a_caption(given, expected):
    none = {"trigger_word": None, "prefix": None, "suffix": None}
    assert command.compose(**{**none, **given}) == expected


def test_text_files(images, tiny_captioner, capsys):
    (images / "03.txt").write_text("mine")
    assert run(images, tiny_captioner, "--format=txt") == 0
    assert capsys.readouterr().out.splitlines() == [
        "8 images: 1 keeps its caption, 7 to be captioned.",
        f"Wrote 7 new captions in {images}, each into a .txt beside its image.",
    ]
    expected = {**said(images), "03.png": "mine"}
    assert not (images / "metadata.jsonl").exists()
    assert captions_beside(images) == expected
    assert (images / "03.txt").read_text() == "mine"
    assert seen_by_training(images) == {str(images / name): [caption] for name, caption in expected.items()}
    assert run(images, tiny_captioner, "--format=txt", "--overwrite", "--suffix=new") == 0
    assert (images / "03.txt").read_text().strip() == f"{said(images)['03.png']} new"


def test_text_files_count_whatever_the_case_of_their_suffix(images, tiny_captioner):
    (images / "03.TXT").write_text("mine")
    assert run(images, tiny_captioner) == 0
    assert captions(images) == {name: caption for name, caption in said(images).items() if name != "03.png"}
    assert seen_by_training(images)[str(images / "03.png")] == ["mine"]


def test_captions_under_other_names_are_not_overruled(images, tiny_captioner, capsys):
    (images / "03.png.txt").write_text("mine")
    before = snapshot(images)
    assert run(images, tiny_captioner) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds 1 .txt that is not read, such as 03.png.txt; call it 03.txt, or move it away" in said
    assert snapshot(images) == before


def test_existing_metadata_is_kept(images, tiny_captioner):
    """Its rows and columns, to the byte where nothing is added, and its order; captions from elsewhere count too."""
    first = '{"file_name":"00.png",  "text": "mine", "score": 1.50}'
    second = '{"file_name": "gone.jpg", "text": "\\u00fc"}'
    third = '{"file_name": "02.png", "score": 2, "text": null}'
    fourth = '{"text": ["one", "two"], "file_name": "./below/../03.png"}'
    metadata = images / "metadata.jsonl"
    metadata.write_text("\ufeff" + "\n".join([first, second, third, "", fourth]), encoding="utf-8")
    metadata.chmod(0o640)
    (images / "below" / "metadata.csv").write_text("file_name,text\n07.png,of a table\n")
    (images / "05.txt").write_text("beside")
    assert run(images, tiny_captioner) == 0
    expected = said(images)
    lines = metadata.read_text(encoding="utf-8").splitlines()
    assert [lines[0], lines[1], lines[3]] == [first, second, fourth]
    assert json.loads(lines[2]) == {"file_name": "02.png", "score": 2, "text": expected["02.png"]}
    new = [json.loads(line) for line in lines[4:]]
    assert new == [{"file_name": name, "text": expected[name]} for name in ("01.png", "04.png", "06.png")]
    assert metadata.stat().st_mode & 0o777 == 0o640
    before = snapshot(images)
    assert run(images, tiny_captioner) == 0  # nothing is left to do
    assert snapshot(images) == before


def test_metadata_without_captions_gets_a_column(images, tiny_captioner):
    write_metadata(images, [{"file_name": name, "score": 1} for name in NAMES])
    assert run(images, tiny_captioner) == 0
    expected = said(images)
    assert rows(images) == {name: {"file_name": name, "score": 1, "text": expected[name]} for name in NAMES}


def test_overwrite_replaces_all_captions(images, tiny_captioner):
    gone = {"file_name": "gone.png", "text": "kept"}
    old, older = {"file_name": "00.png", "text": "old", "score": 1}, {"file_name": "00.png", "text": "older"}
    write_metadata(images, [old, older, gone])
    assert run(images, tiny_captioner, "--overwrite") == 0
    expected = said(images)
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    new = expected["00.png"]
    assert lines[:3] == [{**old, "text": new}, {**older, "text": new}, gone]
    assert {row["file_name"]: row["text"] for row in lines[3:]} == {name: expected[name] for name in NAMES[1:]}


def test_dry_run_shows_five_and_writes_nothing(images, tiny_captioner, tmp_path, capsys):
    before = snapshot(images)
    (tmp_path / "flags.yaml").write_text("dry_run: true\ntrigger_word: sks\n")
    assert run(images, tiny_captioner, f"--config={tmp_path / 'flags.yaml'}") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert shown == [f"  {name}: sks, {caption}" for name, caption in said(images, NAMES[:5]).items()]
    assert snapshot(images) == before


def test_another_kind_of_model(images, tmp_path):
    """GIT, a decoder that sees the image as words, where BLIP's decoder attends to it."""
    from transformers import GitConfig, GitForCausalLM

    _, processor = captioner()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8, **size}
    torch.manual_seed(0)
    model = GitForCausalLM(GitConfig(vision_config=vision, vocab_size=80, initializer_range=1.0, **ids, **size))
    for part in (model, processor.image_processor, processor.tokenizer):
        part.save_pretrained(tmp_path / "git")
    assert run(images, tmp_path / "git") == 0
    opened = [Image.open(images / name) for name in NAMES]
    pixel_values = processor.image_processor(opened, return_tensors="pt").pixel_values
    tokens = model.eval().generate(pixel_values=pixel_values, max_new_tokens=5)
    texts = [" ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert any(texts)
    assert captions(images) == {name: text for name, text in zip(NAMES, texts) if text}


# ---------------------------------------------------------------------------------------------------------- stopping


def note_batches(monkeypatch, stop_after=None):
    """Lists the images of every batch that is captioned from now on, and presses Ctrl-C after so many batches."""
    seen, real = [], command.caption

    def caption(*args):
        for batch in real(*args):
            seen.append([Path(path).name for path, _ in batch])
            yield batch
            if len(seen) == stop_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(command, "caption", caption)
    return seen


@pytest.mark.parametrize("form", ["metadata", "txt"])
def test_interrupted_run_goes_on(images, tiny_captioner, monkeypatch, capsys, form):
    """What Ctrl-C leaves is whole and usable, and nothing is captioned twice."""
    expected = said(images)
    flags = ["--batch_size=3", f"--format={form}"]
    with monkeypatch.context() as patch:
        note_batches(patch, stop_after=2)
        assert run(images, tiny_captioner, *flags) == 130
    assert "sdtune caption: stopped; the same command goes on" in capsys.readouterr().err
    assert not (images / JOURNAL).exists()
    if form == "metadata":
        assert captions(images) == {name: expected[name] for name in NAMES[:6]}
        mended = {"file_name": "00.png", "text": "mended by hand"}
        write_metadata(images, [mended, *list(rows(images).values())[1:]])
        expected["00.png"] = "mended by hand"
    seen = note_batches(monkeypatch)
    assert run(images, tiny_captioner, *flags) == 0
    assert seen == [["06.png", "07.png"]]
    found = captions(images) if form == "metadata" else captions_beside(images)
    assert found == expected


def test_interrupted_overwriting_goes_on(images, tiny_captioner, monkeypatch, capsys):
    """All captions are replaced or none, and another setting is not mixed in."""
    write_metadata(images, [{"file_name": name, "text": "old"} for name in NAMES])
    flags = ["--overwrite", "--batch_size=3"]
    with monkeypatch.context() as patch:
        note_batches(patch, stop_after=2)
        assert run(images, tiny_captioner, *flags) == 130
    assert set(captions(images).values()) == {"old"}
    before = snapshot(images)
    assert run(images, tiny_captioner, *flags, "--suffix=new") == 2
    message = capsys.readouterr().err
    assert f"{images / JOURNAL}: holds captions of a run that was stopped" in message
    assert "--suffix=None" in message
    assert snapshot(images) == before
    seen = note_batches(monkeypatch)
    assert run(images, tiny_captioner, *flags) == 0
    assert seen == [["06.png", "07.png"]]
    assert capsys.readouterr().out.splitlines() == [
        "8 images: 0 keep their captions, 6 were captioned before a stop, 2 to be captioned.",
        f"Wrote {images / 'metadata.jsonl'}: 8 new captions.",
    ]
    assert captions(images) == said(images)
    assert not (images / JOURNAL).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_at_any_moment_loses_one_batch_at_most(images, tiny_captioner, monkeypatch, tmp_path, overwrite):
    """As the disk is after each batch, and in the midst of a journal's line, a run ends like one without a stop."""
    flags = ["--batch_size=2", *(["--overwrite"] if overwrite else [])]
    write_metadata(images, [{"file_name": "00.png", "text": "old", "score": 1}])
    original, states, real = (images / "metadata.jsonl").read_bytes(), [], command.caption

    def caption(*args):
        for number, batch in enumerate(real(*args)):
            if number:  # the batch before is in the journal now
                states.append(shutil.copytree(images, tmp_path / f"state{number}"))
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(command, "caption", caption)
        assert run(images, tiny_captioner, *flags) == 0
    expected = said(images) if overwrite else {**said(images), "00.png": "old"}
    assert captions(images) == expected
    assert len(states) == 3
    num_to_caption = len(NAMES) if overwrite else len(NAMES) - 1
    seen = note_batches(monkeypatch)
    for number, state in enumerate(states, 1):
        for cut in (0, 1, 20):  # bytes of the journal's last line
            copy = shutil.copytree(state, tmp_path / f"state{number}-{cut}")
            assert (copy / "metadata.jsonl").read_bytes() == original
            journal = (copy / JOURNAL).read_bytes()
            (copy / JOURNAL).write_bytes(journal[: len(journal) - cut])
            seen.clear()
            assert run(copy, tiny_captioner, *flags) == 0
            assert captions(copy) == expected
            num_noted = 2 * number - (1 if cut else 0)
            assert sum(map(len, seen)) == num_to_caption - num_noted
            assert snapshot(copy).keys() == snapshot(images).keys()
    (copy / JOURNAL).write_bytes(b'{"model"')  # killed in the first line
    assert run(copy, tiny_captioner) == 0
    assert captions(copy) == expected


def test_killed_process_goes_on(images, tiny_captioner, monkeypatch):
    """As a user's machine that loses its power: SIGKILL while the model is at work."""
    journal = images / JOURNAL
    words = [images, f"--model={tiny_captioner}", "--max_new_tokens=100", "--batch_size=1"]
    kill_copy_when(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3, command.main, *words)
    noted = journal.read_bytes().count(b"\n") - 1
    assert 2 <= noted < 8
    assert not (images / "metadata.jsonl").exists()
    seen = note_batches(monkeypatch)
    assert run(images, tiny_captioner, "--batch_size=1", max_new_tokens=100) == 0
    assert len(seen) == 8 - noted
    assert captions(images) == said(images, max_new_tokens=100)


# ------------------------------------------------------------------------------------------------------------ errors


def test_bad_images_are_named(tiny_captioner, messy_folder, monkeypatch, capsys):
    """Before the model is loaded; with --skip_bad_images the others are captioned."""
    messy = messy_folder(missing_caption="no_row")
    bad = {messy.bad[kind] for kind in ("truncated", "not_an_image", "too_small")}
    before = snapshot(messy.path)
    with monkeypatch.context() as patch:
        patch.delattr(command, "load_models")
        assert run(messy.path, tiny_captioner, "--overwrite") == 2
    message = capsys.readouterr().err
    assert "3 of 8 images are unusable" in message
    assert {path for path in messy.bad.values() if f"  {path}: " in message} == bad
    assert "Traceback" not in message
    assert snapshot(messy.path) == before
    assert run(messy.path, tiny_captioner, "--overwrite", "--skip_bad_images") == 0
    names = [path.name for path in [*messy.good, messy.bad["no_caption"]]]
    found = captions(messy.path)
    assert {name: found[name] for name in names} == said(messy.path, names)
    assert found["truncated.jpg"] == "a picture with a defect truncated"


def test_image_that_breaks_meanwhile_is_named(images, tiny_captioner, monkeypatch, capsys):
    """What was captioned before it is written."""
    real, expected = command.usable, said(images, NAMES[:6])

    def usable(*args):
        found = real(*args)
        (images / "06.png").write_bytes(b"broken")
        return found

    monkeypatch.setattr(command, "usable", usable)
    assert run(images, tiny_captioner, "--batch_size=2") == 2
    assert f"{images / '06.png'}: changed since it was checked" in capsys.readouterr().err
    assert captions(images) == expected


def test_wrong_words_are_listed_together(tiny_pipeline, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    words = ["--precision=fp16", "--caption_column=file_name", "--batch_size=0"]
    assert run(nowhere, tiny_pipeline / "text_encoder", *words) == 2
    message = capsys.readouterr().err
    assert f"FOLDER={nowhere}" in message
    assert "--precision=fp16: cannot be used on a CPU" in message
    assert "--caption_column" in message
    assert "--batch_size: must be a whole number in [1, inf), not '0'" in message
    assert "is a clip_text_model, no image-to-text model" in message
    assert run(tmp_path, tmp_path / "no_model") == 2
    assert f"--model={tmp_path / 'no_model'}: there is no such folder here; name another\n" in capsys.readouterr().err


@pytest.mark.parametrize("name, told", [("a.heic", "holds no images but 1 of a kind"), ("metadata.jsonl", "row 1 is")])
def test_a_folder_is_looked_at_before_the_model_is_missed(name, told, tiny_pipeline, tmp_path, capsys):
    (tmp_path / name).write_text("x")
    if name == "metadata.jsonl":
        make_image(0).save(tmp_path / "a.png")
    assert run(tmp_path, tiny_pipeline / "text_encoder") == 2
    message = capsys.readouterr()
    assert (message.out, told in message.err) == ("", True)
    assert "is a clip_text_model, no image-to-text model" in message.err


@pytest.mark.parametrize("flag", ["--batch_size=0", "--max_new_tokens=0", "--num_beams=0", "--format=csv"])
def test_wrong_flag_is_refused(images, tiny_captioner, capsys, flag):
    assert run(images, tiny_captioner, flag) == 2
    assert flag.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text, flags, message",
    [
        ("metadata.jsonl", '{"file_name": "00.png"}\nno row', [], "row 2 is not a file_name and a caption"),
        ("metadata.jsonl", '{"text": "a"}', [], "row 1: has no column file_name but text"),
        ("metadata.csv", "file_name,text\n00.png,a\n", ["--overwrite"], "would stay in use"),
        ("metadata.jsonl", '{"file_name": "00.png", "text": "a"}', ["--overwrite", "--format=txt"], "would stay"),
        ("below/metadata.jsonl", '{"file_name": "07.png", "text": "a"}', ["--overwrite"], "would stay in use"),
        ("00.jpg", "", ["--format=txt"], "would share"),
    ],
)
def test_folder_that_cannot_be_captioned(images, tiny_captioner, capsys, name, text, flags, message):
    (images / name).write_text(text)
    before = snapshot(images)
    assert run(images, tiny_captioner, *flags) == 2
    assert message in capsys.readouterr().err
    assert snapshot(images) == before


def test_folder_without_images(tmp_path, tiny_captioner, capsys):
    assert run(tmp_path, tiny_captioner) == 2
    assert f"{tmp_path} holds no images (.avif, " in capsys.readouterr().err
    (tmp_path / "a.heic").write_bytes(b"x")
    assert run(tmp_path, tiny_captioner) == 2
    told = "holds no images but 1 of a kind that is not read (HEIC), such as a.heic; convert to JPEG or PNG first\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize("photos, kinds", [(["a.heic"], "HEIC"), (["a.DNG", "below/b.heic"], "DNG, HEIC")])
def test_photos_of_another_kind_are_said_to_be_left_aside(images, tiny_captioner, capsys, photos, kinds):
    for name in photos:
        (images / name).write_bytes(b"x")
    assert run(images, tiny_captioner, "--dry_run") == 0
    told = f"{len(photos)} of a kind that is not read ({kinds}), such as {photos[0]}; convert to JPEG or PNG first."
    assert capsys.readouterr().out.startswith(f"Left aside in {images}: {told}\n8 images: ")


def test_default_model_without_a_connection(tmp_path, capsys):
    """The command ends with one message."""
    make_image(0).save(tmp_path / "a.png")
    assert status_of(command.main, tmp_path) == 2
    told = "--model=Salesforce/blip-image-captioning-large: there is no such folder here, no whole copy in the Hub's "
    told += "cache, and HF_HUB_OFFLINE=1 is set; drop that, or name another"
    assert " ".join(capsys.readouterr().err.split()) == f"sdtune caption: {told}"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_damaged_journal_is_named(images, tiny_captioner, capsys):
    (images / JOURNAL).write_text("not json\n")
    before = snapshot(images)
    assert run(images, tiny_captioner) == 2
    assert f"{images / JOURNAL}: is damaged; remove it" in capsys.readouterr().err
    assert snapshot(images) == before
