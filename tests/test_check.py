"""`sdtune check` finds what is wrong with a dataset and nothing else, and leaves it as it is."""

import io
import json
import re
import shutil

import datasets
import numpy as np
import pytest
from conftest import load_script
from image_data import make_image, snapshot, write_messy_folder, write_metadata
from PIL import Image, ImageOps
from running import REPO, status_of
from shards import make_rows, write_parquet, write_tar
from tiny import make_tokenizer

from sdtune.commands import check as command
from sdtune.counts import count_sizes

KINDS = ("unusable", "missing_captions", "cut_captions", "exact_duplicates", "near_duplicates", "enlarged")


@pytest.fixture(scope="module")
def render():
    """miniature/render.py as a module."""
    return load_script(REPO / "miniature" / "render.py")


@pytest.fixture(scope="module")
def creatures(render):
    """240 creatures, as the demo draws them."""
    return [Image.fromarray(render.make("creatures", 0, index)[0]) for index in range(240)]


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the tiny pipelines."""
    return make_tokenizer()


def check(folder, tmp_path, *words):
    """Runs the command; returns (status, report)."""
    report = tmp_path / "report.json"
    own = ["--resolution=64", f"--cache_dir={tmp_path / 'cache'}", f"--json={report}", "--overwrite"]
    status = status_of(command.main, folder, *own, *words)
    return status, json.loads(report.read_text(encoding="utf-8"))


def errors(capsys, *words):
    """What the command says on the standard error, having ended with status 2."""
    assert status_of(command.main, *words) == 2
    return capsys.readouterr().err


def write_images(folder, images, captions=None):
    """Writes images by name, and their captions; returns the folder."""
    folder.mkdir()
    captions, rows = captions or {}, []
    for name, image in images.items():
        image.save(folder / name)
        rows.append({"file_name": name, "text": captions.get(name, f"picture {name}")})
    write_metadata(folder, rows)
    return folder


def encoded(image, kind, quality):
    """The image as a file of another format gives it back."""
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return Image.open(file).convert("RGB")


def noise(seed, size=(200, 150)):
    """A photo-like image: coloured noise of which large parts are stronger than small ones."""
    frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, size[::-1]), indexing="ij"))
    frequency[0, 0] = 1
    waves = np.fft.fft2(np.random.default_rng(seed).standard_normal((3, *size[::-1]))) / frequency**1.2
    pixels = np.fft.ifft2(waves).real
    pixels = (pixels - pixels.mean()) / pixels.std() * 55 + 128
    return Image.fromarray(pixels.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


@pytest.fixture
def planted(tmp_path, creatures):
    """A folder of 40 images, 29 of them good and 11 with a fault each."""
    folder = write_messy_folder(tmp_path / "planted", 0, 64).path
    images = {f"creature_{index:02d}.png": image for index, image in enumerate(creatures[:28])}
    images["cmyk.jpg"] = noise(1).convert("CMYK")  # no fault: opened as a viewer would
    images["long.png"] = noise(2)
    images["small.png"] = noise(3, (60, 40))
    images["mirrored.png"] = ImageOps.mirror(creatures[7])
    for name, image in images.items():
        image.save(folder / name)
    creatures[5].save(folder / "reencoded.jpg", quality=75)
    creatures[9].resize((100, 100), Image.Resampling.BICUBIC).save(folder / "resized.webp", quality=80)
    shutil.copy(folder / "creature_03.png", folder / "exact.png")

    captions = dict.fromkeys([*images, "reencoded.jpg", "resized.webp", "exact.png"], "a <b>red</b> & star")
    captions["long.png"] = "red " * 80 + "tail"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    write_metadata(folder, rows + [{"file_name": name, "text": text} for name, text in captions.items()])
    return folder


def test_an_earlier_page_of_its_own_is_replaced(tmp_path, creatures, capsys):
    folder = write_images(tmp_path / "two", {"a.png": creatures[0], "b.png": creatures[1]})
    page = tmp_path / "page.html"
    words = [folder, "--resolution=64", f"--cache_dir={tmp_path / 'cache'}", f"--html={page}"]
    assert status_of(command.main, *words) == 0
    first = page.read_text(encoding="utf-8")
    shutil.copy(folder / "a.png", folder / "c.png")
    assert status_of(command.main, *words) == 1
    assert page.read_text(encoding="utf-8") != first
    page.write_text("mine")
    assert f"--html={page}: exists; name another, or add --overwrite" in " ".join(errors(capsys, *words).split())
    assert page.read_text(encoding="utf-8") == "mine"


def named(findings, *keys):
    """What findings say under some keys: a list of tuples, the image first."""
    return [tuple(finding[key] for key in ("image", *keys)) for finding in findings]


def test_every_planted_fault_and_nothing_else(planted, tiny_pipeline, tmp_path, capsys):
    before = snapshot(planted)
    assert len(before) - 1 == 39  # and one in the metadata that is not there
    page = tmp_path / "report.html"
    base = f"--pretrained_model_name_or_path={tiny_pipeline}"
    status, report = check(planted, tmp_path, base, f"--html={page}")
    assert status == 1
    assert snapshot(planted) == before
    assert (report["num_images"], report["num_usable"], report["num_captions"]) == (40, 35, 39)
    assert {image: problem.split(":")[0] for image, problem in named(report["unusable"], "problem")} == {
        "no_file.png": "there is no such file",
        "not_an_image.jpg": "no image that Pillow knows",
        "truncated.jpg": "cannot be read",
        "too_small.png": "100 x 3 pixels; a side needs at least 16",
    }
    assert named(report["missing_captions"]) == [("no_caption.png",)]
    assert named(report["cut_captions"], "tokens", "lost") == [("long.png", 86, "red red red red red tail")]
    assert named(report["enlarged"], "width", "height", "factor") == [("small.png", 60, 40, 1.6)]
    assert named(report["exact_duplicates"], "same_as") == [("exact.png", "creature_03.png")]
    assert named(report["near_duplicates"], "like", "mirrored") == [
        ("mirrored.png", "creature_07.png", True),
        ("reencoded.jpg", "creature_05.png", False),
        ("resized.webp", "creature_09.png", False),
    ]
    assert report["near_duplicates"][0]["difference"] == 0
    assert sum(report["sizes"].values()) == 36
    assert sum(report["aspect_ratios"].values()) == 36
    assert report["sizes"]["64 x 64"] == 32
    assert report["captions_with_word"]["star"] == 34
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for line in (
        "Unusable images: 4",
        "Missing captions: 1",
        "Cut captions: 1",
        "Exact duplicates: 1",
        "Near duplicates: 3",
        "Small images: 1",
        "small.png: 60 x 40, enlarged 1.60 times",
        "exact.png: same as creature_03.png",
    ):
        assert line in text
    check_page(page.read_text(encoding="utf-8"), report)


def check_page(page, report):
    """The page holds all findings, escaped, and needs nothing else."""
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; star" in page
    assert "<b>red" not in page
    assert not re.search(r"<(script|link|iframe)|https?://|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    # Unusable ones that open, a thumbnail of each cut, small and good image, and two of each duplicate.
    assert len(sources) == 1 + 1 + 1 + 2 * 4 + 36
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all(finding["image"] in page for kind in KINDS for finding in report[kind])


def test_a_good_dataset_has_no_findings(creatures, tmp_path, tiny_pipeline, capsys):
    """Among the demo's creatures no two pass for near duplicates, as they are or mirrored."""
    folder = write_images(tmp_path / "good", {f"{index:03d}.png": image for index, image in enumerate(creatures)})
    status, report = check(folder, tmp_path, f"--pretrained_model_name_or_path={tiny_pipeline}")
    assert status == 0
    assert [report[kind] for kind in KINDS] == [[]] * 6
    assert "Near duplicates: 0\n" in capsys.readouterr().out


