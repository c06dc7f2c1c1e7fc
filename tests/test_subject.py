"""Prior preservation: a pass has a class image for every photo, and its loss is the papers' sum of two means."""

import itertools
import math

import numpy as np
import pytest
import torch
from closed_forms import hand_computed, min_snr_weights
from image_data import write_image_folder
from stubs import StubUNet, make_scheduler

from sdtune.batches import StepCounts, micro_batches
from sdtune.diffusion import diffusion_losses
from sdtune.subject import has_captions, with_classes


def passes_of(num_instances, batch_size=1, num_processes=1, accumulation=1, steps=6):
    """The passes of all processes, [process][pass], without class images: lists of (epoch, index, weight)."""
    per_pass = batch_size * num_processes
    per_step = per_pass * accumulation
    counts = StepCounts(
        num_images=num_instances,
        samples_per_pass=per_pass,
        samples_per_step=per_step,
        steps_per_epoch=math.ceil(num_instances / per_step),
        last_step=steps,
    )
    return [list(micro_batches(counts, num_processes, process, 0, 0)) for process in range(num_processes)]


def passes_with_classes(num_instances, num_classes, weight, **layout):
    """The same with class images."""
    processes = passes_of(num_instances, **layout)
    return [list(with_classes(passes, num_instances, num_classes, weight, 0)) for passes in processes]


def halves(batch):
    """The instances of a pass and their class images."""
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]


class EchoUNet(StubUNet):
    """Answers the embedding of each sample (batch,)."""

    def __call__(self, noisy_latents, timesteps, prompt_embeds):
        self.answer = prompt_embeds.reshape(-1, 1, 1, 1)
        return super().__call__(noisy_latents, timesteps, prompt_embeds)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("num_processes, accumulation", [(1, 1), (1, 2), (2, 2)])
