"""The held-out loss is measured at timesteps and with noise that never change, samples are drawn as the flags say and
alike by any number of processes, and a look that is given up leaves nothing."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from copies import run_copies
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from stubs import StubUNet, StubVAE, grey_samples, make_scheduler
from training import draws, parse, read_log, words

import sdtune.validation
from sdtune.checkpoints import Run, Weights
from sdtune.diffusion import diffusion_losses, encode
from sdtune.validation import (
    LookGivenUp,
    check_validation,
    draw_samples,
    encode_held_out,
    held_out_losses,
    prompts_of,
    steps_between_looks,
    validate,
)

PROMPTS = ["a red circle", "a blue square", "a green star"]


class OnePixelVAE(StubVAE):
    """Latents (batch, 1, 1, 1) that are the first value of the image; counts the images that it encodes."""

    def __init__(self):
        super().__init__(torch.zeros(1), torch.zeros(1))
        self.num_images = 0

    def encode(self, pixel_values):
        self.num_images += len(pixel_values)
        mean = pixel_values[:, :1, ::8, ::8]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.full_like(mean, -torch.inf)))


class StubTextEncoder:
    """Gives the tokens themselves, and counts the captions that it encodes."""

    def __init__(self, training=False):
        self.training, self.num_captions = training, 0

    def __call__(self, input_ids):
        self.num_captions += len(input_ids)
        return (input_ids.float(),)


def measure(batch_size, num_looks=1, accelerator=None, text_encoder=None):
    """The losses of 40 held-out images, of a UNet that predicts 0; the timesteps at which they were measured; what
    encoded them."""
    accelerator = accelerator or Accelerator(cpu=True)
    unet, vae, text_encoder = StubUNet(), OnePixelVAE(), text_encoder or StubTextEncoder()
    images = grey_samples(40, latent_shape=(1, 1, 1))
    held_out = encode_held_out(accelerator, vae, text_encoder, images, batch_size)
    for _ in range(num_looks):
        losses = held_out_losses(accelerator, unet, vae, text_encoder, make_scheduler(), held_out, batch_size)
    return losses, torch.cat([timesteps for _, timesteps, _ in unet.calls]), vae, text_encoder


def test_held_out_timesteps_cover_the_range_evenly_and_never_change():
    losses, timesteps, *_ = measure(40)
    parts = 4
    assert losses.shape == (40,)
    assert timesteps.shape == (40 * parts,)
    for part in range(parts):  # each image has one timestep in every part of the range
        column = timesteps[part::parts]
        drawn = [draws(0, part, index, (1, 1, 1)).timestep for index in range(40)]
        assert torch.equal(column, (torch.tensor(drawn) + part * 1000) // parts)
        assert column.min() >= part * 1000 // parts
        assert column.max() < (part + 1) * 1000 // parts
        assert column.unique().numel() > 25
    middle = timesteps.float().mean().item()
    assert abs(middle - 499.5) < 5 * 1000 / parts / 12**0.5 / 40**0.5
    again, *_ = measure(40)
    in_sevens, *_ = measure(7)
    assert torch.equal(losses, again)
    torch.testing.assert_close(losses, in_sevens)
    # The UNet predicts 0, so that the loss of an image is the mean square of the numbers that are its noise.
    noise = [[draws(0, part, index, (1, 1, 1)).noise for part in range(parts)] for index in range(40)]
    torch.testing.assert_close(losses, torch.tensor(noise).square().mean(dim=1))


@pytest.mark.parametrize("num_looks", [1, 3])
def test_held_out_images_and_captions_are_encoded_once(num_looks):
    _, timesteps, vae, text_encoder = measure(7, num_looks)
    assert len(timesteps) == num_looks * 40 * 4
    assert vae.num_images == 40
    assert text_encoder.num_captions == 40
    # A text encoder that is trained is another one at every look.
    _, _, vae, text_encoder = measure(7, num_looks, text_encoder=StubTextEncoder(training=True))
    assert vae.num_images == 40
    assert text_encoder.num_captions == num_looks * 40


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    """The tiny pipeline, frozen."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


