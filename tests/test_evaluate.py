"""`sdtune evaluate`: its statistics against closed forms, its features against transformers, and its verdicts on a
model that learnt from many images and on one that learnt a few by heart."""

import argparse
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from conftest import load_script
from diffusers import StableDiffusionPipeline
from fake_hub import files_of
from image_data import snapshot, write_metadata
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from reach_hub import reaching
from running import REPO, status_of

from sdtune.clip import PATCHES, image_features, load_clip, text_features
from sdtune.commands import evaluate, generate
from sdtune.dataset import name_of
from sdtune.errors import InputError
from sdtune.grids import MARGIN, PAIR_LABEL_WIDTH, PAIR_TILE
from sdtune.inference import GENERATE_KEYS
from sdtune.measures import (
    COPY_RATIO,
    Nearest,
    compare_kid,
    interval,
    jackknife_error,
    judge,
    paired,
    share,
    squared_mmd,
)

CLIP, BASE = REPO / "miniature" / "clip", REPO / "miniature" / "pipeline"
SHORT = ["--clip_model", CLIP, "--resolution", 64, "--num_inference_steps", 1, "--num_images", 3]
SHORT += ["--num_validation_samples", 2]


@pytest.fixture(scope="module")
def render():
    """miniature/render.py as a module."""
    return load_script(REPO / "miniature" / "render.py")


