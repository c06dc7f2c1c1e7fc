"""Aspect-ratio buckets: which there are, which picture is in which, and runs whose steps are of one bucket each."""

import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import load_script
from copies import run_copies
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from image_data import make_image, write_image_folder
from PIL import Image
from running import TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA, TRAIN_TEXT_TO_IMAGE_LORA
from training import checkpoint_state, losses, parse, read_log, same, train, unet, words

from sdtune.buckets import (
    BucketRule,
    bucket_rule,
    check_bucket_rule,
    cropped_shares,
    describe_buckets,
    fit_of,
    fit_to_buckets,
    list_buckets,
)
from sdtune.dataset import load_data
from sdtune.validation import encode_held_out, held_out_losses

AT_512 = [  # floor(262144 / width / 64) * 64 for each width in steps of 64, by hand, and the same turned
    (256, 1024),
    (256, 960),
    (256, 896),
    (256, 832),
    (320, 768),
    (320, 704),
    (384, 640),
    (448, 576),
    (512, 512),
    (576, 448),
    (640, 384),
    (704, 320),
    (768, 320),
    (832, 256),
    (896, 256),
    (960, 256),
    (1024, 256),
]
SD = BucketRule(resolution=512, step=64, smallest=256, largest=1024, upscale=True)
# Of 13 pictures at 32 pixels: five in 40 x 24, four in 24 x 40, three in 32 x 32, one in 56 x 16.
SIZES = [(48, 32)] * 5 + [(32, 48)] * 4 + [(40, 40)] * 3 + [(100, 30)]
FITTED = [(40, 24)] * 5 + [(24, 40)] * 4 + [(32, 32)] * 3 + [(56, 16)]


def rule_of(*flags):
    """The rule that flags give."""
    return bucket_rule(parse("--aspect_ratio_buckets", *flags))


def fitted(rule, *pictures):
    """The sizes of pictures in their buckets."""
    return list(map(tuple, fit_to_buckets(rule, np.array(pictures)).tolist()))


# --------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    "rule, expected",
    [
        (SD, AT_512),
        (BucketRule(96, 32, 64, 160, True), [(64, 128), (96, 96), (128, 64)]),  # 160 x 32 is too low
        (
            BucketRule(64, 16, 16, 80, True),  # 4096 / 16 = 256 is cut to 80
            [(16, 80), (32, 80), (48, 80), (64, 64), (80, 48), (80, 32), (80, 16)],
        ),
        (BucketRule(100, 32, 50, 150, True), [(64, 128), (96, 96), (128, 64)]),  # sides are multiples of the step
    ],
)
def test_buckets_are_those_worked_out_by_hand(rule, expected):
    assert list(map(tuple, list_buckets(rule).tolist())) == expected


@pytest.mark.parametrize(
    "resolution, step, smallest, largest",
    [(512, 64, 256, 1024), (1024, 64, 512, 2048), (256, 32, 128, 512), (320, 40, 160, 640), (32, 8, 16, 64)],
)
def test_defaults_follow_the_resolution(resolution, step, smallest, largest):
    expected = BucketRule(resolution, step, smallest, largest, upscale=True)
    assert rule_of(f"--resolution={resolution}") == expected
    asked = rule_of("--bucket_step=16", "--bucket_min=128", "--bucket_max=640", "--bucket_no_upscale")
    assert asked == BucketRule(512, 16, 128, 640, upscale=False)


def test_nearest_is_by_the_logarithm_of_the_ratio():
    """Between 576 : 448 = 1.286 and 640 : 384 = 1.667 the middle is 1.476 by difference, 1.464 by logarithm; turned
    pictures get turned buckets, which a difference of ratios would not give."""
    assert fitted(SD, (1470, 1000), (1460, 1000)) == [(640, 384), (576, 448)]
    assert fitted(SD, (1000, 1470), (1000, 1460)) == [(384, 640), (448, 576)]
    assert fitted(SD, (4000, 3000), (100, 100), (9000, 300), (10, 900)) == [
        (576, 448),
        (512, 512),
        (1024, 256),
        (256, 1024),
    ]
    generator = np.random.default_rng(0)
    for width, height in generator.integers(100, 3000, (300, 2)).tolist():
        far = {bucket: abs(np.log(width / height) - np.log(bucket[0] / bucket[1])) for bucket in AT_512}
        assert fitted(SD, (width, height)) == [min(far, key=far.get)]


