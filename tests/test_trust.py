"""Data and models of people whom nobody knows: nothing of theirs runs, nothing is read outside of their folder, and
what cannot be used is named. And the user's own: nobody learns tokens, files get the permissions of the umask."""

import io
import json
import os
import shutil
import stat
import struct
import sys
import zlib
from pathlib import Path

import datasets
import pytest
import torch
from conftest import load_script
from copies import FORK, end_of, run_main
from fake_hub import USER
from image_data import make_image, write_image_folder
from PIL import Image, ImageFile
from reach_hub import reaching
from running import SCRIPTS, TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_FLAX, run_script, status_of
from safetensors.torch import load_file
from training import parse, train, unet, words

from sdtune import inference
from sdtune.arguments import with_hidden_tokens
from sdtune.commands import caption, check, convert, push_dataset, push_model, show
from sdtune.dataset import read_folder, read_rows
from sdtune.errors import InputError, fitted
from sdtune.images import check_images
from sdtune.models import check_model, load_base

SIDE = 50_000  # pixels, of an image whose file is small
TOKEN = "hf_PlantedPlantedPlantedPlantedPlanted"
OTHER_TOKENS = {"HF_TOKEN": "hf_InTheEnvironmentInTheEnvironmen", "WANDB_API_KEY": "f00dfeedcafe" + 28 * "0"}
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])


class Marker:
    """A pickle of this makes a file when it is loaded as any pickle is."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def marker(tmp_path):
    """Where a Marker leaves its trace, which must not be there at the end of a test."""
    path = tmp_path / "code_was_run"
    yield path
    assert not path.exists()


@pytest.fixture
def model(tiny_pipeline, tmp_path):
    """A copy of the tiny pipeline."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))


def with_pickles(folder, marker):
    """Turns the weights of a pipeline folder into pickles that would run code, beside the weights that they hold."""
    for name, file in (
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ):
        (path,) = (folder / name).glob("*.safetensors")
        torch.save({**load_file(path), "extra": Marker(marker)}, folder / name / file)
    return folder


# ---------------------------------------------------------------------------------------------------- models


def test_the_marker_marks(tmp_path):
    torch.save({"a": Marker(tmp_path / "mark")}, tmp_path / "evil.bin")
    torch.load(tmp_path / "evil.bin", weights_only=False)["a"].close()
    assert (tmp_path / "mark").exists()


def test_safetensors_are_preferred_to_pickles_beside_them(model, tiny_pipeline, marker):
    with_pickles(model, marker)
    own, other = load_base(parse(f"--pretrained_model_name_or_path={model}")).unet.state_dict(), unet(tiny_pipeline)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_of_weights_run_nothing_and_are_refused(model, marker, part):
    with_pickles(model, marker)
    (weights,) = (model / part).glob("*.safetensors")
    weights.unlink()
    told = "a file holds more than weights, maybe code, which is not run; get it as .safetensors"
    for load, end in (
        (lambda: load_base(parse(f"--pretrained_model_name_or_path={model}")), "; mend it, or use another"),
        (lambda: inference.load_pipeline(str(model), [], torch.float32, "cpu"), ""),
    ):
        with pytest.raises(InputError) as caught:
            load()
        assert str(caught.value) == f"{model}: cannot be loaded ({told}){end}"


