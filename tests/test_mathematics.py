"""The mathematics of train_text_to_image.py against closed forms, computed here in float64 and without the libraries
that the script uses for them."""

import io
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from training import draws

SHAPE = (4, 8, 8)


class GreyRows:
    """Rows of any number; the image of each is one pixel, as bright as its index."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        buffer = io.BytesIO()
        Image.new("L", (1, 1), index % 256).save(buffer, format="ppm")
        return {"image": {"bytes": buffer.getvalue(), "path": None}, "captions": ["a"]}


def one_token(caption, **options):
    """Stands for a tokenizer."""
    return SimpleNamespace(input_ids=[np.array([1])])


def sampled(train_script, number=100, resolution=8, latent_shape=SHAPE, num_timesteps=1000, **options):
    """CaptionedImages of which the numbers drawn matter, not the pictures."""
    flags = {"resolution": resolution, "image_interpolation_mode": "nearest", "seed": 0, "center_crop": True}
    flags |= {"random_flip": False, "caption_dropout": 0.0, "noise_offset": 0.0, "input_perturbation": 0.0} | options
    return train_script.CaptionedImages(GreyRows(number), one_token, latent_shape, num_timesteps, flags)


def make_scheduler(**options):
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options
    )


def alphas_cumprod(rescaled=False):
    """The schedule of SD 1 by its definition; rescaled to zero terminal SNR by arXiv 2305.08891, algorithm 1."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if rescaled:
        roots = np.sqrt(alphas)
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return alphas