def test_without_upscaling_a_small_picture_gets_a_size_of_its_own():
    rule = BucketRule(512, 64, 256, 1024, upscale=False)
    assert fitted(rule, (500, 333), (333, 500), (300, 300)) == [(448, 320), (320, 448), (256, 256)]
    assert fitted(rule, (640, 384), (4000, 3000)) == [(640, 384), (576, 448)]  # large enough
    assert fitted(rule, (639, 384)) == [(576, 384)]
    assert fitted(rule, (2048, 128), (1122, 80)) == [(1024, 64), (1024, 64)]  # low, and within the largest side
    assert fitted(rule, (40, 900), (20, 30)) == [(64, 896), (64, 64)]  # not less than a step
    pictures = np.random.default_rng(0).integers(64, 3000, (500, 2))
    sizes = fit_to_buckets(rule, pictures)
    is_whole = pictures.min(axis=1) * np.minimum(1024 / pictures.max(axis=1), 1) >= 64
    assert is_whole.sum() > 400
    assert (sizes <= pictures)[is_whole].all()
    assert (sizes.prod(axis=1) <= 512**2).all()
    assert (sizes % 64 == 0).all()
    assert (sizes >= 64).all()


def test_shares_that_are_cropped_away():
    """By hand: 96 x 64 becomes 80 x 53.3, of which 48 lines stay; 200 x 40 becomes 160 x 32, of which 128 columns."""
    pictures = np.array([(96, 64), (64, 96), (80, 80), (200, 40)])
    sizes = np.array([(80, 48), (48, 80), (64, 64), (128, 32)])
    assert cropped_shares(pictures, sizes) == pytest.approx([0.1, 0.1, 0.0, 0.2])


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "flags, problems",
    [
        (["--bucket_step=32"], []),
        (["--bucket_min=520"], ["--bucket_min=520: must be at most --resolution=512; use a smaller one"]),
        (["--bucket_max=500"], ["--bucket_max=500: must be at least --resolution=512; use a larger one"]),
        (["--bucket_step=576"], ["--bucket_step=576: must be at most --resolution=512; use a smaller one"]),
        (
            ["--resolution=500", "--bucket_min=480", "--bucket_max=510"],
            [
                "--bucket_step=56: no size of --resolution=500 has sides of 480 to 510; use a smaller step, or a "
                "smaller --bucket_min"
            ],
        ),
        (
            ["--bucket_min=600", "--bucket_max=400"],
            [
                "--bucket_min=600: must be at most --resolution=512; use a smaller one",
                "--bucket_max=400: must be at least --resolution=512; use a larger one",
            ],
        ),
    ],
)
def test_rules_that_contradict_themselves_are_refused(flags, problems):
    assert check_bucket_rule(parse("--aspect_ratio_buckets", *flags)) == problems


