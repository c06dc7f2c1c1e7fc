"""tools/check_dataset.py finds what is wrong with a dataset and nothing else, and leaves it as it is."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from conftest import load_script
from image_data import make_image, snapshot, write_messy_folder, write_metadata
from PIL import Image, ImageOps
from running import REPO, run_script
from tiny import make_tokenizer

TOOL = REPO / "tools" / "check_dataset.py"
KINDS = ("unusable", "cut_captions", "enlarged", "exact_duplicates", "near_duplicates")


@pytest.fixture(scope="module")
def tool():
    """tools/check_dataset.py as a module."""
    return load_script(TOOL)


@pytest.fixture(scope="module")
def render():
    """miniature/render.py as a module."""
    return load_script(REPO / "miniature" / "render.py")


@pytest.fixture(scope="module")
def creatures(render):
    """240 creatures, as the demo draws them."""
    return [Image.fromarray(render.make("creatures", 0, index)[0]) for index in range(240)]


def check(tool, folder, tmp_path, *words):
    """Runs the tool; returns (status, report)."""
    report = tmp_path / "report.json"
    status = tool.main([str(folder), "--resolution=64", f"--cache_dir={tmp_path / 'cache'}", f"--json={report}",
                        "--overwrite", *map(str, words)])
    return status, json.loads(report.read_text(encoding="utf-8"))


def errors(tool, capsys, *words):
    """What the tool says on the standard error, having ended with status 2."""
    with pytest.raises(SystemExit) as stop:
        tool.main(list(map(str, words)))
    assert stop.value.code == 2
    return capsys.readouterr().err


def write_images(folder, images, captions=None):
    """Writes images by name, and their captions; returns the folder."""
    folder.mkdir()
    for name, image in images.items():
        image.save(folder / name)
    write_metadata(folder, [{"file_name": name, "text": (captions or {}).get(name, f"picture {name}")}
                            for name in images])
    return folder


def encoded(image, kind="JPEG", **options):
    """The image as a file of another format gives it back."""
    file = io.BytesIO()
    image.save(file, kind, **options)
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
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = {f"creature_{index:02d}.png": image for index, image in enumerate(creatures[:28])}
    images["cmyk.jpg"] = noise(1).convert("CMYK")  # no fault: opened as a viewer would
    images["long.png"], images["small.png"] = noise(2), noise(3, (60, 40))
    images["mirrored.png"] = ImageOps.mirror(creatures[7])
    for name, image in images.items():
        image.save(folder / name)
    creatures[5].save(folder / "reencoded.jpg", quality=75)
    creatures[9].resize((100, 100), Image.Resampling.BICUBIC).save(folder / "resized.webp", quality=80)
    shutil.copy(folder / "creature_03.png", folder / "exact.png")
    for name in [*images, "reencoded.jpg", "resized.webp", "exact.png"]:
        rows.append({"file_name": name, "text": "red " * 80 + "tail" if name == "long.png" else "a <b>red</b> & star"})
    write_metadata(folder, rows)
    return folder


def test_every_planted_fault_and_nothing_else(tool, planted, tiny_pipeline, tmp_path, capsys):
    before = snapshot(planted)
    assert len(before) - 1 == 39  # and one in the metadata that is not there
    page = tmp_path / "report.html"
    words = [f"--pretrained_model_name_or_path={tiny_pipeline}", f"--html={page}"]
    status, report = check(tool, planted, tmp_path, *words)
    assert status == 1
    assert snapshot(planted) == before
    assert (report["num_images"], report["num_usable"], report["num_captions"]) == (40, 35, 39)
    assert {row["image"]: row["problem"].split(":")[0] for row in report["unusable"]} == {
        "no_caption.png": "has no caption, in metadata or a .txt beside it", "no_file.png": "there is no such file",
        "not_an_image.jpg": "no image that Pillow knows", "truncated.jpg": "cannot be read",
        "too_small.png": "100 x 3 pixels; a side needs at least 16"}
    assert [(row["image"], row["tokens"], row["lost"]) for row in report["cut_captions"]] == [
        ("long.png", 86, "red red red red red tail")]
    assert [(row["image"], row["width"], row["height"], row["factor"]) for row in report["enlarged"]] == [
        ("small.png", 60, 40, 1.6)]
    assert [(row["image"], row["same_as"]) for row in report["exact_duplicates"]] == [("exact.png", "creature_03.png")]
    assert [(row["image"], row["like"], row["mirrored"]) for row in report["near_duplicates"]] == [
        ("mirrored.png", "creature_07.png", True), ("reencoded.jpg", "creature_05.png", False),
        ("resized.webp", "creature_09.png", False)]
    assert report["near_duplicates"][0]["difference"] == 0
    assert sum(report["sizes"].values()) == sum(report["aspect_ratios"].values()) == 36
    assert report["sizes"]["64 x 64"] == 32
    assert report["captions_with_word"]["star"] == 34
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for line in ("Unusable images: 5", "Cut captions: 1", "Small images: 1", "Exact duplicates: 1",
                 "Near duplicates: 3", "small.png: 60 x 40, enlarged 1.60 times",
                 "exact.png: same as creature_03.png"):
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
    assert all(row["image"] in page for kind in KINDS for row in report[kind])


def test_a_good_dataset_has_no_findings(tool, creatures, tmp_path, tiny_pipeline, capsys):
    """Among the demo's creatures no two pass for near duplicates, as they are or mirrored."""
    folder = write_images(tmp_path / "good", {f"{index:03d}.png": image for index, image in enumerate(creatures)})
    status, report = check(tool, folder, tmp_path, f"--pretrained_model_name_or_path={tiny_pipeline}")
    assert status == 0
    assert [report[kind] for kind in KINDS] == [[], [], [], [], []]
    assert "Near duplicates: 0\n" in capsys.readouterr().out