@pytest.fixture
def loaded(train_script, pipeline, tiny_pipeline, image_folder, tmp_path):
    """(training images, held-out images) of a folder of seven."""
    args, _ = train_script.parse_flags(
        train_script.make_parser(), words(tiny_pipeline, image_folder(7), tmp_path, num_validation_samples=3), {}
    )
    images, held_out, _ = train_script.load_data(args, args.train_data_dir)
    return images, held_out


@pytest.mark.parametrize("batch_size", [2, 12])
def test_losses_of_what_was_encoded_once_are_those_of_encoding_every_time(loaded, pipeline, batch_size):
    """To the rounding of batches of another size."""
    images = loaded[1]
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    accelerator, unet, vae, text_encoder = Accelerator(cpu=True), pipeline.unet, pipeline.vae, pipeline.text_encoder
    expected = []
    for index in range(3):
        for part in range(4):
            (batch,) = torch.utils.data.DataLoader(images, 1, sampler=[(part, index, 1.0)])
            batch["timestep"] = (batch["timestep"] + part * 1000) // 4
            with torch.no_grad():
                prompt_embeds = text_encoder(batch["input_ids"])[0]
                expected.append(diffusion_losses(unet, noise_scheduler, encode(vae, batch), prompt_embeds, batch))
    held_out = encode_held_out(accelerator, vae, text_encoder, images, batch_size)
    losses = held_out_losses(accelerator, unet, vae, text_encoder, noise_scheduler, held_out, batch_size)
    torch.testing.assert_close(losses, torch.cat(expected).reshape(3, 4).mean(1), rtol=1e-5, atol=0)


# ---- samples


def drawing(*words_):
    """The flags of a run at 32 x 32 pixels that draws in two steps, unless the words say otherwise."""
    return parse("--resolution=32", "--seed=5", "--validation_num_inference_steps=2", *words_)