@pytest.mark.parametrize("step, usable", [(12, 8), (4, 8), (20, 16)])
def test_a_step_that_the_vae_cannot_divide_is_refused(fit, tmp_path, capsys, step, usable):
    assert fit(tmp_path / "out", bucket_step=step) == 2
    message = f"--bucket_step={step}: must be a multiple of 8 for this VAE; use {usable}\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    "settings", [{"bucket_step": 16}, {"bucket_no_upscale": True}, {"no-aspect_ratio_buckets": True}]
)
def test_other_buckets_on_resume_are_refused(fit, straight, tmp_path, capsys, settings):
    folder = tmp_path / "out"
    shutil.copytree(straight, folder)
    assert fit(folder, resume_from_checkpoint="latest", **settings) == 2
    name = next(iter(settings)).removeprefix("no-")
    assert f"\n  {name}: " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Thirteen pictures, in landscape, in portrait, square and one very wide."""
    return write_image_folder(tmp_path_factory.mktemp("data") / "pictures", 13, SIZES)


@pytest.fixture(scope="module")
def fit(train_script, tiny_pipeline, pictures):
    """Trains in buckets into a folder: nine steps, of which eight make an epoch (3 + 2 + 2 + 1 of at most 2)."""

    def run(folder, script=train_script, data=pictures, base=tiny_pipeline, **settings):
        return train(script, base, data, folder, **{**SETTINGS, **settings})

    return run


SETTINGS = {
    "aspect_ratio_buckets": True,
    "max_train_steps": 9,
    "checkpointing_steps": 4,
    "learning_rate": 1e-4,
    "random_flip": True,
    "caption_dropout": 0.3,
}


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert fit(folder) == 0
    return folder


@pytest.fixture
def seen(monkeypatch):
    """The shapes of latents that UNets see from now on, (batch, height, width)."""
    shapes, forward = [], UNet2DConditionModel.forward

    def noted(self, sample, *args, **options):
        shapes.append((len(sample), *sample.shape[2:]))
        return forward(self, sample, *args, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", noted)
    return shapes


def steps_by_hand(seed, epoch, per_step, sizes):
    """The steps of an epoch by their definition: one order of all images, cut within each bucket, and mixed."""
    draw = np.random.default_rng((seed, 1, epoch))
    order = draw.permutation(len(sizes)).tolist()
    steps = []
    for bucket in sorted(set(sizes)):
        mine = [index for index in order if sizes[index] == bucket]
        steps += [mine[start : start + per_step] for start in range(0, len(mine), per_step)]
    return [steps[number] for number in draw.permutation(len(steps)).tolist()]


@pytest.mark.parametrize("path", [None, TRAIN_TEXT_TO_IMAGE_LORA], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_unet_sees_the_shapes_of_the_buckets(fit, seen, tmp_path, train_script, path, accumulation):
    """Landscape as landscape, a pass of one bucket each, and short steps where a bucket ends."""
    script = load_script(path) if path else train_script
    assert fit(tmp_path, script, gradient_accumulation_steps=accumulation, max_train_steps=7) == 0
    expected = []
    for epoch in range(2):
        for step in steps_by_hand(0, epoch, 2 * accumulation, FITTED):
            width, height = FITTED[step[0]]
            passes = [len(step[start : start + 2]) for start in range(0, len(step), 2)]
            expected.append([(number, height // 8, width // 8) for number in passes])
    assert len(expected) == (16 if accumulation == 1 else 10)
    assert seen == [shape for passes in expected[:7] for shape in passes]
    assert {shape[1:] for shape in seen} >= {(3, 5), (5, 3), (4, 4)}


def test_without_upscaling_the_unet_sees_smaller_shapes(fit, seen, tmp_path):
    """A picture of 23 x 41 is not enlarged to 24 x 40, but gets 16 x 40."""
    data = write_image_folder(tmp_path / "small", 2, [(23, 41), (200, 200)])
    assert fit(tmp_path / "out", data=data, bucket_no_upscale=True, max_train_steps=2) == 0
    assert sorted(seen) == [(1, 4, 4), (1, 5, 2)]
    seen.clear()
    assert fit(tmp_path / "enlarged", data=data, max_train_steps=2) == 0
    assert sorted(seen) == [(1, 4, 4), (1, 5, 3)]


def distance(one, two):
    """The norm of the difference of two sets of weights."""
    return torch.stack([(one[name] - two[name]).norm() for name in one]).norm().item()


def test_steps_are_the_same_for_every_split(fit, train_script, tiny_pipeline, pictures, tmp_path):
    """4 a pass, 2 a pass in two passes, and two processes with 2 a pass: the same losses and weights, to rounding; of
    the last images of a bucket one process may have none."""
    settings = {"max_train_steps": 8, "checkpointing_steps": 3}
    whole, in_passes, by_two, resumed = (tmp_path / name for name in ("whole", "in_passes", "by_two", "resumed"))
    assert fit(whole, train_batch_size=4, **settings) == 0
    assert fit(in_passes, train_batch_size=2, gradient_accumulation_steps=2, **settings) == 0
    said = tmp_path / "said"
    line = words(tiny_pipeline, pictures, by_two, **{**SETTINGS, **settings, "train_batch_size": 2})
    assert not any(run_copies(train_script, line, said)), said.read_text()
    start, result = unet(tiny_pipeline), unet(whole)
    moved = distance(result, start)
    assert len(set(losses(whole))) == 8
    for folder in (in_passes, by_two):
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)
        assert distance(unet(folder), result) < 1e-3 * moved
    # The checkpoint of two processes goes on in one, in the middle of an epoch.
    assert fit(resumed, train_batch_size=4, resume_from_checkpoint=by_two / "checkpoint-3", **settings) == 0
    assert losses(resumed) == pytest.approx(losses(whole)[3:], rel=1e-5)


@pytest.mark.parametrize("checkpoint", [4, 8])
def test_resumed_equals_straight(fit, straight, tmp_path, checkpoint):
    """In the middle of an epoch of eight steps, and at its end."""
    folder = tmp_path / "out"
    assert fit(folder, resume_from_checkpoint=straight / f"checkpoint-{checkpoint}") == 0
    assert same(unet(folder), unet(straight))
    assert same(checkpoint_state(folder / "checkpoint-9"), checkpoint_state(straight / "checkpoint-9"))
    assert read_log(folder) == read_log(straight)[checkpoint:]


def test_one_bucket_gives_the_bits_of_squares(fit, tmp_path):
    data = write_image_folder(tmp_path / "data", 5, (40, 40))
    settings = {"data": data, "max_train_steps": 4}
    assert fit(tmp_path / "buckets", **settings) == 0
    assert fit(tmp_path / "squares", aspect_ratio_buckets=False, center_crop=True, **settings) == 0
    assert same(unet(tmp_path / "buckets"), unet(tmp_path / "squares"))
    assert read_log(tmp_path / "buckets") == read_log(tmp_path / "squares")


def test_lora_is_resumed_to_the_bit(fit, tmp_path):
    script = load_script(TRAIN_TEXT_TO_IMAGE_LORA)
    settings = {"script": script, "gradient_accumulation_steps": 2, "max_train_steps": 6, "checkpointing_steps": 3}
    straight, folder = tmp_path / "straight", tmp_path / "out"
    assert fit(straight, **settings) == 0
    assert fit(folder, resume_from_checkpoint=straight / "checkpoint-3", **settings) == 0
    assert same(checkpoint_state(folder / "checkpoint-6"), checkpoint_state(straight / "checkpoint-6"))
    assert read_log(folder) == read_log(straight)[3:]


@pytest.mark.parametrize("path", [TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA], ids=["full", "lora"])
def test_a_class_image_has_the_shape_of_its_instance(fit, seen, tmp_path, monkeypatch, path):
    """In every pass both halves are of one bucket, and all four class images are used in all shapes that need them;
    they are fitted from their middle."""
    script = load_script(path)
    photos = write_image_folder(tmp_path / "photos", 5, [(48, 32)] * 3 + [(32, 48)] * 2)
    classes = write_image_folder(tmp_path / "classes", 4, (32, 32), ["a picture of a star"] * 4)
    noted, get = [], script.CaptionedImages.__getitem__

    def note(self, item):
        noted.append((item, get(self, item)))
        return noted[-1][1]

    monkeypatch.setattr(script.CaptionedImages, "__getitem__", note)
    settings = {
        "train_data_dir": None,
        "instance_data_dir": photos,
        "instance_prompt": "a photo of sks star",
        "with_prior_preservation": True,
        "class_data_dir": classes,
        "class_prompt": "a picture of a star",
        "num_class_images": 4,
        "random_flip": False,
        "max_train_steps": 6,
    }
    assert fit(tmp_path / "out", script, **settings) == 0
    # Steps of 2 and 1 in landscape and of 2 in portrait make an epoch.
    assert sorted(seen[:3]) == [(2, 3, 5), (4, 3, 5), (4, 5, 3)]
    assert sorted(seen[3:]) == sorted(seen[:3])
    used = set()
    for (_, index, weight), sample in noted:
        shape = sample["pixel_values"].shape[1:]
        if index < 5:
            assert shape == [(24, 40), (40, 24)][index >= 3]
            continue
        bucket, number = divmod(index - 5, 4)
        assert weight > 0
        assert shape == [(40, 24), (24, 40)][bucket]  # in the order of widths
        used.add((bucket, number))
        width, height = shape[1], shape[0]
        side = 32 * 24 / 40  # of the square's 32 pixels, the shorter one of what is kept
        box = (16 - side / 2, 0, 16 + side / 2, 32) if width < height else (0, 16 - side / 2, 32, 16 + side / 2)
        expected = make_image(number).resize((width, height), Image.Resampling.LANCZOS, box)
        assert np.abs(np.asarray(expected).transpose(2, 0, 1).astype(int) - sample["pixel_values"]).max() <= 1
    assert len({number for _, number in used}) == 4
    assert {bucket for bucket, _ in used} == {0, 1}


def test_prior_preservation_is_resumed_to_the_bit(fit, tmp_path):
    """Steps of 3 + 2 photos in two shapes, in two passes, with as many class images."""
    photos = write_image_folder(tmp_path / "photos", 5, [(48, 32)] * 3 + [(32, 48)] * 2)
    classes = write_image_folder(tmp_path / "classes", 4, (32, 32), ["a picture of a star"] * 4)
    settings = {
        "script": load_script(TRAIN_DREAMBOOTH),
        "data": None,
        "instance_data_dir": photos,
        "instance_prompt": "a photo of sks star",
        "with_prior_preservation": True,
        "class_data_dir": classes,
        "class_prompt": "a picture of a star",
        "num_class_images": 4,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 6,
        "checkpointing_steps": 3,
    }
    straight, folder = tmp_path / "straight", tmp_path / "out"
    assert fit(straight, **settings) == 0
    assert fit(folder, resume_from_checkpoint=straight / "checkpoint-3", **settings) == 0
    assert same(unet(folder), unet(straight))
    assert same(checkpoint_state(folder / "checkpoint-6"), checkpoint_state(straight / "checkpoint-6"))
    assert read_log(folder) == read_log(straight)[3:]


@pytest.mark.parametrize("with_classes", [False, True])
def test_buckets_are_encoded_once(fit, seen, tmp_path, pictures, with_classes):
    """With both caches the same shapes and, to the rounding of other batches, the same losses; no --center_crop is
    needed. Again from the cache all is the same to the bit."""
    settings = {"cache_dir": tmp_path / "cache", "max_train_steps": 6, "num_validation_samples": 3}
    if with_classes:
        classes = write_image_folder(tmp_path / "classes", 4, (32, 32), ["a picture of a star"] * 4)
        settings |= {
            "script": load_script(TRAIN_DREAMBOOTH),
            "data": None,
            "instance_data_dir": pictures,
            "with_prior_preservation": True,
            "class_data_dir": classes,
            "class_prompt": "a picture of a star",
            "num_class_images": 4,
        }
    cached = {"cache_latents": True, "cache_text_embeddings": True}
    plain, first, second = (tmp_path / name for name in ("plain", "first", "second"))
    assert fit(plain, **settings) == 0
    shapes = seen.copy()
    for folder in (first, second):
        seen.clear()
        assert fit(folder, **settings, **cached) == 0
        assert seen == shapes
    assert losses(first) == pytest.approx(losses(plain), rel=1e-4)
    assert read_log(second) == read_log(first)
    assert same(unet(second), unet(first))


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def loaded(pictures, tiny_pipeline, tmp_path):
    """A function that loads the pictures in buckets, with more flags."""

    def load(*flags, data=pictures):
        args = parse(
            f"--pretrained_model_name_or_path={tiny_pipeline}",
            f"--train_data_dir={data}",
            f"--cache_dir={tmp_path / 'cache'}",
            "--resolution=32",
            "--aspect_ratio_buckets",
            *flags,
        )
        return args, *load_data(args, args.train_data_dir, fit=fit_of(args))

    return load


def test_pixels_are_the_middle_of_the_scaled_picture(loaded):
    """Against Pillow: of 48 x 32 the middle 28.8 lines become 24; of 100 x 30 all but 5 columns become 56 x 16."""
    _, images, _, _ = loaded()
    assert images.sizes.tolist() == list(map(list, FITTED))
    assert images.center_crop
    for index, box in (
        (0, (0, 1.6, 48, 30.4)),
        (5, (1.6, 0, 30.4, 48)),
        (9, (0, 0, 40, 40)),
        (12, (0, 0.714, 100, 29.286)),
    ):
        sample = images[0, index, 1.0]
        expected = make_image(index, SIZES[index]).resize(FITTED[index], Image.Resampling.LANCZOS, box)
        width, height = FITTED[index]
        assert sample["pixel_values"].shape == (3, height, width)
        assert sample["noise"].shape == (4, height // 8, width // 8)
        difference = np.abs(np.asarray(expected).transpose(2, 0, 1).astype(int) - sample["pixel_values"])
        assert difference.max() <= 1
    again = images[7, 0, 1.0]["pixel_values"]
    assert np.array_equal(again, images[0, 0, 1.0]["pixel_values"])  # nothing of the crop is random


def test_held_out_images_keep_their_shapes(loaded, tiny_pipeline):
    """Together in batches they have the losses that each has alone."""
    _, images, held_out, _ = loaded("--num_validation_samples=6")
    assert sorted(images.sizes.tolist() + held_out.sizes.tolist()) == sorted(map(list, FITTED))
    assert len(np.unique(held_out.sizes, axis=0)) > 1
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    scheduler, accelerator = DDPMScheduler.from_config(pipeline.scheduler.config), Accelerator(cpu=True)

    def measure(batch_size):
        encoded = encode_held_out(accelerator, pipeline.vae, pipeline.text_encoder, held_out, batch_size)
        shapes = {index: mean.shape[1:] for index, (mean, _) in encoded.posteriors.items()}
        parts = (accelerator, pipeline.unet, pipeline.vae, pipeline.text_encoder, scheduler, encoded)
        return held_out_losses(*parts, batch_size), shapes

    together, shapes = measure(6)
    alone, _ = measure(1)
    assert shapes == {k: (height // 8, width // 8) for k, (width, height) in enumerate(held_out.sizes.tolist())}
    torch.testing.assert_close(together, alone)
    assert (together > 0).all()


def test_the_plan_tells_the_buckets(fit, tmp_path, pictures, capsys):
    assert fit(tmp_path / "out", dry_run=True, train_batch_size=4) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("  images ")]
    assert line == "  images     13 to train on, 0 held out, in buckets of the area of 32 x 32 pixels"
    # By hand: 48 x 32 loses 10 %, 100 x 30 becomes 56 x 16.8 and loses 4.8 %: (9 x 10 + 4.762) / 13 = 7.3.
    expected = [
        "40 x 24: 5",
        "24 x 40: 4",
        "32 x 32: 3",
        "56 x 16: 1",
        "cropped away: 7.3% of a picture on average, 10.0% at worst, of ",
    ]
    found = said.splitlines()
    start = found.index(line) + 1
    *rows, cropped = [text.strip() for text in found[start : start + 5]]
    assert [*rows, cropped.removesuffix(cropped[-6:])] == expected
    assert cropped[-6:] in [f"{index:02d}.png" for index in range(9)]
    short = "too few images for a whole step in 2 of 4 buckets; a larger --bucket_step makes fewer"
    assert f"  warning    {short}" in found
    assert "  steps      0 to 9, 1.8 epochs" in found  # of 2 + 1 + 1 + 1 steps
    assert len(f"  warning    {short}") <= 100


def test_more_than_eight_buckets_are_summed_up(loaded, tmp_path):
    """Ten pictures of a bucket's size each, and more of two of them, which come first."""
    shapes = [(32, 128), (40, 96), (48, 80), (56, 72), (64, 64), (72, 56), (80, 48), (96, 40), (128, 32), (120, 32)]
    data = write_image_folder(tmp_path / "many", 15, [*shapes, (64, 64), (640, 640), (144, 112), (90, 70), (64, 65)])
    args, images, _, _ = loaded("--resolution=64", data=data)
    assert describe_buckets(args, images) == [
        "64 x 64: 4",
        "72 x 56: 3",
        "32 x 128: 1",
        "40 x 96: 1",
        "48 x 80: 1",
        "56 x 72: 1",
        "80 x 48: 1",
        "96 x 40: 1",
        "and 2 more: 2",
        "cropped away: 0.1% of a picture on average, 1.5% at worst, of 14.png",  # 1 of 65 lines, in one of 15
    ]


def test_pictures_that_are_enlarged_are_warned_of(loaded, tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", 3, [(100, 100), (100, 20), (39, 24)])
    loaded(data=data)
    said = capsys.readouterr().out
    assert "Warning: 1 image is smaller than its bucket and is enlarged, such as\n" in said
    assert f"{data / '02.png'}: 39 x 24" in said
    loaded("--bucket_no_upscale", data=data)
    assert "enlarged" not in capsys.readouterr().out
