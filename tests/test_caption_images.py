"""tools/caption_images.py captions what has no caption, changes nothing else, and goes on where it was stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_script
from image_data import make_image, snapshot, write_metadata
from PIL import Image
from running import REPO, kill_when, run_script, start_script
from tiny import make_captioner

TOOL = REPO / "tools" / "caption_images.py"
JOURNAL = ".caption_images.jsonl"


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    return load_script(TOOL)


@pytest.fixture
def images(tmp_path):
    """Folder with 00.png to 06.png and below/07.png, without captions."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for index in range(8):
        make_image(index).save(folder / ("below" if index == 7 else ".") / f"{index:02d}.png")
    (folder / ".hidden.png").write_bytes(b"not to be opened")
    return folder


NAMES = [*[f"{index:02d}.png" for index in range(7)], "below/07.png"]


def said(folder, names=NAMES, tokens=5, **options):
    """What the tiny captioner says of each image, by name, asked for one after the other."""
    model, processor = make_captioner()
    captions = {}
    for name in names:
        inputs = processor(images=Image.open(folder / name), return_tensors="pt")
        tokens_out = model.generate(pixel_values=inputs.pixel_values, max_new_tokens=tokens, **options)
        captions[name] = processor.decode(tokens_out[0], skip_special_tokens=True)
    return captions


def run(tool, folder, model, *flags, tokens=5):
    """Runs the tool in this process; returns its exit status."""
    try:
        tool.main([str(folder), f"--model={model}", f"--max_new_tokens={tokens}", *flags])
    except SystemExit as stop:
        return stop.code
    return 0