def min_snr_weights(prediction_type, timesteps, gamma, rescaled=False):
    alphas = alphas_cumprod(rescaled)[timesteps]
    snr = alphas / (1 - alphas)
    return np.minimum(snr, gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


class StubUNet:
    """Answers every call with `answer` and keeps what it was called with."""

    def __init__(self, answer=0.0):
        self.answer, self.calls = answer, []

    def __call__(self, noisy_latents, timesteps, prompt_embeds):
        self.calls.append((noisy_latents, timesteps, prompt_embeds))
        return SimpleNamespace(sample=torch.zeros_like(noisy_latents) + self.answer)


class StubVAE:
    """A posterior of fixed moments; remembers the pixels that it was given."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=0.3)

    def __init__(self, mean, std):
        self.posterior = SimpleNamespace(mean=mean, std=std)

    def encode(self, pixel_values):
        self.pixel_values = pixel_values
        return SimpleNamespace(latent_dist=self.posterior)


# ---------------------------------------------------------------------------------------------------- random numbers


def test_streams_are_distinct(train_script):
    names = "SAMPLE ORDER DROPOUT SUBSET HELD_OUT"
    assert len({getattr(train_script, name) for name in names.split()}) == len(names.split())


def collected(items, pairs, name):
    """One tensor of the samples (epoch, index), each fetched by itself."""
    return torch.stack([torch.as_tensor(items[epoch, index, 1.0][name]) for epoch, index in pairs])


def test_sample_is_drawn_by_the_generator_of_seed_stream_epoch_and_index(train_script):
    items = sampled(train_script, seed=7, noise_offset=0.5, input_perturbation=0.25)
    for epoch, index in [(0, 0), (3, 17), (2, 100_000)]:
        item, drawn = items[epoch, index, 1.0], draws(train_script, 7, epoch, index, SHAPE)
        noise = drawn.noise + 0.5 * drawn.offset
        assert item["timestep"] == drawn.timestep
        assert torch.equal(torch.from_numpy(item["posterior_noise"]), drawn.posterior_noise)
        assert torch.equal(torch.from_numpy(item["noise"]), noise)
        assert torch.equal(torch.from_numpy(item["added_noise"]), noise + 0.25 * drawn.perturbation)


def test_draws_do_not_depend_on_the_company(train_script):
    items, pairs = sampled(train_script, seed=1), [(0, 5), (1, 5), (0, 6), (4, 0)]
    batches = [[(*pair, 1.0) for pair in order] for order in (pairs, pairs[::-1])]
    together, backwards = torch.utils.data.DataLoader(items, batch_sampler=batches)
    for name in ("posterior_noise", "noise", "added_noise", "timestep"):
        assert together[name].dtype == (torch.int64 if name == "timestep" else torch.float32)
        assert torch.equal(together[name], collected(items, pairs, name))
        assert torch.equal(together[name], backwards[name].flip(0))


def test_draws_do_not_touch_or_follow_global_generators(train_script):
    items, before, numpy_before = sampled(train_script), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = items[0, 0, 1.0]
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])
    torch.manual_seed(99)
    np.random.seed(99)
    second = items[0, 0, 1.0]
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_draws_differ_in_seed_stream_epoch_and_index(train_script, monkeypatch):
    """Also where two of the four are exchanged, which a sum or product of them would not tell apart; nor are the three
    that one sample has the same."""
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 2, 0, 0), (2, 1, 0, 0)]
    places += [(0, 1, 2, 0), (0, 2, 1, 0), (0, 0, 1, 2), (0, 0, 2, 1)]
    drawn = []
    for seed, stream, epoch, index in places:
        monkeypatch.setattr(train_script, "SAMPLE", stream)
        item = sampled(train_script, seed=seed, input_perturbation=1.0)[epoch, index, 1.0]
        drawn += [item["posterior_noise"], item["noise"], item["added_noise"] - item["noise"]]
    flat = torch.from_numpy(np.stack(drawn)).flatten(1)
    correlations = torch.corrcoef(flat) - torch.eye(3 * len(places))
    assert correlations.abs().max() < 5 / flat.shape[1] ** 0.5


def test_normal_numbers_have_mean_0_and_variance_1(train_script):
    items = sampled(train_script, input_perturbation=1.0)
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


def test_timesteps_are_uniform_over_the_whole_range(train_script):
    few = {"num_timesteps": 10, "latent_shape": (1, 1, 1)}
    pairs = [(epoch, index) for epoch in range(40) for index in range(500)]
    timesteps = collected(sampled(train_script, **few), pairs, "timestep")
    assert timesteps.dtype == torch.int64
    assert timesteps.shape == (20_000,)
    counts = torch.bincount(timesteps)
    assert len(counts) == 10
    chi_squared = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001
    assert torch.equal(timesteps[:3], collected(sampled(train_script, **few), pairs[:3], "timestep"))
    assert not torch.equal(timesteps[:100], collected(sampled(train_script, seed=1, **few), pairs[:100], "timestep"))


def test_noise_without_options_is_plain_and_the_same_for_both(train_script):
    items = sampled(train_script, seed=3)
    for epoch, index in [(0, 1), (2, 3)]:
        item = items[epoch, index, 1.0]
        assert np.array_equal(item["noise"], draws(train_script, 3, epoch, index, SHAPE).noise)
        assert np.array_equal(item["noise"], item["added_noise"])


def test_noise_offset_shifts_whole_channels_of_both(train_script):
    pairs = [(0, index) for index in range(500)]
    plain, once, twice = (sampled(train_script, seed=3, noise_offset=scale) for scale in (0.0, 0.1, 0.2))
    noise = collected(once, pairs, "noise")
    assert torch.equal(noise, collected(once, pairs, "added_noise"))
    shift = noise - collected(plain, pairs, "noise")
    assert shift.std(dim=(2, 3)).max() < 1e-6
    channels = shift.mean(dim=(2, 3))
    assert abs(channels.std().item() - 0.1) < 5 * 0.1 / (2 * channels.numel()) ** 0.5
    assert torch.corrcoef(channels.T).triu(1).abs().max() < 5 / 500**0.5  # each channel its own
    doubled = collected(twice, pairs, "noise") - collected(plain, pairs, "noise")
    torch.testing.assert_close(doubled, 2 * shift, rtol=0, atol=1e-6)


def test_input_perturbation_changes_the_added_noise_alone(train_script):
    pairs = [(0, index) for index in range(100)]
    plain, perturbed = (
        sampled(train_script, seed=3, noise_offset=0.05, input_perturbation=scale) for scale in (0.0, 0.1)
    )
    noise = collected(perturbed, pairs, "noise")
    assert torch.equal(noise, collected(plain, pairs, "noise"))
    extra = collected(perturbed, pairs, "added_noise") - noise
    assert abs(extra.std().item() - 0.1) < 5 * 0.1 / (2 * extra.numel()) ** 0.5
    correlation = torch.corrcoef(torch.stack([extra.flatten(), noise.flatten()]))[0, 1]
    assert abs(correlation) < 5 / extra.numel() ** 0.5


# ----------------------------------------------------------------------------------------------------- diffusion step


def hand_computed(prediction_type, answer, latents, noise, timesteps, rescaled=False):
    """The mean squared error of each sample in float64, from the definitions of epsilon and v (arXiv 2202.00512)."""
    alphas = alphas_cumprod(rescaled)[timesteps.numpy()][:, None, None, None]
    x0, eps = latents.double().numpy(), noise.double().numpy()
    target = np.sqrt(alphas) * eps - np.sqrt(1 - alphas) * x0 if prediction_type == "v_prediction" else eps
    return ((answer.double().numpy() - target) ** 2).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("snr_gamma", [None, 5.0, 0.5])
@pytest.mark.parametrize(  # epsilon at zero terminal SNR is refused by the script
    "prediction_type, rescaled", [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_losses_equal_those_computed_by_hand(train_script, prediction_type, rescaled, snr_gamma):
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([0, 1, 100, 500, 750, 999])
    latents, noise, answer = (torch.randn(6, *SHAPE, generator=generator) for _ in range(3))
    scheduler = make_scheduler(prediction_type=prediction_type, rescale_betas_zero_snr=rescaled)
    losses = train_script.diffusion_losses(
        StubUNet(answer), scheduler, latents, torch.zeros(6, 1), noise, noise, timesteps, snr_gamma
    )
    expected = hand_computed(prediction_type, answer, latents, noise, timesteps, rescaled)
    if snr_gamma is not None:
        expected *= min_snr_weights(prediction_type, timesteps.numpy(), snr_gamma, rescaled)
    assert losses.shape == (6,)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_perfect_prediction_costs_nothing_and_perturbation_stays_out_of_the_target(train_script, prediction_type):
    generator = torch.Generator().manual_seed(1)
    timesteps = torch.tensor([3, 300, 900])
    latents, noise, extra = (torch.randn(3, *SHAPE, generator=generator) for _ in range(3))
    alphas = torch.from_numpy(alphas_cumprod()[timesteps])[:, None, None, None]
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    unet = StubUNet(noise if prediction_type == "epsilon" else velocity.float())
    scheduler, added_noise = make_scheduler(prediction_type=prediction_type), noise + 0.1 * extra
    embeds = torch.arange(3.0)
    losses = train_script.diffusion_losses(unet, scheduler, latents, embeds, noise, added_noise, timesteps)
    assert losses.max() < 1e-9
    ((noisy_latents, seen_timesteps, seen_embeds),) = unet.calls
    expected = alphas.sqrt() * latents + (1 - alphas).sqrt() * added_noise
    torch.testing.assert_close(noisy_latents, expected.float(), rtol=0, atol=1e-5)
    assert torch.equal(seen_timesteps, timesteps)
    assert torch.equal(seen_embeds, embeds)


def snr_weights(train_script, scheduler, timesteps, gamma):
    """The losses of a UNet that is off by 1 everywhere."""
    zeros = torch.zeros(len(timesteps), *SHAPE)
    return train_script.diffusion_losses(StubUNet(1.0), scheduler, zeros, None, zeros, zeros, timesteps, gamma)


def test_weights_of_min_snr_at_every_timestep(train_script):
    timesteps = torch.arange(1000)
    for prediction_type in ("epsilon", "v_prediction"):
        weights = snr_weights(train_script, make_scheduler(prediction_type=prediction_type), timesteps, 5.0)
        expected = min_snr_weights(prediction_type, timesteps.numpy(), 5.0)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=2e-4)
    # Values that can be read off the formulas: above gamma the epsilon weight is gamma / snr, below it is 1.
    snr = alphas_cumprod() / (1 - alphas_cumprod())
    epsilon = snr_weights(train_script, make_scheduler(), timesteps, 5.0).numpy()
    assert (epsilon[snr < 4.99] == 1).all()
    np.testing.assert_allclose(epsilon[snr > 5] * snr[snr > 5], 5, rtol=2e-4)


def test_snr_is_that_of_the_rescaled_schedule(train_script):
    scheduler = make_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    timesteps = torch.arange(1000)
    weights = snr_weights(train_script, scheduler, timesteps, 5.0).numpy()
    np.testing.assert_allclose(weights, min_snr_weights("v_prediction", timesteps, 5.0, True), rtol=1e-3, atol=1e-6)
    plain = min_snr_weights("v_prediction", timesteps, 5.0)
    assert np.abs(weights - plain).max() > 0.004  # else the test could not tell the two apart
    assert weights[-1] == 0  # pure noise: snr = 0


def test_noise_is_added_in_float32_under_bfloat16(train_script):
    """bfloat16 has 8 bits: sqrt(alphas_cumprod[0]) = 0.99957 would round to 1 and sqrt(1 - 1) add no noise."""
    unet, timesteps = StubUNet(), torch.zeros(2, dtype=torch.int64)
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(2, *SHAPE, generator=generator) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_script.diffusion_losses(unet, make_scheduler(), latents, torch.zeros(2, 1), noise, noise, timesteps)
    noisy_latents = unet.calls[0][0]
    assert noisy_latents.dtype == torch.float32
    added = (noisy_latents.double() - (1 - 0.00085) ** 0.5 * latents.double()) / 0.00085**0.5
    torch.testing.assert_close(added, noise.double(), rtol=0, atol=1e-3)


def test_bfloat16_predictions_are_compared_in_float32(train_script):
    unet, timesteps = StubUNet(), torch.tensor([10])
    unet.answer = torch.zeros(1, *SHAPE, dtype=torch.bfloat16)
    noise = torch.full((1, *SHAPE), 1 + 2**-10)  # rounds to 1 in bfloat16
    losses = train_script.diffusion_losses(
        lambda *inputs: SimpleNamespace(sample=unet.answer), make_scheduler(), noise, noise, noise, noise, timesteps
    )
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx((1 + 2**-10) ** 2, rel=1e-7)


# -------------------------------------------------------------------------------------------------------------- encode


def test_latents_are_mean_plus_std_times_own_noise_scaled(train_script):
    generator = torch.Generator().manual_seed(3)
    mean, std = torch.randn(2, *SHAPE, generator=generator), torch.rand(2, *SHAPE, generator=generator)
    vae, own = StubVAE(mean, std), torch.randn(2, *SHAPE, generator=generator)
    pixel_values = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 64, 64)
    latents = train_script.encode(vae, {"pixel_values": pixel_values, "posterior_noise": own})
    torch.testing.assert_close(latents, (mean + std * own) * 0.3, rtol=0, atol=1e-6)
    assert torch.allclose(vae.pixel_values[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]), atol=1e-6)


def test_encode_with_a_real_vae(train_script, tiny_pipeline):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    generator = torch.Generator().manual_seed(4)
    pixel_values = torch.randint(256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    own = torch.randn(3, 4, 4, 4, generator=generator)
    latents = train_script.encode(pipeline.vae, {"pixel_values": pixel_values, "posterior_noise": own})
    with torch.no_grad():
        moments = pipeline.vae.quant_conv(pipeline.vae.encoder(pixel_values.float() / 127.5 - 1))
        mean, log_variance = moments.chunk(2, dim=1)
        expected = (mean + (log_variance / 2).exp() * own) * 0.18215
    assert latents.shape == (3, 4, 4, 4)
    assert not latents.requires_grad
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- micro-batches


def all_passes(train_script, num_samples, batch_size, num_processes, accumulation, first_step, last_step, seed=0):
    """What every process gets: a list of passes, each with one list of (epoch, index, weight) per process."""
    settings = (accumulation, seed, first_step, last_step)
    ranks = [
        list(train_script.micro_batches(num_samples, batch_size, num_processes, rank, *settings))
        for rank in range(num_processes)
    ]
    assert len({len(rank) for rank in ranks}) == 1  # else some would wait forever for the others
    return list(zip(*ranks))


def real_samples(passes):
    """The (epoch, index) in global order, padding left out."""
    return [(epoch, index) for ranks in passes for rank in ranks for epoch, index, weight in rank if weight]


LAYOUTS = [  # num_samples, batch_size, num_processes, accumulation
    (12, 4, 1, 1),
    (13, 4, 1, 3),
    (13, 2, 2, 2),
    (7, 2, 3, 1),
    (2, 2, 3, 2),  # more processes than samples
    (1, 1, 4, 1),
    (5, 16, 1, 1),  # a batch larger than the data
    (30, 4, 2, 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_epoch_sees_every_sample_exactly_once(train_script, layout):
    num_samples, batch_size, num_processes, accumulation = layout
    steps_per_epoch = -(-num_samples // (batch_size * num_processes * accumulation))
    passes = all_passes(train_script, *layout, 0, 3 * steps_per_epoch)
    seen = Counter(real_samples(passes))
    assert seen == {(epoch, index): 1 for epoch in range(3) for index in range(num_samples)}
    assert [epoch for epoch, _ in real_samples(passes)] == sorted(epoch for epoch, _ in seen)
    assert all(1 <= len(rank) <= batch_size for ranks in passes for rank in ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_sum_to_1_over_the_processes_and_passes_of_a_step(train_script, layout):
    num_samples, batch_size, num_processes, accumulation = layout
    per_step = batch_size * num_processes * accumulation
    steps_per_epoch = -(-num_samples // per_step)
    for step in range(2 * steps_per_epoch):
        passes = all_passes(train_script, *layout, step, step + 1)
        samples = min(per_step, num_samples - step % steps_per_epoch * per_step)
        weights = [weight for ranks in passes for rank in ranks for _, _, weight in rank]
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert {weight for weight in weights if weight} == {1 / samples}  # a mean over its samples
        assert len(passes) == -(-samples // (batch_size * num_processes))


def test_order_is_the_same_for_any_number_of_processes(train_script):
    """12 samples a step in every case, over 25: the second step of an epoch is full, the third has one sample."""
    orders = [
        real_samples(all_passes(train_script, 25, batch_size, num_processes, accumulation, 0, 9, seed=3))
        for batch_size, num_processes, accumulation in [
            (12, 1, 1),
            (6, 2, 1),
            (4, 3, 1),
            (3, 2, 2),
            (1, 3, 4),
            (1, 1, 12),
        ]
    ]
    assert len(orders[0]) == 75
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_goes_on_with_the_tail_of_the_full_sequence(train_script, layout):
    num_samples, batch_size, num_processes, accumulation = layout
    settings = (num_samples, batch_size, num_processes)
    for rank in range(num_processes):
        full = [
            list(train_script.micro_batches(*settings, rank, accumulation, 1, step, step + 1)) for step in range(9)
        ]
        for first_step in range(9):
            tail = list(train_script.micro_batches(*settings, rank, accumulation, 1, first_step, 9))
            assert tail == [micro_batch for step in full[first_step:] for micro_batch in step]


def test_order_is_a_shuffle_by_seed_and_epoch(train_script):
    def epoch_order(seed, epoch):
        return [index for _, index in real_samples(all_passes(train_script, 50, 50, 1, 1, epoch, epoch + 1, seed))]

    orders = {tuple(epoch_order(seed, epoch)) for seed in range(3) for epoch in range(4)} | {tuple(range(50))}
    assert len(orders) == 13
    assert epoch_order(0, 2) == epoch_order(0, 2)


def test_short_last_batch_is_kept_and_padding_weighs_nothing(train_script):
    passes = all_passes(train_script, 7, 2, 2, 2, 0, 1)  # 8 a step: 4 in the first pass, 3 in the second
    assert [[len(rank) for rank in ranks] for ranks in passes] == [[2, 2], [2, 1]]
    passes = all_passes(train_script, 5, 2, 2, 2, 0, 1)  # the second pass has one sample, the second process none
    assert [[len(rank) for rank in ranks] for ranks in passes] == [[2, 2], [1, 1]]
    assert [weight for _, _, weight in passes[1][1]] == [0.0]
    assert len(set(real_samples(passes))) == 5


# ------------------------------------------------------------------------------------------------------- held-out loss


class OnePixelVAE(StubVAE):
    """Latents (batch, 1, 1, 1) that are the first value of the image."""

    def __init__(self):
        super().__init__(None, None)

    def encode(self, pixel_values):
        mean = pixel_values[:, :1, ::8, ::8]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))


def test_held_out_timesteps_cover_the_range_evenly_and_never_change(train_script):
    def measure(batch_size):
        unet = StubUNet()
        images = sampled(train_script, 40, latent_shape=(1, 1, 1))
        losses = train_script.held_out_losses(
            accelerator, unet, OnePixelVAE(), lambda ids: (ids,), make_scheduler(), images, batch_size
        )
        return losses, torch.cat([timesteps for _, timesteps, _ in unet.calls])

    accelerator = Accelerator(cpu=True)
    losses, timesteps = measure(40)
    parts = train_script.HELD_OUT_TIMESTEPS
    assert losses.shape == (40,)
    assert timesteps.shape == (40 * parts,)
    for part in range(parts):  # each image has one timestep in every part of the range
        column = timesteps[part::parts]
        drawn = [draws(train_script, 0, part, index, (1, 1, 1)).timestep for index in range(40)]
        assert torch.equal(column, (torch.tensor(drawn) + part * 1000) // parts)
        assert column.min() >= part * 1000 // parts
        assert column.max() < (part + 1) * 1000 // parts
        assert column.unique().numel() > 25
    middle = timesteps.float().mean().item()
    assert abs(middle - 499.5) < 5 * 1000 / parts / 12**0.5 / 40**0.5
    again, _ = measure(40)
    in_sevens, _ = measure(7)
    assert torch.equal(losses, again)
    torch.testing.assert_close(losses, in_sevens)
    # The stub predicts 0, so that the loss of an image is the mean square of the numbers that are its noise.
    noise = [[draws(train_script, 0, part, index, (1, 1, 1)).noise for part in range(parts)] for index in range(40)]
    torch.testing.assert_close(losses, torch.tensor(noise).square().mean(dim=1))