def drawn_alone(pipeline, prompt, seed, kind=DPMSolverMultistepScheduler, steps=2, scale=7.5, negative_prompt=None):
    """What a user's own code draws, pixels (32, 32, 3)."""
    parts = {**pipeline.components, "scheduler": kind.from_config(pipeline.scheduler.config)}
    own = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    image = own(
        prompt,
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=scale,
        negative_prompt=negative_prompt,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.array(image, int)


SAMPLERS = [  # flags, and what they mean
    ([], {}),
    (["--validation_num_inference_steps=3", "--validation_guidance_scale=2"], {"steps": 3, "scale": 2.0}),
    (["--validation_guidance_scale=1"], {"scale": 1.0}),
    (["--validation_negative_prompt=a yellow body"], {"negative_prompt": "a yellow body"}),
    (["--validation_scheduler=DDPMScheduler"], {"kind": DDPMScheduler}),
]


@pytest.mark.parametrize("flags, meaning", SAMPLERS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_samples_are_drawn_as_the_flags_say(pipeline, flags, meaning, batch_size):
    """Each from a seed of its own, whatever shares its batch; one level of 255 is rounding."""
    args = drawing(f"--train_batch_size={batch_size}", *flags)
    parts = {**pipeline.components, "scheduler": DDPMScheduler.from_config(pipeline.scheduler.config)}
    images = draw_samples(args, Accelerator(cpu=True), parts, PROMPTS, lambda: False)
    expected = [drawn_alone(pipeline, prompt, 5 + number, **meaning) for number, prompt in enumerate(PROMPTS)]
    for image, alone in zip(images, expected, strict=True):
        assert np.abs(np.array(image, int) - alone).max() <= 1
    others = [drawn_alone(pipeline, prompt, 6 + number, **meaning) for number, prompt in enumerate(PROMPTS)]
    assert np.abs(np.array(images[0], int) - others[0]).max() > 8  # another seed shows


def test_defaults_are_those_of_diffusers(pipeline, monkeypatch):
    asked = []

    def call(self, prompts, **settings):
        asked.append({"prompts": prompts, "scheduler": type(self.scheduler), **settings})
        return SimpleNamespace(images=[Image.new("RGB", (32, 32))] * len(prompts))

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    parts = {**pipeline.components, "scheduler": DDPMScheduler.from_config(pipeline.scheduler.config)}
    args = parse("--resolution=32", "--train_batch_size=2")
    assert len(draw_samples(args, Accelerator(cpu=True), parts, PROMPTS, lambda: False)) == 3
    assert [call["prompts"] for call in asked] == [PROMPTS[:2], PROMPTS[2:]]
    for call in asked:
        assert (call["num_inference_steps"], call["guidance_scale"], call["negative_prompt"]) == (25, 7.5, None)
        assert call["scheduler"] is DPMSolverMultistepScheduler


PROMPT_FLAGS = [  # flags, the prompt of each sample
    ([], []),
    (["--validation_prompt=a"], ["a"] * 4),
    (["--validation_prompt=a", "--num_validation_images=2"], ["a", "a"]),
    (["--validation_prompt=a", "--num_validation_images=0"], []),
    (["--validation_prompt="], [""] * 4),
    (["--validation_prompts", "a", "b"], ["a", "b"]),
    (["--validation_prompts", "a", "b", "--num_validation_images=2"], ["a", "a", "b", "b"]),
    (["--validation_prompts", "a", "b", "--num_validation_images=0"], []),
    (["--validation_prompts", "a", "--validation_prompt=c", "--num_validation_images=1"], ["a", "c"]),
]


@pytest.mark.parametrize("flags, prompts", PROMPT_FLAGS)
def test_prompts_of_samples(flags, prompts):
    assert prompts_of(parse(*flags)) == prompts


@pytest.mark.parametrize("flags, steps", [([], 500), (["--validation_steps=7"], 7), (["--validation_epochs=3"], 12)])
def test_how_often_a_run_is_looked_at(flags, steps):
    assert steps_between_looks(parse(*flags), SimpleNamespace(steps_per_epoch=4)) == steps


# ---- two processes


def gathered_by_hand(monkeypatch, look, number=2):
    """What each of so many processes gets from `look(accelerator)`, which they do one after the other: the first time
    to see what each has to give, then with all of that."""
    given = {"reduce": [], "gather": []}

    def share(rank, answers):
        def reduce(tensor, *_):
            given["reduce"].append(tensor)
            return answers["reduce"] if answers else tensor

        def gather(things):
            given["gather"].append(things)
            return answers["gather"] if answers else things

        monkeypatch.setattr(sdtune.validation, "gather_object", gather)
        plain = Accelerator(cpu=True)
        return SimpleNamespace(
            process_index=rank,
            num_processes=number,
            is_fsdp2=False,
            device=plain.device,
            autocast=plain.autocast,
            reduce=reduce,
            wait_for_everyone=lambda: None,
        )

    def outcome(rank, answers):
        try:
            return look(share(rank, answers))
        except LookGivenUp:
            return "given up"

    for rank in range(number):
        with contextlib.suppress(KeyError):  # samples that only the other one has
            outcome(rank, None)
    answers = {
        "reduce": torch.stack(given["reduce"]).sum(0) if given["reduce"] else None,
        "gather": [thing for things in given["gather"] for thing in things],
    }
    return [outcome(rank, answers) for rank in range(number)]


def test_samples_shared_out_are_all_there_in_order(pipeline, monkeypatch):
    args = drawing("--train_batch_size=2")
    parts = {**pipeline.components, "scheduler": DDPMScheduler.from_config(pipeline.scheduler.config)}

    def look(accelerator):
        return draw_samples(args, accelerator, parts, PROMPTS, lambda: False)

    for images in gathered_by_hand(monkeypatch, look):
        for number, image in enumerate(images):
            alone = drawn_alone(pipeline, PROMPTS[number], 5 + number)
            assert np.abs(np.array(image, int) - alone).max() <= 1


def test_losses_shared_out_are_those_of_one_process(monkeypatch):
    alone, *_ = measure(7)
    for losses, _, vae, text_encoder in gathered_by_hand(monkeypatch, lambda accelerator: measure(7, 1, accelerator)):
        torch.testing.assert_close(losses, alone)
        assert vae.num_images == text_encoder.num_captions == 20  # its share alone


def test_two_processes_look_as_one(train_script, pipeline, tiny_pipeline, image_folder, tmp_path):
    """Five samples and three held-out images: neither has an even share."""
    settings = {
        "max_train_steps": 1,
        "learning_rate": 1e-8,
        "num_validation_samples": 3,
        "validation_prompt": "a red circle",
        "num_validation_images": 5,
        "validation_num_inference_steps": 2,
    }
    images, pictures, rows = image_folder(7), [], []
    for number, batch_size in ((1, 2), (2, 1)):
        output = tmp_path / f"of_{number}"
        line = words(tiny_pipeline, images, output, train_batch_size=batch_size, **settings)
        assert run_copies(train_script, line, tmp_path / "said", number) == [0] * number, said_in(tmp_path)
        pictures.append(np.array(Image.open(output / "samples" / "step-000000.png"), int))
        rows.append([row for row in read_log(output) if "held_out_loss" in row])
    assert pictures[0].shape == (64, 128, 3)  # a row of four, and one of one
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.all(pictures[0][32:, 32:] == 255)
    assert np.ptp(pictures[0][32:, :32]) > 20
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [0, 1]
    for one, two in zip(*rows, strict=True):
        assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-5)


def said_in(folder):
    return (folder / "said").read_text()


# ---- a look that is given up


class Stop:
    """Says no so many times, and yes from then on."""

    def __init__(self, after):
        self.after, self.num_asked = after, 0

    def __call__(self):
        self.num_asked += 1
        return self.num_asked > self.after


@pytest.fixture
def look(pipeline, loaded, tmp_path):
    """look(stop_asked) -> the held-out loss that `validate` returned. The average is not what is trained."""
    parts = {**pipeline.components, "scheduler": DDPMScheduler.from_config(pipeline.scheduler.config)}
    accelerator = Accelerator(cpu=True)
    args = drawing("--train_batch_size=2", "--validation_prompts", *PROMPTS)
    parameters = list(pipeline.unet.parameters())
    ema = EMAModel([parameter * 0.5 for parameter in parameters])
    progress = {"global_step": 3, "base_losses": None, "losses": []}
    counts = SimpleNamespace(last_step=4)
    run = Run(tmp_path / "out", {}, progress, {"ema": ema}, counts, Weights({}, {}, parameters, None, None, {}))
    run.output_dir.mkdir()
    held_out = encode_held_out(accelerator, parts["vae"], parts["text_encoder"], loaded[1], 2)

    def validate_and_check(stop_asked):
        before = [parameter.clone() for parameter in parameters]
        try:
            loss = validate(args, accelerator, run, parts, held_out, PROMPTS, stop_asked)
        finally:
            assert all(map(torch.equal, parameters, before))
        assert run.progress["base_losses"] is None or loss
        return loss

    yield validate_and_check
    pipeline.unet.eval()


@pytest.mark.parametrize("after", [0, 3, 6, 7, 9, 11])
def test_a_look_that_is_given_up_leaves_nothing(look, tmp_path, after):
    """Before the first batch of losses, between them, before the samples, in the first and last denoising step."""
    stop = Stop(after)
    with pytest.raises(LookGivenUp):
        look(stop)
    assert list((tmp_path / "out").iterdir()) == []
    assert stop.num_asked <= after + 3  # it ends soon
    # Six batches of losses; two of samples, of two steps each; and what is asked at the end.
    never = Stop(math.inf)
    loss = look(never)
    assert never.num_asked == 6 + 2 * (1 + 2) + 1
    assert (tmp_path / "out" / "samples" / "step-000003.png").exists()
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert (row["step"], row["held_out_loss"]) == (3, loss)


def test_weights_are_put_back_after_an_error(look, monkeypatch):
    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(sdtune.validation, "draw_samples", fail)
    with pytest.raises(OSError, match="disk"):
        look(lambda: False)


def test_all_processes_give_up_if_one_is_stopped(pipeline, monkeypatch):
    """The other one does its share, and waits for nothing that the first one skips."""
    args = drawing("--train_batch_size=1")
    parts = {**pipeline.components, "scheduler": DDPMScheduler.from_config(pipeline.scheduler.config)}

    def draw(accelerator):
        return draw_samples(args, accelerator, parts, PROMPTS, lambda: accelerator.process_index == 1)

    def measure_losses(accelerator):
        unet, vae, text_encoder = StubUNet(), OnePixelVAE(), StubTextEncoder()
        held_out = encode_held_out(accelerator, vae, text_encoder, grey_samples(5, latent_shape=(1, 1, 1)), 2)
        others = (accelerator, unet, vae, text_encoder, make_scheduler(), held_out, 2)
        return held_out_losses(*others, lambda: accelerator.process_index == 1)

    assert gathered_by_hand(monkeypatch, draw) == ["given up", "given up"]
    assert gathered_by_hand(monkeypatch, measure_losses) == ["given up", "given up"]


@pytest.mark.parametrize("stopped, done", [({1}, False), ({0}, False), (set(), True)])
def test_two_real_processes_end_a_look_together(pipeline, loaded, tmp_path, stopped, done):
    """One of them is stopped when the samples are due; neither hangs, and nothing is written."""
    parts = {**pipeline.components, "scheduler": DDPMScheduler.from_config(pipeline.scheduler.config)}
    output_dir = tmp_path / "out"
    output_dir.mkdir()

    def main(_):
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        held_out = encode_held_out(accelerator, parts["vae"], parts["text_encoder"], loaded[1], 4)
        counts = SimpleNamespace(last_step=4)
        run = Run(output_dir, {}, {"global_step": 3, "base_losses": None, "losses": []}, {}, counts)
        run.weights = Weights({}, {}, [], None, None, {})
        stop = Stop(2) if accelerator.process_index in stopped else Stop(math.inf)
        look = (drawing("--train_batch_size=4"), accelerator, run, parts, held_out, PROMPTS, stop)
        try:
            validate(*look)
            outcome = "True"
        except LookGivenUp:
            outcome = "False"
        (tmp_path / f"rank_{accelerator.process_index}").write_text(outcome)

    assert run_copies(SimpleNamespace(main=main), [], tmp_path / "said", seconds=60) == [0, 0], said_in(tmp_path)
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in range(2)] == [str(done)] * 2
    assert sorted(path.name for path in output_dir.iterdir()) == (["log.jsonl", "samples"] if done else [])