@pytest.fixture(scope="module")
def clip():
    """The miniature's CLIP."""
    return load_clip(CLIP, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder_of_five(render, tmp_path_factory):
    """A folder of five creatures. Read only."""
    return creatures(render, tmp_path_factory.mktemp("five") / "images", 5)


def run(*words):
    """Calls main(); returns the exit status that its process would have."""
    return status_of(evaluate.main, *words)


def parse(*words):
    """The flags of a command line without mistakes."""
    args, problems = evaluate.parse_args([str(word) for word in words])
    assert problems == []
    return args


def read_figures(folder):
    """What a run wrote to evaluation.json."""
    return json.loads((folder / "evaluation.json").read_text())


def creatures(render, folder, num_images, seed=0):
    """Writes drawn creatures with captions; returns the folder."""
    folder.mkdir()
    rows = []
    for index in range(num_images):
        image, record = render.make("creatures", seed, index)
        Image.fromarray(image).save(folder / f"{index:03d}.png")
        rows.append({"file_name": f"{index:03d}.png", "text": record["text"]})
    write_metadata(folder, rows)
    return folder


# ------------------------------------------------------------------------------------------------------ statistics
def test_squared_mmd_of_two_points():
    """Under (x.y / 2 + 1)^3 the kernel of a unit vector of two with itself is 3.375, of orthogonal ones 1."""
    x, y = np.array([[1.0, 0.0]] * 3), np.array([[0.0, 1.0]] * 4)
    value, without_x, without_y = squared_mmd(x, y)
    assert value == pytest.approx(2 * 3.375 - 2, abs=1e-12)
    assert without_x == pytest.approx([4.75] * 3)
    assert without_y == pytest.approx([4.75] * 4)
    assert squared_mmd(x, x)[0] == pytest.approx(0, abs=1e-12)


def brute_force_mmd(x, y):
    """The definition, pair by pair."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    within_x = np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
    within_y = np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
    between = np.mean([kernel(a, b) for a in x for b in y])
    return within_x + within_y - 2 * between


def test_squared_mmd_is_the_definition_and_the_mean_over_subsets():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(7, 3)), draw.normal(size=(6, 3)) + 0.5
    value, without_x, without_y = squared_mmd(x, y)
    assert value == pytest.approx(brute_force_mmd(x, y))
    assert without_x == pytest.approx([brute_force_mmd(np.delete(x, k, 0), y) for k in range(7)])
    assert without_y == pytest.approx([brute_force_mmd(x, np.delete(y, k, 0)) for k in range(6)])
    subsets = itertools.product(itertools.combinations(x, 3), itertools.combinations(y, 3))
    assert value == pytest.approx(np.mean([squared_mmd(a, b)[0] for a, b in subsets]))  # so that none has to be drawn
    many = draw.normal(size=(300, 3))  # more than one slice
    assert squared_mmd(many, y)[0] == pytest.approx(brute_force_mmd(many, y))


def test_kid_is_unbiased_and_its_error_is_right():
    """Over 300 pairs of samples of the same law, KID is 0 within its error of the mean; its spread over independent
    samples of different laws is what the jackknife says of one."""
    draw = np.random.default_rng(1)
    same = [squared_mmd(draw.normal(size=(20, 4)), draw.normal(size=(15, 4)))[0] for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 300**0.5
    values, errors = [], []
    for _ in range(300):
        value, *without = squared_mmd(draw.normal(size=(40, 4)) + 0.7, draw.normal(size=(30, 4)))
        values.append(value)
        errors.append(jackknife_error(*without))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.2)


def test_jackknife_error_of_means_is_the_usual_one():
    draw = np.random.default_rng(2)
    x, y = draw.normal(size=9), draw.normal(size=5)
    without = [np.array([np.delete(z, k).mean() for k in range(len(z))]) for z in (x, y)]
    expected = math.sqrt(x.var(ddof=1) / 9 + y.var(ddof=1) / 5)
    assert jackknife_error(*without) == pytest.approx(expected)


def test_kid_against_the_base_is_paired():
    draw = np.random.default_rng(3)
    model, base, real = draw.normal(size=(8, 4)), draw.normal(size=(8, 4)) + 1, draw.normal(size=(9, 4))
    found = compare_kid(real, model, base)
    model_kid, model_without_x, model_without_y = squared_mmd(2 * model, 2 * real)
    base_kid, base_without_x, base_without_y = squared_mmd(2 * base, 2 * real)
    assert found["model"]["mean"] == model_kid
    assert found["gain"]["mean"] == base_kid - model_kid
    expected = jackknife_error(base_without_x - model_without_x, base_without_y - model_without_y)
    assert found["gain"]["standard_error"] == pytest.approx(expected)
    same = compare_kid(real, model, model)["gain"]
    assert (same["mean"], same["standard_error"]) == (0, 0)
    assert compare_kid(real, model).keys() == {"model"}
    assert compare_kid(real[:2], model, base) == {}


def test_interval_is_that_of_student():
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["standard_error"] == pytest.approx(1 / 3**0.5)
    assert found["high"] - 2 == pytest.approx(4.302653 / 3**0.5)  # t of 2 degrees of freedom, not 1.96
    assert 2 - found["low"] == pytest.approx(found["high"] - 2)
    assert interval([5.0]) == {"mean": 5.0}
    assert interval([]) == {}
    assert paired([3.0, 5.0, 9.0], [1.0, 4.0, 6.0])["gain"] == interval([2.0, 1.0, 3.0])
    assert paired([1.0, 2.0], [3.0, 7.0], less_is_better=True)["gain"] == interval([2.0, 5.0])


def test_share_has_the_exact_interval():
    none = {"copies": 0, "pictures": 10, "share": 0, "low": 0, "high": pytest.approx(1 - 0.025**0.1)}
    assert share([False] * 10) == none
    assert share([True] * 10)["low"] == pytest.approx(0.025**0.1)
    assert share([True] * 10)["high"] == 1
    half = share([True, False])  # P(at least 1 of 2) = 0.025 at 1 - sqrt(0.975)
    assert (half["low"], half["high"]) == (pytest.approx(1 - 0.975**0.5), pytest.approx(0.975**0.5))


@pytest.mark.parametrize(
    ("copies", "base_copies", "num_pictures", "num_images", "verdict"),
    [
        (100, None, 100, 8, "memorising"),
        (100, 0, 100, 8, "memorising"),
        (36, None, 100, 8, "memorising"),
        (0, None, 100, 8, "not memorising"),
        (0, 0, 100, 8, "not memorising"),
        (12, 5, 100, 8, "not memorising"),
        (25, None, 100, 8, "cannot say: too few"),
        (0, None, 5, 8, "cannot say: too few"),  # none of five proves little
        (40, 40, 100, 8, "cannot say: too few"),  # what the base does, which never saw them, is chance
        (100, None, 100, 2, "cannot say: a copy"),
    ],
)
def test_verdicts(copies, base_copies, num_pictures, num_images, verdict):
    flags = [
        None if number is None else [True] * number + [False] * (num_pictures - number)
        for number in (copies, base_copies)
    ]
    assert judge(num_images, *flags)["verdict"].startswith(verdict)


def test_nearest_finds_mirrored_images_and_the_second():
    queries = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    nearest = Nearest.of(queries)
    assert nearest.ratios().tolist() == [1, 1]
    nearest.see(torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[6.0, 0.0], [6.0, 0.0]]]), 0)  # two images, two views each
    nearest.see(torch.tensor([[[10.0, 1.0], [9.0, 9.0]]]), 2)
    assert nearest.index.tolist() == [0, 2]
    assert nearest.distance.tolist() == [2, 1]
    assert nearest.second.tolist() == [6, 4]
    assert nearest.ratios().tolist() == pytest.approx([2 / 6, 1 / 4])
    alone = Nearest.of(queries)
    alone.see(torch.zeros(1, 1, 2), 0)
    assert alone.ratios().tolist() == [1, 1]  # nothing to compare with


def test_the_closest_pictures_show_every_image_first(monkeypatch):
    monkeypatch.setattr(evaluate, "PAIRS", 4)
    found = [("a", 0.9), ("a", 0.99), ("b", 0.5), ("a", 0.8), ("b", 0.7), ("c", 0.6)]
    assert evaluate.closest_pictures([{"nearest": name, "similarity": value} for name, value in found]) == [1, 4, 5, 0]


# -------------------------------------------------------------------------------------------------------- features
def test_features_are_those_of_transformers(clip, render):
    images = [Image.fromarray(render.make("creatures", 0, k)[0]) for k in range(3)]
    prompts = ["a red creature with blue eyes", "a small red circle on the left of a blue background"]
    embeds, patches = image_features(clip, images)
    texts = text_features(clip, prompts)
    pixels = clip.processor(images, return_tensors="pt")
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(**pixels, **tokens)
    cosines = expected.logits_per_image / clip.model.logit_scale.exp()
    assert torch.allclose(embeds @ texts.T, cosines, atol=1e-5)
    assert patches.shape == (3, PATCHES**2 * 96)
    assert torch.allclose(patches.norm(dim=1), torch.ones(3))


def test_new_pictures_of_a_caption_are_not_copies_of_its_image(clip, render):
    """Why copies are told by patches: for CLIP's embedding, new drawings of the captions of 8 images are as good as
    the images themselves."""
    kinds = [
        ("cyan", "orange"),
        ("red", "pink"),
        ("blue", "red"),
        ("pink", "purple"),
        ("green", "orange"),
        ("purple", "cyan"),
        ("yellow", "blue"),
        ("orange", "green"),
    ]
    draw = np.random.default_rng(0)
    images, *new = [[Image.fromarray(render.draw_creature(draw, *kind)) for kind in kinds] for _ in range(5)]
    noisy = []
    for image in images:
        values = np.asarray(image) * 0.95 + draw.normal(6, 6, (64, 64, 3))
        noisy.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))

    # Of each image its embedding and its patches, upright and mirrored.
    views = list(zip(image_features(clip, images), image_features(clip, [ImageOps.mirror(image) for image in images])))

    def shares(pictures):
        found = []
        for features, (upright, mirrored) in zip(image_features(clip, pictures), views):
            nearest = Nearest.of(features)
            nearest.see(torch.stack([upright, mirrored], 1), 0)
            found.append((nearest.ratios() < COPY_RATIO).float().mean().item())
        return found

    of_new_by_embedding, of_new_by_patches = shares(list(itertools.chain(*new)))
    assert of_new_by_embedding > 0.6
    assert of_new_by_patches < 0.25
    for copies in (noisy, [ImageOps.mirror(image) for image in noisy]):
        _, by_patches = shares(copies)
        assert by_patches == 1


def test_prompts_are_captions_in_random_order_or_given_in_turn(folder_of_five):
    args = parse(BASE, folder_of_five, "--resolution", 64, "--num_validation_samples", 1)
    images, held_out = evaluate.load_images(args)
    assert (len(images), len(held_out)) == (4, 1)
    captions = [caption for [caption] in images.rows["captions"]]
    plan = evaluate.plan_prompts(None, images, 10, seed=0)
    assert len(plan) == 10
    assert sorted(plan[:4]) == sorted(plan[4:8]) == sorted(captions)
    assert plan == evaluate.plan_prompts(None, images, 10, seed=0)
    assert evaluate.plan_prompts(["a", "b"], images, 3, 0) == ["a", "b", "a"]


@pytest.mark.parametrize(("max_train_samples", "seed"), [(None, 0), (7, 0), (7, 3)])
def test_the_images_are_split_as_in_training(train_script, render, tmp_path, max_train_samples, seed):
    folder = creatures(render, tmp_path / "images", 12)
    settings = {"resolution": 64, "num_validation_samples": 3, "max_train_samples": max_train_samples, "seed": seed}
    words = training.words(BASE, folder, tmp_path / "model", **settings)
    trained_with, problems = train_script.parse_flags(train_script.make_parser(), words, {})
    assert problems == []
    expected = train_script.load_data(trained_with, trained_with.train_data_dir)[:2]

    flags = ["--resolution=64", "--num_validation_samples=3"]
    if max_train_samples:
        flags += [f"--max_train_samples={max_train_samples}", f"--train_seed={seed}"]
    found = evaluate.load_images(parse(BASE, folder, *flags))
    for part, wanted, number in zip(found, expected, ((max_train_samples or 12) - 3, 3)):
        assert len(part) == number
        assert [row["path"] for row in part.rows["image"]] == [row["path"] for row in wanted.rows["image"]]
    for index in range(3):  # so that the loss is the same, too
        sample, wanted = found[1][0, index, 1.0], expected[1][0, index, 1.0]
        assert np.array_equal(sample["noise"], wanted["noise"])
        assert sample["timestep"] == wanted["timestep"]


def test_images_without_captions_are_those_of_a_subject(render, tmp_path):
    folder = creatures(render, tmp_path / "images", 4)
    (folder / "metadata.jsonl").unlink()
    (folder / "002.txt").write_text("a sks star at night")
    words = [BASE, folder, "--resolution", 64]
    with pytest.raises(InputError, match="3 of 4 images are unusable") as caught:
        evaluate.load_images(parse(*words))
    told = f"`sdtune caption {folder}` writes them, or give one for all by --instance_prompt; mend or remove them, or"
    assert str(caught.value).splitlines()[-1] == f"{told} add --skip_bad_images."
    images, _ = evaluate.load_images(parse(*words, "--instance_prompt", "a sks star"))
    assert sorted(evaluate.plan_prompts(None, images, 4, 0)) == [*["a sks star"] * 3, "a sks star at night"]


def test_recipes_are_for_both_commands(tmp_path, monkeypatch):
    args = parse("model", "images", "--config", REPO / "examples" / "configs" / "dreambooth.yaml")
    assert evaluate.read_given_prompts(args)[1] == "a sks star on a pink background"
    assert (args.seed, args.num_inference_steps, args.guidance_scale) == (0, 25, 3)
    own = tmp_path / "own.yaml"
    own.write_text(
        "training: {seed: 7}\nevaluation: {seed: 5, seeds: [1, 2], num_images: 9, scheduler: euler, "
        "negative_prompt: dull, height: 64, width: 64, base: ~/base}"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse("model", "images", "--config", own, "--clip_model=~/clip")
    assert (args.seed, args.num_images, args.model, args.dataset) == (5, 9, "model", "images")
    assert (args.base, args.clip_model) == (f"{tmp_path}/base", f"{tmp_path}/clip")
    others, _ = generate.parse_args(["model"])
    assert vars(others).keys() - vars(args).keys() == GENERATE_KEYS


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("evaluation: {dataset: here}", "unknown key dataset"),
        ("width: 64", "unknown key width"),
        ("evaluation: {guidance_scale: [3, 5]}", "5 stands in a list where one value is taken"),
    ],
)
def test_recipes_that_are_refused(tmp_path, capsys, text, told):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    assert run("model", "images", "--config", own) == 2
    assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- runs
def test_private_models_are_reached_by_the_token(folder_of_five, tmp_path, fake_hub, monkeypatch, capsys):
    """The stored token is another one."""
    for name, folder in (("base", BASE), ("clip", CLIP)):
        fake_hub.add_repo(f"somebody/{name}", files_of(folder), private=True)
        fake_hub.readers[f"somebody/{name}"] = "hf_reader"
    words = [
        "somebody/base",
        folder_of_five,
        *SHORT,
        "--clip_model",
        "somebody/clip",
        "--output_dir",
        tmp_path / "out",
    ]
    with reaching(fake_hub, monkeypatch):
        assert run(*words) == 2
        told = capsys.readouterr().err
        assert "MODEL=somebody/base: no whole pipeline, no name of one on the Hub" in told
        assert "--clip_model=somebody/clip: no whole CLIP, no name of one on the Hub" in told
        assert run(*words, "--hub_token", "hf_reader") == 0
    assert run(BASE, folder_of_five, *SHORT, "--output_dir", tmp_path / "same") == 0
    private, local = (read_figures(tmp_path / name) for name in ("out", "same"))
    assert private.keys() == local.keys()
    for key in private.keys() - {"settings"}:
        assert private[key] == local[key], key


def test_a_run_measures_what_training_measured(train_script, render, tmp_path, capsys):
    folder = creatures(render, tmp_path / "images", 9)
    settings = {"max_train_steps": 3, "validation_steps": 3, "learning_rate": 1e-3}
    settings |= {"resolution": 64, "num_validation_samples": 4}
    assert training.train(train_script, BASE, folder, tmp_path / "model", **settings) == 0
    logged = [row for row in training.read_log(tmp_path / "model") if "held_out_loss" in row]
    before = snapshot(folder)
    capsys.readouterr()
    words = [tmp_path / "model", folder, "--clip_model", CLIP, "--num_inference_steps", 2]
    words += ["--num_validation_samples", 4, "--output_dir", tmp_path / "out"]
    assert run(*words, "--base", BASE, "--num_images", 4, "--hub_token", "a-secret") == 0
    assert snapshot(folder) == before
    found = read_figures(tmp_path / "out")
    assert found["settings"]["num_images"] == 4
    assert "a-secret" not in json.dumps(found)
    loss = found["held_out_loss"]
    assert loss["model"]["mean"] == pytest.approx(logged[-1]["held_out_loss"], rel=1e-5)
    assert loss["base"]["mean"] == pytest.approx(logged[0]["held_out_loss"], rel=1e-5)
    assert loss["gain"]["mean"] == pytest.approx(logged[-1]["held_out_gain"], rel=1e-3)
    assert loss["gain"]["standard_error"] == pytest.approx(logged[-1]["gain_error"], rel=1e-3)
    assert loss["gain"]["low"] < loss["gain"]["mean"] < loss["gain"]["high"]
    assert (found["training_images"], found["different_images"], found["held_out_images"]) == (5, 5, 4)
    assert [row["seed"] for row in found["pictures"]] == [0, 1, 2, 3]
    scores = [row["clip_score"] for row in found["pictures"]]
    assert found["clip_score"]["model"]["mean"] == pytest.approx(np.mean(scores))
    assert {row["nearest"] for row in found["pictures"]} <= {f"{k:03d}.png" for k in range(9)}
    assert found["memorisation"]["verdict"].startswith("cannot say: too few pictures")
    with Image.open(tmp_path / "out" / "closest_pairs.png") as sheet:
        assert sheet.width == PAIR_LABEL_WIDTH + 4 * (PAIR_TILE + MARGIN)
        sheet.load()
    told = capsys.readouterr().out
    check_what_is_told(told)
    assert f"Resolution: 64, as in the training that {tmp_path / 'model' / 'args.json'} tells of.\n" in told
    assert "%): cannot say: too few pictures" in told
    assert max(len(line) for line in told.splitlines() if str(tmp_path) not in line) <= 100

    assert run(*words) == 2
    assert "holds an evaluation" in capsys.readouterr().err
    assert run(*words, "--num_images", 3, "--overwrite") == 0
    alone = read_figures(tmp_path / "out")
    assert len(alone["pictures"]) == 3
    assert alone["held_out_loss"] == {"model": loss["model"]}
    assert not any("base" in alone[name] for name in ("clip_score", "kid", "nearest_similarity", "memorisation"))


def check_what_is_told(told):
    """First the time, then a table that says which figures are the better ones."""
    time = r"Takes about \d:\d\d:\d\d, until \d{4}-\d\d-\d\d \d\d:\d\d, by a trial of a few steps:\n"
    parts = "  4 pictures by each of model and base, 2 steps each, at 64 pixels; CLIP looks at 9 images.\n"
    place = re.search(time + re.escape(parts), told).end()
    better = dict(re.findall(r"^(.{22}) (higher|lower|-) ", told[place:], re.M))
    assert {label.strip(): way for label, way in better.items()} == {
        "CLIP score": "higher",
        "CLIP image similarity": "higher",
        "KID, 5 images": "lower",
        "KID, 4 held out": "lower",
        "held-out loss": "lower",
        "to the nearest image": "-",
    }
    assert (
        "\nA gain above 0 is for the better, except in the line “to the nearest image”: there 1 is a copy.\n"
        "Of fewer than 30 images or pictures, such as 4, KID may be further off than it says here.\n"
    ) in told[place:]
    assert re.search(r"^CLIP score +higher +[\d.]+ \xb1 [\d.e-]+ +[\d.]+ \xb1 ", told, re.M)
    assert "+-" not in told


@pytest.mark.parametrize(
    "numbers, pictures, told",
    [((30, 29), 30, "such as 29"), ((8, 9), 30, "such as 8"), ((30, 31), 30, None), ((30, 31), 3, "such as 3")],
)
def test_kid_of_few_images_or_pictures_is_said_to_be_uncertain(numbers, pictures, told, capsys):
    figures = {name: {} for name in ("clip_score", "clip_image_similarity", "held_out_loss", "nearest_similarity")}
    kid = {"model": {"mean": 1.0, "standard_error": 0.1}}
    share = {"copies": 0, "pictures": pictures, "share": 0.0, "low": 0.0, "high": 0.1}
    verdict = {"limit": 0.1, "verdict": "none", "model": share}
    evaluate.print_table({**figures, "kid": kid, "kid_held_out": kid, "memorisation": verdict}, *numbers)
    said = capsys.readouterr().out
    assert ("Of fewer than 30 images or pictures" in said) == bool(told)
    assert not told or f"{told}, KID may be further off" in said


def test_the_time_is_that_of_all_batches():
    args = argparse.Namespace(num_images=10, batch_size=4, num_inference_steps=5, guidance_scale=7.5, base="base")
    # Three batches of 2 + 4 * 1 + 0.5 s; 8 held out images of 4 timesteps: 8 passes of 0.5 s; 25 looks of 2 * 0.5 s.
    assert evaluate.estimate_seconds(args, 92, 8, 2, 1, 0.5) == 2 * (3 * 6.5 + 8 * 0.5) + 25
    alone = argparse.Namespace(**{**vars(args), "base": None, "guidance_scale": 1, "num_inference_steps": 1})
    assert evaluate.estimate_seconds(alone, 92, 8, 2, 1, 0.5) == 3 * 2.5 + 8 + 25


def test_a_resolution_that_is_not_given_is_the_runs_or_the_models(tmp_path, capsys):
    for name, side in (("lora", 96), ("other", 48), ("odd", "64"), ("none", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps({"resolution": side} if side else []))
    lora, other = tmp_path / "lora", tmp_path / "other"
    cases = [
        ([BASE, "--resolution", 32], 32, ""),
        ([BASE], 64, "Resolution: 64, the model's own."),
        ([tmp_path / "odd"], 512, "Resolution: 512, the model's own."),  # which is no model, as is told next
        ([tmp_path / "none"], 512, "Resolution: 512, the model's own."),
        ([other], 48, f"Resolution: 48, as in the training that {other / 'args.json'} tells of."),
        ([other, f"--lora={lora}:0.5"], 96, f"Resolution: 96, as in the training that {lora / 'args.json'} tells of."),
        ([other, f"--lora={lora / 'a.safetensors'}"], 96, f"{lora / 'args.json'} tells of."),
    ]
    for words, side, expected in cases:
        args, told = evaluate.with_resolution(parse(*words))
        assert args.resolution == side
        assert told.endswith(expected)
        assert bool(told) == bool(expected)
    assert run(tmp_path / "none", "--batch_size=0") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--batch_size: must be" in said.err


def test_a_prompt_that_is_not_given_is_the_runs(tmp_path):
    """Of the LoRA's before the model's, whatever that was trained with."""
    for name, settings in (("dog", {"instance_prompt": "a sks dog"}), ("cat", {"instance_prompt": "a zwx cat"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(settings | {"resolution": 64}))
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "args.json").write_text(json.dumps({"resolution": 64}))
    dog, cat, style = tmp_path / "dog", tmp_path / "cat", tmp_path / "style"
    for words, prompt, place in (
        ([dog], "a sks dog", dog),
        ([dog, f"--lora={cat}:0.5"], "a zwx cat", cat),
        ([dog, f"--lora={style}"], None, None),
        ([dog, "--instance_prompt=a dog"], "a dog", None),
        ([BASE], None, None),
    ):
        args, told = evaluate.with_instance_prompt(parse(*words))
        expected = f"Caption of images without one: {prompt}, as in the training that {place}/args.json tells of."
        assert (args.instance_prompt, told) == (prompt, expected if place else "")


def test_a_lora_is_measured_against_the_same_model_without_it(folder_of_five, tmp_path, capsys):
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    gains = {}
    for scale in (0, 1):
        flags = ["--lora", f"{tmp_path / 'lora'}:{scale}", "--base", BASE, "--output_dir", tmp_path / str(scale)]
        assert run(BASE, folder_of_five, *SHORT, *flags) == 0
        found = read_figures(tmp_path / str(scale))
        figures = ("clip_score", "clip_image_similarity", "kid", "held_out_loss", "nearest_similarity")
        gains[scale] = [found[name]["gain"]["mean"] for name in figures]
    assert gains[0] == pytest.approx([0] * 5, abs=1e-5)
    assert np.abs(gains[1]).min() > 1e-4
    assert "noise schedule differ" not in capsys.readouterr().out


def test_losses_of_different_schedules_are_not_compared(folder_of_five, tmp_path, capsys):
    """As those are that have one schedule, in the test above."""
    for name, rescaled in (("plain", False), ("rescaled", True)):
        shutil.copytree(BASE, tmp_path / name)
        config = tmp_path / name / "scheduler" / "scheduler_config.json"
        changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": rescaled}
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    flags = ["--base", tmp_path / "plain", "--output_dir", tmp_path / "out"]
    assert run(tmp_path / "rescaled", folder_of_five, *SHORT, *flags) == 0
    assert read_figures(tmp_path / "out")["held_out_loss"].keys() == {"model"}
    assert "noise schedule differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "Stopped; nothing was written."),
    ],
)
def test_a_report_is_whole_or_not_there(tmp_path, monkeypatch, capsys, error, status, message):
    def fail_half_way(path, text, encoding):
        path.write_bytes(text[: len(text) // 2].encode())
        raise error

    def save_something(args):
        evaluate.save_report(tmp_path, {"a": 1}, Image.new("RGB", (9, 9)))

    (tmp_path / "closest_pairs.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_text", fail_half_way)
    monkeypatch.setattr(evaluate, "check_args", lambda args: [])
    monkeypatch.setattr(evaluate, "evaluate", save_something)
    assert run(BASE, tmp_path) == status
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["closest_pairs.png"]
    assert (tmp_path / "closest_pairs.png").read_bytes() == b"old"


def test_duplicates_are_one_image(clip, tmp_path, render):
    folder = creatures(render, tmp_path / "images", 4)
    (folder / "again.png").write_bytes((folder / "002.png").read_bytes())
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "again.png", "text": "a creature"}) + "\n")
    images, _ = evaluate.load_images(parse(BASE, folder, "--resolution", 64))
    picture = Image.open(folder / "002.png").convert("RGB")
    _, queries = image_features(clip, [picture, ImageOps.mirror(picture)])
    for batch_size in (1, 5):
        embeds, kept, [nearest] = evaluate.look_at(images, clip, [queries], batch_size, "")
        assert len(embeds) == len(kept) == 4
        assert Path(name_of(images.rows, kept[nearest.index[0]])).name in ("002.png", "again.png")
        assert nearest.distance.tolist() == pytest.approx([0, 0], abs=1e-3)
        assert nearest.ratios().max() < 0.01  # as a duplicate, the second nearest would be at 0 as well


def test_all_mistakes_at_once(tmp_path, capsys):
    flags = ["--clip_model", BASE, "--num_images", 2, "--resolution", 0, "--guidance_scale", "nan"]
    flags += ["--train_seed", 3, "--lora", tmp_path / "no", "--output_dir", tmp_path / "out"]
    assert run(tmp_path / "nowhere", *flags) == 2
    told = capsys.readouterr().err
    for wrong in (
        "MODEL=",
        "DATASET is missing: name",
        "--clip_model=",
        "--num_images: must be a whole number in [3, inf), not '2'",
        "--resolution: must be a whole number in [1, inf), not '0'",
        "--lora=",
        "--guidance_scale: must be in [1, inf), not 'nan'",
        "--train_seed=3: does nothing without",
    ):
        assert wrong in told, wrong
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = ["--clip_model", CLIP, "--resolution", 64]
    assert run(BASE, empty, *flags, "--output_dir", tmp_path / "out") == 2
    assert str(empty) in capsys.readouterr().err
    assert run(BASE, empty, *flags, "--output_dir", empty / "out") == 2
    assert "lies in the dataset, which stays as it is; put it elsewhere" in capsys.readouterr().err
    assert run(BASE, empty, "--clip_model", CLIP, "--resolution", 65, "--output_dir", tmp_path / "out") == 2
    assert "--resolution=65: must be a multiple of 8 for this VAE" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def figures_of_training(train_script, folder, tmp_path, num_held_out, num_images, **settings):
    """Trains the miniature on the folder; returns what the command finds on the result."""
    common = {
        "resolution": 64,
        "snr_gamma": 5.0,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "max_train_steps": 400,
        "use_ema": True,
        "ema_decay": 0.95,
        "caption_dropout": 0.1,
        "num_validation_samples": num_held_out,
    }
    assert training.train(train_script, BASE, folder, tmp_path / "model", **(common | settings)) == 0
    flags = ["--base", BASE, "--clip_model", CLIP, "--resolution", 64, "--num_validation_samples", num_held_out]
    flags += ["--num_images", num_images, "--batch_size", 16, "--num_inference_steps", 12, "--guidance_scale", 4]
    assert run(tmp_path / "model", folder, *flags, "--output_dir", tmp_path / "out") == 0
    return read_figures(tmp_path / "out")


@pytest.mark.slow
def test_a_model_that_learnt_from_many_beats_its_base_and_copies_none(train_script, render, tmp_path):
    folder = creatures(render, tmp_path / "images", 120)
    settings = {"train_batch_size": 16, "learning_rate": 2e-3, "ema_decay": 0.97}
    found = figures_of_training(train_script, folder, tmp_path, 20, 64, **settings)
    for figure in (
        "clip_score",
        "clip_image_similarity",
        "kid",
        "kid_held_out",
        "held_out_loss",
        "nearest_similarity",
    ):
        assert found[figure]["gain"]["low"] > 0, figure
    assert found["memorisation"]["verdict"] == "not memorising"


@pytest.mark.slow
def test_a_model_that_saw_few_images_often_memorises(train_script, render, tmp_path):
    folder = creatures(render, tmp_path / "images", 4)
    settings = {"train_batch_size": 4, "learning_rate": 1.5e-3}
    found = figures_of_training(train_script, folder, tmp_path, 0, 32, **settings)
    assert found["memorisation"]["verdict"] == "memorising"
    assert found["memorisation"]["model"]["share"] > 0.5
    assert found["memorisation"]["base"]["copies"] == 0
    assert found["held_out_loss"] == {}
    assert found["clip_score"]["gain"]["low"] > 0
