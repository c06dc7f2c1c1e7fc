"""tools/show_dataset.py draws what training sees, pixel by pixel, with captions that can be read."""

import io
import json
from itertools import combinations

import numpy as np
import pytest
from conftest import load_script
from image_data import caption_of, make_image, snapshot, write_image_folder, write_metadata
from PIL import Image, ImageDraw, ImageFont
from running import REPO
from training import words

TOOL = REPO / "tools" / "show_dataset.py"


@pytest.fixture(scope="module")
def tool():
    """tools/show_dataset.py as a module."""
    return load_script(TOOL)


def show(tool, folder, tmp_path, *flags):
    """Runs the tool; returns the sheet as pixels (height, width, 3)."""
    sheet = tmp_path / "sheet.png"
    tool.main([str(folder), f"--output={sheet}", f"--cache_dir={tmp_path / 'cache'}", "--overwrite", *flags])
    return np.asarray(Image.open(sheet))


def errors(tool, capsys, *flags):
    """What the tool says on the standard error, having ended with status 2."""
    with pytest.raises(SystemExit) as stop:
        tool.main(list(map(str, flags)))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("settings", [
    {}, {"random_flip": True, "seed": 3}, {"center_crop": True, "image_interpolation_mode": "nearest"},
    {"random_flip": True, "caption_dropout": 0.5, "num_validation_samples": 3, "max_train_samples": 9},
], ids=["plain", "flip", "centre", "all"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_sheet_is_what_training_sees(tool, train_script, tiny_pipeline, messy_folder, tmp_path, settings, epoch,
                                         monkeypatch):
    """The same images in the same order, cropped, mirrored and captioned as the script's own dataset gives them."""
    folder = messy_folder(12, 40)
    sizes = [(40 + 7 * index, 90 - 4 * index) for index in range(12)]
    captions = [[caption_of(index), "another one"] for index in range(12)]
    write_image_folder(folder.path, 12, sizes, captions)
    rows = [json.loads(line) for line in (folder.path / "metadata.jsonl").read_text().splitlines()]
    write_metadata(folder.path, [*rows, {"file_name": "truncated.jpg", "text": "broken"}])
    line = words(tiny_pipeline, folder.path, tmp_path / "out", skip_bad_images=True, cache_dir=tmp_path / "cache",
                 **settings)
    images, _, _ = train_script.load_data(**vars(train_script.parse_args(line)))
    num = len(images)
    order = train_script.micro_batches(num, num, 1, 0, 1, settings.get("seed", 0), epoch, epoch + 1)
    samples = [images[item] for item in next(order)]

    seen, draw_sheet = [], tool.draw_sheet
    monkeypatch.setattr(tool, "draw_sheet", lambda cells, *rest: draw_sheet(seen.extend(cells) or cells, *rest))
    flags = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in settings.items()]
    sheet = show(tool, folder.path, tmp_path, "--resolution=32", f"--epoch={epoch}", "--num_images=7", "--columns=7",
                 "--caption_lines=3", *flags)
    assert len(seen) == min(7, num)
    tokenize = images.tokenizer
    for column, ((image, caption, _), sample) in enumerate(zip(seen, samples)):
        pixels = sample["pixel_values"].transpose(1, 2, 0)
        assert np.array_equal(np.asarray(image), pixels)
        assert np.array_equal(tokenize(caption, padding="max_length", truncation=True).input_ids, sample["input_ids"])
        left = 13 + column * (192 + 13)  # a cell of six times 32 pixels and a gap of the font's size
        assert np.array_equal(sheet[13 : 13 + 192 : 6, left : left + 192 : 6], pixels)
        assert np.array_equal(sheet[18 : 18 + 192 : 6, left + 5 : left + 192 + 5 : 6], pixels)
    if "caption_dropout" in settings:
        assert 0 < sum(caption == "" for _, caption, _ in seen) < len(seen)


@pytest.fixture(params=["system", "own"])
def font_names(request, tool, monkeypatch):
    """Where the font comes from: the system, if it has one, or Pillow."""
    if request.param == "own":
        monkeypatch.setattr(tool, "FONTS", ())
    return request.param


CAPTIONS = ["short", "a caption of many words " * 30, "Donaudampfschifffahrtsgesellschaft" * 5, "猫" * 200,
            "größer als Привет – “quoted” 😀", "i" * 500, "W" * 60 + " and more", "two words", "x", "a b " * 40]


@pytest.mark.parametrize("resolution, columns", [(32, None), (200, 3), (512, 10)])
def test_nothing_overlaps_and_all_is_on_the_sheet(tool, monkeypatch, font_names, resolution, columns):
    """Every text and every image has a box of its own."""
    boxes, images = [], []

    class Draw(ImageDraw.ImageDraw):
        def text(self, place, text, fill, font):
            boxes.append(self.textbbox(place, text, font=font))
            super().text(place, text, fill, font)

        def rectangle(self, box, **options):
            images.append(box)
            super().rectangle(box, **options)

    cells = [(make_image(index, (resolution,) * 2), caption, f"{'long name ' * 9}{index}.png")
             for index, caption in enumerate([*CAPTIONS, ""])]
    monkeypatch.setattr(tool.ImageDraw, "Draw", Draw)
    sheet, _ = tool.draw_sheet(cells, None, resolution, columns, 4)
    assert len(images) == 11
    assert len(boxes) >= 11 + 4 * 5
    for a, b in combinations(boxes + images, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    for left, top, right, bottom in boxes + images:
        assert left >= 0 and top >= 0 and right < sheet.width and bottom < sheet.height  # noqa: PT018 (one box)


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_wrap(tool, text):
    """No line is too wide; all words are there in their order, or the last line says that some are not."""
    font = ImageFont.load_default(14)
    whole = tool.wrap(text, font, 200, 999)
    assert max(map(font.getlength, whole)) <= 200
    assert "".join(whole).replace(" ", "") == "".join(text.split())
    cut = tool.wrap(text, font, 200, 3)
    assert len(cut) == min(3, len(whole))
    assert cut == whole if len(whole) <= 3 else cut[:2] == whole[:2] and cut[2].endswith("...")
    assert max(map(font.getlength, cut)) <= 200


def test_words_are_cut_only_where_they_must_be(tool):
    font = ImageFont.load_default(14)
    lines = tool.wrap("one two three four five six seven eight", font, 80, 9)
    assert len(lines) > 2
    assert " ".join(lines) == "one two three four five six seven eight"
    assert tool.wrap("", font, 80, 3) == tool.wrap(" \n ", font, 80, 3) == []


def test_signs_that_the_font_lacks_are_said(tool, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "FONTS", ())
    folder = image_folder(2, captions=["ein Mädchen", "“plain” one"])
    show(tool, folder, tmp_path, "--resolution=32")
    assert "The font has no picture of ä and draws boxes; give another by --font.\n" in capsys.readouterr().out


def test_a_dataset_that_holds_its_images_and_a_config(tool, tmp_path, capsys):
    import datasets

    file = io.BytesIO()
    make_image(3, (40, 40)).save(file, "PNG")
    rows = [{"image": {"bytes": file.getvalue(), "path": None}, "text": ""}] * 2
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    before = snapshot(tmp_path / "saved")
    recipe, sheet = tmp_path / "show.yaml", tmp_path / "new" / "sheet.png"
    recipe.write_text(f"dataset: {tmp_path / 'saved'}\noutput: {sheet}\nresolution: 256\ninstance_prompt: a sks star\n"
                      f"cache_dir: {tmp_path / 'cache'}\n")
    tool.main(["--config", str(recipe)])
    assert capsys.readouterr().out == f"Wrote {sheet}: 2 of 2 images, as epoch 0 takes them.\n"
    with Image.open(sheet) as image:
        assert image.width == 3 * 13 + 2 * 256
    assert snapshot(tmp_path / "saved") == before


def test_the_dataset_stays_as_it_is_and_bad_images_are_left_out(tool, messy_folder, tmp_path, capsys):
    folder = messy_folder(3).path
    before = snapshot(folder)
    show(tool, folder, tmp_path)
    assert "Left out 5 images that cannot be used" in capsys.readouterr().out
    assert snapshot(folder) == before


def test_wrong_usage_is_named_at_once_before_anything_is_read(tool, image_folder, tmp_path, capsys):
    folder = image_folder(2)
    (tmp_path / "there.png").write_text("mine")
    before = snapshot(tmp_path)
    said = errors(tool, capsys, folder, "--resolution=0", "--epoch=-1", "--caption_dropout=2", "--columns=0")
    for problem in ("--resolution=0", "--epoch=-1", "--caption_dropout=2", "--columns=0", "--output=None"):
        assert problem in said
    assert "exists" in errors(tool, capsys, folder, f"--output={tmp_path / 'there.png'}")
    assert "lies in the dataset" in errors(tool, capsys, folder, f"--output={folder / 'new.png'}")
    assert "ends in .png" in errors(tool, capsys, folder, f"--output={tmp_path / 'new.jpg'}")
    output = f"--output={tmp_path / 'new.png'}"
    assert "no dataset is given" in errors(tool, capsys, output)
    assert "no font file" in errors(tool, capsys, folder, output, f"--font={tmp_path / 'there.png'}")
    assert "DATASET=" in errors(tool, capsys, tmp_path / "nowhere", output)
    cache = f"--cache_dir={tmp_path / 'cache'}"
    assert "leaves none of the 2" in errors(tool, capsys, folder, output, cache, "--num_validation_samples=2")
    after = snapshot(tmp_path)
    assert {name: state for name, state in after.items() if not name.startswith("cache/")} == before
