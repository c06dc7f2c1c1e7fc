"""Images arrive as a viewer shows them, captions as they were written, and what cannot be used is named."""

import io
import json
import os
import re
import shutil
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from image_data import caption_of, make_image, snapshot, write_metadata
from PIL import Image
from running import run_script
from tiny import make_tokenizer

RESOLUTION = 32


def encoded(image, suffix="png", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format={"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
    return buffer.getvalue()


def opened(train_script, image, suffix="png", **options):
    """What the script makes of an image file, as an array (height, width, 3)."""
    result = train_script.open_image(encoded(image, suffix, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


# ----------------------------------------------------------------------------------------------------- pixel values


def test_rgb_and_grey_keep_their_values(train_script):
    image = make_image(3, (20, 14))
    assert np.array_equal(opened(train_script, image), np.asarray(image))
    grey = grid([0, 1, 127], [128, 254, 255])
    assert np.array_equal(opened(train_script, Image.fromarray(grey)), np.stack([grey] * 3, axis=-1))


def test_one_bit_images_are_black_and_white(train_script):
    image = Image.fromarray(grid([0, 255], [255, 0])).convert("1", dither=Image.Dither.NONE)
    assert opened(train_script, image)[..., 0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_colours_are_looked_up(train_script, suffix):
    image = Image.fromarray(grid([0, 1], [2, 1]), mode=None).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0] + [0] * 759)
    image.putdata([0, 1, 2, 1])
    result = opened(train_script, image, suffix)
    assert result.tolist() == [[[10, 20, 30], [200, 100, 50]], [[0, 255, 0], [200, 100, 50]]]


def test_transparent_palette_entries_are_white(train_script):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0] + [0] * 759)
    image.putdata([0, 1, 2])
    result = opened(train_script, image, transparency=bytes([255, 0, 51]))
    assert result[0, 0].tolist() == [10, 20, 30]
    assert result[0, 1].tolist() == [255, 255, 255]  # not the hidden (200, 100, 50)
    np.testing.assert_allclose(result[0, 2], [204, 255, 204], atol=1)  # a fifth of green over white
    result = opened(train_script, image, "gif", transparency=1)
    assert result[0].tolist() == [[10, 20, 30], [255, 255, 255], [0, 255, 0]]


def test_transparent_colour_of_rgb_is_white(train_script):
    image = Image.fromarray(grid([[1, 2, 3], [9, 8, 7]]))
    assert opened(train_script, image, transparency=(9, 8, 7)).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_alpha_is_laid_over_white(train_script):
    colours = np.array([[200, 0, 100], [0, 40, 80], [13, 17, 19], [255, 255, 255]])
    alphas = np.array([255, 128, 0, 77])
    image = Image.fromarray(np.concatenate([colours, alphas[:, None]], axis=1)[None].astype(np.uint8))
    share = alphas[:, None] / 255
    expected = colours * share + 255 * (1 - share)
    for suffix in ("png", "webp", "tif"):
        options = {"lossless": True, "exact": True} if suffix == "webp" else {}
        np.testing.assert_allclose(opened(train_script, image, suffix, **options)[0], expected, atol=1)


def test_grey_with_alpha_is_laid_over_white(train_script):
    image = Image.fromarray(np.array([[[100, 255], [100, 51], [0, 0]]], dtype=np.uint8))
    assert image.mode == "LA"
    result = opened(train_script, image)
    np.testing.assert_allclose(result[0, :, 0], [100, 224, 255], atol=1)
    assert (result == result[..., :1]).all()


def test_cmyk_becomes_rgb(train_script):
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [51, 102, 0, 51]], dtype=np.uint8)
    blocks = np.repeat(np.repeat(inks[None], 16, axis=0), 16, axis=1)
    expected = (255 - inks[:, :3].astype(float)) * (255 - inks[:, 3:].astype(float)) / 255
    for suffix, tolerance in (("tif", 1), ("jpg", 4)):
        options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
        result = opened(train_script, Image.fromarray(blocks, mode="CMYK"), suffix, **options)
        np.testing.assert_allclose(result[8, 8::16], expected, atol=tolerance)


# XYZ of sRGB's red, green and blue for the white of profiles (ICC.1:2022, annex D; IEC 61966-2-1).
RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142)