def test_plain_weights_in_a_pickle_are_taken(model, tiny_pipeline):
    (weights,) = (model / "unet").glob("*.safetensors")
    torch.save(load_file(weights), model / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    own, other = load_base(parse(f"--pretrained_model_name_or_path={model}")).unet.state_dict(), unet(tiny_pipeline)
    assert all(torch.equal(own[name], other[name]) for name in other)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_single_file_that_is_a_pickle_runs_nothing(tiny_pipeline, tmp_path, marker, capsys, suffix):
    path = tmp_path / f"evil{suffix}"
    torch.save({"state_dict": {"model.diffusion_model.x": torch.ones(1)}, "callbacks": Marker(marker)}, path)
    args = parse(f"--pretrained_model_name_or_path={path}", f"--single_file_config={tiny_pipeline}")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(args)
    assert status_of(convert.main, path, tmp_path / "folder", "--config_folder", tiny_pipeline) == 2
    assert f"{path}: cannot be read as weights" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_a_lora_file_that_is_a_pickle_runs_nothing(tiny_pipeline, tmp_path, marker):
    script = load_script(SCRIPTS[1])
    for name in ("pytorch_lora_weights.safetensors", "lora.bin"):
        torch.save({"unet.x.lora_A.weight": Marker(marker)}, tmp_path / name)
        args, _ = script.parse_flags(
            script.make_parser(),
            [f"--pretrained_model_name_or_path={tiny_pipeline}", f"--init_lora_weights={tmp_path / name}"],
            {},
        )
        (problem,) = script.check_adapters(args)
        assert problem.startswith(f"--init_lora_weights={tmp_path / name}: cannot be used")
        with pytest.raises(InputError, match=r"is no LoRA in a .safetensors file"):
            inference.find_loras([str(tmp_path / name)])


def plant_module(folder, marker):
    """Puts modules that leave a mark into a folder, where custom pipelines and parts have them."""
    code = f"open({str(marker)!r}, 'w').close()\nclass Mine: pass\n"
    for name in ("pipeline.py", "my_module.py", "unet/my_module.py", "unet/unet.py", "tokenizer/my_module.py"):
        (folder / name).write_text(code)


def change_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_code_in_a_model_folder_that_nothing_names_is_left_alone(model, tiny_pipeline, marker, monkeypatch):
    plant_module(model, marker)
    monkeypatch.chdir(model)
    monkeypatch.syspath_prepend(str(model))
    args = parse(f"--pretrained_model_name_or_path={model}", "--resolution=32")
    assert check_model(args) == []
    own = load_base(args).unet.state_dict()
    assert all(torch.equal(own[name], value) for name, value in unet(model).items())


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"unet": ["my_module", "Mine"]}, "its unet is of my_module.Mine, code that is not run"),
        ({"tokenizer": ["my_module", "Mine"]}, "its tokenizer is of my_module.Mine, code that is not run"),
        ({"more": ["antigravity", "x"]}, "its more is of antigravity.x, code that is not run"),
        ({"_class_name": ["pipeline", "Mine"]}, "its model_index.json names code of its own, ['pipeline', 'Mine']"),
    ],
)
def test_classes_of_others_in_a_model_are_refused_by_name(model, tmp_path, marker, monkeypatch, changes, told, capsys):
    plant_module(model, marker)
    change_index(model, **changes)
    monkeypatch.chdir(model)
    monkeypatch.syspath_prepend(str(model))  # where diffusers would import it from
    args = parse(f"--pretrained_model_name_or_path={model}", "--resolution=32")
    (problem,) = check_model(args)
    assert problem.startswith(f"--pretrained_model_name_or_path={model}: {told}")
    with pytest.raises(InputError, match="not run; use "):
        load_base(args)
    with pytest.raises(InputError) as caught:
        inference.read_configs("MODEL", str(model))
    assert told in str(caught.value)
    status_of(convert.main, model, tmp_path / "single.safetensors")  # which reads configs and weights by name
    assert "my_module" not in sys.modules


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_of_others_is_refused_by_name(model, tiny_captioner, image_folder, tmp_path, capsys, key):
    """transformers would fetch it from the Hub, and run it."""
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "evil/kernel"}))
    told = f"its text_encoder asks for code on the Hub, evil/kernel, as {key}, which is not run"
    args = parse(f"--pretrained_model_name_or_path={model}", "--resolution=32")
    (problem,) = check_model(args)
    assert problem.startswith(f"--pretrained_model_name_or_path={model}: {told}")
    for load in (lambda: load_base(args), lambda: inference.load_pipeline(str(model), [], torch.float32, "cpu")):
        with pytest.raises(InputError) as caught:
            load()
        assert told in str(caught.value)
    captioner = Path(shutil.copytree(tiny_captioner, tmp_path / "captioner"))
    config = json.loads((captioner / "config.json").read_text())
    (captioner / "config.json").write_text(json.dumps({**config, key: "evil/kernel"}))
    assert status_of(caption.main, image_folder(1), "--model", captioner, "--overwrite") == 2
    assert "asks for code on the Hub, evil/kernel" in capsys.readouterr().err