def rows(folder):
    """{file_name: row} of metadata.jsonl."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row for row in map(json.loads, lines)}


def texts(folder, column="text"):
    return {name: row[column] for name, row in rows(folder).items()}


# ---------------------------------------------------------------------------------------------------------- captions


def test_captions_of_all_images(tool, train_script, images, tiny_captioner, capsys):
    """In batches they are what the model says of each image alone, and the training script reads them."""
    before = snapshot(images)
    assert run(tool, images, tiny_captioner, "--batch_size=3") == 0
    expected = said(images)
    assert texts(images) == expected
    assert len(set(expected.values())) == 8
    assert all(len(caption.split()) == 5 for caption in expected.values())
    read = {row["image"]["path"]: row["captions"] for row in train_script.read_folder(images, "text")}
    assert read == {str(images / name): [caption] for name, caption in expected.items()}
    assert set(snapshot(images)) - set(before) == {"metadata.jsonl"}
    assert {name: value for name, value in snapshot(images).items() if name != "metadata.jsonl"} == before
    assert "Captioned 8 images" in capsys.readouterr().out


def test_beams_and_words_around(tool, images, tiny_captioner):
    assert run(tool, images, tiny_captioner, "--num_beams=3", "--trigger_word=sks", "--prefix=a photo of ",
               "--suffix=, on white", "--caption_column=caption") == 0
    beams = said(images, num_beams=3)
    assert beams != said(images)
    assert texts(images, "caption") == {name: f"sks, a photo of {caption}, on white" for name, caption in
                                        beams.items()}


@pytest.mark.parametrize("given, expected", [
    ({"said": "a  cat ,  a dog"}, "a cat, a dog"),
    ({"said": "a cat", "trigger_word": "sks"}, "sks, a cat"),
    ({"said": "a sks cat", "trigger_word": "sks"}, "a sks cat"),
    ({"said": "a sksy cat", "trigger_word": "sks"}, "sks, a sksy cat"),
    ({"said": "a cat", "prefix": "a photo of", "suffix": ". On white"}, "a photo of a cat. On white"),
    ({"said": "a cat", "suffix": "in C++", "trigger_word": "C++"}, "a cat in C++"),
    ({"said": " ", "prefix": "a photo of", "trigger_word": "sks"}, ""),
])
def test_words_around_a_caption(tool, given, expected):
    assert tool.compose(**{"trigger_word": None, "prefix": None, "suffix": None, **given}) == expected


def test_text_files(tool, train_script, images, tiny_captioner):
    (images / "03.txt").write_text("mine")
    assert run(tool, images, tiny_captioner, "--format=txt") == 0
    expected = said(images) | {"03.png": "mine"}
    assert not (images / "metadata.jsonl").exists()
    assert {name: (images / name).with_suffix(".txt").read_text().strip() for name in NAMES} == expected
    assert (images / "03.txt").read_text() == "mine"
    read = {row["image"]["path"]: row["captions"] for row in train_script.read_folder(images, "text")}
    assert read == {str(images / name): [caption] for name, caption in expected.items()}
    assert run(tool, images, tiny_captioner, "--format=txt", "--overwrite", "--suffix=new") == 0
    assert (images / "03.txt").read_text().strip() == f"{said(images)['03.png']} new"


def test_existing_metadata_is_kept(tool, images, tiny_captioner):
    """Its rows and columns, to the byte where nothing is added, and its order; captions from elsewhere count too."""
    kept = ['{"file_name":"00.png",  "text": "mine", "score": 1.50}', '{"file_name": "gone.jpg", "text": "\\u00fc"}',
            '{"text": ["one", "two"], "file_name": "./below/../03.png"}']
    (images / "metadata.jsonl").write_text(
        "\ufeff" + "\n".join([*kept[:2], '{"file_name": "02.png", "score": 2, "text": null}', "", kept[2]]),
        encoding="utf-8")
    (images / "metadata.jsonl").chmod(0o640)
    (images / "below" / "metadata.csv").write_text("file_name,text\n07.png,of a table\n")
    (images / "05.txt").write_text("beside")
    assert run(tool, images, tiny_captioner) == 0
    expected = said(images)
    lines = (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [lines[0], lines[1], lines[3]] == kept
    assert json.loads(lines[2]) == {"file_name": "02.png", "score": 2, "text": expected["02.png"]}
    assert [json.loads(line) for line in lines[4:]] == [{"file_name": name, "text": expected[name]}
                                                        for name in ("01.png", "04.png", "06.png")]
    assert (images / "metadata.jsonl").stat().st_mode & 0o777 == 0o640
    before = snapshot(images)
    assert run(tool, images, tiny_captioner) == 0  # nothing is left to do
    assert snapshot(images) == before


def test_metadata_without_captions_gets_a_column(tool, images, tiny_captioner):
    write_metadata(images, [{"file_name": name, "score": 1} for name in NAMES])
    assert run(tool, images, tiny_captioner) == 0
    assert rows(images) == {name: {"file_name": name, "score": 1, "text": caption} for name, caption in
                            said(images).items()}


def test_overwrite_replaces_all_captions(tool, images, tiny_captioner):
    gone = {"file_name": "gone.png", "text": "kept"}
    write_metadata(images, [{"file_name": "00.png", "text": "old", "score": 1},
                            {"file_name": "00.png", "text": "older"}, gone])
    assert run(tool, images, tiny_captioner, "--overwrite") == 0
    expected = said(images)
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    assert lines[:3] == [{"file_name": "00.png", "text": expected["00.png"], "score": 1},
                         {"file_name": "00.png", "text": expected["00.png"]}, gone]
    assert {row["file_name"]: row["text"] for row in lines[3:]} == {name: expected[name] for name in NAMES[1:]}


def test_dry_run_shows_five_and_writes_nothing(tool, images, tiny_captioner, tmp_path, capsys):
    before = snapshot(images)
    (tmp_path / "flags.yaml").write_text("dry_run: true\ntrigger_word: sks\n")
    assert run(tool, images, tiny_captioner, f"--config={tmp_path / 'flags.yaml'}") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert shown == [f"  {name}: sks, {caption}" for name, caption in said(images, NAMES[:5]).items()]
    assert snapshot(images) == before


def test_another_kind_of_model(tool, images, tmp_path):
    """GIT, a decoder that sees the image as words, where BLIP's decoder attends to it."""
    from transformers import GitConfig, GitForCausalLM

    _, processor = make_captioner()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = GitForCausalLM(GitConfig(vision_config={"image_size": 32, "patch_size": 8, **size}, vocab_size=80,
                                     bos_token_id=2, eos_token_id=3, pad_token_id=0, initializer_range=1.0, **size))
    model.save_pretrained(tmp_path / "git")
    processor.image_processor.save_pretrained(tmp_path / "git")
    processor.tokenizer.save_pretrained(tmp_path / "git")
    assert run(tool, images, tmp_path / "git") == 0
    pixels = processor.image_processor([Image.open(images / name) for name in NAMES], return_tensors="pt").pixel_values
    tokens = model.eval().generate(pixel_values=pixels, max_new_tokens=5)
    captions = [" ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert texts(images) == {name: caption for name, caption in zip(NAMES, captions) if caption}
    assert texts(images)


# ---------------------------------------------------------------------------------------------------------- stopping


def noting(tool, monkeypatch, at=None, error=KeyboardInterrupt):
    """Lists the images of every batch that is captioned from now on, and raises the error after so many batches."""
    seen, real = [], tool.caption

    def caption(*args, **options):
        for batch in real(*args, **options):
            seen.append([Path(path).name for path, _ in batch])
            yield batch
            if len(seen) == at:
                raise error

    monkeypatch.setattr(tool, "caption", caption)
    return seen


@pytest.mark.parametrize("form", ["metadata", "txt"])
def test_interrupted_run_goes_on(tool, images, tiny_captioner, monkeypatch, capsys, form):
    """What Ctrl-C leaves is whole and usable, and nothing is captioned twice."""
    expected = said(images)
    with monkeypatch.context() as patch:
        noting(tool, patch, at=2)
        assert run(tool, images, tiny_captioner, "--batch_size=3", f"--format={form}") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (images / JOURNAL).exists()
    if form == "metadata":
        assert texts(images) == {name: expected[name] for name in NAMES[:6]}
        write_metadata(images, [{"file_name": "00.png", "text": "mended by hand"}, *list(rows(images).values())[1:]])
        expected["00.png"] = "mended by hand"
    seen = noting(tool, monkeypatch)
    assert run(tool, images, tiny_captioner, "--batch_size=3", f"--format={form}") == 0
    assert seen == [["06.png", "07.png"]]
    found = texts(images) if form == "metadata" else {
        name: (images / name).with_suffix(".txt").read_text().strip() for name in NAMES}
    assert found == expected


def test_interrupted_overwriting_goes_on(tool, images, tiny_captioner, monkeypatch, capsys):
    """All captions are replaced or none, and another setting is not mixed in."""
    write_metadata(images, [{"file_name": name, "text": "old"} for name in NAMES])
    flags = ["--overwrite", "--batch_size=3"]
    with monkeypatch.context() as patch:
        noting(tool, patch, at=2)
        assert run(tool, images, tiny_captioner, *flags) == 130
    assert set(texts(images).values()) == {"old"}
    before = snapshot(images)
    assert run(tool, images, tiny_captioner, *flags, "--suffix=new") == 2
    assert f"{images / JOURNAL}: holds captions of a run that was stopped" in (message := capsys.readouterr().err)
    assert "--suffix=None" in message
    assert snapshot(images) == before
    seen = noting(tool, monkeypatch)
    assert run(tool, images, tiny_captioner, *flags) == 0
    assert seen == [["06.png", "07.png"]]
    assert texts(images) == said(images)
    assert not (images / JOURNAL).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_at_any_moment_loses_one_batch_at_most(tool, images, tiny_captioner, monkeypatch, tmp_path, overwrite):
    """As the disk is after each batch, and in the midst of a journal's line, a run ends like one without a stop."""
    flags = ["--batch_size=2", *(["--overwrite"] if overwrite else [])]
    write_metadata(images, [{"file_name": "00.png", "text": "old", "score": 1}])
    original, states, real = (images / "metadata.jsonl").read_bytes(), [], tool.caption

    def caption(*args, **options):
        for number, batch in enumerate(real(*args, **options)):
            if number:  # the batch before is in the journal now
                states.append(shutil.copytree(images, tmp_path / f"state{number}"))
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(tool, "caption", caption)
        assert run(tool, images, tiny_captioner, *flags) == 0
    expected = said(images) if overwrite else said(images) | {"00.png": "old"}
    assert texts(images) == expected
    assert len(states) == 3
    seen = noting(tool, monkeypatch)
    for number, state in enumerate(states, 1):
        for cut in (0, 1, 20):
            copy = shutil.copytree(state, tmp_path / f"state{number}-{cut}")
            assert (copy / "metadata.jsonl").read_bytes() == original
            journal = (copy / JOURNAL).read_bytes()
            (copy / JOURNAL).write_bytes(journal[: len(journal) - cut])
            del seen[:]
            assert run(tool, copy, tiny_captioner, *flags) == 0
            assert texts(copy) == expected
            assert sum(map(len, seen)) == len(NAMES) - (not overwrite) - 2 * number + (cut > 0)
            assert snapshot(copy).keys() == snapshot(images).keys()
    (copy / JOURNAL).write_bytes(b'{"model"')  # killed in the first line
    assert run(tool, copy, tiny_captioner) == 0
    assert texts(copy) == expected


@pytest.mark.slow
def test_killed_process_goes_on(tool, images, tiny_captioner, monkeypatch):
    """As a user's machine that loses its power: SIGKILL while the model is at work."""
    args = [images, f"--model={tiny_captioner}", "--max_new_tokens=200", "--batch_size=1"]
    process = start_script(args, script=TOOL)
    kill_when(process, lambda: (images / JOURNAL).exists() and (images / JOURNAL).read_bytes().count(b"\n") >= 3)
    noted = (images / JOURNAL).read_bytes().count(b"\n") - 1
    assert 2 <= noted < 8
    assert not (images / "metadata.jsonl").exists()
    seen = noting(tool, monkeypatch)
    assert run(tool, images, tiny_captioner, "--batch_size=1", tokens=200) == 0
    assert len(seen) == 8 - noted
    assert texts(images) == said(images, tokens=200)


# ------------------------------------------------------------------------------------------------------------ errors


def test_bad_images_are_named(tool, tiny_captioner, messy_folder, monkeypatch, capsys):
    """Before the model is loaded; with --skip_bad_images the others are captioned."""
    messy = messy_folder(missing_caption="no_row")
    bad = {messy.bad[kind] for kind in ("truncated", "not_an_image", "too_small")}
    before = snapshot(messy.path)
    with monkeypatch.context() as patch:
        patch.delattr(tool, "load_models")
        assert run(tool, messy.path, tiny_captioner, "--overwrite") == 2
    message = capsys.readouterr().err
    assert "3 of 8 images are unusable" in message
    assert {path for path in messy.bad.values() if f"  {path}: " in message} == bad
    assert "Traceback" not in message
    assert snapshot(messy.path) == before
    assert run(tool, messy.path, tiny_captioner, "--overwrite", "--skip_bad_images") == 0
    names = [path.name for path in [*messy.good, messy.bad["no_caption"]]]
    expected = said(messy.path, names)
    found = texts(messy.path)
    assert {name: found[name] for name in names} == expected
    assert found["truncated.jpg"] == "a picture with a defect truncated"


def test_image_that_breaks_meanwhile_is_named(tool, images, tiny_captioner, monkeypatch, capsys):
    """What was captioned before it is written."""
    real = tool.usable

    def usable(*args):
        found = real(*args)
        (images / "06.png").write_bytes(b"broken")
        return found

    monkeypatch.setattr(tool, "usable", usable)
    assert run(tool, images, tiny_captioner, "--batch_size=2") == 2
    assert f"{images / '06.png'}: changed since it was checked" in capsys.readouterr().err
    assert texts(images) == said(images, NAMES[:6])


def test_wrong_words_are_listed_together(tool, tiny_pipeline, tmp_path, capsys):
    assert run(tool, tmp_path / "nowhere", tiny_pipeline / "text_encoder", "--precision=fp16",
               "--caption_column=file_name") == 2
    message = capsys.readouterr().err
    for part in (f"FOLDER={tmp_path / 'nowhere'}", "--precision=fp16: cannot be used on a CPU", "--caption_column",
                 "is a clip_text_model, no image-to-text model"):
        assert part in message
    assert run(tool, tmp_path, tmp_path / "no_model") == 2
    assert f"--model={tmp_path / 'no_model'}: no model's folder" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch_size=0", "--max_new_tokens=0", "--num_beams=0", "--format=csv"])
def test_wrong_flag_is_refused(tool, images, tiny_captioner, capsys, flag):
    assert run(tool, images, tiny_captioner, flag) == 2
    assert flag.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("name, text, flags, message", [
    ("metadata.jsonl", '{"file_name": "00.png"}\nno row', [], "row 2 is not a file_name and more"),
    ("metadata.jsonl", '{"text": "a"}', [], "row 1 is not"),
    ("metadata.csv", "file_name,text\n00.png,a\n", ["--overwrite"], "would stay in use"),
    ("metadata.jsonl", '{"file_name": "00.png", "text": "a"}', ["--overwrite", "--format=txt"], "would stay in use"),
    ("below/metadata.jsonl", '{"file_name": "07.png", "text": "a"}', ["--overwrite"], "would stay in use"),
    ("00.jpg", "", ["--format=txt"], "would share"),
])
def test_folder_that_cannot_be_captioned(tool, images, tiny_captioner, capsys, name, text, flags, message):
    (images / name).write_text(text)
    before = snapshot(images)
    assert run(tool, images, tiny_captioner, *flags) == 2
    assert message in capsys.readouterr().err
    assert snapshot(images) == before


def test_folder_without_images(tool, tmp_path, tiny_captioner, capsys):
    assert run(tool, tmp_path, tiny_captioner) == 2
    assert f"{tmp_path} holds no images" in capsys.readouterr().err


@pytest.mark.slow
def test_process_ends_with_one_message(tmp_path):
    """The default model, without a connection."""
    make_image(0).save(tmp_path / "a.png")
    ran = run_script([tmp_path], script=TOOL)
    assert ran.returncode == 2
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("caption_images.py: ")]
    assert "--model=Salesforce/blip-image-captioning-large: no model's folder, no name of one on the Hub" in line
    assert "Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_damaged_journal_is_named(tool, images, tiny_captioner, capsys):
    (images / JOURNAL).write_text("not json\n")
    before = snapshot(images)
    assert run(tool, images, tiny_captioner) == 2
    assert f"{images / JOURNAL}: is damaged; remove it" in capsys.readouterr().err
    assert snapshot(images) == before