def colour_profile(*primaries, name=b""):
    """An ICC profile (version 2.1) of a display with these primaries (XYZ each), gamma 2.2, named in its text tag."""
    tags = [(tag, b"XYZ " + struct.pack(">4x3i", *[round(value * 65536) for value in xyz]))
            for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), (*primaries, (0.9642, 1, 0.8249)), strict=True)]
    tags += [(tag, b"curv" + struct.pack(">4xIHxx", 1, round(2.2 * 256))) for tag in (b"rTRC", b"gTRC", b"bTRC")]
    tags += [(b"cprt", b"text" + bytes(4) + name.ljust(8, b"\0"))]
    table, content, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags:
        table += tag + struct.pack(">II", start + len(content), len(data))
        content += data
    head = struct.pack(">I4sI4s4s4s12x4s28x3i48x", start + len(content), b"lcms", 0x02100000, b"mntr", b"RGB ",
                       b"XYZ ", b"acsp", 63190, 65536, 54061)
    return head + table + content


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_colour_profiles_are_obeyed(train_script, suffix):
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    swapped = opened(train_script, image, suffix, icc_profile=colour_profile(GREEN, RED, BLUE), **options)
    np.testing.assert_allclose(swapped[8, 8], (0, 255, 0), atol=4)
    # The primaries of Display P3: the same numbers are a more saturated colour than sRGB's.
    primaries = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
    wide = colour_profile(*primaries)
    pixel = opened(train_script, Image.new("RGB", (16, 16), (180, 100, 90)), suffix, icc_profile=wide, **options)[8, 8]
    xyz = np.transpose(primaries) @ (np.array([180, 100, 90]) / 255) ** 2.2
    linear = np.linalg.solve(np.transpose((RED, GREEN, BLUE)), xyz)
    np.testing.assert_allclose(pixel, 255 * (1.055 * linear ** (1 / 2.4) - 0.055), atol=2)  # IEC 61966-2-1
    assert np.abs(pixel - [180.0, 100, 90]).max() > 8
    white = opened(train_script, Image.new("RGB", (16, 16), "white"), suffix, icc_profile=wide, **options)
    np.testing.assert_allclose(white[8, 8], 255, atol=1)


def test_a_profile_is_not_srgb_because_it_names_it(train_script):
    """Phones write such names for the primaries of Display P3."""
    profile = colour_profile(GREEN, RED, BLUE, name=b"Display P3 Gamut with sRGB Transfer")
    assert opened(train_script, Image.new("RGB", (1, 1), (255, 0, 0)), icc_profile=profile).tolist() == [[[0, 255, 0]]]


def grey_profile(gamma):
    """An ICC profile (version 2.1) of a grey device with this gamma."""
    colour, size = colour_profile(RED, GREEN, BLUE), 128 + 4 + 2 * 12 + 20 + 14
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 14)
    white = b"XYZ " + struct.pack(">4x3i", 63190, 65536, 54061)
    return (struct.pack(">I", size) + colour[4:16] + b"GRAY" + colour[20:128] + table + white
            + b"curv" + struct.pack(">4xIH", 1, round(gamma * 256)))


def test_grey_profiles_are_obeyed(train_script):
    expected = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)  # linear light as sRGB, IEC 61966-2-1
    for image in (Image.new("L", (1, 1), 128), Image.new("LA", (1, 1), (128, 255))):
        np.testing.assert_allclose(opened(train_script, image, icc_profile=grey_profile(1.0))[0, 0], expected, atol=1)
    clear = Image.new("LA", (1, 1), (128, 0))
    assert opened(train_script, clear, icc_profile=grey_profile(1.0)).tolist() == [[[255, 255, 255]]]


def test_profiles_of_palettes_and_of_alpha(train_script):
    swapped = colour_profile(GREEN, RED, BLUE)
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 0, 0] + [0] * 765)
    assert opened(train_script, palette, icc_profile=swapped).tolist() == [[[0, 255, 0]]]
    result = opened(train_script, Image.new("RGBA", (1, 1), (255, 0, 0, 0)), icc_profile=swapped)
    assert result.tolist() == [[[255, 255, 255]]]
    result = opened(train_script, Image.new("RGBA", (1, 1), (255, 0, 0, 255)), icc_profile=swapped)
    assert result.tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize("profile", [b"no profile at all", colour_profile(GREEN, RED, BLUE)[:200],
                                     colour_profile(RED, GREEN, BLUE, name=b"sRGB IEC61966-2.1")])