def test_shapes_test_images_and_noise_are_no_near_duplicates(render):
    """Squares of any colour have one and the same hash; their colours tell them apart."""
    shapes = [Image.fromarray(render.make("shapes", 0, index)[0]) for index in range(120)]
    for images in (shapes, [make_image(index) for index in range(60)], [noise(seed) for seed in range(30)]):
        assert command.near_duplicates([command.fingerprint(image) for image in images], 2.5) == {}


def as_jpeg(image):
    return encoded(image, "JPEG", 75)


def as_webp(image):
    return encoded(image, "WEBP", 80)


def doubled(image):
    return image.resize([2 * side for side in image.size], Image.Resampling.BICUBIC)


def made_smaller(image):
    return image.resize([3 * side // 4 for side in image.size], Image.Resampling.LANCZOS)


@pytest.mark.parametrize("change", [as_jpeg, as_webp, doubled, made_smaller])
@pytest.mark.parametrize("mirror", [False, True])
def test_near_duplicates_are_found(creatures, change, mirror):
    for image in [*creatures[:30], *map(noise, range(5)), noise(6, (211, 97))]:
        copy = change(ImageOps.mirror(image) if mirror else image)
        found = command.near_duplicates([command.fingerprint(image), command.fingerprint(copy)], 2.5)
        assert list(found) == [1]
        assert found[1][1:] == (mirror, 0)


def test_the_most_alike_is_named_in_blocks_too(monkeypatch):
    re_encoded, mirrored = encoded(noise(0), "JPEG", 30), ImageOps.mirror(noise(1))
    images = [noise(0), noise(1), re_encoded, noise(0), mirrored, noise(2)]
    prints = [command.fingerprint(image) for image in images]
    found = command.near_duplicates(prints, 5.0)
    matches = {late: (is_mirrored, early) for late, (_, is_mirrored, early) in found.items()}
    assert matches == {2: (False, 0), 3: (False, 0), 4: (True, 1)}
    monkeypatch.setattr(command, "PAIRS", 7)  # one row at a time
    assert command.near_duplicates(prints, 5.0) == found


def test_difference():
    """Root mean square, the larger one of brightness and colour."""
    brightness, colour = np.zeros((2, 16, 16), np.uint8), np.full((2, 8, 8, 2), 200, np.uint8)
    other_brightness = np.stack([np.full((16, 16), 3), np.eye(16) * 8]).astype(np.uint8)
    other_colour = colour + np.array([5, 1], np.uint8).reshape(2, 1, 1, 1)
    found = command.difference((brightness, colour), (other_brightness, other_colour))
    assert found.tolist() == [5, 2]  # 8 in one pixel of 16: sqrt(64 / 16)


def test_no_near_duplicates_are_looked_for_if_not_wanted(planted, tmp_path, capsys):
    _, report = check(planted, tmp_path, "--near_duplicate_difference=-1")
    assert report["near_duplicates"] is None
    assert report["cut_captions"] is None  # without a tokenizer
    text = " ".join(capsys.readouterr().out.split())
    assert "Near duplicates: not checked (give --near_duplicate_difference" in text
    assert "Cut captions: not checked (give --pretrained_model_name_or_path" in text


@pytest.mark.parametrize(
    "caption", ["red " * 74 + "circles are lost", "red  " * 75 + "\ncircle", "Ünï " + "x" * 90, "red " * 75, ""]
)
def test_lost_words_are_those_that_the_tokenizer_cuts(tokenizer, caption):
    length, lost = command.lost_words(tokenizer, caption)
    whole = tokenizer(caption, verbose=False).input_ids
    cut = tokenizer(caption, truncation=True).input_ids
    assert length == len(whole)
    assert bool(lost) == (len(whole) > 77)
    assert caption.endswith(lost)
    kept = caption[: len(caption) - len(lost)]
    assert not lost or kept[-1].isspace()  # whole words are named
    seen = tokenizer(kept, verbose=False).input_ids[:-1]
    assert seen == cut[: len(seen)]


def test_words_that_are_cut_in_two_are_lost_whole(tokenizer):
    assert command.lost_words(tokenizer, "red " * 74 + "zzz tail") == (83, "zzz tail")
    assert command.lost_words(tokenizer, "red " * 75 + "tail")[1] == "tail"
    assert command.lost_words(tokenizer, "red " * 75) == (77, "")


def test_captions_of_dreambooth_and_of_a_config(tmp_path):
    """Photos without captions are no fault if all have one caption; a configuration file sets any flag."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(2):
        noise(seed).save(folder / f"{seed}.png")
    status, report = check(folder, tmp_path)
    assert (status, report["unusable"], len(report["missing_captions"])) == (1, [], 2)
    recipe = tmp_path / "check.yaml"
    recipe.write_text(
        f"dataset: {folder}\ninstance_prompt: a sks star\nresolution: 100\n"
        f"json: {tmp_path / 'two.json'}\ncache_dir: {tmp_path / 'cache'}\n"
    )
    assert status_of(command.main, "--config", recipe) == 0
    report = json.loads((tmp_path / "two.json").read_text())
    assert report["captions_with_word"] == {"a": 2, "sks": 2, "star": 2}
    assert report["resolution"] == 100


def test_a_dataset_that_holds_its_images(tmp_path):
    rows = []
    for index, seed in enumerate((1, 2, 1)):
        file = io.BytesIO()
        noise(seed).save(file, "PNG")
        rows.append({"picture": {"bytes": file.getvalue(), "path": None}, "prompt": ["one", f"two {index}"]})
    features = datasets.Features({"picture": datasets.Image(), "prompt": datasets.List(datasets.Value("string"))})
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder)
    before = snapshot(folder)
    columns = ["--image_column=picture", "--caption_column=prompt"]
    status, report = check(folder, tmp_path, *columns, f"--html={tmp_path / 'page.html'}")
    assert status == 1
    assert report["exact_duplicates"] == [{"image": "row 2", "same_as": "row 0", "rows": [2, 0]}]
    assert report["captions_with_word"] == {"one": 3, "two": 3, "0": 1, "1": 1, "2": 1}
    assert snapshot(folder) == before


def test_long_names_and_steering_characters_stay_in_the_columns(tmp_path, capsys):
    name = "\x1b[31m" + "long" * 40 + ".png"
    folder = write_images(tmp_path / "names", {name: make_image(0, (20, 20))}, {name: "x"})
    check(folder, tmp_path)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "20 x 20, enlarged 3.20 times" in " ".join(text.split())


def test_only_some_findings_are_shown_and_all_written(tmp_path, capsys):
    images = {f"{index:02d}.png": make_image(index, (32, 32)) for index in range(25)}
    _, report = check(write_images(tmp_path / "small", images), tmp_path)
    assert len(report["enlarged"]) == 25
    text = capsys.readouterr().out
    assert text.count("enlarged 2.00 times") == 20
    assert "and 5 more, which --json lists" in text


def test_small_images_are_found_before_they_have_captions(tmp_path, capsys):
    """Who has read of them does not write captions for them first."""
    images = {"a.png": make_image(0, (64, 64)), "b.png": make_image(1, (32, 40)), "c.png": make_image(2, (16, 80))}
    folder = write_images(tmp_path / "bare", images)
    (folder / "metadata.jsonl").unlink()
    _, report = check(folder, tmp_path)
    assert named(report["missing_captions"]) == [("a.png",), ("b.png",), ("c.png",)]
    assert named(report["enlarged"], "factor") == [("b.png", 2.0), ("c.png", 4.0)]
    assert "Small images: 2 (" in capsys.readouterr().out


def test_wrong_usage_is_named_at_once_before_anything_is_read(image_folder, tmp_path, capsys):
    folder, there = image_folder(2), tmp_path / "there.html"
    there.write_text("mine")
    before = snapshot(tmp_path)
    wrong = ["--resolution=0", f"--json={folder / 'r.json'}", "--revision=x", f"--html={there}"]
    said = errors(capsys, folder, *wrong, "--near_duplicate_difference=nan")
    assert "--resolution: must be a whole number in [1, inf), not '0'" in said
    assert "--near_duplicate_difference: must be in [-1, inf], not 'nan'" in said
    assert f"--json={folder / 'r.json'}: lies in the dataset" in said
    assert f"--html={there}: exists; name another" in said
    assert "--revision: does nothing" in said
    assert "single file" in errors(capsys, folder, "--pretrained_model_name_or_path=model.ckpt")
    assert "DATASET is missing: name a folder" in errors(capsys)
    assert "name two files" in errors(capsys, folder, f"--json={tmp_path}/x", f"--html={tmp_path}/x")
    assert "tokenizer" in errors(capsys, folder, f"--pretrained_model_name_or_path={tmp_path}")
    said = errors(capsys, tmp_path / "nowhere")
    assert "DATASET=" in said
    assert "--dataset_name" not in said
    assert snapshot(tmp_path) == before


def test_status_and_output(tmp_path, image_folder, monkeypatch, capsys):
    image_folder(2, 64).rename(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["../data", "--json=r.json", "--cache_dir=cache"]
    assert status_of(command.main, *words, "--resolution=32") == 0
    assert "2 images, 2 usable" in capsys.readouterr().out
    assert status_of(command.main, *words, "--resolution=65", "--overwrite") == 1
    assert "01.png: 64 x 64, enlarged 1.02 times" in capsys.readouterr().out
    assert status_of(command.main, *words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "sdtune check: --json=r.json: exists; name another, or add --overwrite\n"


def test_many_missing_captions_hide_no_broken_image(tmp_path, capsys):
    """The folder of somebody who has photos alone."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(55):
        make_image(index, (64, 64)).save(folder / f"{index:02d}.png")
    noise(1).save(folder / "zebra.jpg")
    (folder / "zebra.jpg").write_bytes((folder / "zebra.jpg").read_bytes()[:1000])
    status, report = check(folder, tmp_path)
    assert (status, report["num_usable"]) == (1, 0)
    assert named(report["unusable"]) == [("zebra.jpg",)]
    assert named(report["missing_captions"]) == [(f"{index:02d}.png",) for index in range(55)]
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    text = " ".join(text.split())
    assert (
        "Unusable images: 1 (training stops at these, or goes on without them by --skip_bad_images) zebra.jpg: "
        in text
    )
    told = f"`sdtune caption {folder}` writes them, or give one for all by --instance_prompt; training stops at these"
    assert f"Missing captions: 55 ({told}" in text
    assert "08.png, 09.png and 45 more, which --json lists" in text


def test_the_rarest_problem_comes_first(tmp_path, capsys):
    images = {f"{index:02d}.png": make_image(index, (64, 64)) for index in range(30)}
    images |= {f"small{index}.png": make_image(index, (40 + index, 3)) for index in range(2)}
    images["zebra.jpg"] = noise(1)
    folder = write_images(tmp_path / "images", images)
    for index in range(28):
        (folder / f"{index:02d}.png").write_bytes(b"no image")
    (folder / "zebra.jpg").write_bytes((folder / "zebra.jpg").read_bytes()[:1000])
    _, report = check(folder, tmp_path)
    shown = [image for (image,) in named(report["unusable"])]
    assert shown == ["zebra.jpg", "small0.png", "small1.png", *[f"{index:02d}.png" for index in range(28)]]
    text = " ".join(capsys.readouterr().out.split())
    kinds = "1 cannot be read, 2 a side needs at least 16, 28 no image that Pillow knows; training stops"
    assert f"Unusable images: 31 ({kinds}" in text
    assert "zebra.jpg: cannot be read: " in text
    assert "and 11 more, which --json lists" in text


@pytest.mark.parametrize(
    "problem, kind",
    [
        ("no image that Pillow knows", "no image that Pillow knows"),
        ("cannot be read: image file is truncated (3 bytes not processed)", "cannot be read"),
        ("100 x 3 pixels; a side needs at least 16", "a side needs at least 16"),
        ("3,000 bytes, more than any picture that is opened; shrink it", "more than any picture that is opened"),
        ("is no regular file; remove it", "is no regular file"),
    ],
)
def test_kinds_of_problems(problem, kind):
    assert command.kind_of_problem(problem) == kind


@pytest.mark.parametrize("photos", [["below/a.heic", "b.NEF"], []])
def test_photos_of_another_kind_are_on_the_page_too(photos, tmp_path):
    """Beside others they are no findings: training leaves them aside."""
    folder = write_images(tmp_path / "images", {"a.png": noise(1)})
    (folder / "below").mkdir()
    for name in [*photos, "._a.heic"]:
        (folder / name).write_bytes(b"x")
    page = tmp_path / "page.html"
    status, report = check(folder, tmp_path, f"--html={page}")
    assert (status, report["left_aside"]) == (0, photos[::-1])
    told = "2 of a kind that is not read (HEIC, NEF), such as b.NEF; convert to JPEG or PNG first"
    assert (f"<tr><th>Left aside</th><td>{told}</td></tr>" in page.read_text(encoding="utf-8")) == bool(photos)


@pytest.mark.parametrize("write, name", [(write_tar, "0.tar"), (write_parquet, "train.parquet")])
def test_libraries_draw_no_bars_outside_of_a_terminal(write, name, tmp_path, capsys):
    write(tmp_path / "shards" / name, make_rows(3, size=(64, 64)))
    datasets.enable_progress_bars()
    assert check(tmp_path / "shards", tmp_path)[0] == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert " ".join(said.out.split()).startswith(f"{tmp_path / 'shards'}: 3 images, 3 usable, 3 captions ")


def test_ratios_beyond_the_usual_ones_are_not_called_by_the_last_of_them():
    sizes = [(90, 600), (600, 90), (100, 250), (250, 100), (100, 230), (230, 100), (100, 200), (64, 64)]
    found = count_sizes([("", width, height, "") for width, height in sizes])["aspect_ratios"]
    assert found == {"taller than 1:2": 2, "1:2": 2, "1:1": 1, "2:1": 1, "wider than 2:1": 2}


@pytest.mark.parametrize("limit", ["2.5", "4"])
def test_duplicates_come_before_small_images_and_say_what_their_distance_means(limit, tmp_path, capsys):
    images = {"a.png": noise(1), "b.png": noise(2), "small.png": noise(3, (60, 40))}
    folder = write_images(tmp_path / "images", images)
    noise(1).save(folder / "c.jpg", quality=75)
    (folder / "c.txt").write_text("again")
    check(folder, tmp_path, f"--near_duplicate_difference={limit}", f"--html={tmp_path / 'page.html'}")
    text = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for told in (text, page):
        places = [told.index(f"{title}: ") for title in ("Exact duplicates", "Near duplicates", "Small images")]
        assert places == sorted(places)
    means = "they differ by so many of 255 shades in the mean (root of squares): 0 is the same picture, JPEG of"
    assert means in text
    assert f"what differs by more than {limit} is not named" in text
    assert "c.jpg: like a.png, differs by " in text


def test_a_mistyped_folder_is_looked_for_on_the_hub_in_so_many_words(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "my_photos", {"a.png": noise(1)})
    monkeypatch.chdir(tmp_path)
    cache = f"--cache_dir={tmp_path / 'cache'}"
    (tmp_path / "sets").mkdir()
    (tmp_path / "my_photos").rename(tmp_path / "sets" / "my_photos")
    for name, meant in (
        ("sets/my_photo", " (did you mean sets/my_photos?)"),
        ("setz", " (did you mean sets?)"),
        ("xyz", ""),
    ):
        assert status_of(command.main, name, cache) == 2
        said = capsys.readouterr()
        looking = f"There is no folder or file {name} here{meant}; looking for a dataset of that name on the Hub.\n"
        assert said.out == looking
        told = f"DATASET={name}: no such folder here{meant}; looked for a dataset of that name on the Hub too, which"
        assert told in " ".join(said.err.split())


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_captions_in_other_encodings_are_findings_beside_others(encoding, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        noise(number).save(folder / f"{number}.png")
    for number in (0, 2):
        (folder / f"{number}.txt").write_bytes("ein Mädchen".encode(encoding))
    (folder / "3.txt").write_text("a girl")
    status, report = check(folder, tmp_path)
    told = "its caption, a .txt, is not UTF-8; convert it"
    assert (status, report["num_usable"]) == (1, 1)
    assert named(report["unusable"], "problem") == [("0.png", told), ("2.png", told)]
    assert named(report["missing_captions"]) == [("1.png",)]
    assert "Unusable images: 2 (training stops at these" in capsys.readouterr().out


@pytest.mark.parametrize("name, kind", [("a.heic", "HEIC"), ("below/b.NEF", "NEF")])
def test_a_folder_of_photos_of_another_kind_alone(name, kind, tmp_path, capsys):
    photo = tmp_path / "photos" / name
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"x")
    told = f"1 of a kind that is not read ({kind}), such as {photo.name}; convert to JPEG or PNG first"
    said = errors(capsys, tmp_path / "photos")
    assert said == f"sdtune check: the folder {tmp_path / 'photos'} holds no images but {told}\n"


@pytest.mark.parametrize("names", [[], [".DS_Store"], ["a.txt", "b.TXT"], ["metadata.jsonl"]])
def test_a_folder_without_images_is_told(names, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).write_bytes(b"")
    said = " ".join(errors(capsys, tmp_path / "photos").split())
    assert said.startswith(f"sdtune check: the folder {tmp_path / 'photos'} holds no images (.avif, .bmp, ")


def test_what_cannot_be_a_name_on_the_hub_is_not_looked_for_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdtune.named_dataset.read_rows", None)
    for name in ("./photo", f"{tmp_path}/photo", "../photo/of/mine"):
        said = " ".join(errors(capsys, name).split())
        meant = "" if "mine" in name else f" (did you mean {name}s?)"
        assert said == f"sdtune check: DATASET={name}: there is no such folder or file; check its name{meant}"
    said = " ".join(errors(capsys, "demo/creatures").split())
    assert said.endswith("no such folder or file; run `make demo` in the folder of the repository, which makes it")