def test_no_library_is_told_to_trust_code(repo):
    """transformers asks in the terminal where it is not told, and diffusers takes no for an answer."""
    sources = [*repo.glob("sdtune/**/*.py"), *repo.glob("recipes/*.py"), *repo.glob("examples/*/*.py")]
    assert len(sources) > 40
    for path in sources:
        text = path.read_text()
        for forbidden in (
            "trust_remote_code=True",
            "weights_only=False",
            "yaml.load(",
            "import pickle",
            "allow_pickle",
        ):
            assert forbidden not in text, path
        assert text.count("AutoTokenizer.from_pretrained(") <= text.count("trust_remote_code"), path


def test_a_tokenizer_with_code_runs_nothing_and_asks_nothing(tiny_pipeline, tmp_path, marker, monkeypatch):
    folder = Path(shutil.copytree(tiny_pipeline / "tokenizer", tmp_path / "tokenizer"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "my_module.Mine"]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "my_module.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    args = parse(f"--pretrained_model_name_or_path={tiny_pipeline}", f"--tokenizer_name={folder}", "--resolution=32")
    for problem in check_model(args):
        assert problem.startswith(f"--tokenizer_name={folder}: ")


def test_a_captioner_with_code_runs_nothing_and_asks_nothing(tiny_captioner, image_folder, tmp_path, marker, capsys):
    folder = Path(shutil.copytree(tiny_captioner, tmp_path / "captioner"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "my_module.Mine", "AutoModelForImageTextToText": "my_module.Mine"}}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine"}))
    (folder / "my_module.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Mine: pass\n")
    assert status_of(caption.main, image_folder(2), "--model", folder) == 2
    assert f"--model={folder}: " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- images


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side=SIDE):
    """A PNG of side x side pixels, as small as such a file gets."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    row = bytes(1 + (side + 7) // 8)
    packer, packed = zlib.compressobj(9), []
    for _ in range(side):
        packed.append(packer.compress(row))
    packed.append(packer.flush())
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [png_chunk(b"IHDR", header), png_chunk(b"IDAT", b"".join(packed)), png_chunk(b"IEND", b"")]
    )


@pytest.fixture(scope="module")
def bomb_file():
    """The bytes of a PNG of 50,000 x 50,000 pixels."""
    content = bomb()
    assert len(content) < 1_000_000
    return content


@pytest.fixture
def undecoded(monkeypatch):
    """Fails a test that decodes as many pixels."""
    original = ImageFile.ImageFile.load

    def load(self):
        assert self.size[0] * self.size[1] < 1e6, f"{self.size} pixels were decoded"
        return original(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


TOLD_OF_BOMB = "2,500,000,000 pixels, more than the 178,956,970 that are opened; shrink it"


@every_script
def test_a_bomb_is_named_and_not_decoded_by_any_script(
    path, train_script, tiny_pipeline, image_folder, tmp_path, bomb_file, undecoded, capsys
):
    script = train_script if path == TRAIN_TEXT_TO_IMAGE else load_script(path)
    folder = image_folder(3)
    (folder / "bomb.png").write_bytes(bomb_file)
    (folder / "bomb.txt").write_text("a bomb")
    settings = {"max_train_steps": 1}
    if "dreambooth" in path.stem:
        settings |= {"train_data_dir": None, "instance_data_dir": folder, "instance_prompt": "a sks photo"}
    assert train(script, tiny_pipeline, folder, tmp_path / "out", **settings) == 2
    message = capsys.readouterr().err
    assert f"{folder / 'bomb.png'}: {TOLD_OF_BOMB}" in message
    assert "add --skip_bad_images" in message


def test_a_bomb_in_a_parquet_file_is_named_and_not_decoded(tmp_path, bomb_file, undecoded):
    folder = tmp_path / "set"
    folder.mkdir()
    buffer = io.BytesIO()
    make_image(0).save(buffer, "PNG")
    contents = [{"bytes": content, "path": None} for content in (buffer.getvalue(), bomb_file)]
    datasets.Dataset.from_dict({"image": contents, "text": ["a", "b"]}).to_parquet(folder / "train.parquet")
    rows = read_rows(parse(f"--dataset_name={folder}"), None, None)
    findings = check_images(rows, tmp_path / "checked.json")
    assert [finding[3] for finding in findings] == ["", TOLD_OF_BOMB]


@pytest.mark.parametrize("name", ["check", "caption", "show", "push_dataset"])
def test_a_bomb_is_named_or_left_out_by_every_command(
    name, image_folder, tmp_path, tiny_captioner, bomb_file, undecoded, capsys
):
    folder = image_folder(3)
    (folder / "bomb.png").write_bytes(bomb_file)
    (folder / "bomb.txt").write_text("a bomb")
    main, more, status = {
        "check": (check.main, ["--json", tmp_path / "report.json"], 1),
        "caption": (caption.main, ["--model", tiny_captioner, "--overwrite"], 2),
        "show": (show.main, ["--output", tmp_path / "sheet.png", "--resolution=32"], 0),
        "push_dataset": (push_dataset.main, ["me/mine", "--dry_run"], 2),
    }[name]
    if name == "caption":
        (folder / "bomb.txt").unlink()
    assert status_of(main, folder, *more) == status
    said = capsys.readouterr()
    if name == "show":
        assert "cannot use them: 1 unusable; `sdtune check` names them" in said.out
    else:
        assert "2,500,000,000 pixels" in " ".join((said.out + said.err).split())


def bombs_of_other_kinds():
    """{name: bytes} of files that are small and hold much beside their pixels, or many pages."""
    text = 200 * 2**20 * b"a"
    packed = zlib.compress(text, 9)
    plain = io.BytesIO()
    make_image(1).save(plain, "PNG")
    head, body = plain.getvalue()[:33], plain.getvalue()[33:]  # behind IHDR
    files = {
        "ztxt.png": head + png_chunk(b"zTXt", b"Comment\0\0" + packed) + body,
        "itxt.png": head + png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed) + body,
        "iccp.png": head + png_chunk(b"iCCP", b"Profile\0\0" + packed) + body,
    }
    frames = [make_image(1).convert("P") for _ in range(300)]
    for kind in ("GIF", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        first, *others = [frame.convert("RGB") for frame in frames] if kind != "GIF" else frames
        first.save(buffer, kind, save_all=True, append_images=others)
        files[f"many.{kind.lower()}"] = buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def other_bombs():
    return bombs_of_other_kinds()


@pytest.mark.parametrize("name", ["ztxt.png", "itxt.png", "iccp.png", "many.gif", "many.webp", "many.tiff"])
def test_texts_and_pages_of_a_file_are_not_unpacked(other_bombs, tmp_path, name):
    """The first picture is used, and the peak of memory stays where it is."""
    import tracemalloc

    path = tmp_path / name
    path.write_bytes(other_bombs[name])
    rows = [{"image": {"path": str(path), "bytes": None}}]
    tracemalloc.start()
    (finding,) = check_images(rows, tmp_path / "checked.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert finding[1:] == [32, 32, ""]
    assert peak < 16 * 2**20


def test_what_is_no_picture_by_its_content_starts_no_program(tmp_path, monkeypatch):
    """Pillow would have Ghostscript draw PostScript, whatever the file's name."""
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "page.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    assert Image.open(path).format == "EPS"
    (finding,) = check_images([{"image": {"path": str(path), "bytes": None}}], tmp_path / "checked.json")
    assert finding[3] == "no image that Pillow knows"


