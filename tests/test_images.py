"""Images arrive as a viewer shows them; every one is opened once before training, and what cannot be used is named."""

import hashlib
import json
import shutil
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_data import encoded, make_image
from PIL import Image, ImageOps

from sdtune import images
from sdtune.dataset import read_folder
from sdtune.errors import InputError
from sdtune.images import check_image, check_images, open_fitted, open_image


def opened(image, suffix="png", **options):
    """What `open_image` makes of an image file, as an array (height, width, 3)."""
    result = open_image(encoded(image, suffix, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


# ----------------------------------------------------------------------------------------------------- pixel values


def test_rgb_and_grey_keep_their_values():
    image = make_image(3, (20, 14))
    assert np.array_equal(opened(image), np.asarray(image))
    grey = grid([0, 1, 127], [128, 254, 255])
    assert np.array_equal(opened(Image.fromarray(grey)), np.stack([grey] * 3, axis=-1))


def test_one_bit_images_are_black_and_white():
    image = Image.fromarray(grid([0, 255], [255, 0])).convert("1", dither=Image.Dither.NONE)
    assert opened(image)[..., 0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_colours_are_looked_up(suffix):
    image = Image.fromarray(grid([0, 1], [2, 1]), mode=None).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0] + [0] * 759)
    image.putdata([0, 1, 2, 1])
    result = opened(image, suffix)
    assert result.tolist() == [[[10, 20, 30], [200, 100, 50]], [[0, 255, 0], [200, 100, 50]]]


def test_transparent_palette_entries_are_white():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0] + [0] * 759)
    image.putdata([0, 1, 2])
    result = opened(image, transparency=bytes([255, 0, 51]))
    assert result[0, 0].tolist() == [10, 20, 30]
    assert result[0, 1].tolist() == [255, 255, 255]  # not the hidden (200, 100, 50)
    np.testing.assert_allclose(result[0, 2], [204, 255, 204], atol=1)  # a fifth of green over white
    result = opened(image, "gif", transparency=1)
    assert result[0].tolist() == [[10, 20, 30], [255, 255, 255], [0, 255, 0]]


def test_transparent_colour_of_rgb_is_white():
    image = Image.fromarray(grid([[1, 2, 3], [9, 8, 7]]))
    assert opened(image, transparency=(9, 8, 7)).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_alpha_is_laid_over_white():
    colours = np.array([[200, 0, 100], [0, 40, 80], [13, 17, 19], [255, 255, 255]])
    alphas = np.array([255, 128, 0, 77])
    image = Image.fromarray(np.concatenate([colours, alphas[:, None]], axis=1)[None].astype(np.uint8))
    share = alphas[:, None] / 255
    expected = colours * share + 255 * (1 - share)
    for suffix in ("png", "webp", "tif"):
        options = {"lossless": True, "exact": True} if suffix == "webp" else {}
        np.testing.assert_allclose(opened(image, suffix, **options)[0], expected, atol=1)


def test_grey_with_alpha_is_laid_over_white():
    image = Image.fromarray(np.array([[[100, 255], [100, 51], [0, 0]]], dtype=np.uint8))
    assert image.mode == "LA"
    result = opened(image)
    np.testing.assert_allclose(result[0, :, 0], [100, 224, 255], atol=1)
    assert (result == result[..., :1]).all()


def test_cmyk_becomes_rgb():
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [51, 102, 0, 51]], dtype=np.uint8)
    blocks = np.repeat(np.repeat(inks[None], 16, axis=0), 16, axis=1)
    expected = (255 - inks[:, :3].astype(float)) * (255 - inks[:, 3:].astype(float)) / 255
    for suffix, tolerance in (("tif", 1), ("jpg", 4)):
        options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
        result = opened(Image.fromarray(blocks, mode="CMYK"), suffix, **options)
        np.testing.assert_allclose(result[8, 8::16], expected, atol=tolerance)


# XYZ of sRGB's red, green and blue for the white of profiles (ICC.1:2022, annex D; IEC 61966-2-1).
RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142)
WHITE = (0.9642, 1, 0.8249)


def xyz_tag(values):
    """A colour of a profile: XYZ as fixed-point numbers of 16 bits before and after the point."""
    return b"XYZ " + struct.pack(">4x3i", *[round(value * 65536) for value in values])


def gamma_tag(gamma):
    """A tone curve of a profile: a power."""
    return b"curv" + struct.pack(">4xIHxx", 1, round(gamma * 256))