def test_loss_of_a_step_is_instance_mean_plus_weighted_class_mean(
    prediction_type, snr_gamma, batch_size, num_processes, accumulation
):
    """Seven instances, which end most epochs with a short step, and four class images. The UNet answers 0.5 for an
    instance and -4 for a class image."""
    num_instances, weight = 7, 0.3
    answers = torch.tensor([0.5, -4.0])
    scheduler = make_scheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(11, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.randint(1000, (11,), generator=generator)

    def loss_of_pass(batch):
        index, weights = torch.tensor([item[1] for item in batch]), torch.tensor([item[2] for item in batch])
        prompt_embeds = answers[(index >= num_instances).long()]
        sample = {"noise": noise[index], "added_noise": noise[index], "timestep": timesteps[index]}
        found = diffusion_losses(EchoUNet(), scheduler, latents[index], prompt_embeds, sample, snr_gamma)
        return float((found * weights).sum())

    def losses_by_hand(answer):
        losses = hand_computed(prediction_type, answer, latents, noise, timesteps)
        return losses * min_snr_weights(prediction_type, timesteps.numpy(), snr_gamma) if snr_gamma else losses

    as_instance, as_class = losses_by_hand(answers[0]), losses_by_hand(answers[1])  # of each of the 11 images
    layout = {"batch_size": batch_size, "num_processes": num_processes, "accumulation": accumulation}
    processes = [iter(passes) for passes in passes_with_classes(num_instances, 4, weight, **layout)]
    per_step = batch_size * num_processes * accumulation
    steps_per_epoch = math.ceil(num_instances / per_step)
    for step in range(6):
        in_step = min(per_step, num_instances - step % steps_per_epoch * per_step)
        num_passes = math.ceil(in_step / (batch_size * num_processes))
        batches = [next(passes) for _ in range(num_passes) for passes in processes]
        total = sum(map(loss_of_pass, batches))
        real = [index for batch in batches for _, index, sample_weight in batch if sample_weight]
        instances = [index for index in real if index < num_instances]
        classes = [index for index in real if index >= num_instances]
        assert len(instances) == len(classes) == in_step
        mean, class_mean = as_instance[instances].mean(), as_class[classes].mean()
        assert total == pytest.approx(mean + weight * class_mean, rel=2e-4)
        assert total != pytest.approx(weight * mean + class_mean, rel=1e-2)
        # Nor are the captions swapped.
        mean, class_mean = as_class[instances].mean(), as_instance[classes].mean()
        assert total != pytest.approx(mean + weight * class_mean, rel=1e-2)


@pytest.mark.parametrize("weight, factor", [(None, 1.0), (0.0, 0.0), (2.5, 2.5)])
def test_weights_of_a_pass_stand_in_the_order_of_its_samples(weight, factor):
    """First the instances, then as many class images; of a process without a sample neither counts."""
    for passes in passes_with_classes(3, 5, weight, batch_size=2, num_processes=2, steps=4):
        for batch in passes:
            instances, classes = halves(batch)
            assert len(instances) == len(classes)
            assert all(index < 3 for _, index, _ in instances)
            assert all(index >= 3 for _, index, _ in classes)
            assert [item[2] for item in classes] == [item[2] * factor for item in instances]


@pytest.mark.parametrize("num_classes", [1, 4, 11])
def test_class_images_of_a_bucket_stand_behind_those_of_the_one_before(num_classes):
    """Row 7 + b k + n is class image n of k in bucket b; which one it is, and when, does not depend on buckets."""
    buckets = np.array([0, 2, 1, 1, 0, 2, 2])
    (passes,) = passes_of(7, batch_size=2, steps=12)
    (plain,) = passes_with_classes(7, num_classes, 0.5, batch_size=2, steps=12)
    found = list(with_classes(passes, 7, num_classes, 0.5, 0, buckets))
    for batch, plain_batch in zip(found, plain, strict=True):
        instances, classes = halves(batch)
        plain_instances, plain_classes = halves(plain_batch)
        assert instances == plain_instances
        shifted = []
        for (_, instance, _), (turn, index, weight) in zip(instances, plain_classes, strict=True):
            shifted.append((turn, index + num_classes * int(buckets[instance]), weight))
        assert classes == shifted


def test_without_class_images_a_pass_is_as_it_was():
    assert passes_with_classes(3, 0, 2.5, batch_size=2, steps=4) == passes_of(3, batch_size=2, steps=4)


@pytest.mark.parametrize("num_instances, num_classes", [(3, 7), (7, 3), (5, 5), (1, 4)])
def test_class_images_are_used_evenly(num_instances, num_classes):
    """As many epochs as there are class images use each of them as often as there are instances: once a turn."""
    (passes,) = passes_with_classes(num_instances, num_classes, 1.0, steps=num_instances * num_classes)
    used = [(turn, index) for batch in passes for turn, index, _ in batch[1:]]
    every = itertools.product(range(num_instances), range(num_instances, num_instances + num_classes))
    assert sorted(used) == sorted(every)
    orders = {tuple(index for turn, index in used if turn == number) for number in range(num_instances)}
    assert len(orders) > 1 or num_instances == 1


def test_class_images_do_not_depend_on_the_processes():
    partners = []
    for batch_size, num_processes, accumulation in ((6, 1, 1), (3, 2, 1), (2, 3, 1), (1, 2, 3)):
        layout = {"batch_size": batch_size, "num_processes": num_processes, "accumulation": accumulation}
        found = {}
        for passes in passes_with_classes(7, 4, 1.0, **layout, steps=8):
            for instance, partner in itertools.chain.from_iterable(zip(*halves(batch)) for batch in passes):
                if instance[2]:
                    found[instance[:2]] = partner[:2]
        partners.append(found)
    assert len(partners[0]) == 28
    assert all(found == partners[0] for found in partners)


def test_class_images_of_an_epoch_are_drawn_by_its_place():
    """From the definition alone: the n-th instance since the start takes place n % 4 of permutation n // 4, of the
    stream of random numbers 5."""
    (passes,) = passes_with_classes(3, 4, 1.0, steps=9)
    for number, ((epoch, index, _), (turn, partner, _)) in enumerate(passes):
        place = epoch * 3 + index
        order = np.random.default_rng((0, 5, place // 4)).permutation(4)
        assert turn == place // 4, number
        assert partner == 3 + order[place % 4], number


def test_captions_in_hidden_folders_are_none(tmp_path):
    """Neither those of a repository's history nor a cache's."""
    write_image_folder(tmp_path / ".cache")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.png").touch()
    (tmp_path / ".git" / "a.txt").touch()
    assert not has_captions(tmp_path)
    assert has_captions(tmp_path / ".cache")
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").touch()
    assert has_captions(tmp_path)


@pytest.mark.parametrize("name, found", [("a.TXT", True), ("a.txt", True), ("b.txt", False), (".a.txt", False)])
def test_captions_beside_photos_are_found_whatever_the_case_of_their_ending(name, found, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / name).write_text("a dog")
    assert has_captions(tmp_path) == found
