"""The emoji of `make demo-emoji`: what is chosen and held out, fetched, rendered and read back. No test needs the
package or, but for one, the library that renders it."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.error
from collections import Counter

import numpy as np
import pytest
from conftest import load_script
from PIL import Image, ImageDraw
from running import REPO, environment

from sdtune.commands import evaluate

emoji = load_script(REPO / "miniature" / "emoji.py")
render = emoji.render


@pytest.fixture(scope="module")
def measure_emoji():
    return load_script(REPO / "miniature" / "measure_emoji.py")


@pytest.fixture
def package(tmp_path):
    """A folder with an icons.json that has every name that is chosen; each body is the name itself."""
    icons = [record["icon"] for split in ("train", "held_out") for record in emoji.records(split)]
    folder = tmp_path / "noto"
    folder.mkdir()
    content = {"width": 128, "height": 128, "icons": {icon: {"body": icon} for icon in icons}}
    (folder / "icons.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def stand_in(monkeypatch):
    """Renders the circles as red discs and all else as blue squares, both half as wide as the picture."""

    def rasterise(svg, side):
        image = Image.new("RGBA", (side, side))
        draw = ImageDraw.Draw(image)
        box = (side // 4, side // 4, side - side // 4 - 1, side - side // 4 - 1)
        if "-circle" in svg:
            draw.ellipse(box, fill="red")
        else:
            draw.rectangle(box, fill="blue")
        return image

    monkeypatch.setattr(emoji, "rasterise", rasterise)


# ---------------------------------------------------------------------------------------------- what is chosen


def test_captions_are_the_names():
    texts = {record["icon"]: record["text"] for split in ("train", "held_out") for record in emoji.records(split)}
    assert texts["blue-heart"] == "an emoji of a blue heart"
    assert texts["orange-heart"] == "an emoji of an orange heart"
    assert texts["closed-book"] == "an emoji of a red book"
    assert texts["high-heeled-shoe"] == "an emoji of a high heeled shoe"
    assert emoji.records("not_there")[0] == {
        "text": "an emoji of a purple book",
        "icon": None,
        "thing": "book",
        "colour": "purple",
    }


def test_no_combination_that_is_held_out_or_not_there_is_trained_on():
    found = {split: emoji.records(split) for split in ("train", "held_out", "not_there")}
    assert {split: len(records) for split, records in found.items()} == {"train": 94, "held_out": 7, "not_there": 12}
    texts = Counter(record["text"] for records in found.values() for record in records)
    assert max(texts.values()) == 1
    icons = Counter(record["icon"] for split in ("train", "held_out") for record in found[split])
    assert max(icons.values()) == 1
    colours = Counter(record["colour"] for record in found["train"])
    things = Counter(record["thing"] for record in found["train"] if record["colour"])
    for record in (*found["held_out"], *found["not_there"]):
        assert things[record["thing"]] >= 2, record
        assert colours[record["colour"]] >= 1, record
    for record in found["not_there"]:
        assert record["colour"] not in emoji.COLOURED[record["thing"]]


def test_names_of_the_picture_are_of_their_splits(measure_emoji):
    splits = {record["text"]: split for split in measure_emoji.NOTES for record in emoji.records(split)}
    assert {splits[emoji.caption(name)] for name in measure_emoji.SEEN} == {"train"}
    unseen = [splits[emoji.caption(name)] for name in measure_emoji.UNSEEN]
    assert unseen == ["held_out"] * 4 + ["not_there"] * 4


def test_recipe_is_of_the_script_and_of_the_names():
    script = load_script(REPO / "examples" / "text_to_image" / "train_text_to_image_lora.py")
    recipe = str(REPO / "examples" / "configs" / "emoji.yaml")
    args, problems = script.parse_flags(script.make_parser(), ["--config", recipe], {})
    assert problems == []
    assert args.train_text_encoder
    known = {record["text"] for split in ("train", "held_out", "not_there") for record in emoji.records(split)}
    assert len(args.validation_prompts) == 5
    assert set(args.validation_prompts) <= known
    words = ["miniature/pipeline", "demo/emoji/train", "--config", recipe, "--num_validation_samples", "47"]
    evaluation, problems = evaluate.parse_args(words)
    assert problems == []
    assert (evaluation.resolution, evaluation.clip_model) == (args.resolution, "miniature/clip")
    assert args.num_validation_samples == evaluation.num_validation_samples


# ---------------------------------------------------------------------------------------------- fetching


def write_package(path, icons):
    """Writes a package like npm's with an icons.json; returns its SHA-256."""
    content = json.dumps(icons).encode()
    member = tarfile.TarInfo("package/icons.json")
    member.size = len(content)
    with tarfile.open(path, "w:gz") as package:
        package.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_npm(folder, text):
    """Writes a program of the name of npm that does what the shell is told."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "npm").chmod(0o755)
    return str(folder)


def test_package_is_fetched_by_npm(tmp_path, monkeypatch, capsys):
    digest = write_package(tmp_path / "made.tgz", {"icons": {"a": 1}})
    told = tmp_path / "told"
    npm = write_npm(tmp_path / "bin", f'echo "$@" > {told}\ncp {tmp_path}/made.tgz "$4/iconify-json-noto-1.2.9.tgz"')
    monkeypatch.setenv("PATH", f"{npm}:{os.environ['PATH']}")
    monkeypatch.setattr(emoji, "SHA256", digest)
    folder = tmp_path / "noto"
    emoji.main(["fetch", "--package_dir", str(folder)])
    assert told.read_text().startswith(f"pack @iconify-json/noto@1.2.9 --pack-destination {folder}")
    assert json.loads((folder / "icons.json").read_text()) == {"icons": {"a": 1}}
    assert "Apache-2.0" in capsys.readouterr().out


def test_package_is_downloaded_where_npm_is_missing(tmp_path, monkeypatch):
    digest = write_package(tmp_path / "made.tgz", {"icons": {"b": 2}})
    asked = []

    def open_address(address, timeout):
        asked.append(address)
        return (tmp_path / "made.tgz").open("rb")

    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    monkeypatch.setattr(emoji.urllib.request, "urlopen", open_address)
    monkeypatch.setattr(emoji, "SHA256", digest)
    emoji.fetch(tmp_path / "noto")
    assert [address.removeprefix(emoji.REGISTRY) for address in asked] == ["/@iconify-json/noto/-/noto-1.2.9.tgz"]
    assert json.loads((tmp_path / "noto" / "icons.json").read_text()) == {"icons": {"b": 2}}


def test_what_cannot_be_fetched_is_told_in_a_line(tmp_path, monkeypatch):
    npm = write_npm(tmp_path / "bin", 'echo "npm error code ENOTFOUND" >&2\necho "npm error syscall x" >&2\nexit 1')
    words = [sys.executable, str(REPO / "miniature" / "emoji.py"), "fetch", "--package_dir", "demo/noto"]
    env = environment({"PATH": f"{npm}:{os.environ['PATH']}"})
    done = subprocess.run(words, cwd=tmp_path, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    line = "Cannot fetch Noto emoji (npm pack: ENOTFOUND): connect, or put noto-1.2.9.tgz into demo/noto\n"
    assert done.stderr == line
    assert len(line) <= 100

    def fail(address, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    monkeypatch.setattr(emoji.urllib.request, "urlopen", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        emoji.main(["fetch", "--package_dir", "demo/noto"])
    assert f"{stop.value.code}\n" == line.replace("npm pack: ENOTFOUND", "no route to host")
    assert not list((tmp_path / "demo" / "noto").iterdir())


def test_package_that_lies_there_is_used_if_it_is_the_right_one(tmp_path, monkeypatch):
    digest = write_package(tmp_path / "noto-1.2.9.tgz", {"icons": {"c": 3}})
    monkeypatch.setattr(emoji, "download", lambda folder: pytest.fail("downloaded"))
    with pytest.raises(SystemExit) as stop:
        emoji.fetch(tmp_path)
    assert "is not version 1.2.9 of @iconify-json/noto: delete it" in stop.value.code
    assert not (tmp_path / "icons.json").exists()
    monkeypatch.setattr(emoji, "SHA256", digest)
    emoji.fetch(tmp_path)
    assert json.loads((tmp_path / "icons.json").read_text()) == {"icons": {"c": 3}}


# ---------------------------------------------------------------------------------------------- rendering


def test_folders_have_views_of_what_is_trained_on_and_one_of_what_is_held_out(package, stand_in, tmp_path):
    for name in ("once", "again"):
        emoji.main(["render", "--package_dir", str(package), "--output_dir", str(tmp_path / name)])
    rows = {}
    for split in ("train", "held_out"):
        folder = tmp_path / "once" / split
        rows[split] = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert {row["file_name"] for row in rows[split]} == {path.name for path in folder.glob("*.png")}
        for path in folder.iterdir():
            assert path.read_bytes() == (tmp_path / "again" / split / path.name).read_bytes()
    assert Counter(row["icon"] for row in rows["train"]) == dict.fromkeys(
        (record["icon"] for record in emoji.records("train")), emoji.NUM_VIEWS
    )
    assert [row["text"] for row in rows["held_out"]] == [record["text"] for record in emoji.records("held_out")]
    # The square of view 0, half of 49 pixels wide, is in the middle; the others are larger or smaller, and elsewhere.
    images = [np.asarray(Image.open(tmp_path / "once" / "train" / f"star_{view}.png")) for view in range(6)]
    blue = [np.argwhere((image == (0, 0, 255)).all(-1)) for image in images]
    assert (blue[0].min(0).tolist(), blue[0].max(0).tolist()) == ([19, 19], [43, 43])
    assert all(((image == 255).all(-1) | (image == (0, 0, 255)).all(-1)).all() for image in images)
    assert len({(*area.min(0), *area.max(0)) for area in blue}) == 6
    assert all(21 <= np.ptp(area[:, 0]) <= 27 for area in blue)


def test_icon_is_drawn_in_its_own_frame():
    package = {
        "width": 128,
        "icons": {"a": {"body": "<g/>"}, "b": {"body": "<b/>", "left": 3, "top": -2, "height": 9}},
    }
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    assert emoji.svg_of(package, "a") == f'<svg {names} viewBox="0 0 128 16"><g/></svg>'
    assert emoji.svg_of(package, "b") == f'<svg {names} viewBox="3 -2 128 9"><b/></svg>'


def test_library_draws_what_the_package_says():
    pytest.importorskip("resvg_py")
    body = '<path fill="#f44336" d="M0 0H128V64H0Z"/>'
    image = emoji.draw_view({"width": 128, "height": 128, "icons": {"a": {"body": body}}}, "a", 0)
    assert image[20, 32].tolist() == [244, 67, 54]
    assert image[45, 32].tolist() == [255, 255, 255]
    assert image[2, 2].tolist() == [255, 255, 255]


def test_what_is_missing_is_told(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(SystemExit) as stop:
        emoji.render_folders(package, tmp_path / "emoji")
    assert stop.value.code == "Rendering emoji needs a library: pip install -r requirements_emoji.txt"
    (package / "icons.json").unlink()
    with pytest.raises(SystemExit, match=r"icons.json is missing: python miniature/emoji.py fetch --package_dir"):
        emoji.render_folders(package, tmp_path / "emoji")


# ---------------------------------------------------------------------------------------------- reading back


def drawn(shape, colour, ground=(255, 255, 255), radius=18):
    """A plain shape: uint8 (64, 64, 3)."""
    canvas = render.Canvas(ground)
    canvas.polygon(render.outline(shape, 30, 34, radius), colour)
    return canvas.pixels()


@pytest.mark.parametrize(("name", "rgb"), emoji.INKS)
def test_colour_is_read_in_whatever_shape(name, rgb):
    shade = tuple(np.clip(np.array(rgb) + (9, -9, 9), 0, 255).tolist())
    for shape in render.SHAPES:
        assert emoji.read_colour(drawn(shape, rgb)) == name
        assert emoji.read_colour(drawn(shape, shade, ground=(250, 245, 250))) == name


def test_colour_is_that_of_most_pixels():
    image = drawn("square", (25, 118, 210)).copy()
    image[20:30] = np.where((image[20:30] == 255).all(-1, keepdims=True), 255, (244, 67, 54))
    assert emoji.read_colour(image) == "blue"
    image[20:42] = np.where((image[20:42] == 255).all(-1, keepdims=True), 255, (244, 67, 54))
    assert emoji.read_colour(image) == "red"


def test_thing_is_read_in_whatever_size_and_colour():
    outlines = [(shape, emoji.outline_of(drawn(shape, (244, 67, 54)))) for shape in render.SHAPES]
    for shape in render.SHAPES:
        for radius, colour in ((13, (171, 71, 188)), (21, (66, 66, 66))):
            assert emoji.read_thing(drawn(shape, colour, radius=radius), outlines) == shape


def test_nothing_is_read_where_nothing_is():
    blank = np.full((64, 64, 3), 250, np.uint8)
    assert emoji.read_colour(blank) is None
    assert emoji.read_thing(blank, [("circle", np.ones((24, 24)))]) is None
    assert emoji.has_white_ground(blank)
    assert emoji.has_white_ground(drawn("star", (66, 66, 66)))
    on_pink = drawn("star", (244, 67, 54), ground=(245, 150, 190))
    assert not emoji.has_white_ground(on_pink)
    assert emoji.read_colour(on_pink) is None


# ---------------------------------------------------------------------------------------------- measuring


FEW = {
    "train": (
        emoji.record_of("red-circle", "circle", "red"),
        emoji.record_of("blue-square", "square", "blue"),
        emoji.record_of("star", "star"),
    ),
    "held_out": (emoji.record_of("blue-circle", "circle", "blue"),),
    "not_there": (emoji.record_of(None, "square", "purple"),),
}


@pytest.fixture
def few(monkeypatch):
    """Three names, one combination that is held out and one that is not there; returns their images."""
    monkeypatch.setattr(emoji, "records", FEW.get)
    shapes = {"red-circle": (244, 67, 54), "blue-square": (25, 118, 210), "star": (255, 204, 50)}
    return {
        icon: np.stack([drawn(icon.split("-")[-1], rgb, radius=radius) for radius in (16, 19)])
        for icon, rgb in shapes.items()
    }


def test_names_are_told_apart_by_their_pictures(measure_emoji, few):
    alike = np.stack([np.stack([few[record["icon"]][0]] * 3) for record in FEW["train"]])
    found = measure_emoji.score_names(alike, few)
    assert found["pictures"] == 9
    assert found["nearest_is_own"] == 1
    assert found["copies"] == 1
    assert found["apart_by_seed"] == 0
    assert found["white_ground"] == 1
    between = (alike / 3 + alike[[1, 2, 0]] / 1.5).astype(np.uint8)  # half as far from one image as from another
    found = measure_emoji.score_names(between, few)
    assert found["nearest_is_own"] == found["copies"] == 0
    stars = np.stack([np.stack([few["star"][0], few["star"][1]])] * 3)
    found = measure_emoji.score_names(stars, few)
    assert found["nearest_is_own"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["apart_by_name"] == 0
    assert found["apart_by_seed"] == pytest.approx(
        np.sqrt(np.square(few["star"][0].astype(float) - few["star"][1]).mean()), abs=0.05
    )


def test_colours_and_things_are_counted(measure_emoji, few):
    outlines = [(record["thing"], emoji.outline_of(few[record["icon"]][0])) for record in FEW["train"][:2]]
    right, wrong = few["red-circle"][0], few["blue-square"][0]
    blue_circle = drawn("circle", (25, 118, 210))
    pictures = np.stack([np.stack([right, right, blue_circle, wrong]), np.stack([wrong, wrong, wrong, blue_circle])])
    found = measure_emoji.score_colours(pictures, FEW["train"][:2], outlines)
    assert found == {"pictures": 8, "colour": 0.75, "thing": 0.75, "both": 0.625}


def test_a_model_is_measured_beside_its_base(measure_emoji, few, tmp_path, monkeypatch, capsys):
    for split, icons in (("train", list(few)), ("held_out", ["blue-circle"])):
        folder = tmp_path / "emoji" / split
        folder.mkdir(parents=True)
        lines = []
        for icon in icons:
            for view, image in enumerate(few.get(icon, few["star"])):
                Image.fromarray(image).save(folder / f"{icon}_{view}.png")
                lines.append(json.dumps({"file_name": f"{icon}_{view}.png", "text": "", "icon": icon}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
    monkeypatch.setattr(measure_emoji, "SEEN", ("red circle", "star"))
    monkeypatch.setattr(measure_emoji, "UNSEEN", ("blue circle", "purple square"))
    pipeline = str(REPO / "miniature" / "pipeline")
    flags = ["--model", pipeline, "--base", pipeline, "--data_dir", str(tmp_path / "emoji"), "--num_seeds", "2"]
    outputs = ["--output", str(tmp_path / "emoji.json"), "--picture", str(tmp_path / "emoji.png")]
    measure_emoji.main([*flags, *outputs, "--num_inference_steps", "2"])
    figures = json.loads((tmp_path / "emoji.json").read_text())
    assert figures["base"] == figures["fine-tuned"]
    assert figures["base"]["names_seen"]["pictures"] == 6
    assert figures["base"]["held_out"]["pictures"] == figures["base"]["not_there"]["pictures"] == 4
    assert "nearest_is_own" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "emoji.png"))
    top, left = picture.shape[0] // 2 - 3 * 168, 90  # of the first tile: three rows of 160 pixels and 8 between
    assert picture[top + 80, left + 76].tolist() == [244, 67, 54]
    assert picture.shape[1] == 90 + 2 * 168