def make_profile(colour_space, tags):
    """An ICC profile (version 2.1) of a display: a header of 128 bytes, a table of its tags, and what they hold."""
    table, content, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(content), len(data))
        content += data
    size = struct.pack(">I", start + len(content))
    head = size + b"lcms" + struct.pack(">I", 0x02100000) + b"mntr" + colour_space + b"XYZ " + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # the white of profiles
    return head + bytes(128 - len(head)) + table + content


def colour_profile(*primaries, name=b""):
    """The profile of a display with these primaries (XYZ each), gamma 2.2, named in its text tag."""
    red, green, blue = map(xyz_tag, primaries)
    tags = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"wtpt": xyz_tag(WHITE)}
    tags |= {tag: gamma_tag(2.2) for tag in (b"rTRC", b"gTRC", b"bTRC")}
    tags[b"cprt"] = b"text" + bytes(4) + name.ljust(8, b"\0")
    return make_profile(b"RGB ", tags)


def grey_profile(gamma):
    """The profile of a grey device with this gamma."""
    return make_profile(b"GRAY", {b"wtpt": xyz_tag(WHITE), b"kTRC": gamma_tag(gamma)})


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_colour_profiles_are_obeyed(suffix):
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    swapped = opened(image, suffix, icc_profile=colour_profile(GREEN, RED, BLUE), **options)
    np.testing.assert_allclose(swapped[8, 8], (0, 255, 0), atol=4)
    # The primaries of Display P3: the same numbers are a more saturated colour than sRGB's.
    primaries = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
    wide = colour_profile(*primaries)
    pixel = opened(Image.new("RGB", (16, 16), (180, 100, 90)), suffix, icc_profile=wide, **options)[8, 8]
    xyz = np.transpose(primaries) @ (np.array([180, 100, 90]) / 255) ** 2.2
    linear = np.linalg.solve(np.transpose((RED, GREEN, BLUE)), xyz)
    np.testing.assert_allclose(pixel, 255 * (1.055 * linear ** (1 / 2.4) - 0.055), atol=2)  # IEC 61966-2-1
    assert np.abs(pixel - [180.0, 100, 90]).max() > 8
    white = opened(Image.new("RGB", (16, 16), "white"), suffix, icc_profile=wide, **options)
    np.testing.assert_allclose(white[8, 8], 255, atol=1)


def test_a_profile_is_not_srgb_because_it_names_it():
    """Phones write such names for the primaries of Display P3."""
    profile = colour_profile(GREEN, RED, BLUE, name=b"Display P3 Gamut with sRGB Transfer")
    assert opened(Image.new("RGB", (1, 1), (255, 0, 0)), icc_profile=profile).tolist() == [[[0, 255, 0]]]


def test_grey_profiles_are_obeyed():
    expected = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)  # linear light as sRGB, IEC 61966-2-1
    for image in (Image.new("L", (1, 1), 128), Image.new("LA", (1, 1), (128, 255))):
        np.testing.assert_allclose(opened(image, icc_profile=grey_profile(1.0))[0, 0], expected, atol=1)
    clear = Image.new("LA", (1, 1), (128, 0))
    assert opened(clear, icc_profile=grey_profile(1.0)).tolist() == [[[255, 255, 255]]]