# ---------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", ["png", "txt", "jsonl", "parquet"])
def test_pipes_and_sockets_are_named_and_not_waited_for(image_folder, tmp_path, kind):
    folder = image_folder(2)
    if kind == "parquet":
        shutil.rmtree(folder)
        folder.mkdir()
        os.mkfifo(folder / "train.parquet")
        with pytest.raises(InputError, match=r"train.parquet: is no regular file; remove it"):
            read_rows(parse(f"--dataset_name={folder}"), None, None)
        return
    if kind == "jsonl":
        (folder / "metadata.jsonl").unlink()
        os.mkfifo(folder / "metadata.jsonl")
        with pytest.raises(InputError, match=r"metadata.jsonl: is no regular file; remove it"):
            read_folder(folder, "text")
        return
    os.mkfifo(folder / f"pipe.{kind}")
    if kind == "txt":
        make_image(3).save(folder / "pipe.png")
    rows = read_folder(folder, "text")
    findings = dict(zip([Path(row["image"]["path"]).name for row in rows], check_images(rows, tmp_path / "c.json")))
    assert findings["pipe.png"][3] == ("is no regular file; remove it" if kind == "png" else "")


def test_files_with_holes_are_named_and_not_read(image_folder, tmp_path):
    """They take no place on a disk, and all memory."""
    folder = image_folder(2)
    with (folder / "huge.png").open("wb") as file:
        file.truncate(2**40)
    rows = read_folder(folder, "text")
    problems = [found[3] for found in check_images(rows, tmp_path / "checked.json")]
    assert problems == ["", "", "1,099,511,627,776 bytes, more than any picture that is opened; shrink it"]
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(2**40)
    rows = read_folder(folder, "text")
    told = "its caption, a .txt, has more than 1,048,576 bytes; shorten or remove it"
    assert (list(rows["problem"]), list(rows["captions"])[2]) == ([None, None, told], [])


