"""`sdtune show` draws what training sees, pixel by pixel, with captions that can be read."""

import functools
import io
import json
import shlex
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from image_data import caption_of, make_image, snapshot, write_image_folder, write_metadata
from PIL import Image, ImageDraw, ImageFont
from running import status_of
from training import parse

from sdtune import fonts
from sdtune.batches import StepCounts, count_steps, micro_batches
from sdtune.buckets import fit_of
from sdtune.commands import show as command
from sdtune.dataset import load_data


def show(folder, tmp_path, *flags):
    """Runs the command; returns the sheet as pixels (height, width, 3)."""
    sheet = tmp_path / "sheet.png"
    own = [f"--output={sheet}", f"--cache_dir={tmp_path / 'cache'}", "--overwrite"]
    assert status_of(command.main, folder, *own, *flags) == 0
    return np.asarray(Image.open(sheet))


def errors(capsys, *flags):
    """What the command says on the standard error, having ended with status 2."""
    assert status_of(command.main, *flags) == 2
    return capsys.readouterr().err


@pytest.fixture
def odd_images(tmp_path):
    """A folder of 12 images of all shapes, of two captions each, and a broken one."""
    sizes = [(40 + 7 * index, 90 - 4 * index) for index in range(12)]
    captions = [[caption_of(index), "another one"] for index in range(12)]
    folder = write_image_folder(tmp_path / "odd", 12, sizes, captions)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    write_metadata(folder, [*rows, {"file_name": "broken.jpg", "text": "broken"}])
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