# ---- flags


def test_a_rhythm_needs_something_to_look_at():
    needed = "--validation_prompt, --validation_prompts or --num_validation_samples"
    for flag in ("--validation_steps=2", "--validation_epochs=3"):
        assert check_validation(parse(flag)) == [f"{flag}: does nothing without {needed}; add that or drop this"]
        for more in (["--validation_prompts", "a"], ["--num_validation_samples=1"], ["--validation_prompt=a"]):
            assert check_validation(parse(flag, *more)) == []
    assert check_validation(parse()) == []


def test_settings_of_samples_need_a_prompt():
    for flag in ("--validation_guidance_scale=2.0", "--num_validation_images=0", "--validation_negative_prompt=a"):
        needed = "--validation_prompt or --validation_prompts"
        assert check_validation(parse(flag)) == [f"{flag}: does nothing without {needed}; add that or drop this"]
        assert check_validation(parse(flag, "--validation_prompt=a")) == []


def test_validation_flags_that_contradict_each_other():
    (problem,) = check_validation(parse("--validation_steps=2", "--validation_epochs=3", "--validation_prompt=a"))
    assert problem == "--validation_epochs=3: contradicts --validation_steps=2; drop one"
    flags = ["--validation_prompt=a", "--validation_guidance_scale=1", "--validation_negative_prompt=b"]
    (problem,) = check_validation(parse(*flags))
    assert problem == "--validation_negative_prompt=b: does nothing under --validation_guidance_scale=1; drop one"