@pytest.mark.parametrize("command", ["caption", "push_dataset", "check", "show"])
def test_links_out_of_a_folder_are_refused_by_every_command(command, image_folder, tmp_path, tiny_captioner, capsys):
    folder, secret = image_folder(2), tmp_path / "secret.png"
    make_image(7).save(secret)
    (folder / "linked.png").symlink_to(secret)
    main, more = {
        "check": (check.main, []),
        "caption": (caption.main, ["--model", tiny_captioner, "--overwrite"]),
        "show": (show.main, ["--output", tmp_path / "sheet.png", "--resolution=32"]),
        "push_dataset": (push_dataset.main, ["me/mine", "--dry_run", "--without_captions"]),
    }[command]
    assert status_of(main, folder, *more) == 2
    told = capsys.readouterr().err
    assert f"{folder}: 1 file in it is a link that leads out of it, such as\n  {folder / 'linked.png'}\n" in told
    assert "add --follow_symlinks" in told
    assert status_of(main, folder, *more, "--follow_symlinks") in (0, 1)


@pytest.mark.parametrize("name", ["metadata.jsonl", ".caption_images.jsonl", "00.txt"])
def test_captions_are_not_written_through_links(image_folder, tmp_path, tiny_captioner, capsys, name):
    """The link may be broken: what it names would be made."""
    folder = image_folder(2)
    (folder / "metadata.jsonl").unlink()
    (folder / name).symlink_to(tmp_path / "outside")
    form = "txt" if name == "00.txt" else "metadata"
    assert status_of(caption.main, folder, "--model", tiny_captioner, f"--format={form}") == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "outside").exists()


def test_metadata_that_is_a_link_opens_no_other_folder(image_folder, tmp_path):
    """The folder of what it leads to is none of the dataset's."""
    folder, other = image_folder(2), write_image_folder(tmp_path / "other", 2)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.jsonl").symlink_to(other / "metadata.jsonl")
    with pytest.raises(InputError, match=f"{folder / 'metadata.jsonl'}"):
        read_folder(folder, "text")


def test_linked_folders_and_loops_are_not_entered(image_folder, tmp_path, capsys):
    folder = image_folder(2)
    other = write_image_folder(tmp_path / "other", 3)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "more").symlink_to(other, target_is_directory=True)
    (folder / "self.png").symlink_to("self.png")
    rows = read_folder(folder, "text")
    names = [Path(row["image"]["path"]).name for row in rows]
    assert names == ["00.png", "01.png", "self.png"]
    assert "loop, more" in capsys.readouterr().out
    (problem,) = [found[3] for found in check_images(rows, tmp_path / "checked.json") if found[3]]
    assert "Too many levels of symbolic links" in problem


@pytest.mark.parametrize("place", ["../secret/train.parquet", "{secret}/train.parquet", "hf://datasets/a/b/c.parquet"])
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_cannot_name_data_elsewhere(tmp_path, place, card):
    secret, folder = tmp_path / "secret", tmp_path / "set"
    secret.mkdir()
    folder.mkdir()
    for number, place_of in enumerate((secret, folder)):
        buffer = io.BytesIO()
        make_image(number).save(buffer, "PNG")
        images = [{"bytes": buffer.getvalue(), "path": None}]
        datasets.Dataset.from_dict({"image": images, "text": ["a"]}).to_parquet(place_of / "train.parquet")
    text = f"configs:\n- config_name: default\n  data_files: {place.format(secret=secret)}\n"
    (folder / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    with pytest.raises(InputError) as caught:
        read_rows(parse(f"--dataset_name={folder}"), None, None)
    if not place.startswith("hf:"):  # which is out of reach here
        assert "which leads out of it" in str(caught.value)


def test_a_saved_dataset_cannot_name_data_elsewhere(tmp_path):
    for name in ("secret", "set"):
        rows = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}], "text": ["a"]})
        rows.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / name)
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../secret/data-00000-of-00001.arrow"}]
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"names the file '../secret/.*', which leads out of"):
        read_rows(parse(f"--dataset_name={tmp_path / 'set'}"), None, None)