def test_profiles_of_palettes_and_of_alpha():
    swapped = colour_profile(GREEN, RED, BLUE)
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 0, 0] + [0] * 765)
    assert opened(palette, icc_profile=swapped).tolist() == [[[0, 255, 0]]]
    result = opened(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), icc_profile=swapped)
    assert result.tolist() == [[[255, 255, 255]]]
    result = opened(Image.new("RGBA", (1, 1), (255, 0, 0, 255)), icc_profile=swapped)
    assert result.tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile at all",
        colour_profile(GREEN, RED, BLUE)[:200],
        colour_profile(RED, GREEN, BLUE, name=b"sRGB IEC61966-2.1"),
    ],
)
def test_profiles_that_change_nothing(profile):
    image = make_image(3, (20, 14))
    assert np.array_equal(opened(image, icc_profile=profile), np.asarray(image))
    grey = Image.fromarray(grid([0, 1, 127], [128, 254, 255]))  # of another colour space than the profile
    for unfit in (profile, colour_profile(GREEN, RED, BLUE)):
        assert np.array_equal(opened(grey, icc_profile=unfit)[..., 0], np.asarray(grey))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greys_are_divided_by_257(suffix):
    values = np.array([[0, 257, 25700], [32896, 65535, 1000]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    result = opened(image, suffix)
    assert np.array_equal(result[..., 0], np.round(values / 257))
    assert (result == result[..., :1]).all()


def test_big_endian_16_bit_greys():
    values = np.array([[0, 25700, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert opened(image, "tif")[0, :, 0].tolist() == [0, 100, 255]


def test_float_pixels_are_refused():
    data = encoded(Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)), "tif")
    with pytest.raises(ValueError, match="floating-point"):
        open_image(data)


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
def test_exif_orientation_is_obeyed(orientation):
    colours = np.random.default_rng(0).integers(256, size=(2, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(opened(Image.fromarray(colours), exif=exif), UPRIGHT[orientation](colours))
    blocks = Image.fromarray(colours.repeat(16, axis=0).repeat(16, axis=1))
    photo = opened(blocks, "jpg", exif=exif, quality=100, subsampling=0)
    np.testing.assert_allclose(photo[8::16, 8::16].astype(int), UPRIGHT[orientation](colours), atol=3)


def test_orientation_and_16_bits_together():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.array([[0, 2570, 5140], [7710, 10280, 65535]], dtype=np.uint16)
    result = opened(Image.fromarray(values), exif=exif)[..., 0]
    assert np.array_equal(result, np.rot90(np.round(values / 257), -1))


def test_half_a_file_is_no_image():
    for suffix in ("jpg", "png", "webp"):
        data = encoded(make_image(1, (200, 200)), suffix)
        with pytest.raises((OSError, ValueError, SyntaxError)):
            open_image(data[: len(data) // 2])


# -------------------------------------------------------------------------------------------------------- the check


@pytest.fixture
def openings(monkeypatch):
    """Counts what is opened, and read, from here on."""
    counts = Counter()
    for owner, name in ((images, "open_image"), (Path, "read_bytes")):
        original = getattr(owner, name)

        def counted(*args, name=name, original=original):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counted)
    return counts


def test_second_check_opens_nothing_and_says_the_same(image_folder, tmp_path, openings):
    folder, memory = image_folder(5), tmp_path / "memory" / "checked.json"
    rows = read_folder(folder, "text")
    first = check_images(rows, memory)
    assert openings == {"open_image": 5, "read_bytes": 5}
    openings.clear()
    assert check_images(rows, memory) == first
    assert not openings
    assert [result[1:] for result in first] == [[32, 32, ""]] * 5
    assert len({digest for digest, *_ in first}) == 5


def test_a_changed_file_is_opened_again(image_folder, tmp_path, openings):
    folder, memory = image_folder(5), tmp_path / "checked.json"
    rows = read_folder(folder, "text")
    first = check_images(rows, memory)
    openings.clear()
    make_image(9, (40, 20)).save(folder / "02.png")
    shutil.copy(folder / "00.png", folder / "01.png")  # of the same size, maybe, but of another time
    second = check_images(rows, memory)
    assert openings["open_image"] == 2
    assert second[2][1:] == [40, 20, ""]
    assert second[1][0] == first[0][0] != first[1][0]
    assert [second[index] == first[index] for index in range(5)] == [True, False, False, True, True]


def test_bad_images_are_looked_at_again_once_mended(image_folder, tmp_path):
    folder, memory = image_folder(2), tmp_path / "checked.json"
    whole = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(whole[: len(whole) // 2])
    rows = read_folder(folder, "text")
    assert check_images(rows, memory)[0][3]
    (folder / "00.png").write_bytes(whole)
    assert not check_images(rows, memory)[0][3]


def test_images_inside_of_a_dataset_are_remembered_by_content(tmp_path, openings):
    contents = [{"bytes": encoded(make_image(index)), "path": f"{index}.png"} for index in range(3)]
    rows = datasets.Dataset.from_dict({"image": contents}).cast_column("image", datasets.Image(decode=False))
    first = check_images(rows, tmp_path / "checked.json")
    assert openings == {"open_image": 3}
    assert [digest for digest, *_ in first] == [hashlib.sha256(image["bytes"]).hexdigest() for image in contents]
    openings.clear()
    assert check_images(rows, tmp_path / "checked.json") == first
    assert not openings


def stored(place, *numbers):
    """A dataset that holds its images, as loaded from disk."""
    if not place.exists():
        contents = [{"bytes": encoded(make_image(number)), "path": f"{number}.png"} for number in numbers]
        datasets.Dataset.from_dict({"image": contents}).save_to_disk(place)
    return datasets.load_from_disk(place).cast_column("image", datasets.Image(decode=False))


@pytest.mark.parametrize("numbers", [(0, 1, 2), (5, 5, 6, 7)])
def test_a_second_process_reads_no_image_of_a_dataset_and_writes_nothing(tmp_path, openings, numbers, monkeypatch):
    memory, place = tmp_path / "checked.json", tmp_path / "set"
    first = check_images(stored(place, *numbers), memory)
    written = memory.stat().st_mtime_ns, memory.read_text()
    openings.clear()
    monkeypatch.setattr(images, "check_image", lambda *_: pytest.fail("an image was looked at"))
    assert check_images(stored(place), memory) == first
    assert (memory.stat().st_mtime_ns, memory.read_text()) == written
    assert not openings
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checked.json", "checked.json.lock", "set"]


def test_a_second_process_reads_no_file_again_and_writes_nothing(image_folder, tmp_path, openings):
    memory = tmp_path / "checked.json"
    folder = image_folder(3)
    first = check_images(read_folder(folder, "text"), memory)
    written = memory.stat().st_mtime_ns
    assert check_images(read_folder(folder, "text"), memory) == first
    assert openings == {"open_image": 3, "read_bytes": 3}
    assert memory.stat().st_mtime_ns == written


def test_another_choice_of_rows_is_remembered_by_content(tmp_path, openings):
    """Of several the latest four as a whole, so that the memory does not grow with every seed."""
    memory, rows = tmp_path / "checked.json", stored(tmp_path / "set", *range(6))
    whole = check_images(rows, memory)
    openings.clear()
    for start in range(5):
        assert check_images(rows.select([start, start + 1]), memory) == whole[start : start + 2]
    assert not openings
    assert len(json.loads(memory.read_text())["listings"]) == 4


def test_a_bad_image_of_a_dataset_is_looked_at_again(tmp_path, openings):
    """A reader of a later day may know it; the good ones are known."""
    contents = [{"bytes": encoded(make_image(0)), "path": None}, {"bytes": b"no image", "path": None}, None]
    rows = datasets.Dataset.from_dict({"image": contents}).cast_column("image", datasets.Image(decode=False))
    first = check_images(rows, tmp_path / "checked.json")
    openings.clear()
    assert check_images(rows, tmp_path / "checked.json") == first
    assert openings == {"open_image": 1}
    assert [problem for *_, problem in first] == ["", "no image that Pillow knows", "the row holds no image"]


@pytest.mark.parametrize("text", ["{broken", "[1, 2]", ""])
def test_a_memory_that_is_broken_only_costs_time(image_folder, tmp_path, openings, text):
    rows, memory = read_folder(image_folder(2), "text"), tmp_path / "checked.json"
    memory.write_text(text)
    assert len(check_images(rows, memory)) == 2
    assert openings["open_image"] == 2
    assert len(check_images(rows, memory)) == 2
    assert openings["open_image"] == 2  # it was mended


def test_a_cache_folder_that_cannot_be_made_or_locked_is_named(image_folder, tmp_path):
    """The second as in a cache that belongs to somebody else; a folder in the lock's place fails for root too."""
    rows = read_folder(image_folder(2), "text")
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "checked.json.lock").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "other"):
        with pytest.raises(InputError, match="--cache_dir") as caught:
            check_images(rows, folder / "checked.json")
        assert f"{folder} cannot be used" in str(caught.value)


def test_of_several_that_check_at_once_one_opens_the_images(image_folder, tmp_path, openings):
    rows, memory = read_folder(image_folder(20), "text"), tmp_path / "checked.json"
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: check_images(rows, memory), range(3))
    assert openings["open_image"] == 20
    assert others == [first, first]


def test_a_missing_file_and_a_broken_link_are_named(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("gone.png", "nowhere.png"):
        finding = check_image({"bytes": None, "path": str(tmp_path / name)}, {})
        assert finding == (None, ["", 0, 0, "there is no such file"])


@pytest.mark.parametrize("side, problem", [(16, ""), (15, "15 x 40 pixels; a side needs at least 16")])
def test_a_side_of_16_pixels_is_enough(side, problem):
    content = encoded(make_image(0, (side, 40)))
    digest = hashlib.sha256(content).hexdigest()
    assert check_image({"bytes": content, "path": None}, {}) == (digest, [digest, side, 40, problem])


def test_a_row_without_an_image_is_named():
    assert check_image(None, {}) == (None, ["", 0, 0, "the row holds no image"])


# ------------------------------------------------------------------------------------------ at the size of training


def photo(width, height, seed):
    """A picture with detail of every size, as photos have it, and the noise of a sensor."""
    generator = np.random.default_rng(seed)
    pixels = generator.normal(128, 5, (height, width, 3))
    for size in (4, 32, 256):
        coarse = generator.normal(128, 20, (height // size + 2, width // size + 2)).clip(0, 255).astype(np.uint8)
        coarse = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(coarse)[..., None] - 128.0
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


WIDE = colour_profile((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))  # Display P3


def differences(content, side, place=(0.5, 0.5)):
    """Of what training sees and what the whole picture, opened as a viewer shows it, would give: largest and mean."""
    seen = open_fitted(content, (side, side), Image.Resampling.LANCZOS, place)
    whole = ImageOps.fit(open_image(content), (side, side), Image.Resampling.LANCZOS, centering=place)
    apart = np.abs(np.asarray(seen).astype(int) - np.asarray(whole))
    return apart.max(), apart.mean()


@pytest.mark.parametrize("profile", [None, WIDE])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.1, 0.9)])
@pytest.mark.parametrize("size", [(800, 600), (602, 798), (600, 801)])
def test_large_photos_change_by_rounding_alone(size, place, profile):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(photo(*size, 0), "jpg", quality=92, icc_profile=profile, exif=exif)
    largest, mean = differences(content, 96, place)
    assert largest <= 8
    assert mean < 0.7


def test_a_reduced_size_leaves_twice_the_side(monkeypatch):
    """A quarter, a half or the whole, as much as the resampling needs; pictures of other formats come whole."""
    sizes = []
    original = images.decode_file

    def noted(*args):
        image = original(*args)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(images, "decode_file", noted)
    content = encoded(photo(800, 600, 0), "jpg")
    for side in (37, 38, 75, 76, 150, 151, 400):
        open_fitted(content, (side, side), Image.Resampling.LANCZOS, (0.5, 0.5))
    open_fitted(encoded(photo(804, 602, 0), "jpg"), (37, 37), Image.Resampling.LANCZOS, (0.5, 0.5))
    open_fitted(content, (37, 37), Image.Resampling.NEAREST, (0.5, 0.5))  # which takes single pixels
    open_fitted(encoded(photo(800, 600, 0), "webp"), (37, 37), Image.Resampling.LANCZOS, (0.5, 0.5))
    open_image(content)
    whole, half, quarter = (800, 600), (400, 300), (200, 150)
    small = [(100, 75), quarter, quarter, half, half]
    assert sizes == [*small, whole, whole, (402, 301), whole, whole, whole]


def test_what_is_no_large_jpeg_keeps_every_pixel():
    """But for a colour profile, which is obeyed after the picture was made smaller."""
    picture = photo(300, 200, 1)
    clear = picture.copy()
    clear.putalpha(Image.fromarray(np.tile(np.arange(300, dtype=np.uint16) * 255 // 299, (200, 1)).astype(np.uint8)))
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    pictures = [picture, clear, picture.quantize(32), picture.convert("L"), clear.convert("LA"), deep]
    for image in pictures:
        assert differences(encoded(image), 64) == (0, 0)
    assert differences(encoded(picture.convert("CMYK"), "tif", icc_profile=WIDE), 64) == (0, 0)
    for image in pictures[:2]:
        largest, mean = differences(encoded(image, icc_profile=WIDE), 64)
        assert 0 < largest <= 8
        assert mean < 0.7


def test_a_photo_that_breaks_off_is_found_by_the_check():
    """Which decodes to the end, at full size."""
    content = encoded(photo(800, 600, 0), "jpg")
    for end in (len(content) // 2, len(content) * 9 // 10):
        key, (_, _, _, problem) = check_image({"bytes": content[:end], "path": None}, {})
        assert key is None
        assert "cannot be read: " in problem


@pytest.mark.parametrize("size", [(13_500, 13_500), (20_000, 9_000)])
def test_a_scan_that_is_too_large_is_to_be_shrunk(size):
    """As few bytes: of one colour."""
    content = encoded(Image.new("1", size))
    key, (_, _, _, problem) = check_image({"bytes": content, "path": None}, {})
    assert key is None
    assert problem == f"{size[0] * size[1]:,} pixels, more than the 178,956,970 that are opened; shrink it"