def test_profiles_that_change_nothing(train_script, profile):
    image = make_image(3, (20, 14))
    assert np.array_equal(opened(train_script, image, icc_profile=profile), np.asarray(image))
    grey = Image.fromarray(grid([0, 1, 127], [128, 254, 255]))  # of another colour space than the profile
    for unfit in (profile, colour_profile(GREEN, RED, BLUE)):
        assert np.array_equal(opened(train_script, grey, icc_profile=unfit)[..., 0], np.asarray(grey))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greys_are_divided_by_257(train_script, suffix):
    values = np.array([[0, 257, 25700], [32896, 65535, 1000]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    result = opened(train_script, image, suffix)
    assert np.array_equal(result[..., 0], np.round(values / 257))
    assert (result == result[..., :1]).all()


def test_big_endian_16_bit_greys(train_script):
    values = np.array([[0, 25700, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert opened(train_script, image, "tif")[0, :, 0].tolist() == [0, 100, 255]


def test_float_pixels_are_refused(train_script):
    data = encoded(Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)), "tif")
    with pytest.raises(ValueError, match="floating-point"):
        train_script.open_image(data)


# What a viewer does with a stored array for each value of the tag (Exif 2.32, section 4.6.4 A).
UPRIGHT = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_obeyed(train_script, orientation):
    colours = np.random.default_rng(0).integers(256, size=(2, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(opened(train_script, Image.fromarray(colours), exif=exif), UPRIGHT[orientation](colours))
    blocks = Image.fromarray(colours.repeat(16, axis=0).repeat(16, axis=1))
    photo = opened(train_script, blocks, "jpg", exif=exif, quality=100, subsampling=0)
    np.testing.assert_allclose(photo[8::16, 8::16].astype(int), UPRIGHT[orientation](colours), atol=3)


def test_orientation_and_16_bits_together(train_script):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.array([[0, 2570, 5140], [7710, 10280, 65535]], dtype=np.uint16)
    result = opened(train_script, Image.fromarray(values), exif=exif)[..., 0]
    assert np.array_equal(result, np.rot90(np.round(values / 257), -1))


def test_half_a_file_is_no_image(train_script):
    for suffix in ("jpg", "png", "webp"):
        data = encoded(make_image(1, (200, 200)), suffix)
        with pytest.raises((OSError, ValueError, SyntaxError)):
            train_script.open_image(data[: len(data) // 2])


# ---------------------------------------------------------------------------------------------------- CaptionedImages


def captioned(train_script, images, captions, **options):
    """CaptionedImages over PIL images, kept in a dataset as bytes."""
    flags = {"resolution": RESOLUTION, "image_interpolation_mode": "lanczos", "seed": 0, "center_crop": False}
    flags |= {"random_flip": False, "caption_dropout": 0.0, "noise_offset": 0.0, "input_perturbation": 0.0} | options
    lists = [[caption] if isinstance(caption, str) else caption for caption in captions]
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(image), "path": None} for image in images], "captions": lists}
    ).cast_column("image", datasets.Image(decode=False))
    return train_script.CaptionedImages(rows, make_tokenizer(), (4, 4, 4), 1000, flags)


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def pixels(item):
    return item["pixel_values"].transpose(1, 2, 0)


def test_an_item_is_what_the_training_needs(train_script):
    items = captioned(train_script, [make_image(0, (50, 40))], ["a red circle"])
    item = items[7, 0, 0.25]
    assert item["pixel_values"].dtype == np.uint8
    assert item["pixel_values"].shape == (3, RESOLUTION, RESOLUTION)
    for name in ("posterior_noise", "noise", "added_noise"):
        assert item[name].dtype == np.float32
        assert item[name].shape == (4, 4, 4)
    assert item["weight"].dtype == np.float32  # a loss times a weight stays in float32
    assert 0 <= item["timestep"] < 1000
    assert item["input_ids"].tolist() == make_tokenizer()("a red circle", padding="max_length").input_ids
    assert (item["epoch"], item["index"], item["weight"]) == (7, 0, 0.25)
    assert len(items) == 1


@pytest.mark.parametrize("size, box", [((48, 32), (8, 0, 40, 32)), ((32, 40), (0, 4, 32, 36)), ((32, 32), None)])
def test_centre_crop_is_the_centre_to_the_pixel(train_script, size, box):
    image = noise_image(*size)
    items = captioned(train_script, [image], ["a"], center_crop=True)
    assert np.array_equal(pixels(items[0, 0, 1]), np.asarray(image.crop(box)))
    assert np.array_equal(pixels(items[5, 0, 1]), pixels(items[0, 0, 1]))


def test_the_whole_shorter_side_is_seen_at_any_size(train_script):
    """A picture of two halves, scaled down by 3.5 and cropped in the middle, still has its edge in the middle."""
    halves = np.zeros((112, 140, 3), dtype=np.uint8)
    halves[:, 70:] = 255
    result = pixels(captioned(train_script, [Image.fromarray(halves)], ["a"], center_crop=True)[0, 0, 1])
    assert (result[:, :13] == 0).all()
    assert (result[:, -13:] == 255).all()


def test_interpolation_is_the_chosen_one(train_script):
    image = noise_image(64, 64)
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"):
        items = captioned(train_script, [image], ["a"], image_interpolation_mode=name)
        expected = image.resize((RESOLUTION, RESOLUTION), Image.Resampling[name.upper()])
        assert np.array_equal(pixels(items[0, 0, 1]), np.asarray(expected))


def column_of(item):
    """Where an image whose red is its column was cropped."""
    return item["pixel_values"][0].mean() - (RESOLUTION - 1) / 2


def test_random_crop_reaches_from_one_end_to_the_other_evenly(train_script):
    ramp = np.tile(np.arange(132, dtype=np.uint8)[None, :, None], (32, 1, 3))
    items = captioned(train_script, [Image.fromarray(ramp)], ["a"])
    lefts = np.array([column_of(items[epoch, 0, 1]) for epoch in range(400)])
    assert -0.5 <= lefts.min() < 3
    assert 97 < lefts.max() <= 100.5
    assert abs(lefts.mean() - 50) < 5 * 100 / 12**0.5 / 20
    assert np.histogram(lefts, bins=4, range=(-0.5, 100.5))[0].min() > 60


def test_flip_mirrors_half_of_the_images(train_script):
    image = noise_image(RESOLUTION, RESOLUTION)
    items = captioned(train_script, [image] * 20, ["a"] * 20, random_flip=True)
    plain, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    flipped = []
    for epoch in range(20):
        for index in range(20):
            seen = pixels(items[epoch, index, 1])
            flipped.append(np.array_equal(seen, mirrored))
            assert flipped[-1] or np.array_equal(seen, plain)
    assert abs(np.mean(flipped) - 0.5) < 5 * 0.5 / 20
    by_index = np.reshape(flipped, (20, 20)).mean(axis=0)
    assert by_index.min() > 0  # drawn anew each epoch
    assert by_index.max() < 1


DRAWN = ("timestep", "posterior_noise", "noise", "added_noise")


def identity(item):
    """All of an item but where it stands and what it weighs."""
    return item["pixel_values"].tobytes(), tuple(item["input_ids"]), *(item[name].tobytes() for name in DRAWN)


def test_every_draw_depends_on_seed_epoch_and_index_alone(train_script):
    images = [noise_image(60, 40, seed) for seed in range(4)]
    captions = [[f"{number} {word}" for word in ("one", "two", "three")] for number in range(4)]
    options = {"random_flip": True, "caption_dropout": 0.2, "noise_offset": 0.1, "input_perturbation": 0.1}
    first, second = (captioned(train_script, images, captions, **options) for _ in range(2))
    places = [(epoch, index, 0.5) for epoch in range(5) for index in range(4)]
    forwards = {place: identity(first[place]) for place in places}
    backwards = {place: identity(second[place]) for place in reversed(places)}
    assert forwards == backwards
    assert forwards == {place: identity(first[(*place[:2], 0.0)]) for place in places}
    other = captioned(train_script, images, captions, seed=1, **options)
    for part in (0, 2, 3, 4, 5):  # all but the captions, of which there are few
        assert len({forwards[epoch, 0, 0.5][part] for epoch in range(5)}) == 5
        assert all(identity(other[place])[part] != forwards[place][part] for place in places)


def test_switching_one_option_on_leaves_the_other_draws_as_they_were(train_script):
    images, captions = [noise_image(60, 40)], [["one", "two", "three"]]
    plain = captioned(train_script, images, captions)
    flipping = captioned(train_script, images, captions, random_flip=True)
    dropping = captioned(train_script, images, captions, caption_dropout=0.5)
    centred = captioned(train_script, images, captions, center_crop=True)
    shifted = captioned(train_script, images, captions, noise_offset=0.1)
    perturbed = captioned(train_script, images, captions, input_perturbation=0.1)
    empty = make_tokenizer()("", padding="max_length").input_ids
    for epoch in range(20):
        item, flipped, dropped = (items[epoch, 0, 1] for items in (plain, flipping, dropping))
        for other in (flipped, dropped, centred[epoch, 0, 1]):
            assert all(np.array_equal(item[name], other[name]) for name in DRAWN)
        for other, changed in (
            (shifted[epoch, 0, 1], {"noise", "added_noise"}),
            (perturbed[epoch, 0, 1], {"added_noise"}),
        ):
            assert {name for name in item if not np.array_equal(item[name], other[name])} == changed
        assert np.array_equal(item["input_ids"], centred[epoch, 0, 1]["input_ids"])
        assert np.array_equal(item["input_ids"], flipped["input_ids"])
        assert any(np.array_equal(pixels(flipped), view) for view in (pixels(item), pixels(item)[:, ::-1]))
        assert np.array_equal(item["pixel_values"], dropped["pixel_values"])
        assert dropped["input_ids"].tolist() in (item["input_ids"].tolist(), empty)


@pytest.mark.slow
def test_workers_change_nothing(train_script):
    items = captioned(train_script, [noise_image(60, 40, seed) for seed in range(4)], ["a"] * 4, random_flip=True)
    order = [[(epoch, index, 1.0) for index in (3, 1)] for epoch in range(4)]
    batches = [
        list(torch.utils.data.DataLoader(items, batch_sampler=order, num_workers=workers)) for workers in (0, 2)
    ]
    for alone, by_workers in zip(*batches):
        assert all(torch.equal(alone[key], by_workers[key]) for key in alone)


def test_one_caption_of_a_list_is_drawn_per_epoch(train_script):
    texts = ["one", "two", "three"]
    items = captioned(train_script, [make_image(0)], [texts])
    ids = {tuple(make_tokenizer()(text, padding="max_length").input_ids): text for text in texts}
    drawn = Counter(ids[tuple(items[epoch, 0, 1]["input_ids"].tolist())] for epoch in range(300))
    assert drawn.keys() == set(texts)
    assert all(abs(count - 100) < 5 * (300 * 2 / 9) ** 0.5 for count in drawn.values())


def test_captions_without_a_letter_are_left_out_of_a_list(train_script, tiny_pipeline, tmp_path):
    images = [{"bytes": encoded(make_image(number)), "path": None} for number in range(3)]
    captions = [["two", "", None, "  ", "four"], ["x"], [None, ""]]
    rows = datasets.Dataset.from_dict({"image": images, "text": captions})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    args = train_script.parse_args([f"--dataset_name={tmp_path / 'set'}", f"--cache_dir={tmp_path / 'cache'}",
                                    f"--pretrained_model_name_or_path={tiny_pipeline}", "--resolution=32",
                                    "--skip_bad_images", "--max_train_samples=3"])
    loaded, _, _ = train_script.load_data(**vars(args))
    assert list(loaded.rows["captions"]) == [["two", "four"], ["x"]]


def test_columns_and_configurations_that_a_dataset_lacks_are_refused(train_script, tmp_path):
    images = [{"bytes": encoded(make_image(number)), "path": None} for number in range(2)]
    rows = datasets.Dataset.from_dict({"image": images, "caption": ["one", "two"]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")

    def read(name="set", config_name=None, **options):
        options = {"image_column": "image", "caption_column": "text"} | options
        found = train_script.read_dataset(str(tmp_path / name), config_name, cache_dir=str(tmp_path / "cache"),
                                          token=None, **options)
        return list(found["captions"])

    assert read(caption_column="caption") == ["one", "two"]
    assert read(default_caption="a sks star") == ["a sks star"] * 2
    for options in ({}, {"caption_column": "captoin"}, {"caption_column": "captoin", "default_caption": "a sks star"},
                    {"caption_column": "caption", "config_name": "small"}):
        with pytest.raises(train_script.InputError, match="set: cannot be loaded; check it, --dataset_config_name"):
            read(**options)
    make_image(0).save(tmp_path / "image.png")  # beside the set, so that this is a folder of images
    for options in ({"config_name": "default"}, {"image_column": "picture"}):
        with pytest.raises(train_script.InputError, match="holds images; drop --dataset_config_name and --image"):
            read(".", **options)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_caption_dropout_is_the_share_of_empty_captions(train_script, share):
    items = captioned(train_script, [make_image(0, (16, 16))], ["a red circle"], caption_dropout=share, resolution=16)
    empty = make_tokenizer()("", padding="max_length").input_ids
    dropped = np.mean([items[epoch, 0, 1]["input_ids"].tolist() == empty for epoch in range(600)])
    assert abs(dropped - share) <= 5 * (share * (1 - share) / 600) ** 0.5


def test_long_captions_are_cut_at_the_limit(train_script):
    ids = captioned(train_script, [make_image(0)], ["red " * 200])[0, 0, 1]["input_ids"]
    tokenizer = make_tokenizer()
    assert ids.shape == (77,)
    assert ids[-1] == tokenizer.eos_token_id
    assert (ids[1:-1] == tokenizer("red").input_ids[1]).all()


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


def test_read_folder_with_jsonl(train_script, image_folder):
    captions = ["a red circle", ["one", "two"], "two words", "one"]
    rows = train_script.read_folder(image_folder(4, captions=captions), "text")
    assert as_dict(rows) == {
        "00.png": ["a red circle"],
        "01.png": ["one", "two"],
        "02.png": ["two words"],
        "03.png": ["one"],
    }
    assert all(row["image"]["bytes"] is None for row in rows)


def test_read_folder_with_csv(train_script, tmp_path):
    folder = write_images(tmp_path / "images", "a.png", "b.jpg")
    (folder / "metadata.csv").write_text('file_name,note\na.png,"red, with a comma"\nb.jpg,blue\n')
    assert as_dict(train_script.read_folder(folder, "note")) == {"a.png": ["red, with a comma"], "b.jpg": ["blue"]}


def test_read_folder_with_text_files(train_script, tmp_path):
    folder = write_images(tmp_path / "images", "a.png", "B.JPG", "c.webp")
    (folder / "a.txt").write_text("  a red\n circle \n")
    (folder / "B.txt").write_text("blüe", encoding="utf-8")
    rows = as_dict(train_script.read_folder(folder, "text"))
    assert not any(rows.pop("c.webp"))  # a row all the same, so that the check names it
    assert rows == {"a.png": ["a red circle"], "B.JPG": ["blüe"]}


def test_read_folder_goes_into_subfolders(train_script, tmp_path):
    folder = write_images(tmp_path / "images", "top.png", "one/a.png", "one/b.png", "two/deep/c.png")
    write_metadata(folder, [{"file_name": "top.png", "text": "top"}, {"file_name": "one/a.png", "text": "from above"}])
    write_metadata(folder / "two", [{"file_name": "deep/c.png", "text": "deep"}])
    (folder / "one" / "b.txt").write_text("beside")
    rows = train_script.read_folder(folder, "text")
    assert as_dict(rows) == {"top.png": ["top"], "a.png": ["from above"], "b.png": ["beside"], "c.png": ["deep"]}
    assert all(os.path.exists(row["image"]["path"]) for row in rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_byte_order_mark_is_no_part_of_a_caption_or_column(train_script, tmp_path, kind):
    folder = write_images(tmp_path / "images", "a.png")
    text = {"jsonl": '{"file_name": "a.png", "text": "rød"}\n', "csv": "file_name,text\na.png,rød\n", "txt": "rød"}
    (folder / ("a.txt" if kind == "txt" else f"metadata.{kind}")).write_text(text[kind], encoding="utf-8-sig")
    assert as_dict(train_script.read_folder(folder, "text")) == {"a.png": ["rød"]}


def test_order_is_that_of_the_paths_wherever_the_metadata_stands(train_script, tmp_path):
    folder = write_images(tmp_path / "images", "c.png", "a.png", "b.png")
    write_metadata(folder, [{"file_name": f"{name}.png", "text": name} for name in "bca"])
    assert list(as_dict(train_script.read_folder(folder, "text"))) == ["a.png", "b.png", "c.png"]


def test_bad_json_is_named_with_its_row(train_script, image_folder):
    folder = image_folder(3)
    path = folder / "metadata.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = '{"file_name": "01.png", "text": '
    path.write_text("\n".join(lines))
    with pytest.raises(train_script.InputError) as caught:
        train_script.read_folder(folder, "text")
    assert str(path) in str(caught.value)
    assert "row 2 is not" in str(caught.value)


def test_line_ends_of_unicode_inside_of_a_caption_end_no_line(train_script, tmp_path):
    folder = write_images(tmp_path / "images", "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": "one\u2028two"}, {"file_name": "b.png", "text": "a\x85b"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
    assert as_dict(train_script.read_folder(folder, "text")) == {"a.png": ["one two"], "b.png": ["a b"]}


@pytest.mark.parametrize("line", ['"just a string"', '{"text": "no file name"}', "[1, 2]", "null"])
def test_metadata_of_another_form_is_named(train_script, image_folder, line):
    folder = image_folder(2)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(train_script.InputError, match="file_name") as caught:
        train_script.read_folder(folder, "text")
    assert f"{folder / 'metadata.jsonl'}: row 3 is not" in str(caught.value)


@pytest.mark.parametrize("caption", [5, 0.5, True])
def test_captions_that_are_no_text_are_named(train_script, image_folder, caption):
    """The image is left without a caption, which the check reports by its path."""
    rows = train_script.read_folder(image_folder(2, captions=["one", caption]), "text")
    assert as_dict(rows) == {"00.png": ["one"], "01.png": []}


def test_rows_of_one_image_are_its_captions(train_script, image_folder):
    folder = image_folder(2, captions=["one", "two"])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "00.png", "text": "another"}\n')
    assert as_dict(train_script.read_folder(folder, "text")) == {"00.png": ["one", "another"], "01.png": ["two"]}


def test_csv_with_commas_outside_of_quotes_is_refused(train_script, image_folder):
    """The cut caption would pass for a whole one."""
    folder = image_folder(2)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n00.png,a cat, sitting\n01.png,a dog\n")
    with pytest.raises(train_script.InputError, match=r"metadata\.csv: row 1 .*too many cells"):
        train_script.read_folder(folder, "text")


def test_an_open_quote_in_a_csv_is_refused(train_script, image_folder):
    """Else one caption takes in all rows that follow."""
    folder = image_folder(2)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\n00.png,"a cat\n01.png,a dog\n')
    with pytest.raises(train_script.InputError, match=r"metadata\.csv: row 1 .*unexpected end of data"):
        train_script.read_folder(folder, "text")


def test_half_a_character_is_refused(train_script, image_folder):
    folder = image_folder(1)
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a cat \\ud83d"}\n')
    with pytest.raises(train_script.InputError, match=r"metadata\.jsonl: row 1 .*surrogates not allowed"):
        train_script.read_folder(folder, "text")


def test_file_name_in_another_encoding_is_named(train_script, image_folder):
    folder = image_folder()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(train_script.InputError, match=r"caf.udce9.png'?: its name is not UTF-8; rename it"):
        train_script.read_folder(folder, "text")


def test_text_file_in_another_encoding_is_named(train_script, image_folder):
    folder = image_folder(1)
    (folder / "metadata.jsonl").unlink()
    (folder / "00.txt").write_bytes("ein Mädchen".encode("latin-1"))
    with pytest.raises(train_script.InputError, match=r"00\.txt: cannot be read as UTF-8"):
        train_script.read_folder(folder, "text")


def test_folder_is_found_however_it_is_written(train_script, image_folder, monkeypatch):
    folder = image_folder(2, captions=["one", "two"])
    monkeypatch.chdir(folder.parent)
    for way in (folder.name, f"../{folder.parent.name}/{folder.name}", f"./{folder.name}/."):
        assert as_dict(train_script.read_folder(way, "text")) == {"00.png": ["one"], "01.png": ["two"]}


def test_broken_link_is_a_missing_file(train_script, image_folder):
    folder = image_folder(1)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    rows = train_script.read_folder(folder, "text")
    (row,) = [row for row in rows if row["image"]["path"].endswith("gone.png")]
    assert train_script.check_image(row["image"], {}) == (None, ["", 0, 0, "there is no such file"])


def test_only_texts_of_a_list_are_captions(train_script, image_folder):
    rows = train_script.read_folder(image_folder(2, captions=["one", ["two", 3, None, " ", "four"]]), "text")
    assert as_dict(rows) == {"00.png": ["one"], "01.png": ["two", "four"]}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_wrong_caption_column_is_named_with_those_that_are_there(train_script, image_folder, kind):
    folder = image_folder(2)
    if kind == "csv":
        (folder / "metadata.jsonl").unlink()
        (folder / "metadata.csv").write_text("file_name,text\n00.png,a\n01.png,b\n")
    with pytest.raises(train_script.InputError) as caught:
        train_script.read_folder(folder, "prompt")
    message = str(caught.value)
    assert all(word in message for word in (f"metadata.{kind}", "'prompt'", "--caption_column", "text"))


def test_linked_folders_are_said_to_be_left_aside(train_script, image_folder, capsys):
    folder = image_folder(2)
    (folder / "more").symlink_to(image_folder(1, name="elsewhere"), target_is_directory=True)
    assert len(train_script.read_folder(folder, "text")) == 2
    assert "1 files of other kinds, such as more." in capsys.readouterr().out


def test_a_second_table_may_hold_other_columns_only(train_script, image_folder):
    folder = image_folder(2, captions=["one", "two"])
    (folder / "metadata.csv").write_text("file_name,label\n00.png,a\n01.png,b\n")
    assert as_dict(train_script.read_folder(folder, "text")) == {"00.png": ["one"], "01.png": ["two"]}


def test_unknown_files_are_said_to_be_left_aside(train_script, image_folder, capsys):
    folder = image_folder(2)
    (folder / "notes.docx").write_text("x")
    (folder / "photo.heic").write_bytes(b"x")
    assert len(train_script.read_folder(folder, "text")) == 2
    said = capsys.readouterr().out
    assert "2 files" in said
    assert "notes.docx" in said
    assert "photo.heic" in said


def test_nothing_is_said_about_an_ordinary_folder(train_script, image_folder, capsys):
    train_script.read_folder(image_folder(2), "text")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("there", [True, False])
def test_empty_or_missing_folder(train_script, tmp_path, there):
    folder = tmp_path / "images"
    if there:
        folder.mkdir()
        (folder / "note.txt").write_text("no image")
    with pytest.raises(train_script.InputError, match="holds no images" if there else "No such file"):
        train_script.read_folder(folder, "text")


def make_parquet(folder, num_images=3):
    """A dataset as `push_to_hub` would store it: the images inside of the parquet file."""
    folder.mkdir()
    images = [{"bytes": encoded(make_image(index)), "path": f"{index}.png"} for index in range(num_images)]
    columns = {"picture": images, "words": [caption_of(index) for index in range(num_images)], "n": [0] * num_images}
    features = datasets.Features(picture=datasets.Image(), words=datasets.Value("string"), n=datasets.Value("int64"))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def test_read_dataset_from_parquet(train_script, tmp_path):
    folder = make_parquet(tmp_path / "set")
    rows = train_script.read_dataset(str(folder), None, "picture", "words", str(tmp_path / "cache"), None)
    assert rows.column_names == ["image", "captions"]
    assert rows["captions"][:] == [caption_of(index) for index in range(3)]
    for index, row in enumerate(rows):
        seen = train_script.open_image(row["image"]["bytes"])
        assert np.array_equal(np.asarray(seen), np.asarray(make_image(index)))


def test_read_dataset_names_missing_columns_and_those_that_are_there(train_script, tmp_path):
    folder = make_parquet(tmp_path / "set")
    for columns in (("image", "words"), ("picture", "text")):
        with pytest.raises(train_script.InputError) as caught:
            train_script.read_dataset(str(folder), None, *columns, str(tmp_path / "cache"), None)
        assert "--image_column={} and --caption_column={} (".format(*columns) in str(caught.value)
        assert re.search("columns .*picture.*words.*n", str(caught.value)), str(caught.value)


def test_read_dataset_of_a_local_image_folder_keeps_images_without_caption(train_script, messy_folder):
    messy = messy_folder(missing_caption="no_row")
    rows = as_dict(train_script.read_dataset(str(messy.path), None, "image", "text", None, None))
    assert rows == as_dict(train_script.read_folder(messy.path, "text"))
    assert not any(rows["no_caption.png"])
    assert "no_file.png" in rows


def test_read_dataset_that_is_nowhere(train_script, tmp_path):
    with pytest.raises(train_script.InputError, match="cannot be loaded"):
        train_script.read_dataset("nobody/nothing", None, "image", "text", str(tmp_path), None)


# -------------------------------------------------------------------------------------------------------- the check


@pytest.fixture
def openings(train_script, monkeypatch):
    """Counts what is opened, and read, from here on."""
    counts = Counter()
    for owner, name in ((train_script, "open_image"), (Path, "read_bytes")):
        original = getattr(owner, name)

        def counted(*args, name=name, original=original):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counted)
    return counts


def test_second_check_opens_nothing_and_says_the_same(train_script, image_folder, tmp_path, openings):
    folder, memory = image_folder(5), tmp_path / "memory" / "checked.json"
    rows = train_script.read_folder(folder, "text")
    first = train_script.check_images(rows, memory)
    assert openings == {"open_image": 5, "read_bytes": 5}
    openings.clear()
    assert train_script.check_images(rows, memory) == first
    assert not openings
    assert [result[1:] for result in first] == [[32, 32, ""]] * 5
    assert len({digest for digest, *_ in first}) == 5


def test_a_changed_file_is_opened_again(train_script, image_folder, tmp_path, openings):
    folder, memory = image_folder(5), tmp_path / "checked.json"
    rows = train_script.read_folder(folder, "text")
    first = train_script.check_images(rows, memory)
    openings.clear()
    make_image(9, (40, 20)).save(folder / "02.png")
    shutil.copy(folder / "00.png", folder / "01.png")  # of the same size, maybe, but of another time
    second = train_script.check_images(rows, memory)
    assert openings["open_image"] == 2
    assert second[2][1:] == [40, 20, ""]
    assert second[1][0] == first[0][0] != first[1][0]
    assert [second[index] == first[index] for index in range(5)] == [True, False, False, True, True]


def test_bad_images_are_looked_at_again_once_mended(train_script, image_folder, tmp_path):
    folder, memory = image_folder(2), tmp_path / "checked.json"
    whole = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(whole[: len(whole) // 2])
    rows = train_script.read_folder(folder, "text")
    assert train_script.check_images(rows, memory)[0][3]
    (folder / "00.png").write_bytes(whole)
    assert not train_script.check_images(rows, memory)[0][3]


def test_images_inside_of_a_dataset_are_remembered_by_content(train_script, tmp_path, openings):
    folder = make_parquet(tmp_path / "set")
    rows = train_script.read_dataset(str(folder), None, "picture", "words", str(tmp_path / "cache"), None)
    first = train_script.check_images(rows, tmp_path / "checked.json")
    assert openings["open_image"] == 3
    openings.clear()
    assert train_script.check_images(rows, tmp_path / "checked.json") == first
    assert openings["open_image"] == 0


def test_a_memory_that_is_broken_only_costs_time(train_script, image_folder, tmp_path, openings):
    rows, memory = train_script.read_folder(image_folder(2), "text"), tmp_path / "checked.json"
    memory.write_text("{broken")
    assert len(train_script.check_images(rows, memory)) == 2
    assert openings["open_image"] == 2
    assert len(train_script.check_images(rows, memory)) == 2
    assert openings["open_image"] == 2  # it was mended


def test_a_cache_folder_that_cannot_be_made_or_locked_is_named(train_script, image_folder, tmp_path):
    """The second as in a cache that belongs to somebody else; a folder in the lock's place fails for root too."""
    rows = train_script.read_folder(image_folder(2), "text")
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "checked.json.lock").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "other"):
        with pytest.raises(train_script.InputError, match="--cache_dir") as caught:
            train_script.check_images(rows, folder / "checked.json")
        assert f"{folder} cannot be used" in str(caught.value)


def test_of_several_that_check_at_once_one_opens_the_images(train_script, image_folder, tmp_path, openings):
    rows, memory = train_script.read_folder(image_folder(20), "text"), tmp_path / "checked.json"
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: train_script.check_images(rows, memory), range(3))
    assert openings["open_image"] == 20
    assert others == [first, first]


# ------------------------------------------------------------------------------------- acceptance: bad input is named


def arguments(model, folder, output_dir, *more):
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


def test_no_more_than_five_are_named_in_a_warning(train_script, image_folder, tmp_path, capsys):
    rows = train_script.read_folder(image_folder(8, size=20), "text")
    good, _ = train_script.check_rows(rows, tmp_path / "checked.json", False, make_tokenizer(), 32)
    said = capsys.readouterr().out
    assert len(good) == 8
    assert "8 images are smaller" in said
    assert said.count(".png") == 5


def test_digest_of_a_row_follows_content_and_captions_but_not_the_path(train_script, image_folder, tmp_path):
    def digests(folder):
        rows = train_script.read_folder(folder, "text")
        return train_script.check_rows(rows, tmp_path / "checked.json", False, make_tokenizer(), 32)[1]

    here, there = image_folder(3, name="here"), image_folder(3, name="there")
    assert digests(here) == digests(there)
    first = digests(here)
    write_metadata(
        here,
        [{"file_name": f"0{index}.png", "text": "other" if index == 1 else caption_of(index)} for index in range(3)],
    )
    assert [a == b for a, b in zip(first, digests(here))] == [True, False, True]


# ----------------------------------------------------------------------------------------------------- load_data


def load(train_script, model, folder, tmp_path, **options):
    flags = [f"--{key}={value}" for key, value in options.items()]
    args = train_script.parse_args(arguments(model, folder, tmp_path / "out", *flags))
    return train_script.load_data(**vars(args))


def names(images):
    return [os.path.basename(row["image"]["path"]) for row in images.rows]


def test_held_out_images_are_apart_and_the_same_for_every_seed(train_script, tiny_pipeline, image_folder, tmp_path):
    folder = image_folder(8)
    training, held_out, fingerprint = load(train_script, tiny_pipeline, folder, tmp_path, num_validation_samples=3)
    assert len(held_out) == 3
    assert sorted(names(training) + names(held_out)) == [f"0{index}.png" for index in range(8)]
    again = load(train_script, tiny_pipeline, folder, tmp_path, num_validation_samples=3, seed=5)
    assert names(again[1]) == names(held_out)
    assert again[2] == fingerprint
    assert identity(again[1][0, 0, 1]) == identity(held_out[0, 0, 1])
    assert load(train_script, tiny_pipeline, folder, tmp_path)[2] != fingerprint


def test_max_train_samples_draws_by_the_seed(train_script, tiny_pipeline, image_folder, tmp_path):
    folder = image_folder(8)
    drawn = {
        seed: names(load(train_script, tiny_pipeline, folder, tmp_path, max_train_samples=4, seed=seed)[0])
        for seed in range(3)
    }
    assert all(len(set(chosen)) == 4 for chosen in drawn.values())
    assert len({tuple(chosen) for chosen in drawn.values()}) > 1
    assert names(load(train_script, tiny_pipeline, folder, tmp_path, max_train_samples=4, seed=2)[0]) == drawn[2]
    assert len(load(train_script, tiny_pipeline, folder, tmp_path, max_train_samples=100)[0]) == 8


def test_holding_everything_out_is_refused(train_script, tiny_pipeline, image_folder, tmp_path):
    with pytest.raises(train_script.InputError, match="must leave some of 3 images"):
        load(train_script, tiny_pipeline, image_folder(3), tmp_path, num_validation_samples=3)
