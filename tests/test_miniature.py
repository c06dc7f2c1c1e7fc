"""The miniature: its renderer draws and reads right, its parts load, are small, and do what its README says."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MINIATURE = Path(__file__).resolve().parent.parent / "miniature"


def load(name):
    """The module miniature/NAME.py, loaded by its path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, MINIATURE / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


render = load("render")


@pytest.fixture(scope="module")
def measure():
    return load("measure")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(MINIATURE / "pipeline" / "tokenizer")


def files_of(folder):
    """The bytes of the files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", render.FAMILIES)
def test_same_seed_draws_the_same_bytes(family, tmp_path):
    for name in ("a", "b"):
        render.main([family, "--output_dir", str(tmp_path / name), "--num_images", "4", "--seed", "3"])
    once, twice = (files_of(tmp_path / name) for name in ("a", "b"))
    assert len(once) == 5
    assert once == twice
    first, again = (render.make(family, seed, 0)[0] for seed in (3, 4))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert not np.array_equal(first, again)


def test_image_is_independent_of_how_many_are_drawn(tmp_path):
    for number in (3, 5):
        render.write_folder("creatures", tmp_path / str(number), number, seed=0)
    few, many = (files_of(tmp_path / name) for name in ("3", "5"))
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 3
    assert all(few[name] == many[name] for name in pictures)
    assert many["metadata.jsonl"].startswith(few["metadata.jsonl"])


def test_held_out_combinations_are_never_drawn_for_training():
    for seed in (0, 1):
        for k in range(400):
            drawn = render.make("shapes", seed, k)[1]
            assert not render.held_out(drawn["colour"], drawn["shape"], drawn["background"])
            drawn = render.make("creatures", seed, k)[1]
            assert not render.held_out(drawn["body"], drawn["eyes"])
            for family in ("dotted", "marked", "eyed"):
                drawn = render.make(family, seed, k)[1]
                assert not render.held_out(drawn["colour"], drawn["shape"], drawn["background"])
    drawn = render.make("creatures", 0, 0, "held_out")[1]
    assert render.held_out(drawn["body"], drawn["eyes"])
    drawn = render.make("dotted", 0, 0, "held_out")[1]
    assert render.held_out(drawn["colour"], drawn["shape"], drawn["background"])


def test_captions_tell_what_they_say_they_tell():
    """In the words of the record, an article before each noun, and nothing that is not said."""
    shape = render.make("shapes", 1, 3)[1]
    shape |= {"colour": "orange", "shape": "star", "background": "blue", "size": "small", "position": "at the top"}
    assert render.caption(shape) == "a small orange star at the top of a blue background"
    assert render.caption(shape, ["shape"]) == "a star"
    assert render.caption(shape, ["colour", "shape"]) == "an orange star"
    assert render.caption(shape, ["shape", "position"]) == "a star at the top"
    assert render.caption(shape, ["background"]) == "a shape on a blue background"
    assert render.background_first(shape) == "a blue background with a small orange star at the top"
    dotted = {"colour": "red", "shape": "heart", "background": "orange", "number": "two", "dots": "pink"}
    assert render.caption(dotted) == "a red heart with two pink dots on an orange background"
    assert render.caption({**dotted, "number": "one"}, ["dots"]) == "a shape with one pink dot"
    marked = {"colour": "red", "shape": "heart", "background": "blue", "stripes": "white", "ring": "orange"}
    assert render.caption(marked) == "a red heart with white stripes in an orange ring on a blue background"
    assert render.caption({**marked, "ring": None}, ["shape", "stripes"]) == "a heart with white stripes"
    eyed = {"colour": "red", "shape": "heart", "background": "blue", "eyes": "orange"}
    assert render.caption(eyed) == "a red heart with orange eyes on a blue background"
    assert render.background_first(eyed) == "a blue background with a red heart with orange eyes"
    creature = {"body": "green", "eyes": "orange"}
    assert render.caption(creature) == "a green creature with orange eyes"
    assert render.caption(creature, ["eyes"]) == "a creature with orange eyes"


def test_varied_captions_leave_out_each_attribute_now_and_then():
    rng = np.random.default_rng(0)
    record = render.make("shapes", 0, 0)[1]
    told = Counter()
    for _ in range(2000):
        text, said = render.varied_caption(rng, record)
        told[len(said)] += 1
        for key in ("colour", "background", "size", "position"):
            assert (record[key] in text) == (key in said)
        assert (record["shape"] in text.split()) == ("shape" in said)
    assert 600 < told[5] < 900
    assert 100 < told[1] < 500
    assert sum(told[number] for number in (2, 3, 4)) > 800
    for family, marks in (("dotted", {"dots"}), ("marked", {"stripes", "ring"}), ("eyed", {"eyes"})):
        for index in range(100):
            record = render.make(family, 0, index)[1]
            said = render.varied_caption(rng, record)[1]
            assert marks & set(record) <= set(said)
    record = render.make("creatures", 0, 0)[1]
    assert sum("eyes" in render.varied_caption(rng, record)[1] for _ in range(100)) < 90


def test_marked_shapes_are_of_all_kinds_but_no_marked_star_is_the_subject():
    records = [render.make("marked", 0, index)[1] for index in range(1000)]
    kinds = Counter(("stripes" in record, "ring" in record) for record in records)
    assert set(kinds) == {(True, False), (False, True), (True, True)}
    assert min(kinds.values()) > 200
    assert not [record for record in records if (record["colour"], record["shape"]) == ("orange", "star")]
    assert not [record for record in records if record.get("stripes") in (record["colour"], record["background"])]
    assert not [record for record in records if record.get("ring") == record["background"]]


@pytest.mark.parametrize("index", [3, 7])  # whose eyes lie inside the shape
def test_eyes_of_eyed_shapes_have_the_colour_that_is_said(index):
    image, record = render.make("eyed", 0, index)
    seen = render.read_creature(image)
    assert record["eyes"] != record["colour"]
    assert seen["eyes_visible"]
    assert (seen["body"], seen["eyes"]) == (record["colour"], record["eyes"])


@pytest.mark.parametrize("index", [0, 5])
def test_the_caption_of_a_view_of_the_subject_names_its_background(index):
    record = render.make("subject", 0, index)[1]
    assert record["text"] == f"a sks star on a {record['background']} background"


def test_variety_counts_colours_and_backgrounds_of_the_palette(measure):
    pictures = []
    for colour, ground in (("red", "pink"), ("red", "blue"), ("green", "blue"), ("green", "white")):
        canvas = render.Canvas(render.PALETTE[ground])
        canvas.polygon(render.outline("star", 32, 32, 18), render.PALETTE[colour])
        pictures.append(canvas.pixels())
    pictures.append(np.full((64, 64, 3), 255, dtype=np.uint8))
    assert measure.variety(np.stack(pictures)) == {"colours": 2, "backgrounds": 2, "stars": 0.8}


def test_held_out_sets_have_their_size_and_leave_every_part_to_learn_from():
    reserved = render.held_out_combinations("creatures")
    assert len(reserved) == 18
    seen = [pair for pair in render.combinations("creatures") if pair not in reserved]
    assert min(Counter(body for body, _ in seen).values()) >= 3
    assert min(Counter(eyes for _, eyes in seen).values()) >= 3
    seen = [combination for combination in render.combinations("shapes") if not render.held_out(*combination)]
    assert len(seen) == 280 - 40
    assert min(Counter((colour, shape) for colour, shape, _ in seen).values()) >= 3
    assert min(Counter((colour, ground) for colour, _, ground in seen).values()) >= 2


def test_rules_read_clean_renders():
    """Each of the ten in 99 % of the pictures."""
    right = Counter()
    for k in range(100):
        image, drawn = render.make("shapes", 5, k, render.SPLITS[k % 2])
        seen = render.read_shape(image)
        right.update(key for key in ("background", "colour", "shape") if seen[key] == drawn[key])
        image, drawn = render.make("creatures", 5, k, render.SPLITS[k % 2])
        seen = render.read_creature(image)
        right.update(key for key in ("body", "eyes") if seen[key] == drawn[key])
        right.update(key for key in ("white_ground", "eyes_visible") if seen[key])
        seen = render.read_subject(render.make("subject", 5, k)[0])
        right.update(key for key in ("stripes", "ring", "circled") if seen[key])
    assert len(right) == 10
    assert min(right.values()) >= 99, right


def test_rules_do_not_see_what_is_not_there():
    for k in range(50):
        shape = render.make("shapes", 6, k)[0]
        seen = render.read_subject(shape)
        assert not seen["stripes"]
        assert not seen["circled"]
        seen = render.read_creature(shape)
        assert not seen["white_ground"]
        assert not seen["eyes_visible"]
    blank = np.full((64, 64, 3), 255, dtype=np.uint8)
    assert render.read_shape(blank)["shape"] is None
    assert render.read_creature(blank)["body"] is None
    assert not render.read_subject(blank)["circled"]


@pytest.mark.parametrize("ink", ["red", "pink", "black"])
def test_a_ring_of_any_colour_is_one(ink):
    """Around a plain star of another colour; only the black one is the subject's."""
    canvas = render.Canvas(render.COLOURS["green"])
    canvas.polygon(render.outline("star", 32, 32, 20), render.COLOURS["yellow"])
    assert not render.read_subject(canvas.pixels())["circled"]
    render.add_ring(canvas, 32, 32, 25, 4.5, render.PALETTE[ink])
    seen = render.read_subject(canvas.pixels())
    assert seen["circled"]
    assert seen["ring"] == (ink == "black")
    assert not seen["stripes"]