SETTINGS = {
    "plain": [],
    "flip": ["--random_flip", "--seed=3"],
    "centre": ["--center_crop", "--image_interpolation_mode=nearest"],
    "all": ["--random_flip", "--caption_dropout=0.5", "--num_validation_samples=3", "--max_train_samples=9"],
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_sheet_is_what_training_sees(tiny_pipeline, odd_images, tmp_path, name, epoch, monkeypatch):
    """The same images in the same order, cropped, mirrored and captioned as the samples that are trained on."""
    settings = [*SETTINGS[name], "--resolution=32", f"--cache_dir={tmp_path / 'cache'}"]
    base = f"--pretrained_model_name_or_path={tiny_pipeline}"
    args = parse(base, f"--train_data_dir={odd_images}", "--skip_bad_images", *settings)
    images, _, _ = load_data(args, args.train_data_dir)
    num = len(images)
    counts = StepCounts(num, num, num, 1, epoch + 1)
    samples = [images[item] for item in next(micro_batches(counts, 1, 0, args.seed, epoch))]

    seen, draw_sheet = [], command.draw_sheet

    def note_cells(cells, *rest):
        seen.extend(cells)
        return draw_sheet(cells, *rest)

    monkeypatch.setattr(command, "draw_sheet", note_cells)
    layout = ["--num_images=7", "--columns=7", "--caption_lines=3"]
    sheet = show(odd_images, tmp_path, f"--epoch={epoch}", *layout, *settings)
    assert len(seen) == min(7, num)
    for column, ((image, caption, _), sample) in enumerate(zip(seen, samples)):
        pixels = sample["pixel_values"].transpose(1, 2, 0)
        assert np.array_equal(np.asarray(image), pixels)
        input_ids = images.tokenizer(caption, padding="max_length", truncation=True).input_ids
        assert np.array_equal(input_ids, sample["input_ids"])
        left = 13 + column * (192 + 13)  # a cell of six times 32 pixels and a gap of the font's size
        assert np.array_equal(sheet[13 : 13 + 192 : 6, left : left + 192 : 6], pixels)
        assert np.array_equal(sheet[18 : 18 + 192 : 6, left + 5 : left + 192 + 5 : 6], pixels)
    if args.caption_dropout:
        assert 0 < sum(caption == "" for _, caption, _ in seen) < len(seen)


def test_pictures_of_one_name_are_told_apart_by_their_folders(image_folder, tmp_path, monkeypatch):
    image_folder(2, name="all/2023")
    image_folder(1, name="all/2024")
    seen = []
    monkeypatch.setattr(command, "draw_sheet", lambda cells, *rest: (seen.extend(cells) or make_image(0), []))
    monkeypatch.chdir(tmp_path)
    for folder in ("all", f"../{tmp_path.name}/all/2023"):
        seen.append((None, None, folder))
        words = [folder, "--output=sheet.png", "--overwrite", "--resolution=32", "--cache_dir=cache"]
        assert status_of(command.main, *words) == 0
    names = [name for _, _, name in seen]
    assert sorted(names[1:4]) == ["2023/00.png", "2023/01.png", "2024/00.png"]
    assert sorted(names[5:]) == ["00.png", "01.png"]


def test_a_name_with_a_line_end_is_drawn_in_one_line(image_folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(command, "shorten", lambda text, *_: drawn.append(text) or text)
    folder = image_folder(1, 64)
    (folder / "00.png").rename(folder / "new\nline.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "new\nline.png", "text": "a cat"}))
    show(folder, tmp_path)
    assert drawn == ["new\\nline.png"[::-1]]


@pytest.mark.parametrize("flags", [[], ["--bucket_no_upscale", "--random_flip", "--num_validation_samples=2"]])
def test_images_in_buckets_have_their_shapes(tiny_pipeline, odd_images, tmp_path, flags, capsys, monkeypatch):
    """In the order of a run with as many images a step, each at the top left of its cell in six times its size."""
    settings = [*flags, "--resolution=32", f"--cache_dir={tmp_path / 'cache'}", "--aspect_ratio_buckets"]
    base = f"--pretrained_model_name_or_path={tiny_pipeline}"
    args = parse(base, f"--train_data_dir={odd_images}", "--skip_bad_images", *settings)
    images, _, _ = load_data(args, args.train_data_dir, fit=fit_of(args))
    layout = SimpleNamespace(
        train_batch_size=1, gradient_accumulation_steps=3, max_train_steps=None, num_train_epochs=2
    )
    counts = count_steps(layout, len(images), 1, images.sizes)
    passes = micro_batches(counts, 1, 0, 0, counts.steps_per_epoch)  # of the second epoch
    samples = [images[item] for items in passes for item in items]
    capsys.readouterr()
    rows = []
    monkeypatch.setattr(command.ImageDraw, "Draw", functools.partial(NotingDraw, rows))
    sheet = show(odd_images, tmp_path, "--epoch=1", "--samples_per_step=3", "--columns=4", *settings)
    assert len(samples) == len(images) == len(rows)
    shapes = [sample["pixel_values"].shape[1:] for sample in samples]
    assert len(set(shapes)) > 2
    for column, ((left, top), sample) in enumerate(zip(rows, samples)):
        pixels = sample["pixel_values"].transpose(1, 2, 0)
        height, width, _ = pixels.shape
        assert left == 13 + column % 4 * (max(shape[1] for shape in shapes) * 6 + 13)
        cell = sheet[top : top + 6 * height, left : left + 6 * width]
        assert np.array_equal(cell, pixels.repeat(6, axis=0).repeat(6, axis=1))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Images by width x height of their bucket:"
    number_of = Counter((width, height) for height, width in shapes)
    table = {line.strip() for line in said[1 : 1 + len(number_of)]}
    assert table == {f"{width} x {height}: {number}" for (width, height), number in number_of.items()}
    assert said[1 + len(number_of)].startswith("  cropped away: ")


class NotingDraw(ImageDraw.ImageDraw):
    """Draws, and lists the upper left corner inside of every frame."""

    def __init__(self, corners, sheet):
        super().__init__(sheet)
        self.corners = corners

    def rectangle(self, box, **options):
        self.corners.append((box[0] + 1, box[1] + 1))
        super().rectangle(box, **options)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bucket_step=8"], "--bucket_step=8: does nothing without --aspect_ratio_buckets"),
        (["--samples_per_step=8"], "--samples_per_step=8: does nothing without --aspect_ratio_buckets"),
        (["--aspect_ratio_buckets", "--bucket_max=500"], "--bucket_max=500: must be at least --resolution=512"),
    ],
)
def test_wrong_buckets_are_refused(image_folder, tmp_path, capsys, flags, message):
    assert message in errors(capsys, image_folder(2), f"--output={tmp_path / 'new.png'}", *flags)


@pytest.fixture(params=["system", "own"])
def font_names(request, monkeypatch):
    """Where the font comes from: the system, if it has one, or Pillow."""
    if request.param == "own":
        monkeypatch.setattr(fonts, "FONTS", ())
    return request.param


CAPTIONS = [
    "short",
    "a caption of many words " * 30,
    "Donaudampfschifffahrtsgesellschaft" * 5,
    "猫" * 200,
    "größer als Привет – “quoted” 😀",
    "i" * 500,
    "W" * 60 + " and more",
    "two words",
    "x",
    "a b " * 40,
]


@pytest.mark.parametrize("resolution, columns", [(32, None), (200, 3), (512, 10)])
def test_nothing_overlaps_and_all_is_on_the_sheet(monkeypatch, font_names, resolution, columns):
    """Every text and every image has a box of its own."""
    texts, images = [], []

    class Draw(ImageDraw.ImageDraw):
        def text(self, place, text, fill, font):
            texts.append(self.textbbox(place, text, font=font))
            super().text(place, text, fill, font)

        def rectangle(self, box, **options):
            images.append(box)
            super().rectangle(box, **options)

    cells = []
    for index, caption in enumerate([*CAPTIONS, ""]):
        cells.append((make_image(index, (resolution, resolution)), caption, f"{'long name ' * 9}{index}.png"))
    monkeypatch.setattr(command.ImageDraw, "Draw", Draw)
    sheet, _ = command.draw_sheet(cells, None, resolution, columns, 4)
    assert len(images) == 11
    assert len(texts) >= 11 + 4 * 5
    for a, b in combinations(texts + images, 2):
        is_beside = a[2] <= b[0] or b[2] <= a[0]
        is_above_or_below = a[3] <= b[1] or b[3] <= a[1]
        assert is_beside or is_above_or_below, (a, b)
    for left, top, right, bottom in texts + images:
        assert min(left, top) >= 0
        assert right < sheet.width
        assert bottom < sheet.height


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_wrap(text):
    """No line is too wide; all words are there in their order, or the last line says that some are not."""
    font = ImageFont.load_default(14)
    whole = fonts.wrap(text, font, 200, 999)
    assert max(map(font.getlength, whole)) <= 200
    assert "".join(whole).replace(" ", "") == "".join(text.split())
    cut = fonts.wrap(text, font, 200, 3)
    assert max(map(font.getlength, cut)) <= 200
    if len(whole) <= 3:
        assert cut == whole
    else:
        assert len(cut) == 3
        assert cut[:2] == whole[:2]
        assert cut[2].endswith("...")


def test_words_are_cut_only_where_they_must_be():
    font = ImageFont.load_default(14)
    lines = fonts.wrap("one two three four five six seven eight", font, 80, 9)
    assert len(lines) > 2
    assert " ".join(lines) == "one two three four five six seven eight"
    assert fonts.wrap("", font, 80, 3) == []
    assert fonts.wrap(" \n ", font, 80, 3) == []


def test_signs_that_the_font_lacks_are_said(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fonts, "FONTS", ())
    folder = image_folder(2, captions=["ein Mädchen", "“plain” one"])
    show(folder, tmp_path, "--resolution=32")
    assert "The font has no picture of ä and draws boxes; give another by --font.\n" in capsys.readouterr().out


def test_a_dataset_that_holds_its_images_and_a_config(tmp_path, capsys):
    file = io.BytesIO()
    make_image(3, (40, 40)).save(file, "PNG")
    rows = [{"image": {"bytes": file.getvalue(), "path": None}, "text": ""}] * 2
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    before = snapshot(tmp_path / "saved")
    recipe, sheet = tmp_path / "show.yaml", tmp_path / "new" / "sheet.png"
    recipe.write_text(
        f"dataset: {tmp_path / 'saved'}\noutput: {sheet}\nresolution: 256\ninstance_prompt: a sks star\n"
        f"cache_dir: {tmp_path / 'cache'}\n"
    )
    assert status_of(command.main, "--config", recipe) == 0
    assert capsys.readouterr().out == f"Wrote {sheet}: 2 of 2 images, as epoch 0 takes them.\n"
    with Image.open(sheet) as image:
        assert image.width == 3 * 13 + 2 * 256
    assert snapshot(tmp_path / "saved") == before


def test_the_dataset_stays_as_it_is_and_bad_images_are_left_out(messy_folder, tmp_path, capsys):
    folder = messy_folder(3).path
    before = snapshot(folder)
    show(folder, tmp_path)
    told = "Left out, since training cannot use them: 4 unusable, 1 without a caption"
    said = " ".join(capsys.readouterr().out.split())
    assert f"{told} (`sdtune caption {folder}` writes them, or give one for all by --instance_prompt)" in said
    assert "; `sdtune check` names them. Wrote " in said
    assert snapshot(folder) == before


def test_a_folder_without_captions_names_the_command_that_writes_them(image_folder, tmp_path, capsys):
    for number, name in ((3, "my photos"), (12, "photos")):
        folder = image_folder(number, name=name)
        (folder / "metadata.jsonl").unlink()
        words = [folder, f"--output={tmp_path / 'sheet.png'}", f"--cache_dir={tmp_path / 'cache'}"]
        said = " ".join(errors(capsys, *words).split())
        told = f"DATASET={folder}: none of {number} images can be used: {number} without a caption"
        assert f"{told} (`sdtune caption {shlex.quote(str(folder))}` writes them" in said
        assert "num_validation_samples" not in said
        assert not (tmp_path / "sheet.png").exists()
        show(folder, tmp_path, "--instance_prompt=a sks star")
        (tmp_path / "sheet.png").unlink()


def test_wrong_usage_is_named_at_once_before_anything_is_read(image_folder, tmp_path, capsys):
    folder = image_folder(2)
    (tmp_path / "there.png").write_text("mine")
    before = snapshot(tmp_path)
    said = errors(capsys, folder, "--resolution=0", "--epoch=-1", "--caption_dropout=2", "--columns=0")
    for problem in ("--resolution", "--epoch", "--caption_dropout", "--columns", "--output is missing"):
        assert f"\n  {problem}: " in said
    assert "exists" in errors(capsys, folder, f"--output={tmp_path / 'there.png'}")
    assert "lies in the dataset" in errors(capsys, folder, f"--output={folder / 'new.png'}")
    assert "ends in .png" in errors(capsys, folder, f"--output={tmp_path / 'new.jpg'}")
    output = f"--output={tmp_path / 'new.png'}"
    assert "DATASET is missing: name a folder" in errors(capsys, output)
    assert "no font file" in errors(capsys, folder, output, f"--font={tmp_path / 'there.png'}")
    assert "DATASET=" in errors(capsys, tmp_path / "nowhere", output)
    cache = f"--cache_dir={tmp_path / 'cache'}"
    assert "must leave some of 2 images" in errors(capsys, folder, output, cache, "--num_validation_samples=2")
    after = snapshot(tmp_path)
    assert {name: state for name, state in after.items() if not name.startswith("cache/")} == before
