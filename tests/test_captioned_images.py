"""A sample is the image and caption that an epoch is to see, with numbers that depend on its place alone."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from image_data import encoded, make_image
from PIL import Image
from stubs import SHAPE, grey_samples, make_samples
from tiny import make_tokenizer
from training import draws

from sdtune import dataset

RESOLUTION = 32


def captioned(images, captions, resolution=RESOLUTION, **options):
    """CaptionedImages over PIL images, kept in a dataset as bytes."""
    lists = [[caption] if isinstance(caption, str) else caption for caption in captions]
    contents = [{"bytes": encoded(image), "path": None} for image in images]
    rows = datasets.Dataset.from_dict({"image": contents, "captions": lists})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return make_samples(rows, make_tokenizer(), (4, 4, 4), resolution=resolution, **options)


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def pixels(item):
    return item["pixel_values"].transpose(1, 2, 0)


def test_an_item_is_what_the_training_needs():
    items = captioned([make_image(0, (50, 40))], ["a red circle"])
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
def test_centre_crop_is_the_centre_to_the_pixel(size, box):
    image = noise_image(*size)
    items = captioned([image], ["a"], center_crop=True)
    assert np.array_equal(pixels(items[0, 0, 1]), np.asarray(image.crop(box)))
    assert np.array_equal(pixels(items[5, 0, 1]), pixels(items[0, 0, 1]))


def test_the_whole_shorter_side_is_seen_at_any_size():
    """A picture of two halves, scaled down by 3.5 and cropped in the middle, still has its edge in the middle."""
    halves = np.zeros((112, 140, 3), dtype=np.uint8)
    halves[:, 70:] = 255
    result = pixels(captioned([Image.fromarray(halves)], ["a"], center_crop=True)[0, 0, 1])
    assert (result[:, :13] == 0).all()
    assert (result[:, -13:] == 255).all()


def test_interpolation_is_the_chosen_one():
    image = noise_image(64, 64)
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"):
        items = captioned([image], ["a"], image_interpolation_mode=name)
        expected = image.resize((RESOLUTION, RESOLUTION), Image.Resampling[name.upper()])
        assert np.array_equal(pixels(items[0, 0, 1]), np.asarray(expected))


def column_of(item):
    """Where an image whose red is its column, or its row, was cropped."""
    return item["pixel_values"][0].mean() - (RESOLUTION - 1) / 2


def test_random_crop_reaches_from_one_end_to_the_other_evenly():
    ramp = np.tile(np.arange(132, dtype=np.uint8)[None, :, None], (32, 1, 3))
    items = captioned([Image.fromarray(ramp)], ["a"])
    lefts = np.array([column_of(items[epoch, 0, 1]) for epoch in range(400)])
    assert -0.5 <= lefts.min() < 3
    assert 97 < lefts.max() <= 100.5
    assert abs(lefts.mean() - 50) < 5 * 100 / 12**0.5 / 20
    assert np.histogram(lefts, bins=4, range=(-0.5, 100.5))[0].min() > 60


def test_random_crop_is_where_the_first_two_numbers_say():
    """From the left in a wide image, from the top in a high one; a flip is by the third."""
    ramp = np.tile(np.arange(132, dtype=np.uint8)[None, :, None], (32, 1, 3))
    wide, high = Image.fromarray(ramp), Image.fromarray(ramp.transpose(1, 0, 2).copy())
    plain = captioned([wide, high], ["a", "a"])
    flipping = captioned([wide, high], ["a", "a"], random_flip=True)
    for epoch in range(10):
        assert column_of(plain[epoch, 0, 1]) == pytest.approx(100 * draws(0, epoch, 0).left, abs=0.6)
        assert column_of(plain[epoch, 1, 1]) == pytest.approx(100 * draws(0, epoch, 1).top, abs=0.6)
        first, *_, last = pixels(flipping[epoch, 0, 1])[0, :, 0].astype(int)
        assert (first > last) == (draws(0, epoch, 0).flip < 0.5)


def test_flip_mirrors_half_of_the_images():
    image = noise_image(RESOLUTION, RESOLUTION)
    items = captioned([image] * 20, ["a"] * 20, random_flip=True)
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


def test_every_draw_depends_on_seed_epoch_and_index_alone():
    images = [noise_image(60, 40, seed) for seed in range(4)]
    captions = [[f"{number} {word}" for word in ("one", "two", "three")] for number in range(4)]
    options = {"random_flip": True, "caption_dropout": 0.2, "noise_offset": 0.1, "input_perturbation": 0.1}
    first, second = (captioned(images, captions, **options) for _ in range(2))
    places = [(epoch, index, 0.5) for epoch in range(5) for index in range(4)]
    forwards = {place: identity(first[place]) for place in places}
    backwards = {place: identity(second[place]) for place in reversed(places)}
    assert forwards == backwards
    assert forwards == {place: identity(first[(*place[:2], 0.0)]) for place in places}
    other = captioned(images, captions, seed=1, **options)
    for part in (0, 2, 3, 4, 5):  # all but the captions, of which there are few
        assert len({forwards[epoch, 0, 0.5][part] for epoch in range(5)}) == 5
        assert all(identity(other[place])[part] != forwards[place][part] for place in places)


def test_switching_one_option_on_leaves_the_other_draws_as_they_were():
    images, captions = [noise_image(60, 40)], [["one", "two", "three"]]
    plain = captioned(images, captions)
    flipping = captioned(images, captions, random_flip=True)
    dropping = captioned(images, captions, caption_dropout=0.5)
    centred = captioned(images, captions, center_crop=True)
    shifted = captioned(images, captions, noise_offset=0.1)
    perturbed = captioned(images, captions, input_perturbation=0.1)
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


def test_held_out_images_are_seen_alike_by_every_seed_and_epoch():
    images, captions = [noise_image(60, 40, seed) for seed in range(2)], ["one", "two"]
    everything = {"random_flip": True, "caption_dropout": 1.0, "noise_offset": 0.1, "input_perturbation": 0.1}
    training = captioned(images, captions, seed=7, **everything)
    plain = captioned(images, captions, center_crop=True)
    held_out = dataset.seen_alike(training)
    for epoch in range(4):
        for index in range(2):
            assert identity(held_out[epoch, index, 1]) == identity(plain[epoch, index, 1])
            assert identity(held_out[epoch, index, 1])[:2] == identity(plain[0, index, 1])[:2]  # pixels and caption


@pytest.mark.slow
def test_workers_change_nothing():
    items = captioned([noise_image(60, 40, seed) for seed in range(4)], ["a"] * 4, random_flip=True)
    order = [[(epoch, index, 1.0) for index in (3, 1)] for epoch in range(4)]
    batches = [
        list(torch.utils.data.DataLoader(items, batch_sampler=order, num_workers=workers)) for workers in (0, 2)
    ]
    for alone, by_workers in zip(*batches):
        assert all(torch.equal(alone[key], by_workers[key]) for key in alone)


def test_one_caption_of_a_list_is_drawn_per_epoch():
    texts = ["one", "two", "three"]
    items = captioned([make_image(0)], [texts])
    ids = {tuple(make_tokenizer()(text, padding="max_length").input_ids): text for text in texts}
    drawn = Counter(ids[tuple(items[epoch, 0, 1]["input_ids"].tolist())] for epoch in range(300))
    assert drawn.keys() == set(texts)
    assert all(abs(count - 100) < 5 * (300 * 2 / 9) ** 0.5 for count in drawn.values())


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_caption_dropout_is_the_share_of_empty_captions(share):
    items = captioned([make_image(0, (16, 16))], ["a red circle"], caption_dropout=share, resolution=16)
    empty = make_tokenizer()("", padding="max_length").input_ids
    dropped = np.mean([items[epoch, 0, 1]["input_ids"].tolist() == empty for epoch in range(600)])
    assert abs(dropped - share) <= 5 * (share * (1 - share) / 600) ** 0.5


def test_long_captions_are_cut_at_the_limit():
    ids = captioned([make_image(0)], ["red " * 200])[0, 0, 1]["input_ids"]
    tokenizer = make_tokenizer()
    assert ids.shape == (77,)
    assert ids[-1] == tokenizer.eos_token_id
    assert (ids[1:-1] == tokenizer("red").input_ids[1]).all()


# ------------------------------------------------------------------------------------------- random numbers


def collected(items, pairs, name):
    """One tensor of the samples (epoch, index), each fetched by itself."""
    return torch.stack([torch.as_tensor(items[epoch, index, 1.0][name]) for epoch, index in pairs])


def test_sample_is_drawn_by_the_generator_of_seed_stream_epoch_and_index():
    items = grey_samples(100_001, seed=7, noise_offset=0.5, input_perturbation=0.25)
    for epoch, index in [(0, 0), (3, 17), (2, 100_000)]:
        item, drawn = items[epoch, index, 1.0], draws(7, epoch, index, SHAPE)
        noise = drawn.noise + 0.5 * drawn.offset
        assert item["timestep"] == drawn.timestep
        assert torch.equal(torch.from_numpy(item["posterior_noise"]), drawn.posterior_noise)
        assert torch.equal(torch.from_numpy(item["noise"]), noise)
        assert torch.equal(torch.from_numpy(item["added_noise"]), noise + 0.25 * drawn.perturbation)


def test_draws_do_not_depend_on_the_company():
    items, pairs = grey_samples(seed=1), [(0, 5), (1, 5), (0, 6), (4, 0)]
    batches = [[(*pair, 1.0) for pair in order] for order in (pairs, pairs[::-1])]
    together, backwards = torch.utils.data.DataLoader(items, batch_sampler=batches)
    for name in ("posterior_noise", "noise", "added_noise", "timestep"):
        assert together[name].dtype == (torch.int64 if name == "timestep" else torch.float32)
        assert torch.equal(together[name], collected(items, pairs, name))
        assert torch.equal(together[name], backwards[name].flip(0))


def test_draws_do_not_touch_or_follow_global_generators():
    items, before, numpy_before = grey_samples(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = items[0, 0, 1.0]
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])
    torch.manual_seed(99)
    np.random.seed(99)
    second = items[0, 0, 1.0]
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_draws_differ_in_seed_stream_epoch_and_index(monkeypatch):
    """Also where two of the four are exchanged, which a sum or product of them would not tell apart; nor are the three
    that one sample has the same."""
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 2, 0, 0), (2, 1, 0, 0)]
    places += [(0, 1, 2, 0), (0, 2, 1, 0), (0, 0, 1, 2), (0, 0, 2, 1)]
    drawn = []
    for seed, stream, epoch, index in places:
        monkeypatch.setattr(dataset, "SAMPLE", stream)
        item = grey_samples(seed=seed, input_perturbation=1.0)[epoch, index, 1.0]
        drawn += [item["posterior_noise"], item["noise"], item["added_noise"] - item["noise"]]
    flat = torch.from_numpy(np.stack(drawn)).flatten(1)
    correlations = torch.corrcoef(flat) - torch.eye(3 * len(places))
    assert correlations.abs().max() < 5 / flat.shape[1] ** 0.5


def test_normal_numbers_have_mean_0_and_variance_1():
    items = grey_samples(input_perturbation=1.0)
    pairs = [(epoch, index) for epoch in range(10) for index in range(100)]
    posterior, noise, added = (
        collected(items, pairs, name).double() for name in ("posterior_noise", "noise", "added_noise")
    )
    for drawn in (posterior, noise, added - noise):
        number = drawn.numel()
        assert abs(drawn.mean()) < 5 / number**0.5
        assert abs(drawn.var() - 1) < 5 * (2 / number) ** 0.5
        assert abs((drawn**4).mean() - 3) < 5 * (96 / number) ** 0.5
        # Over the samples, at one place: a generator that gave all samples the same would pass the tests above.
        assert abs(drawn[:, 0, 0, 0].mean()) < 5 / 1000**0.5
        assert abs(drawn[:, 0, 0, 0].std() - 1) < 5 / 2000**0.5


def test_timesteps_are_uniform_over_the_whole_range():
    few = {"num_timesteps": 10, "latent_shape": (1, 1, 1)}
    pairs = [(epoch, index) for epoch in range(20) for index in range(250)]
    timesteps = collected(grey_samples(**few), pairs, "timestep")
    assert timesteps.dtype == torch.int64
    assert timesteps.shape == (5_000,)
    counts = torch.bincount(timesteps)
    assert len(counts) == 10
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001
    assert torch.equal(timesteps[:3], collected(grey_samples(**few), pairs[:3], "timestep"))
    assert not torch.equal(timesteps[:100], collected(grey_samples(seed=1, **few), pairs[:100], "timestep"))


def test_noise_without_options_is_plain_and_the_same_for_both():
    items = grey_samples(seed=3)
    for epoch, index in [(0, 1), (2, 3)]:
        item = items[epoch, index, 1.0]
        assert np.array_equal(item["noise"], draws(3, epoch, index, SHAPE).noise)
        assert np.array_equal(item["noise"], item["added_noise"])


def test_noise_offset_shifts_whole_channels_of_both():
    pairs = [(0, index) for index in range(500)]
    plain, once, twice = (grey_samples(seed=3, noise_offset=scale) for scale in (0.0, 0.1, 0.2))
    noise = collected(once, pairs, "noise")
    assert torch.equal(noise, collected(once, pairs, "added_noise"))
    shift = noise - collected(plain, pairs, "noise")
    assert shift.std(dim=(2, 3)).max() < 1e-6
    channels = shift.mean(dim=(2, 3))
    assert abs(channels.std().item() - 0.1) < 5 * 0.1 / (2 * channels.numel()) ** 0.5
    assert torch.corrcoef(channels.T).triu(1).abs().max() < 5 / 500**0.5  # each channel its own
    doubled = collected(twice, pairs, "noise") - collected(plain, pairs, "noise")
    torch.testing.assert_close(doubled, 2 * shift, rtol=0, atol=1e-6)


def test_input_perturbation_changes_the_added_noise_alone():
    pairs = [(0, index) for index in range(100)]
    plain, perturbed = (grey_samples(seed=3, noise_offset=0.05, input_perturbation=scale) for scale in (0.0, 0.1))
    noise = collected(perturbed, pairs, "noise")
    assert torch.equal(noise, collected(plain, pairs, "noise"))
    extra = collected(perturbed, pairs, "added_noise") - noise
    assert abs(extra.std().item() - 0.1) < 5 * 0.1 / (2 * extra.numel()) ** 0.5
    correlation = torch.corrcoef(torch.stack([extra.flatten(), noise.flatten()]))[0, 1]
    assert abs(correlation) < 5 / extra.numel() ** 0.5