def test_shapes_test_images_and_noise_are_no_near_duplicates(tool, render):
    """Squares of any colour have one and the same hash; their colours tell them apart."""
    for images in ([Image.fromarray(render.make("shapes", 0, index)[0]) for index in range(120)],
                   [make_image(index) for index in range(60)], [noise(seed) for seed in range(30)]):
        assert tool.near_duplicates([tool.fingerprint(image) for image in images], 2.5) == {}


@pytest.mark.parametrize("change", [
    lambda image: encoded(image, quality=75), lambda image: encoded(image, "WEBP", quality=80),
    lambda image: image.resize([2 * side for side in image.size], Image.Resampling.BICUBIC),
    lambda image: image.resize([3 * side // 4 for side in image.size], Image.Resampling.LANCZOS),
], ids=["jpeg", "webp", "double", "smaller"])
@pytest.mark.parametrize("mirror", [False, True])
def test_near_duplicates_are_found(tool, creatures, change, mirror):
    for image in [*creatures[:30], *map(noise, range(5)), noise(6, (211, 97))]:
        copy = change(ImageOps.mirror(image) if mirror else image)
        found = tool.near_duplicates([tool.fingerprint(image), tool.fingerprint(copy)], 2.5)
        assert list(found) == [1]
        assert found[1][1:] == (mirror, 0)


def test_the_most_alike_is_named_in_blocks_too(tool, monkeypatch):
    images = [noise(0), noise(1), encoded(noise(0), quality=30), noise(0), ImageOps.mirror(noise(1)), noise(2)]
    prints = [tool.fingerprint(image) for image in images]
    found = tool.near_duplicates(prints, 5.0)
    assert {late: (mirrored, early) for late, (_, mirrored, early) in found.items()} == {
        2: (False, 0), 3: (False, 0), 4: (True, 1)}
    monkeypatch.setattr(tool, "PAIRS", 7)  # one row at a time
    assert tool.near_duplicates(prints, 5.0) == found


def test_difference(tool):
    """Root mean square, the larger one of brightness and colour."""
    plain = np.zeros((2, 16, 16), np.uint8), np.full((2, 8, 8, 2), 200, np.uint8)
    other = np.stack([np.full((16, 16), 3), np.eye(16) * 8]).astype(np.uint8), plain[1] + np.array(
        [5, 1], np.uint8).reshape(2, 1, 1, 1)
    assert tool.difference(plain, other).tolist() == [5, 2]  # 8 in one pixel of 16: sqrt(64 / 16)


def test_no_near_duplicates_are_looked_for_if_not_wanted(tool, planted, tmp_path, capsys):
    _, report = check(tool, planted, tmp_path, "--near_duplicate_difference=-1")
    assert report["near_duplicates"] is None
    assert report["cut_captions"] is None  # without a tokenizer
    text = " ".join(capsys.readouterr().out.split())
    assert "Near duplicates: not checked (give --near_duplicate_difference" in text
    assert "Cut captions: not checked (give --pretrained_model_name_or_path" in text


@pytest.mark.parametrize("caption", ["red " * 74 + "circles are lost", "red  " * 75 + "\ncircle", "Ünï " + "x" * 90,
                                     "red " * 75, ""])
def test_lost_words_are_those_that_the_tokenizer_cuts(tool, caption):
    tokenizer = make_tokenizer()
    length, lost = tool.lost_words(tokenizer, caption)
    whole, cut = tokenizer(caption, verbose=False).input_ids, tokenizer(caption, truncation=True).input_ids
    assert length == len(whole)
    assert bool(lost) == (len(whole) > 77)
    assert caption.endswith(lost)
    kept = caption[: len(caption) - len(lost)]
    assert not lost or kept[-1].isspace()  # whole words are named
    seen = tokenizer(kept, verbose=False).input_ids[:-1]
    assert seen == cut[: len(seen)]


def test_words_that_are_cut_in_two_are_lost_whole(tool):
    assert tool.lost_words(make_tokenizer(), "red " * 74 + "zzz tail") == (83, "zzz tail")
    assert tool.lost_words(make_tokenizer(), "red " * 75 + "tail")[1] == "tail"
    assert tool.lost_words(make_tokenizer(), "red " * 75) == (77, "")


def test_captions_of_dreambooth_and_of_a_config(tool, tmp_path):
    """Photos without captions are no fault if all have one caption; a configuration file sets any flag."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(2):
        noise(seed).save(folder / f"{seed}.png")
    status, report = check(tool, folder, tmp_path)
    assert (status, len(report["unusable"])) == (1, 2)
    recipe = tmp_path / "check.yaml"
    recipe.write_text(f"dataset: {folder}\ninstance_prompt: a sks star\nresolution: 100\n"
                      f"json: {tmp_path / 'two.json'}\ncache_dir: {tmp_path / 'cache'}\n")
    assert tool.main(["--config", str(recipe)]) == 0
    report = json.loads((tmp_path / "two.json").read_text())
    assert (report["captions_with_word"], report["resolution"]) == ({"a": 2, "sks": 2, "star": 2}, 100)


def test_a_dataset_that_holds_its_images(tool, tmp_path):
    import datasets

    encode = [io.BytesIO() for _ in range(3)]
    for seed, file in zip((1, 2, 1), encode):
        noise(seed).save(file, "PNG")
    rows = [{"picture": {"bytes": file.getvalue(), "path": None}, "prompt": ["one", f"two {index}"]}
            for index, file in enumerate(encode)]
    features = datasets.Features({"picture": datasets.Image(), "prompt": datasets.List(datasets.Value("string"))})
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder)
    before = snapshot(folder)
    status, report = check(tool, folder, tmp_path, "--image_column=picture", "--caption_column=prompt",
                           f"--html={tmp_path / 'page.html'}")
    assert status == 1
    assert report["exact_duplicates"] == [{"image": "row 2", "same_as": "row 0", "rows": [2, 0]}]
    assert report["captions_with_word"] == {"one": 3, "two": 3, "0": 1, "1": 1, "2": 1}
    assert snapshot(folder) == before


def test_long_names_and_steering_characters_stay_in_the_columns(tool, tmp_path, capsys):
    name = "\x1b[31m" + "long" * 40 + ".png"
    folder = write_images(tmp_path / "names", {name: make_image(0, (20, 20))}, {name: "x"})
    check(tool, folder, tmp_path)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "20 x 20, enlarged 3.20 times" in " ".join(text.split())


def test_only_some_findings_are_shown_and_all_written(tool, tmp_path, capsys):
    images = {f"{index:02d}.png": make_image(index, (32, 32)) for index in range(25)}
    _, report = check(tool, write_images(tmp_path / "small", images), tmp_path)
    assert len(report["enlarged"]) == 25
    text = capsys.readouterr().out
    assert text.count("enlarged 2.00 times") == 20
    assert "and 5 more, which --json lists" in text


def test_wrong_usage_is_named_at_once_before_anything_is_read(tool, image_folder, tmp_path, capsys):
    folder = image_folder(2)
    (tmp_path / "there.html").write_text("mine")
    before = snapshot(tmp_path)
    said = errors(tool, capsys, folder, "--resolution=0", f"--json={folder / 'r.json'}", "--revision=x",
                  f"--html={tmp_path / 'there.html'}", "--near_duplicate_difference=nan")
    for problem in ("--resolution=0", "lies in the dataset", "--revision", "exists; name another", "=nan"):
        assert problem in said
    assert "single file" in errors(tool, capsys, folder, "--pretrained_model_name_or_path=model.ckpt")
    assert "no dataset is given" in errors(tool, capsys)
    assert "name two files" in errors(tool, capsys, folder, f"--json={tmp_path}/x", f"--html={tmp_path}/x")
    assert "tokenizer" in errors(tool, capsys, folder, f"--pretrained_model_name_or_path={tmp_path}")
    said = errors(tool, capsys, tmp_path / "nowhere")
    assert "DATASET=" in said
    assert "--dataset_name" not in said
    assert snapshot(tmp_path) == before


def test_alone_in_an_empty_folder_as_a_process(tmp_path, image_folder):
    image_folder(2, 64).rename(tmp_path / "data")
    (tmp_path / "alone").mkdir()
    script = shutil.copy(TOOL, tmp_path / "alone")
    words = ["../data", "--resolution=32", "--json=r.json", "--cache_dir=cache"]
    result = run_script(words, script=script, cwd=tmp_path / "alone", env={"PYTHONPATH": None})
    assert result.returncode == 0, result.stderr
    assert "2 images, 2 usable" in result.stdout
    result = run_script([*words, "--resolution=65", "--overwrite"], script=script, cwd=tmp_path / "alone")
    assert result.returncode == 1, result.stderr
    assert "01.png: 64 x 64, enlarged 1.02 times" in result.stdout
    result = run_script(words, script=script, cwd=tmp_path / "alone")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "check_dataset.py: --json=r.json: exists; name another, or add --overwrite\n"