@pytest.mark.parametrize("name", ["set.py", "dataset.py", "data.pkl", "loader.pickle"])
def test_code_in_a_dataset_folder_is_not_run(tmp_path, marker, name):
    folder = tmp_path / "set"
    folder.mkdir()
    if name.endswith(".py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    else:
        torch.save({"a": Marker(marker)}, folder / name, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=f"--dataset_name={folder}: cannot be loaded"):
        read_rows(parse(f"--dataset_name={folder}"), None, None)


def test_names_that_steer_a_terminal_are_escaped(image_folder, tmp_path, train_script, tiny_pipeline, capsys):
    folder = image_folder(2)
    names = ["\x1b[31mred\x1b[0m.png", "two\nlines.png", "bell\a.png", "tab\t.png", f"{'n' * 251}.png"]
    for name in names:
        (folder / name).write_bytes(b"no image")
        (folder / name).with_suffix(".txt").write_text("\x1b]0;title\a")
    os.symlink("nowhere", folder / "link\x1b[2J.png")
    assert train(train_script, tiny_pipeline, folder, tmp_path / "out", max_train_steps=1) == 2
    said = "".join(capsys.readouterr())
    assert not [sign for sign in said if not sign.isprintable() and sign != "\n"]
    assert r"\x1b[31mred\x1b[0m.png: no image that Pillow knows" in said
    assert r"two\nlines.png: no image that Pillow knows" in said
    assert len(said.strip().split("\n")) <= 12


def test_names_that_are_not_utf_8_are_named(image_folder):
    folder = image_folder(1)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")).write_bytes(b"")
    with pytest.raises(InputError, match=r"its name is not UTF-8; rename it"):
        read_folder(folder, "text")


@every_script
@pytest.mark.parametrize("planted", ["../secret.png", "{secret}", "linked.png", "below/../../secret.png"])
def test_a_hostile_dataset_is_refused_by_every_script(
    path, planted, train_script, tiny_pipeline, image_folder, tmp_path, capsys, monkeypatch
):
    """Nothing is read outside: the secret is never opened."""
    script = train_script if path == TRAIN_TEXT_TO_IMAGE else load_script(path)
    folder, secret = image_folder(2), tmp_path / "secret.png"
    make_image(7).save(secret)
    if planted == "linked.png":
        (folder / planted).symlink_to(secret)
    name = planted.format(secret=secret)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": "private"}) + "\n")
    opened = []
    sys_open = io.open

    def noted(file, *args, **kwargs):
        opened.append(os.path.realpath(file) if isinstance(file, (str, os.PathLike)) else file)
        return sys_open(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", noted)
    monkeypatch.setattr("builtins.open", noted)
    settings = {"max_train_steps": 1}
    if "dreambooth" in path.stem:
        settings |= {"train_data_dir": None, "instance_data_dir": folder, "instance_prompt": "a sks photo"}
    assert train(script, tiny_pipeline, folder, tmp_path / "out", **settings) == 2
    monkeypatch.undo()
    assert str(secret) not in opened
    message = capsys.readouterr().err
    assert name in message
    assert "lead out of it" in message or "leads out of" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- tokens


def found_in(folder, *tokens):
    """The files below a folder that hold one of the tokens."""
    found = []
    for path in Path(folder).rglob("*"):
        if path.is_file() and any(token.encode() in path.read_bytes() for token in tokens):
            found.append(str(path.relative_to(folder)))
    return found


@pytest.mark.parametrize(
    "argv, hidden",
    [
        (["--seed=1", "--hub_token=a"], ["--seed=1", "--hub_token=***"]),
        (["--hub_token", "a", "--seed=1"], ["--hub_token", "***", "--seed=1"]),
        (["--seed", "1"], ["--seed", "1"]),
    ],
)
def test_the_words_of_a_process_hold_no_token(argv, hidden, monkeypatch):
    assert with_hidden_tokens(argv) == hidden
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    script = load_script(TRAIN_TEXT_TO_IMAGE)
    args, problems = script.parse_flags(script.make_parser(), None, {})
    assert problems == []
    assert args.hub_token == ("a" if "***" in str(hidden) else None)
    assert sys.argv == ["train.py", *hidden]


def test_messages_hold_no_token(monkeypatch):
    for name, value in OTHER_TOKENS.items():
        monkeypatch.setenv(name, value)
    quoted = f"401 for https://user:{TOKEN}@hub/x (Bearer {OTHER_TOKENS['HF_TOKEN']}; {OTHER_TOKENS['WANDB_API_KEY']})"
    assert fitted(quoted) == "401 for https://user:hf_***@hub/x (Bearer ***; ***)"


@pytest.mark.parametrize("token", ["hf_with\nline", "hf_with space", "hf_\u00e9", ""])
def test_a_token_that_no_header_takes_is_refused_and_not_shown(token, train_script, capsys):
    with pytest.raises(SystemExit):
        train_script.main([f"--hub_token={token}", "--push_to_hub"])
    said = capsys.readouterr().err
    assert "--hub_token: is empty, or holds spaces or other letters than ASCII's; copy it once more" in said
    assert "hf_" not in said


def run_as_process(path, line, said, hub, monkeypatch, **environment):
    """Runs a script with a command line of its own, of which trackers may read the words; returns its exit status. JAX
    cannot be copied with its threads."""
    if path == TRAIN_TEXT_TO_IMAGE_FLAX:
        result = run_script(line, {**hub.env, **environment}, script=path)
        said.write_text(result.stdout + result.stderr)
        return result.returncode
    script = load_script(path)

    def main():
        sys.argv = [str(path), *line]
        script.main()

    with reaching(hub, monkeypatch):
        copy = FORK.Process(target=run_main, args=(main, [], said, environment))
        copy.start()
        return end_of(copy)


@pytest.mark.slow
@every_script
def test_a_planted_token_is_found_nowhere(path, tiny_pipeline, image_folder, tmp_path, fake_hub, monkeypatch):
    """In a flag, in a configuration file and in the environment; in the result, checkpoints, logs, trackers, the card,
    on the Hub, and in what is printed."""
    folder, out, config = image_folder(4), tmp_path / "out", tmp_path / "recipe.yaml"
    in_flag = path in SCRIPTS[:3]
    settings = {
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "report_to": "all",
        "num_validation_samples": 1,
        "validation_prompts": ["a red circle"],
        "validation_num_inference_steps": 1,
        "push_to_hub": True,
        "hub_token": TOKEN if in_flag else None,
        "config": config,
    }
    config.write_text("seed: 1\n" if in_flag else f"hub_token: {TOKEN}\n")
    if "dreambooth" in path.stem:
        settings |= {"train_data_dir": None, "instance_data_dir": folder, "instance_prompt": "a sks photo"}
    env = {**OTHER_TOKENS, "WANDB_DIR": str(tmp_path / "wandb"), "HUGGING_FACE_HUB_TOKEN": TOKEN}
    (tmp_path / "wandb").mkdir()
    line = words(tiny_pipeline, folder, out, **settings)
    status = run_as_process(path, line, tmp_path / "said", fake_hub, monkeypatch, **env)
    assert status == 0, (tmp_path / "said").read_text()
    assert fake_hub.tokens == {TOKEN}  # which was used
    assert list(tmp_path.glob("wandb/**/*.wandb"))
    assert list(out.rglob("events.*"))
    config.unlink()
    assert found_in(tmp_path, TOKEN, *OTHER_TOKENS.values()) == []  # what was printed lies there too
    for repo in fake_hub.repos.values():
        assert not [name for name, content in repo.files.items() if TOKEN.encode() in content]


@pytest.mark.parametrize("fails", ["whoami", "create", "commit"])
@pytest.mark.parametrize("command", ["push_model", "push_dataset", "train"])
def test_a_failed_upload_shows_no_token(
    command, fails, train_script, tiny_pipeline, image_folder, tmp_path, fake_hub, monkeypatch, capsys
):
    fake_hub.fail[fails] = 403
    folder = image_folder(2)
    with reaching(fake_hub, monkeypatch):
        for name, value in OTHER_TOKENS.items():
            monkeypatch.setenv(name, value)
        if command == "train":
            settings = {"max_train_steps": 1, "push_to_hub": True, "hub_token": TOKEN}
            status = train(train_script, tiny_pipeline, folder, tmp_path / "out", **settings)
        else:
            main, source = {
                "push_model": (push_model.main, tiny_pipeline),
                "push_dataset": (push_dataset.main, folder),
            }[command]
            status = status_of(main, source, f"{USER}/mine", f"--hub_token={TOKEN}")
    assert status in (1, 2) or (fails == "whoami" and command != "train")  # which commands do not ask
    said = "".join(capsys.readouterr())
    assert not [token for token in (TOKEN, *OTHER_TOKENS.values()) if token in said]
    assert found_in(tmp_path, TOKEN, *OTHER_TOKENS.values()) == []


# ---------------------------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@every_script
def test_what_a_run_writes_has_the_permissions_that_umask_asks_for(
    path, umask, train_script, tiny_pipeline, image_folder, tmp_path
):
    """Result, checkpoints, LoRA files, cache, samples, logs, lock; safetensors makes files for their owner alone."""
    script = train_script if path == TRAIN_TEXT_TO_IMAGE else load_script(path)
    folder = image_folder(4)
    settings = {
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "report_to": "tensorboard",
        "num_validation_samples": 1,
        "keep_best": True,
        "use_ema": "lora" not in path.stem,
        "validation_prompts": ["a red circle"],
        "validation_num_inference_steps": 1,
        "cache_dir": tmp_path / "cache",
        "cache_latents": True,
        "center_crop": True,
        "output_kohya_format": "lora" in path.stem,
    }
    if path == TRAIN_TEXT_TO_IMAGE_FLAX:  # it compiles for a minute to draw samples, and writes them as the others do
        del settings["validation_prompts"], settings["validation_num_inference_steps"]
    flags = vars(script.make_parser().parse_args([]))
    settings = {flag: value for flag, value in settings.items() if flag in flags}
    if "dreambooth" in path.stem:
        settings |= {"train_data_dir": None, "instance_data_dir": folder, "instance_prompt": "a sks photo"}
    before = os.umask(umask)
    try:
        assert train(script, tiny_pipeline, folder, tmp_path / "out", **settings) == 0
    finally:
        os.umask(before)
    found = {}
    for place in ("out", "cache"):
        for file in (tmp_path / place).rglob("*"):
            kind = 0o777 if file.is_dir() else 0o666
            if stat.S_IMODE(file.stat().st_mode) != kind & ~umask:
                found[str(file.relative_to(tmp_path))] = oct(file.stat().st_mode)
    names = {file.suffix for file in (tmp_path / "out").rglob("*")}
    assert {".safetensors", ".json", ".jsonl", ".md"} <= names
    assert ".png" in names or path == TRAIN_TEXT_TO_IMAGE_FLAX
    assert list((tmp_path / "cache").rglob("*.safetensors")) or "cache_latents" not in flags
    assert found == {}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_commands_write_has_the_permissions_that_umask_asks_for(umask, tiny_pipeline, tmp_path):
    before = os.umask(umask)
    try:
        assert status_of(convert.main, tiny_pipeline, tmp_path / "one.safetensors") == 0
        words_back = [tmp_path / "one.safetensors", tmp_path / "folder", "--config_folder", tiny_pipeline]
        assert status_of(convert.main, *words_back) == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".json")]
    assert len(files) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files if path.suffix == ".safetensors"} == {0o666 & ~umask}


@pytest.mark.parametrize("name", ["picture.dat", ".hidden/picture.png"])
def test_a_caption_beside_an_image_that_metadata_alone_names_is_no_way_out(tmp_path, name):
    """It is no image by its name, or lies in a hidden folder; the .txt beside it is looked at like any other."""
    folder = write_image_folder(tmp_path / "data", 2)
    (tmp_path / "secret.txt").write_text("a secret")
    place = folder / name
    place.parent.mkdir(exist_ok=True)
    make_image(3).save(place, "PNG")
    place.with_suffix(".txt").symlink_to(tmp_path / "secret.txt")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": ""}) + "\n")
    with pytest.raises(InputError, match=r"1 file in it is a link that leads out of it, such as\n  .*picture\.txt"):
        read_folder(folder, "text")