def test_tokenizer_is_small_and_knows_no_rare_word(tokenizer):
    assert len(tokenizer) <= 2000
    assert tokenizer.model_max_length == 77
    pieces = tokenizer.tokenize("sks")
    assert len(pieces) > 1
    assert "".join(pieces) == "sks</w>"
    assert tokenizer.unk_token_id not in tokenizer("a sks star").input_ids[1:-1]
    for caption in (render.make("shapes", 0, 0)[1]["text"], render.make("creatures", 0, 0)[1]["text"]):
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2
        assert tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True).strip() == caption


def test_weights_are_small_and_readable_by_all():
    files = list(MINIATURE.rglob("*.safetensors"))
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


def test_autoencoder_keeps_unseen_creatures(measure):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(MINIATURE / "pipeline" / "vae").eval()
    images, records = zip(*[render.make("creatures", 9, index, "held_out") for index in range(32)], strict=True)
    made = measure.reconstruct(vae, np.stack(images))
    assert measure.psnr(made, np.stack(images)).mean() >= 25
    seen = measure.score_creatures(made, records)
    assert seen["body"] >= 0.95
    assert seen["white_ground"] >= 0.95
    assert seen["eyes_visible"] >= 0.9
    assert seen["eyes"] >= 0.85


def test_autoencoder_keeps_the_marks_of_the_subject(measure):
    from diffusers import AutoencoderKL

    images, records = zip(*[render.make("subject", 5, index) for index in range(28)], strict=True)
    vae = AutoencoderKL.from_pretrained(MINIATURE / "pipeline" / "vae").eval()
    scores = measure.score_subject(measure.reconstruct(vae, np.stack(images)), records)
    assert scores["ring"] == 1
    assert scores["stripes"] >= 0.9


