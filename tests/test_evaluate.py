"""tools/evaluate.py: its statistics against closed forms, its features against transformers, and its verdicts on a
model that learnt from many images and on one that learnt a few by heart."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import training
from conftest import load_script
from diffusers import StableDiffusionPipeline
from image_data import snapshot
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from running import REPO

EVALUATE = REPO / "tools" / "evaluate.py"
CLIP, BASE = REPO / "miniature" / "clip", REPO / "miniature" / "pipeline"


@pytest.fixture(scope="module")
def tool():
    """tools/evaluate.py as a module."""
    return load_script(EVALUATE)


@pytest.fixture(scope="module")
def render():
    """miniature/render.py as a module."""
    return load_script(REPO / "miniature" / "render.py")


@pytest.fixture(scope="module")
def clip(tool):
    """The miniature's CLIP."""
    return tool.load_clip(CLIP, torch.device("cpu"))


def run(tool, *words):
    """Calls main(); returns the exit status that its process would have."""
    try:
        tool.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code
    return 0


def creatures(render, folder, num_images, seed=0):
    """Writes drawn creatures with captions; returns the folder."""
    folder.mkdir()
    rows = []
    for index in range(num_images):
        image, record = render.make("creatures", seed, index)
        Image.fromarray(image).save(folder / f"{index:03d}.png")
        rows.append({"file_name": f"{index:03d}.png", "text": record["text"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ------------------------------------------------------------------------------------------------------ statistics
def test_squared_mmd_of_two_points():
    """Under (x.y / 2 + 1)^3 the kernel of a unit vector of two with itself is 3.375, of orthogonal ones 1."""
    tool = load_script(EVALUATE)
    x, y = np.array([[1.0, 0.0]] * 3), np.array([[0.0, 1.0]] * 4)
    value, without_x, without_y = tool.squared_mmd(x, y)
    assert value == pytest.approx(2 * 3.375 - 2, abs=1e-12)
    assert without_x == pytest.approx([4.75] * 3)
    assert without_y == pytest.approx([4.75] * 4)
    assert tool.squared_mmd(x, x)[0] == pytest.approx(0, abs=1e-12)


def brute_force_mmd(x, y):
    """The definition, pair by pair."""
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    within = [np.mean([k(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_squared_mmd_is_the_definition_and_the_mean_over_subsets(tool):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(7, 3)), draw.normal(size=(6, 3)) + 0.5
    value, without_x, without_y = tool.squared_mmd(x, y)
    assert value == pytest.approx(brute_force_mmd(x, y))
    assert without_x == pytest.approx([brute_force_mmd(np.delete(x, k, 0), y) for k in range(7)])
    assert without_y == pytest.approx([brute_force_mmd(x, np.delete(y, k, 0)) for k in range(6)])
    subsets = [tool.squared_mmd(x[list(a)], y[list(b)])[0] for a in itertools.combinations(range(7), 3)
               for b in itertools.combinations(range(6), 3)]
    assert value == pytest.approx(np.mean(subsets))  # so that no subset has to be drawn
    many = draw.normal(size=(600, 3))  # more than one slice
    assert tool.squared_mmd(many, y)[0] == pytest.approx(brute_force_mmd(many, y))


def test_kid_is_unbiased_and_its_error_is_right(tool):
    """Over 300 pairs of samples of the same law, KID is 0 within its error of the mean; its spread over independent
    samples of different laws is what the jackknife says of one."""
    draw = np.random.default_rng(1)
    same = [tool.squared_mmd(draw.normal(size=(20, 4)), draw.normal(size=(15, 4)))[0] for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 300**0.5
    values, errors = [], []
    for _ in range(300):
        value, *without = tool.squared_mmd(draw.normal(size=(40, 4)) + 0.7, draw.normal(size=(30, 4)))
        values.append(value)
        errors.append(tool.jackknife_error(*without))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.2)


def test_jackknife_error_of_means_is_the_usual_one(tool):
    draw = np.random.default_rng(2)
    x, y = draw.normal(size=9), draw.normal(size=5)
    without = [np.array([np.delete(z, k).mean() for k in range(len(z))]) for z in (x, y)]
    expected = math.sqrt(x.var(ddof=1) / 9 + y.var(ddof=1) / 5)
    assert tool.jackknife_error(*without) == pytest.approx(expected)


def test_kid_against_the_base_is_paired(tool):
    draw = np.random.default_rng(3)
    model, base, real = draw.normal(size=(8, 4)), draw.normal(size=(8, 4)) + 1, draw.normal(size=(9, 4))
    found = tool.compare_kid(model, base, real)
    (m, mx, my), (b, bx, by) = tool.squared_mmd(2 * model, 2 * real), tool.squared_mmd(2 * base, 2 * real)
    assert found["model"]["mean"] == m
    assert found["gain"]["mean"] == b - m
    assert found["gain"]["standard_error"] == pytest.approx(tool.jackknife_error(bx - mx, by - my))
    same = tool.compare_kid(model, model, real)["gain"]
    assert (same["mean"], same["standard_error"]) == (0, 0)
    assert tool.compare_kid(model, base, real[:2]) == {}


def test_interval_is_that_of_student(tool):
    found = tool.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["standard_error"] == pytest.approx(1 / 3**0.5)
    assert found["high"] - 2 == pytest.approx(4.302653 / 3**0.5)  # t of 2 degrees of freedom, not 1.96
    assert 2 - found["low"] == pytest.approx(found["high"] - 2)
    assert tool.interval([5.0]) == {"mean": 5.0}
    assert tool.interval([]) == {}
    gain = tool.paired([3.0, 5.0, 9.0], [1.0, 4.0, 6.0])["gain"]
    assert gain == tool.interval([2.0, 1.0, 3.0])
    assert tool.paired([1.0, 2.0], [3.0, 7.0], less_is_better=True)["gain"] == tool.interval([2.0, 5.0])


def test_share_has_the_exact_interval(tool):
    assert tool.share([False] * 10) == {"copies": 0, "pictures": 10, "share": 0, "low": 0,
                                        "high": pytest.approx(1 - 0.025**0.1)}
    assert tool.share([True] * 10)["low"] == pytest.approx(0.025**0.1)
    assert tool.share([True] * 10)["high"] == 1
    half = tool.share([True, False])  # P(at least 1 of 2) = 0.025 at 1 - sqrt(0.975)
    assert (half["low"], half["high"]) == (pytest.approx(1 - 0.975**0.5), pytest.approx(0.975**0.5))


def test_verdicts(tool):
    def verdict(copies, base=None, num_pictures=100, num_images=8):
        flags = [k < copies for k in range(num_pictures)]
        return tool.judge(flags, None if base is None else [k < base for k in range(num_pictures)],
                          num_images)["verdict"]

    assert verdict(100) == verdict(100, 0) == verdict(36) == "memorising"
    assert verdict(0) == verdict(0, 0) == verdict(12, 5) == "not memorising"
    assert verdict(25).startswith("cannot say: too few")
    assert verdict(0, num_pictures=5).startswith("cannot say: too few")  # none of five proves little
    assert verdict(40, 40).startswith("cannot say: too few")  # what the base does, which never saw them, is chance
    assert verdict(100, num_images=2).startswith("cannot say: a copy")


def test_nearest_finds_mirrored_images_and_the_second(tool):
    queries = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    nearest = tool.Nearest.of(queries)
    assert nearest.ratios().tolist() == [1, 1]
    nearest.see(torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[6.0, 0.0], [6.0, 0.0]]]), 0)  # two images, two views each
    nearest.see(torch.tensor([[[10.0, 1.0], [9.0, 9.0]]]), 2)
    assert nearest.index.tolist() == [0, 2]
    assert nearest.distance.tolist() == [2, 1]
    assert nearest.second.tolist() == [6, 4]
    assert nearest.ratios().tolist() == pytest.approx([2 / 6, 1 / 4])
    alone = tool.Nearest.of(queries)
    alone.see(torch.zeros(1, 1, 2), 0)
    assert alone.ratios().tolist() == [1, 1]  # nothing to compare with


def test_the_closest_pictures_show_every_image_first(tool, monkeypatch):
    monkeypatch.setattr(tool, "PAIRS", 4)
    rows = [{"nearest": name, "similarity": value} for name, value in (
        ("a", 0.9), ("a", 0.99), ("b", 0.5), ("a", 0.8), ("b", 0.7), ("c", 0.6))]
    assert tool.closest_pictures(rows) == [1, 4, 5, 0]


# -------------------------------------------------------------------------------------------------------- features
def test_features_are_those_of_transformers(tool, clip, render):
    images = [Image.fromarray(render.make("creatures", 0, k)[0]) for k in range(3)]
    prompts = ["a drawing of a red creature with blue eyes", "a small red circle on the left of a blue background"]
    embeds, patches = tool.image_features(clip, images)
    texts = tool.text_features(clip, prompts)
    model, tokenizer, processor = clip
    with torch.no_grad():
        expected = model(**processor(images, return_tensors="pt"),
                         **tokenizer(prompts, padding=True, return_tensors="pt"))
    assert torch.allclose(embeds @ texts.T, expected.logits_per_image / model.logit_scale.exp(), atol=1e-5)
    assert patches.shape == (3, tool.PATCHES**2 * 96)
    assert torch.allclose(patches.norm(dim=1), torch.ones(3))


def test_new_pictures_of_a_caption_are_not_copies_of_its_image(tool, clip, render):
    """Why copies are told by patches: for CLIP's embedding, new drawings of the captions of 8 images are as good as
    the images themselves."""
    kinds = [("cyan", "orange"), ("red", "pink"), ("blue", "red"), ("pink", "purple"), ("green", "orange"),
             ("purple", "cyan"), ("yellow", "blue"), ("orange", "green")]
    draw = np.random.default_rng(0)
    images, *new = [[Image.fromarray(render.draw_creature(draw, *kind)) for kind in kinds] for _ in range(5)]
    views = [tool.image_features(clip, shown) for shown in (images, [ImageOps.mirror(image) for image in images])]
    noisy = [Image.fromarray((np.asarray(image) * 0.95 + draw.normal(6, 6, (64, 64, 3))).clip(0, 255).astype(np.uint8))
             for image in images]
    shares = {}
    for name, pictures in (("new", [*itertools.chain(*new)]), ("noisy", noisy),
                           ("mirrored", [*map(ImageOps.mirror, noisy)])):
        for part, kind in enumerate(("embedding", "patches")):
            nearest = tool.Nearest.of(tool.image_features(clip, pictures)[part])
            nearest.see(torch.stack([view[part] for view in views], 1), 0)
            shares[name, kind] = (nearest.ratios() < tool.COPY_RATIO).float().mean().item()
    assert shares["noisy", "patches"] == shares["mirrored", "patches"] == 1
    assert shares["new", "patches"] < 0.25
    assert shares["new", "embedding"] > 0.6


def test_prompts_are_captions_in_random_order_or_given_in_turn(tool, tmp_path, render):
    folder = creatures(render, tmp_path / "images", 5)
    args = tool.parse_args([str(BASE), str(folder), "--resolution", "64", "--num_validation_samples", "1"])
    images, held_out = tool.load_images(**vars(args))
    assert (len(images), len(held_out)) == (4, 1)
    captions = [caption for [caption] in images.rows["captions"]]
    plan = tool.plan_prompts(None, images, 10, seed=0)
    assert sorted(plan[:4]) == sorted(plan[4:8]) == sorted(captions)
    assert plan == tool.plan_prompts(None, images, 10, seed=0)
    assert tool.plan_prompts(["a", "b"], images, 3, 0) == ["a", "b", "a"]


@pytest.mark.parametrize(("max_train_samples", "seed"), [(None, 0), (7, 0), (7, 3)])
def test_the_images_are_split_as_in_training(tool, train_script, render, tmp_path, max_train_samples, seed):
    folder = creatures(render, tmp_path / "images", 12)
    args = train_script.parse_args(training.words(BASE, folder, tmp_path / "model", resolution=64, seed=seed,
                                                  max_train_samples=max_train_samples, num_validation_samples=3))
    words = [str(BASE), str(folder), "--resolution=64", "--num_validation_samples=3"]
    words += [f"--max_train_samples={max_train_samples}", f"--train_seed={seed}"] if max_train_samples else []
    expected, found = train_script.load_data(**vars(args)), tool.load_images(**vars(tool.parse_args(words)))
    names = [[row["path"] for row in part.rows["image"]] for part in (*expected[:2], *found)]
    assert names[:2] == names[2:]
    assert list(map(len, names[2:])) == [(max_train_samples or 12) - 3, 3]
    for index in range(3):  # so that the loss is the same, too
        one, other = [part[1][0, index, 1.0] for part in (expected, found)]
        assert np.array_equal(one["noise"], other["noise"])
        assert one["timestep"] == other["timestep"]


def test_images_without_captions_are_those_of_a_subject(tool, render, tmp_path):
    folder = creatures(render, tmp_path / "images", 4)
    (folder / "metadata.jsonl").unlink()
    (folder / "002.txt").write_text("a sks star at night")
    words = [str(BASE), str(folder), "--resolution", "64"]
    with pytest.raises(tool.InputError, match="3 of 4 images are unusable"):
        tool.load_images(**vars(tool.parse_args(words)))
    images, _ = tool.load_images(**vars(tool.parse_args([*words, "--instance_prompt", "a sks star"])))
    assert sorted(tool.plan_prompts(None, images, 4, 0)) == [*["a sks star"] * 3, "a sks star at night"]


def test_recipes_are_for_both_tools(tool, tmp_path, capsys, monkeypatch):
    args = tool.parse_args(["model", "images", "--config", str(REPO / "examples" / "configs" / "dreambooth.yaml")])
    assert tool.read_prompts(**vars(args))[1] == "a sks star on a pink background"
    assert (args.seed, args.num_inference_steps, args.guidance_scale) == (0, 25, 2)
    own = tmp_path / "own.yaml"
    own.write_text("training: {seed: 7}\nevaluation: {seed: 5, seeds: [1, 2], num_images: 9, scheduler: euler,"
                   " negative_prompt: dull, height: 64, width: 64, base: ~/base}")
    monkeypatch.setenv("HOME", str(tmp_path))
    args = tool.parse_args(["model", "images", "--config", str(own), "--clip_model=~/clip"])
    assert (args.seed, args.num_images, args.model, args.dataset) == (5, 9, "model", "images")
    assert (args.base, args.clip_model) == (f"{tmp_path}/base", f"{tmp_path}/clip")
    flags = load_script(REPO / "tools" / "generate.py").parse_args(["model"])
    assert vars(flags).keys() - vars(args).keys() == tool.OTHER_TOOLS_KEYS
    for text, told in (("evaluation: {dataset: here}", "unknown key dataset"), ("width: 64", "unknown key width"),
                       ("evaluation: {guidance_scale: [3, 5]}", "5 stands in a list where one value is taken")):
        own.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            tool.parse_args(["model", "images", "--config", str(own)])
        assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- runs
def test_a_run_measures_what_training_measured(tool, train_script, render, tmp_path, capsys):
    folder = creatures(render, tmp_path / "images", 9)
    assert training.train(train_script, BASE, folder, tmp_path / "model", resolution=64, num_validation_samples=4,
                          max_train_steps=3, validation_steps=3, learning_rate=1e-3) == 0
    logged = [row for row in training.read_log(tmp_path / "model") if "held_out_loss" in row]
    before = snapshot(folder)
    capsys.readouterr()
    words = [tmp_path / "model", folder, "--base", BASE, "--clip_model", CLIP, "--resolution", 64, "--num_images", 4,
             "--num_validation_samples", 4, "--num_inference_steps", 2, "--output_dir", tmp_path / "out"]
    assert run(tool, *words) == 0
    assert snapshot(folder) == before
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
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
        assert sheet.width == 90 + 4 * (tool.TILE + tool.MARGIN)
        sheet.load()
    told = capsys.readouterr().out
    assert "CLIP score" in told
    assert "%): cannot say: too few pictures" in told
    assert max(len(line) for line in told.splitlines() if str(tmp_path) not in line) <= 100

    assert run(tool, *words) == 2
    assert "holds an evaluation" in capsys.readouterr().err
    assert run(tool, *words, "--num_images", 3, "--overwrite") == 0
    assert len(json.loads((tmp_path / "out" / "evaluation.json").read_text())["pictures"]) == 3


def test_a_lora_is_measured_against_the_same_model_without_it(tool, render, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    folder, gains = creatures(render, tmp_path / "images", 5), {}
    for scale in (0, 1):
        assert run(tool, BASE, folder, "--lora", f"{tmp_path / 'lora'}:{scale}", "--base", BASE, "--clip_model", CLIP,
                   "--resolution", 64, "--num_images", 3, "--num_validation_samples", 2, "--num_inference_steps", 1,
                   "--output_dir", tmp_path / str(scale)) == 0
        found = json.loads((tmp_path / str(scale) / "evaluation.json").read_text())
        gains[scale] = [found[name]["gain"]["mean"] for name in (
            "clip_score", "clip_image_similarity", "kid", "held_out_loss", "nearest_similarity")]
    assert gains[0] == pytest.approx([0] * 5, abs=1e-5)
    assert np.abs(gains[1]).min() > 1e-4


def test_losses_of_different_schedules_are_not_compared(tool, render, tmp_path, capsys):
    folder = creatures(render, tmp_path / "images", 5)
    for name, rescaled in (("plain", False), ("rescaled", True)):
        shutil.copytree(BASE, tmp_path / name)
        config = tmp_path / name / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": rescaled}))
    for name, compared in (("plain", True), ("rescaled", False)):
        assert run(tool, tmp_path / name, folder, "--base", tmp_path / "plain", "--clip_model", CLIP, "--resolution",
                   64, "--num_images", 3, "--num_validation_samples", 2, "--num_inference_steps", 1,
                   "--output_dir", tmp_path / "out" / name) == 0
        found = json.loads((tmp_path / "out" / name / "evaluation.json").read_text())
        assert ("gain" in found["held_out_loss"]) == ("base" in found["held_out_loss"]) == compared
        assert ("noise schedule differ" in capsys.readouterr().out) == (not compared)


@pytest.mark.parametrize(("error", "status", "message"), [
    (OSError(28, "No space left on device"), 2, "No space left on device"), (KeyboardInterrupt(), 130, "Stopped")])
def test_a_report_is_whole_or_not_there(tool, tmp_path, monkeypatch, capsys, error, status, message):
    def fail_half_way(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise error

    (tmp_path / "closest_pairs.png").write_bytes(b"old")
    monkeypatch.setattr(tool.Path, "write_text", fail_half_way)
    monkeypatch.setattr(tool, "evaluate", lambda args: tool.save_report(tmp_path, {"a": 1}, Image.new("RGB", (9, 9))))
    assert run(tool, BASE, tmp_path) == status
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["closest_pairs.png"]
    assert (tmp_path / "closest_pairs.png").read_bytes() == b"old"


def test_duplicates_are_one_image(tool, clip, tmp_path, render):
    folder = creatures(render, tmp_path / "images", 4)
    (folder / "again.png").write_bytes((folder / "002.png").read_bytes())
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "again.png", "text": "a creature"}) + "\n")
    args = tool.parse_args([str(BASE), str(folder), "--resolution", "64"])
    images, _ = tool.load_images(**vars(args))
    picture = Image.open(folder / "002.png").convert("RGB")
    queries = tool.image_features(clip, [picture, ImageOps.mirror(picture)])[1]
    for batch_size in (1, 5):
        embeds, kept, [nearest] = tool.look_at(images, clip, [queries], batch_size, "")
        assert len(embeds) == len(kept) == 4
        assert tool.name_of(images.rows[kept[nearest.index[0]]]["image"], 0) in ("002.png", "again.png")
        assert nearest.distance.tolist() == pytest.approx([0, 0], abs=1e-3)
        assert nearest.ratios().max() < 0.01  # as a duplicate, the second nearest would be at 0 as well


def test_all_mistakes_at_once(tool, tmp_path, capsys):
    assert run(tool, tmp_path / "nowhere", "--clip_model", BASE, "--num_images", 2, "--resolution", 0, "--lora",
               tmp_path / "no", "--guidance_scale", "nan", "--train_seed", 3, "--output_dir", tmp_path / "out") == 2
    told = capsys.readouterr().err
    for wrong in ("MODEL=", "DATASET: name", "--clip_model=", "--num_images=2: must be in [3, inf)", "--resolution=0",
                  "--lora=", "--guidance_scale=nan: must be in [1, inf)", "--train_seed=3: does nothing without"):
        assert wrong in told, wrong
    (tmp_path / "empty").mkdir()
    assert run(tool, BASE, tmp_path / "empty", "--clip_model", CLIP, "--resolution", 64,
               "--output_dir", tmp_path / "out") == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err
    assert run(tool, BASE, tmp_path / "empty", "--clip_model", CLIP, "--resolution", 64,
               "--output_dir", tmp_path / "empty" / "out") == 2
    assert "lies in the dataset, which stays as it is; put it elsewhere" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def verdicts(tool, train_script, folder, tmp_path, num_held_out, num_images, **settings):
    """Trains the miniature on the folder; returns what the tool finds on the result."""
    settings = {"resolution": 64, "snr_gamma": 5.0, "lr_scheduler": "cosine", "lr_warmup_steps": 10, "use_ema": True,
                "ema_decay": 0.95, "caption_dropout": 0.1, "num_validation_samples": num_held_out, **settings}
    assert training.train(train_script, BASE, folder, tmp_path / "model", **settings) == 0
    assert run(tool, tmp_path / "model", folder, "--base", BASE, "--clip_model", CLIP, "--resolution", 64,
               "--num_validation_samples", num_held_out, "--num_images", num_images, "--batch_size", 16,
               "--num_inference_steps", 12, "--guidance_scale", 4, "--output_dir", tmp_path / "out") == 0
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())


@pytest.mark.slow
def test_a_model_that_learnt_from_many_beats_its_base_and_copies_none(tool, train_script, render, tmp_path):
    found = verdicts(tool, train_script, creatures(render, tmp_path / "images", 120), tmp_path, 20, 64,
                     train_batch_size=16, max_train_steps=400, learning_rate=2e-3, ema_decay=0.97)
    for figure in ("clip_score", "clip_image_similarity", "kid", "kid_held_out", "held_out_loss",
                   "nearest_similarity"):
        assert found[figure]["gain"]["low"] > 0, figure
    assert found["memorisation"]["verdict"] == "not memorising"


@pytest.mark.slow
def test_a_model_that_saw_few_images_often_memorises(tool, train_script, render, tmp_path):
    found = verdicts(tool, train_script, creatures(render, tmp_path / "images", 4), tmp_path, 0, 32,
                     train_batch_size=4, max_train_steps=400, learning_rate=1.5e-3)
    assert found["memorisation"]["verdict"] == "memorising"
    assert found["memorisation"]["model"]["share"] > 0.5
    assert found["memorisation"]["base"]["copies"] == 0
    assert found["held_out_loss"] == {}
    assert found["clip_score"]["gain"]["low"] > 0