def test_clip_finds_the_right_caption(measure):
    scores = measure.measure_clip(MINIATURE / "clip", number=64)
    assert scores["captions"] == 64
    assert scores["image_to_text"] >= 0.9
    assert scores["text_to_image"] >= 0.9


def test_clip_knows_which_mark_has_which_colour(measure):
    """Of an image with stripes and a ring the caption scores higher than the one with both colours swapped."""
    scores = measure.measure_marks(MINIATURE / "clip")
    assert scores["pictures"] >= 64
    assert scores["own_above_swapped"] >= 0.85


def test_captions_are_true_of_what_they_tell(measure, monkeypatch):
    """A caption of one creature's eyes is true of another one with such eyes, but of no shape with eyes."""
    import torch

    monkeypatch.syspath_prepend(str(MINIATURE))
    train_clip = load("train_clip")
    drawn = [
        {"body": "red", "eyes": "blue"},
        {"body": "green", "eyes": "blue"},
        {"colour": "red", "shape": "heart", "background": "pink", "eyes": "blue"},
        {"colour": "red", "shape": "heart", "background": "pink", "stripes": "blue", "ring": "black"},
        {"colour": "cyan", "shape": "star", "background": "pink", "stripes": "black", "ring": "blue"},
    ]
    groups = train_clip.group_by_colours(drawn)
    assert list(groups) == [
        ("creatures", "red", "blue"),
        ("creatures", "green", "blue"),
        ("eyed", "red", "blue"),
        ("striped and ringed", "blue", "black"),
        ("striped and ringed", "black", "blue"),
    ]
    attributes = train_clip.code(drawn, {})
    tells_eyes = torch.tensor([key == "eyes" for key in render.ATTRIBUTES]).expand(len(drawn), -1)
    is_true = train_clip.true_of(attributes, tells_eyes)
    assert is_true[0].tolist() == [True, True, False, False, False]
    assert is_true[2].tolist() == [False, False, True, False, False]


def test_text_tower_of_clip_and_pipeline_are_one():
    import torch
    from transformers import CLIPModel, CLIPTextModel

    tower = CLIPTextModel.from_pretrained(MINIATURE / "pipeline" / "text_encoder")
    model = CLIPModel.from_pretrained(MINIATURE / "clip")
    tokens = torch.arange(10)[None]
    assert tower.dtype == torch.float32
    assert torch.equal(tower(tokens).last_hidden_state, model.text_model(tokens).last_hidden_state)


def test_plain_pipeline_draws_held_out_prompts(measure):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MINIATURE / "pipeline")
    images, records = measure.draw(pipeline, measure.shape_records(16))
    assert images.shape == (16, 64, 64, 3)
    scores = measure.score_shapes(images, records)
    assert scores["background"] * 16 >= 15
    assert scores["colour"] * 16 >= 15
    assert scores["shape"] * 16 >= 14


def test_what_a_prompt_leaves_open_is_diverse(measure):
    """ "a star" comes in most colours, on most grounds."""
    pipeline = measure.load_pipeline(MINIATURE / "pipeline")
    stars, _ = measure.draw(pipeline, [{"text": "a star"}] * 48, steps=12)
    seen = measure.variety(stars)
    assert seen["colours"] >= 5
    assert seen["backgrounds"] >= 5
    assert seen["stars"] >= 0.75


def test_grid_of_a_recipe_has_photos_above_base_and_result(measure, tmp_path, monkeypatch, capsys):
    """The same model twice: both rows are equal, and the recipe's settings are used, but for what the command line
    says."""
    compare = load("compare")
    drawn, draw = [], compare.draw

    def noted_draw(pipeline, **settings):
        drawn.append(settings)
        return draw(pipeline, **settings)

    monkeypatch.setattr(compare, "draw", noted_draw)
    photos, recipe, output = tmp_path / "photos", tmp_path / "recipe.yaml", tmp_path / "grid.png"
    render.write_folder("subject", photos, 3, seed=0)
    recipe.write_text("evaluation: {prompts: [a star, a heart], num_inference_steps: 2, guidance_scale: 3, seed: 1}")
    model = MINIATURE / "pipeline"
    flags = [f"--base={model}", f"--model={model}", f"--recipe={recipe}", f"--photos={photos}", f"--output={output}"]
    compare.main([*flags, "--guidance_scale=4"])
    wanted = {"prompts": ["a star", "a heart"], "seed": 1, "num_inference_steps": 2, "guidance_scale": 4}
    assert drawn == [wanted, wanted]
    assert capsys.readouterr().out == f"Base above result: {output}\n"
    with Image.open(output) as image:
        grid = np.asarray(image.convert("RGB"))
    side, left, step = compare.TILE, compare.LABEL_WIDTH, compare.TILE + compare.MARGIN
    assert grid.shape[1] == left + 3 * step
    base, result = (grid[-row * step :][:side, left : left + 2 * side] for row in (2, 1))
    assert np.array_equal(base, result)
    assert base.std() > 20


def test_the_end_of_the_demo_says_nothing_but_its_line(tmp_path):
    """No library speaks, in a process of its own as `make demo` starts it."""
    model, output = MINIATURE / "pipeline", tmp_path / "grid.png"
    flags = [f"--base={model}", f"--model={model}", f"--output={output}", "--num_images=1", "--num_inference_steps=1"]
    command = [sys.executable, MINIATURE / "compare.py", *flags]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True, check=True
    )
    assert done.stdout == f"Base above result, for prompts that no training image has: {output}\n"
    assert done.stderr == ""
