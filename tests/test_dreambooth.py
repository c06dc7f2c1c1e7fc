"""train_dreambooth.py and train_dreambooth_lora.py: what they train on, class images, what is trained, exact resume,
two processes, bad input."""

import itertools
import json
import shutil
import signal
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from copies import run_copies
from diffusers import DDPMScheduler, StableDiffusionPipeline
from image_data import caption_of, make_image, snapshot, write_metadata
from PIL import Image
from running import REPO, TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA
from safetensors.torch import load_file
from test_lora_layouts import draw, largest_difference, load, merged, with_lora
from test_training import encode_by_hand
from training import checkpoint_state, draws, losses, read_log, same, text_encoder, train, unet, words

from sdtune.digests import write_digests
from sdtune.lora_layouts import LORA_FILE

PROMPT = "a photo of sks star"
CLASS_PROMPT = "a picture of a star"
# All that is random or has a state. 5 photos, twice each, make epochs of 3 steps of at most 4.
EVERYTHING = {
    "max_train_steps": 8,
    "checkpointing_steps": 4,
    "gradient_accumulation_steps": 2,
    "repeats": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "caption_dropout": 0.3,
    "random_flip": True,
    "snr_gamma": 5,
    "train_text_encoder": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "prior_loss_weight": 0.5,
    "sample_batch_size": 1,
}


@pytest.fixture(scope="module", params=[TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA], ids=["full", "lora"])
def script(request):
    """Both scripts as modules, one after the other."""
    return load_script(request.param)


@pytest.fixture(scope="module")
def trains_lora(script):
    """Whether the script trains adapters."""
    return "lora" in script.__name__


def write_images(folder, numbers, size=(32, 32)):
    """Writes make_image(number) to number.png for each, without captions; returns the folder."""
    folder.mkdir(parents=True)
    for number in numbers:
        make_image(number, size).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five photos larger than the resolution and not square, so that crops are random."""
    return write_images(tmp_path_factory.mktemp("data") / "photos", range(5), (48, 40))


@pytest.fixture
def fit(script, tiny_pipeline, photos, tmp_path):
    """Runs the script for a step on the tiny pipeline and the photos, with class images if there is a folder for them;
    returns its exit status."""

    def run(output="out", base=tiny_pipeline, classes=None, **settings):
        preservation = {
            "with_prior_preservation": True,
            "class_data_dir": classes,
            "class_prompt": CLASS_PROMPT,
            "num_class_images": 2,
            "sample_batch_size": 1,
        }
        settings = {
            "instance_data_dir": photos,
            "instance_prompt": PROMPT,
            "max_train_steps": 1,
            **(preservation if classes else {}),
            **settings,
        }
        return train(script, base, None, tmp_path / output, **settings)

    return run


@pytest.fixture
def refused(script, fit, tmp_path, monkeypatch, capsys):
    """Runs the script on bad input, which it shall refuse in one short text before a model loads; returns the text."""

    def run(**settings):
        before = snapshot(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(script, "load_base", None)
            assert fit(**settings) == 2
        text = capsys.readouterr().err
        assert text.startswith(f"{script.__name__}.py: ")
        assert len(text.splitlines()) <= 12
        assert snapshot(tmp_path) == before
        assert not (tmp_path / "out").exists()
        return text

    return run


@pytest.fixture
def trained_on(script, monkeypatch):
    """A list of the samples that the runs that follow train on, with the caption of each."""
    seen, get = [], script.CaptionedImages.__getitem__

    def noted(self, item):
        sample = get(self, item)
        caption = self.tokenizer.decode(sample["input_ids"], skip_special_tokens=True).strip()
        seen.append({**sample, "caption": caption})
        return sample

    monkeypatch.setattr(script.CaptionedImages, "__getitem__", noted)
    return seen


@pytest.fixture
def quick_drawing(monkeypatch):
    """Class images without a model: one grey each, by its seed. The list that it gives will say of each call whether
    UNet and text encoder were in training."""
    calls = []

    def call(self, prompts, generator, **settings):
        calls.append((self.unet.training, self.text_encoder.training))
        greys = [one.initial_seed() % 256 for one in generator]
        return SimpleNamespace(images=[Image.new("RGB", (32, 32), (grey, grey, grey)) for grey in greys])

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    return calls


def result(folder):
    """All weights that a run has written, by file and name."""
    return {path.relative_to(folder).as_posix(): load_file(path) for path in folder.rglob("*.safetensors")}


def plan_in(said):
    """The plan in what a run said, with its rows."""
    return said.split("Plan\n", 1)[1].split("\nStep ", 1)[0]


def unbroken(said):
    """A text in one line: those of a plan are broken by the length of paths."""
    return " ".join(said.split())


def contents(folder):
    """SHA-256 of the files in a folder, by name."""
    return {name: digest for name, (_, _, digest) in snapshot(folder).items()}


# ----------------------------------------------------------------------------------------------- what is trained on


@pytest.mark.parametrize("prediction_type, snr_gamma", itertools.product(["epsilon", "v_prediction"], [None, 1.0]))
def test_first_loss_by_hand(fit, tiny_pipeline, tiny_pipeline_v, tmp_path, prediction_type, snr_gamma):
    """Two photos and two class images in the first step: the loss from the papers' formulas and the base's weights."""
    predicts_v = prediction_type == "v_prediction"
    base = tiny_pipeline_v if predicts_v else tiny_pipeline
    pipeline, weight = StableDiffusionPipeline.from_pretrained(base), 0.3
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    @torch.no_grad()
    def one_loss(picture, caption, index):
        drawn = draws(seed=0, epoch=0, index=index)
        latents, embeddings = encode_by_hand(pipeline, make_image(picture), caption, drawn.posterior_noise)
        a, noise = scheduler.alphas_cumprod[drawn.timestep], drawn.noise
        predicted = pipeline.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, drawn.timestep, embeddings).sample
        target = a.sqrt() * noise - (1 - a).sqrt() * latents if predicts_v else noise[None]
        loss = F.mse_loss(predicted, target).item()
        if snr_gamma is None:
            return loss
        snr = (a / (1 - a)).item()
        return loss * min(snr, snr_gamma) / (snr + 1 if predicts_v else snr)

    def means(prompt, class_prompt):
        """Of photos, which are pictures 0 and 1, and of class images, which are 10 and 11 and stand behind them."""
        photos = [one_loss(picture, prompt, index) for picture, index in ((0, 0), (1, 1))]
        classes = [one_loss(picture, class_prompt, index) for picture, index in ((10, 2), (11, 3))]
        return np.mean(photos), np.mean(classes)

    photos, classes = write_images(tmp_path / "two", [0, 1]), write_images(tmp_path / "classes", [10, 11])
    settings = {"prior_loss_weight": weight, "snr_gamma": snr_gamma}
    assert fit(base=base, instance_data_dir=photos, classes=classes, **settings) == 0
    (loss,) = losses(tmp_path / "out")
    mean, class_mean = means(PROMPT, CLASS_PROMPT)
    assert loss == pytest.approx(mean + weight * class_mean, rel=1e-5)
    assert loss != pytest.approx(weight * mean + class_mean, rel=1e-4)
    mean, class_mean = means(CLASS_PROMPT, PROMPT)
    assert loss != pytest.approx(mean + weight * class_mean, rel=1e-4)


def test_captions_of_a_pass_go_with_their_images(fit, trained_on, tmp_path):
    photos, classes = write_images(tmp_path / "two", [0, 1]), write_images(tmp_path / "classes", [10, 11])
    assert fit(classes=classes, instance_data_dir=photos) == 0
    pictures = [make_image(0), make_image(1), make_image(10), make_image(11)]
    captions = [PROMPT, PROMPT, CLASS_PROMPT, CLASS_PROMPT]
    assert sorted(sample["index"] for sample in trained_on) == [0, 1, 2, 3]
    for sample in trained_on:
        picture = np.asarray(pictures[sample["index"]]).transpose(2, 0, 1)
        assert np.array_equal(sample["pixel_values"], picture)
        assert sample["caption"] == captions[sample["index"]]


def test_repeats_are_samples_of_their_own(fit, tmp_path, trained_on, capsys):
    settings = {"repeats": 3, "train_batch_size": 4, "max_train_steps": None, "num_train_epochs": 1}
    assert fit(**settings) == 0
    assert "15 to train on" in capsys.readouterr().out
    assert len(losses(tmp_path / "out")) == 4
    by_index = sorted(trained_on, key=lambda sample: sample["index"])
    assert [sample["index"] for sample in by_index] == list(range(15))
    assert len({sample["noise"].tobytes() for sample in by_index}) == 15
    for photo in range(5):
        crops = {sample["pixel_values"].tobytes() for sample in by_index[3 * photo :][:3]}
        assert len(crops) > 1


def test_instances_and_class_images_have_noise_of_their_own(fit, tmp_path, trained_on):
    assert fit(classes=write_images(tmp_path / "classes", [10, 11]), train_batch_size=5) == 0
    noises = {sample["noise"].tobytes() for sample in trained_on}
    turns = {(sample["epoch"], sample["index"]) for sample in trained_on}
    assert len(trained_on) == len(noises) == len(turns) == 10


def test_a_caption_of_its_own_wins_over_the_prompt(fit, tmp_path, trained_on):
    """From metadata and from a .txt; --instance_prompt is for photos without, also where theirs is empty."""
    photos = write_images(tmp_path / "photos", range(5))
    write_metadata(photos, [{"file_name": "0.png", "text": caption_of(0)}, {"file_name": "1.png", "text": ""}])
    (photos / "2.txt").write_text(caption_of(2))
    (photos / "3.txt").write_text("")
    assert fit(instance_data_dir=photos, train_batch_size=5) == 0
    captions = {sample["index"]: sample["caption"] for sample in trained_on}
    assert captions == {0: caption_of(0), 1: PROMPT, 2: caption_of(2), 3: PROMPT, 4: PROMPT}


def test_captions_alone_are_enough(fit, tmp_path, trained_on):
    photos = write_images(tmp_path / "photos", [0])
    (photos / "0.txt").write_text(caption_of(0))
    assert fit(instance_data_dir=photos, instance_prompt=None) == 0
    assert {sample["caption"] for sample in trained_on} == {caption_of(0)}
    assert "instance_prompt:" not in (tmp_path / "out" / "README.md").read_text()


def test_a_dataset_without_captions_takes_the_prompt(fit, photos, tmp_path, trained_on):
    files = sorted(photos.glob("*.png"))
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in files]
    (tmp_path / "dataset").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "dataset" / "train.parquet")
    assert fit(instance_data_dir=None, dataset_name=tmp_path / "dataset") == 0
    assert {sample["caption"] for sample in trained_on} == {PROMPT}


def test_other_files_are_ignored_and_said(fit, tmp_path, trained_on, capsys):
    photos = write_images(tmp_path / "photos", [0, 1])
    (photos / "README.md").write_text("My dog.")
    (photos / ".DS_Store").write_bytes(bytes(range(256)))
    before = snapshot(photos)
    assert fit(instance_data_dir=photos) == 0
    told = f"Left aside in {photos}: 1 file of other kinds, such as README.md."
    assert told in " ".join(capsys.readouterr().out.split())  # lines are broken by the length of the path
    assert len(trained_on) == 2
    assert snapshot(photos) == before


# ------------------------------------------------------------------------------------------------------ class images


def test_interrupted_class_images_go_on(script, fit, quick_drawing, tmp_path, monkeypatch, capsys):
    """Stopped while the third is written: the first two stay as they are, and all equal those of a straight run."""
    straight, classes, save = tmp_path / "straight", tmp_path / "classes", Image.Image.save

    def save_two(image, path, *words, **options):
        if len(list(classes.glob("class-*.png"))) == 2:
            path.write_bytes(b"half of a picture")
            raise KeyboardInterrupt
        save(image, path, *words, **options)

    assert fit("out_straight", classes=straight, num_class_images=4) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_two)
        assert fit(classes=classes, num_class_images=4) == 128 + signal.SIGINT
    assert f"{script.__name__}.py: stopped by SIGINT\n" in capsys.readouterr().err
    first = {name: found for name, found in snapshot(classes).items() if name.startswith("class-")}
    assert sorted(first) == ["class-00000.png", "class-00001.png"]
    assert not (tmp_path / "out").exists()
    assert fit(classes=classes, num_class_images=4) == 0
    assert {name: found for name, found in snapshot(classes).items() if name in first} == first
    assert contents(classes) == contents(straight)
    assert sorted(contents(classes)) == [f"class-{number:05d}.png" for number in range(4)]
    assert len(set(contents(classes).values())) == 4
    assert same(result(tmp_path / "out"), result(tmp_path / "out_straight"))


def test_one_that_is_missing_is_made_again_alone(fit, tmp_path, quick_drawing, capsys):
    classes = tmp_path / "classes"
    assert fit(classes=classes, num_class_images=5, sample_batch_size=2) == 0
    assert len(quick_drawing) == 3
    before = snapshot(classes)
    (classes / "class-00003.png").unlink()
    assert fit("again", classes=classes, num_class_images=5) == 0
    after = snapshot(classes)
    assert len(quick_drawing) == 4
    digests = [found.pop("class-00003.png")[2] for found in (before, after)]
    assert digests[0] == digests[1]
    assert after == before
    assert fit("third", classes=classes, num_class_images=5, dry_run=True) == 0
    assert f"Class images in {classes}: 0 to be drawn" in unbroken(plan_in(capsys.readouterr().out))


def test_own_class_images_are_kept_and_count(fit, tmp_path, quick_drawing, trained_on, capsys):
    classes = write_images(tmp_path / "classes", [10, 11])
    write_images(classes / "more", [12])
    before = snapshot(classes)
    assert fit(classes=classes, num_class_images=5, train_batch_size=5) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Class images in {classes}: 2 to be drawn, for 5 at least")
    plan = unbroken(plan_in(said))
    assert f" data Class images in {classes}: 0 to be drawn, for 5 at least; a pass has one per photo" in plan
    assert "2 to be drawn" not in plan
    after = snapshot(classes)
    assert after.keys() - before.keys() == {"class-00000.png", "class-00001.png"}
    assert all(after[name] == before[name] for name in before)
    trained = sorted(sample["index"] for sample in trained_on)
    assert trained == list(range(10))  # five photos, and all five of the class


def test_no_caption_of_ones_own_class_images_is_replaced(fit, tmp_path, quick_drawing):
    """Even if one of them is called as a drawn one."""
    classes = write_images(tmp_path / "classes", [10])
    with Image.open(classes / "10.png") as image:
        image.convert("RGB").save(classes / "class-00000.jpg")
    (classes / "10.png").unlink()
    (classes / "class-00000.txt").write_text("my own dog")
    before = snapshot(classes)
    assert fit(classes=classes, class_prompt=None, class_prompts=["a dog", "a cat"], num_class_images=2) == 0
    after = snapshot(classes)
    assert all(after[name] == before[name] for name in before)
    assert after.keys() - before.keys() == {"class-00001.png", "class-00001.txt"}
    assert (classes / "class-00001.txt").read_text() == "a cat"


def test_class_images_record_what_drew_them(fit, tmp_path, tiny_pipeline, quick_drawing):
    classes = tmp_path / "classes"
    assert fit(classes=classes, seed=3) == 0
    expected = {"prompt": CLASS_PROMPT, "base": tiny_pipeline.name, "seed": 3, "steps": 25, "guidance": 7.5}
    for name in ("class-00000.png", "class-00001.png"):
        with Image.open(classes / name) as image:
            assert json.loads(image.text["class_image"]) == expected


def test_class_images_are_drawn_from_several_prompts_in_turn(fit, tmp_path, quick_drawing, trained_on, capsys):
    """Each is trained on with its own, and those that are there are kept when a prompt is added."""
    classes, prompts = tmp_path / "classes", ["a dog", "a black dog"]
    own = {"classes": classes, "class_prompt": None, "num_class_images": 5, "train_batch_size": 5}
    assert fit(**own, class_prompts=prompts) == 0
    before = snapshot(classes)
    for number in range(5):
        with Image.open(classes / f"class-{number:05d}.png") as image:
            assert json.loads(image.text["class_image"])["prompt"] == prompts[number % 2]
    assert sorted(sample["caption"] for sample in trained_on) == sorted([PROMPT] * 5 + prompts * 2 + prompts[:1])
    capsys.readouterr()
    assert fit("second", **{**own, "num_class_images": 6}, class_prompts=[*prompts, "a red dog"]) == 0
    assert f"Class images in {classes}: 1 to be drawn" in capsys.readouterr().out
    after = snapshot(classes)
    assert after.keys() - before.keys() == {"class-00005.png", "class-00005.txt"}
    assert all(after[name] == before[name] for name in before)
    assert (classes / "class-00005.txt").read_text() == "a red dog"
    assert fit("third", **own, class_prompts=["a cat", "a dog"]) == 2
    told = f"--class_prompts (a cat; a dog): {classes / 'class-00001.png'} was drawn for 'a black dog'; name "
    assert told in capsys.readouterr().err


def test_class_images_of_one_prompt_go_on_with_several(fit, tmp_path, quick_drawing, trained_on, capsys):
    """Those that have no caption are trained on with the prompt that they record; nothing is written beside them."""
    classes, told = tmp_path / "classes", "take the prompt which they were drawn for: "
    assert fit(classes=classes, class_prompt="a dog", num_class_images=3) == 0
    (classes / "class-00001.txt").write_text("my own caption")
    before = snapshot(classes)
    trained_on.clear()
    capsys.readouterr()
    own = {"class_prompt": None, "num_class_images": 5, "train_batch_size": 5}
    assert fit("second", classes=classes, class_prompts=["a black dog", "a dog"], **own) == 0
    captions = {sample["index"]: sample["caption"] for sample in trained_on if sample["index"] >= 5}
    assert captions == {5: "a dog", 6: "my own caption", 7: "a dog", 8: "a dog", 9: "a black dog"}
    assert f"{told}2" in " ".join(capsys.readouterr().out.split())
    after = snapshot(classes)
    assert all(after[name] == before[name] for name in before)
    assert after.keys() - before.keys() == {
        f"class-0000{number}.{kind}" for number in (3, 4) for kind in ("png", "txt")
    }
    assert fit("all", classes=classes, class_prompts=["a black dog", "a dog", "a red dog"], **own) == 0
    told = "Warning: 1 of --class_prompts has no class image; use a larger --num_class_images or another "
    assert f"{told}--class_data_dir, such as a red dog" in unbroken(capsys.readouterr().out)
    make_image(12).save(classes / "mine.png")  # of which nobody knows what it shows
    assert fit("third", classes=classes, class_prompts=["a black dog", "a dog"], **own) == 2
    assert f"{classes / 'mine.png'}: has no caption" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["a photo of a cat", "Ein Foto von Bären"])
def test_class_images_of_another_prompt_are_refused(fit, tmp_path, quick_drawing, capsys, other):
    classes = tmp_path / "classes"
    assert fit(classes=classes, class_prompt=other, dry_run=False) == 0
    before = snapshot(classes)
    assert fit("second", classes=classes, num_class_images=3) == 2
    told = f"--class_prompt={CLASS_PROMPT}: {classes / 'class-00000.png'} was drawn for {other!r}; name another "
    assert f"{told}--class_data_dir, or take that prompt\n" in capsys.readouterr().err
    assert snapshot(classes) == before
    assert fit("third", classes=classes, class_prompt=other) == 0


def test_class_images_of_another_base_are_warned_of(fit, tmp_path, tiny_pipeline, quick_drawing, capsys):
    classes, other = tmp_path / "classes", tmp_path / "another"
    other.symlink_to(tiny_pipeline, target_is_directory=True)
    assert fit(classes=classes) == 0
    assert "another base" not in capsys.readouterr().out
    assert fit("second", base=other, classes=classes) == 0
    told = f"2 class images were drawn by another base than another, such as\n  {classes / 'class-00000.png'}: "
    said = capsys.readouterr().out
    assert said.startswith("Plan\n")
    assert unbroken(f"Warning: {told}{tiny_pipeline.name}") in unbroken(said)


def test_more_class_images_than_asked_for_are_enough(fit, tmp_path, quick_drawing):
    classes = write_images(tmp_path / "classes", [10, 11, 12])
    assert fit(classes=classes, num_class_images=2) == 0
    assert len(list(classes.iterdir())) == 3
    assert not quick_drawing


def test_class_images_differ_by_seed_and_number(fit, tmp_path, quick_drawing):
    for seed in (0, 1):
        assert fit(f"out{seed}", classes=tmp_path / f"classes{seed}", num_class_images=5, seed=seed) == 0
    paths = [*(tmp_path / "classes0").glob("*.png"), *(tmp_path / "classes1").glob("*.png")]
    pixels = set()
    for path in paths:
        with Image.open(path) as image:
            pixels.add(image.tobytes())
    assert len(paths) == len(pixels) == 10


def test_a_dry_run_draws_nothing(fit, tmp_path, quick_drawing, capsys):
    assert fit(classes=tmp_path / "classes", dry_run=True) == 0
    said = capsys.readouterr().out
    assert said.startswith("Plan\n")
    assert ": 2 to be drawn, for" in unbroken(said)
    assert not quick_drawing
    assert not list(tmp_path.iterdir())


def test_a_dry_run_takes_photos_for_class_images_that_are_not_there(script, fit, tmp_path, monkeypatch):
    """Each pass has as many as it will have then, with their weight."""
    weights, diffusion_losses = [], script.diffusion_losses

    def noted(unet, noise_scheduler, latents, prompt_embeds, batch, *rest):
        weights.append(batch["weight"].tolist())
        return diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, *rest)

    monkeypatch.setattr(script, "diffusion_losses", noted)
    settings = {"train_batch_size": 2, "prior_loss_weight": 0.5, "max_train_steps": 3, "dry_run": True}
    assert fit(classes=tmp_path / "classes", **settings) == 0
    assert weights == [[0.5, 0.5, 0.25, 0.25]] * 2


def test_hidden_folders_hold_no_class_images(fit, tmp_path, capsys):
    write_images(tmp_path / "classes" / ".thumbnails", [10, 11])
    assert fit(classes=tmp_path / "classes", dry_run=True) == 0
    said = capsys.readouterr().out
    assert said.startswith("Plan\n")
    assert ": 2 to be drawn, for" in unbroken(said)


def test_class_images_are_drawn_without_dropout(fit, tmp_path, quick_drawing):
    assert fit(classes=tmp_path / "classes", train_text_encoder=True) == 0
    assert set(quick_drawing) == {(False, False)}


def test_class_images_are_drawn_in_the_precision_asked_for(fit, tmp_path):
    for precision in ("bf16", "fp32"):
        settings = {"mixed_precision": "bf16", "prior_generation_precision": precision, "num_class_images": 1}
        assert fit(precision, classes=tmp_path / f"classes_{precision}", **settings) == 0
    assert contents(tmp_path / "classes_bf16") != contents(tmp_path / "classes_fp32")


def test_class_images_are_the_bases(tiny_pipeline, photos, tmp_path):
    """Drawn without the adapters that training goes on from, far as those are from nothing."""
    script = load_script(TRAIN_DREAMBOOTH_LORA)
    settings = {"instance_data_dir": photos, "instance_prompt": PROMPT, "max_train_steps": 1, "learning_rate": 1}
    assert train(script, tiny_pipeline, None, tmp_path / "first", **settings) == 0
    trained = load_file(tmp_path / "first" / "pytorch_lora_weights.safetensors")
    assert min(abs(weight).max() for name, weight in trained.items() if "lora_B" in name) > 0.5
    settings |= {"with_prior_preservation": True, "class_prompt": CLASS_PROMPT, "num_class_images": 1}
    for name, start in (("base", None), ("adapted", tmp_path / "first")):
        places = {"class_data_dir": tmp_path / f"classes_{name}", "init_lora_weights": start}
        assert train(script, tiny_pipeline, None, tmp_path / name, **settings, **places) == 0
    assert contents(tmp_path / "classes_base") == contents(tmp_path / "classes_adapted")


def test_two_processes_share_the_class_images(tiny_pipeline, photos, tmp_path):
    """As many as asked for, none twice, and those that one process draws one by one."""
    script, said = load_script(TRAIN_DREAMBOOTH), tmp_path / "said"
    settings = {
        "instance_data_dir": photos,
        "instance_prompt": PROMPT,
        "with_prior_preservation": True,
        "class_prompt": CLASS_PROMPT,
        "num_class_images": 5,
        "sample_batch_size": 1,
        "max_train_steps": 1,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    line = words(tiny_pipeline, None, two, **settings, class_data_dir=tmp_path / "classes2", train_batch_size=1)
    assert run_copies(script, line, said) == [0, 0], said.read_text()
    made = contents(tmp_path / "classes2")
    assert sorted(made) == [f"class-{number:05d}.png" for number in range(5)]
    assert len(set(made.values())) == 5
    settings |= {"class_data_dir": tmp_path / "classes1", "train_batch_size": 2}
    assert train(script, tiny_pipeline, None, one, **settings) == 0
    assert contents(tmp_path / "classes1") == made
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_a_broken_class_image_can_be_left_out(fit, tmp_path, trained_on, capsys):
    classes = write_images(tmp_path / "classes", [10, 11])
    (classes / "broken.png").write_text("no picture")
    before = snapshot(classes)
    assert fit(classes=classes, num_class_images=3, skip_bad_images=True, max_train_steps=9) == 0
    assert str(classes / "broken.png") in capsys.readouterr().out
    assert snapshot(classes) == before
    assert {sample["index"] for sample in trained_on} == set(range(7))  # five photos and two class images


# --------------------------------------------------------------------------------------------------- what is trained


def test_text_encoder_is_trained_saved_and_loaded(fit, trains_lora, tiny_pipeline, tmp_path):
    assert fit(train_text_encoder=True, adam_weight_decay=0, max_train_steps=2) == 0
    before = load(tiny_pipeline)
    if trains_lora:
        after = load(tiny_pipeline)
        after.load_lora_weights(tmp_path / "out")
        keys = load_file(tmp_path / "out" / LORA_FILE)
        assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder"}
        of_text = [key for key in keys if key.startswith("text_encoder.")]
        assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in of_text)
    else:
        after = load(tmp_path / "out")
        old, new = text_encoder(tiny_pipeline), text_encoder(tmp_path / "out")
        published = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
        assert published.keys() == {f"text_model.{name}" for name in new}
        changed = [name for name in old if not torch.equal(old[name], new[name])]
        assert len(changed) >= len(old) - 1  # position numbers are no weights
    tokens = before.tokenizer(PROMPT, return_tensors="pt").input_ids
    embeddings = [pipeline.text_encoder(tokens).last_hidden_state for pipeline in (before, after)]
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-4


def largest_changes(folder, base):
    """By how much a weight of the UNet and one of the text encoder have moved at most; of adapters those that begin
    as zeros."""
    file = folder / LORA_FILE
    if file.exists():
        weights = load_file(file)
        parts = [
            [value for key, value in weights.items() if key.startswith(name) and "lora_B" in key]
            for name in ("unet.", "text_encoder.")
        ]
    else:
        parts = []
        for read in (unet, text_encoder):
            before, after = read(base), read(folder)
            parts.append([after[key] - value for key, value in before.items() if value.is_floating_point()])
    return [max(value.abs().max().item() for value in part) for part in parts]


@pytest.mark.parametrize("rate, expected", [(None, 1e-3), (1e-4, 1e-4), (4e-3, 4e-3)])
def test_the_text_encoder_has_a_rate_of_its_own(fit, tiny_pipeline, tmp_path, capsys, rate, expected):
    """Adam's first step is as long as the rate in every weight whose gradient is not tiny."""
    settings = {"train_text_encoder": True, "learning_rate": 1e-3, "adam_weight_decay": 0}
    assert fit(text_encoder_lr=rate, **settings) == 0
    assert largest_changes(tmp_path / "out", tiny_pipeline) == pytest.approx([1e-3, expected], rel=1e-2)
    told = f", text encoder at {expected:g}" if rate else ""
    assert f"AdamW at 0.001{told}, constant" in capsys.readouterr().out


def test_a_rate_of_its_own_is_scaled_too(fit, tiny_pipeline, tmp_path):
    """By the two photos of a step."""
    settings = {"train_text_encoder": True, "learning_rate": 1e-3, "adam_weight_decay": 0, "scale_lr": True}
    assert fit(text_encoder_lr=5e-4, **settings) == 0
    assert largest_changes(tmp_path / "out", tiny_pipeline) == pytest.approx([2e-3, 1e-3], rel=1e-2)


@pytest.mark.parametrize("script", [TRAIN_DREAMBOOTH], indirect=True)  # adapters are in two groups always
def test_a_resume_of_the_text_encoders_rate(fit, tmp_path, capsys):
    """Without the flag all weights are one group, as in checkpoints from before it was there, and such go on. With it
    they are two, of which a rate may change by --allow_changed_resume, but not whether there are two."""
    settings = {"train_text_encoder": True, "max_train_steps": 2, "checkpointing_steps": 1}
    for name, rate, num_groups in (("one", None, 1), ("two", 1e-4, 2)):
        assert fit(name, text_encoder_lr=rate, **settings) == 0
        (tmp_path / name / "README.md").unlink()
        state = checkpoint_state(tmp_path / name / "checkpoint-2")
        assert len(state["optimizer"]["param_groups"]) == num_groups
        copy = f"{name}_resumed"
        shutil.copytree(tmp_path / name / "checkpoint-1", tmp_path / copy / "checkpoint-1")
        path = tmp_path / copy / "checkpoint-1" / "args.json"
        before = json.loads(path.read_text())
        if rate is None:
            assert (before.pop("text_encoder_lr"), before.pop("text_encoder_apart")) == (None, False)
            path.write_text(json.dumps(before))
            write_digests(path.parent)
        shutil.copy(tmp_path / name / "args.json", tmp_path / copy)
        assert fit(copy, text_encoder_lr=rate, resume_from_checkpoint="checkpoint-1", **settings) == 0
        assert same(state, checkpoint_state(tmp_path / copy / "checkpoint-2"))
    capsys.readouterr()
    again = {**settings, "max_train_steps": 3, "allow_changed_resume": True, "resume_from_checkpoint": "checkpoint-2"}
    for name, rate, lines in (
        ("one", 1e-4, ["text_encoder_lr: None there, 0.0001 now"]),
        ("two", None, ["text_encoder_lr: 0.0001 there, None now"]),
    ):
        assert fit(name, text_encoder_lr=rate, **again) == 2
        told = capsys.readouterr().err
        assert "was made under other settings; use those\n" in told
        assert [line.strip() for line in told.splitlines()[1:]] == lines
    assert fit("two", text_encoder_lr=2e-4, **again) == 0
    groups = checkpoint_state(tmp_path / "two" / "checkpoint-3")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-3, 2e-4]


def test_text_encoder_is_left_to_the_bit(fit, trains_lora, tiny_pipeline, tmp_path):
    assert fit() == 0
    if trains_lora:
        assert {key.split(".")[0] for key in load_file(tmp_path / "out" / LORA_FILE)} == {"unet"}
    else:
        assert same(text_encoder(tmp_path / "out"), text_encoder(tiny_pipeline))


@pytest.mark.parametrize("script", [TRAIN_DREAMBOOTH], indirect=True)  # adapters have no embeddings
@pytest.mark.parametrize("base", [REPO / "miniature" / "pipeline", None], ids=["miniature", "tiny"])
def test_trained_embeddings_keep_32_bits_in_8bit_adam(fit, tiny_pipeline, tmp_path, base):
    """Tensors under 4,096 numbers do so anyway. A run that is resumed ends in the same bits."""
    base = base or tiny_pipeline
    settings = {
        "base": base,
        "train_text_encoder": True,
        "use_8bit_adam": True,
        "max_train_steps": 2,
        "train_batch_size": 1,
        "checkpointing_steps": 1,
    }
    assert fit(**settings) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    of_text = dict(pipeline.text_encoder.named_parameters())
    names = [*dict(pipeline.unet.named_parameters()), *of_text]
    parameters = [*pipeline.unet.parameters(), *of_text.values()]
    embeddings = {name for name in of_text if "_embedding.weight" in name}
    assert len(embeddings) == 2
    assert any(of_text[name].numel() >= 4096 for name in embeddings)
    state = checkpoint_state(tmp_path / "out" / "checkpoint-2")["optimizer"]["state"]
    for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        moments = state[number]["__bnb_optimizer_quant_state__"]
        is_whole = parameter.numel() < 4096 or (name in embeddings)
        assert moments["state1"].dtype == (torch.float32 if is_whole else torch.uint8), name
        assert moments["state2"].dtype == moments["state1"].dtype
    shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    shutil.copy(tmp_path / "out" / "args.json", tmp_path / "again")
    assert fit("again", resume_from_checkpoint="latest", **settings) == 0
    assert same(
        checkpoint_state(tmp_path / "again" / "checkpoint-2"), checkpoint_state(tmp_path / "out" / "checkpoint-2")
    )


def test_lora_file_draws_as_the_trained_model(tiny_pipeline, photos, tmp_path):
    """In diffusers' and kohya's layout, and merged."""
    script, kept = load_script(TRAIN_DREAMBOOTH_LORA), {}
    save_model = script.save_model

    def save_and_keep(args, pipeline, models, *rest):
        kept.update(models)
        return save_model(args, pipeline, models, *rest)

    script.save_model = save_and_keep  # the module is this test's own
    settings = {
        "instance_data_dir": photos,
        "instance_prompt": PROMPT,
        "with_prior_preservation": True,
        "class_data_dir": write_images(tmp_path / "classes", [10]),
        "class_prompt": CLASS_PROMPT,
        "num_class_images": 1,
        "train_text_encoder": True,
        "learning_rate": 0.05,
        "max_train_steps": 3,
        "lora_alpha": 2,
        "output_kohya_format": True,
    }
    folder = tmp_path / "star"
    assert train(script, tiny_pipeline, None, folder, **settings) == 0
    expected = draw(load(tiny_pipeline, **{name: model.eval() for name, model in kept.items()}))
    assert largest_difference(expected, draw(load(tiny_pipeline))) > 1e-2
    assert largest_difference(with_lora(tiny_pipeline, folder / LORA_FILE), expected) < 1e-4
    assert largest_difference(with_lora(tiny_pipeline, folder / "star.safetensors"), expected) < 1e-4
    assert largest_difference(draw(merged(folder, tiny_pipeline, tmp_path / "merged")), expected) < 1e-4


def test_resumed_equals_straight(fit, tmp_path):
    """Also where a class image was lost in between: it is made again to the bit."""
    classes, straight, out = tmp_path / "classes", tmp_path / "straight", tmp_path / "out"
    assert fit("straight", classes=classes, **EVERYTHING) == 0
    assert len(set(losses(straight))) == 8
    shutil.copytree(straight / "checkpoint-4", out / "checkpoint-4")
    for name in ("args.json", "log.jsonl"):
        shutil.copy(straight / name, out)
    before = contents(classes)
    (classes / "class-00001.png").unlink()
    assert fit(classes=classes, resume_from_checkpoint="latest", **EVERYTHING) == 0
    assert contents(classes) == before
    assert same(result(out), result(straight))
    assert read_log(out) == read_log(straight)
    assert same(*[checkpoint_state(folder / "checkpoint-8") for folder in (out, straight)])


def test_other_class_images_are_another_run(fit, tmp_path, capsys):
    """A resume would go on with others than it began with."""
    classes = write_images(tmp_path / "classes", [10, 11])
    settings = {"classes": classes, "max_train_steps": 2, "checkpointing_steps": 1}
    assert fit(**settings) == 0
    (tmp_path / "out" / "README.md").unlink()
    make_image(12).save(classes / "12.png")
    assert fit(**settings, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2") == 2
    assert "class_data: " in capsys.readouterr().err


def test_card_names_the_prompt(fit, tmp_path):
    assert fit() == 0
    text = (tmp_path / "out" / "README.md").read_text()
    front = text.split("---\n")[1].splitlines()
    assert f"instance_prompt: {PROMPT}" in front
    assert "- dreambooth" in front
    assert str(tmp_path) not in text


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"class_prompt": None}, "--with_prior_preservation: needs --class_prompt, or --class_prompts of which"),
        ({"class_prompt": " "}, "--with_prior_preservation: needs --class_prompt, or --class_prompts of which"),
        (
            {"class_prompt": None, "class_prompts": ["a dog", " "]},
            "--with_prior_preservation: needs --class_prompt, or",
        ),
        ({"class_prompts": ["a dog"]}, "--class_prompt and --class_prompts: give one of them"),
        ({"class_data_dir": None}, "--with_prior_preservation: needs --class_data_dir"),
        ({"num_class_images": 0}, "--num_class_images: must be a whole number in [1, inf), not '0'"),
        ({"sample_batch_size": 0}, "--sample_batch_size: must be a whole number in [1, inf), not '0'"),
        ({"prior_loss_weight": -1}, "--prior_loss_weight: must be in [0, inf), not '-1'"),
        ({"repeats": 0}, "--repeats: must be a whole number in [1, inf), not '0'"),
        ({"instance_prompt": " "}, "--instance_prompt: give a rare word and the class"),
        (
            {"instance_data_dir": None},
            "--instance_data_dir is missing: give a folder of images, or a dataset by",
        ),
        ({"instance_data_dir": "nowhere"}, "--instance_data_dir=nowhere: does not exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_flags_end_before_models_load(refused, tmp_path, settings, message):
    assert message in refused(classes=tmp_path / "classes", **settings)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("class_data_dir", "dogs"),
        ("class_prompt", "a dog"),
        ("class_prompts", ["a dog"]),
        ("num_class_images", 10),
        ("sample_batch_size", 2),
        ("prior_loss_weight", 0.5),
        ("prior_generation_precision", "fp32"),
    ],
)
def test_class_flags_do_nothing_without_prior_preservation(refused, flag, value):
    text = refused(**{flag: value})
    assert f"--{flag}={value}: does nothing without --with_prior_preservation" in text


@pytest.mark.parametrize("place", ["photos", "photos/classes", "."])
def test_class_folder_stands_apart_from_the_instances(refused, tmp_path, place):
    photos = write_images(tmp_path / "photos", [0])
    text = refused(classes=tmp_path / place, instance_data_dir=photos)
    assert f"--class_data_dir={tmp_path / place}: is not apart from --instance_data_dir" in text


def test_a_file_as_class_folder(refused, tmp_path):
    file = tmp_path / "classes"
    file.write_text("no folder")
    assert f"--class_data_dir={file}: is a file or lies below one" in refused(classes=file)


def test_class_folder_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("no folder")
    classes = tmp_path / "file" / "classes"
    told = f"--class_data_dir={classes}: is a file or lies below one; name another"
    assert unbroken(told) in unbroken(refused(classes=classes))


def test_output_among_the_class_images_is_refused(refused, tmp_path):
    assert "is not apart from --output_dir" in refused(classes=tmp_path)


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "photos").mkdir()
    assert f"the folder {tmp_path / 'photos'} holds no images" in refused(instance_data_dir=tmp_path / "photos")


def test_no_captions_and_no_prompt_names_the_flag(refused):
    told = "--instance_prompt: give a rare word and the class, such as a photo of sks dog, for photos that have no"
    assert told in unbroken(refused(instance_prompt=None))


def test_a_broken_class_image_is_listed(refused, tmp_path):
    classes = write_images(tmp_path / "classes", [10, 11])
    (classes / "broken.png").write_bytes((classes / "10.png").read_bytes()[:60])
    text = refused(classes=classes, num_class_images=5)
    assert f"{classes / 'broken.png'}: " in text
    assert "1 of 3 images" in text


# ----------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_prior_preservation_keeps_the_class_plain(tmp_path):
    """Both models have learnt the subject; only the one without preservation draws its marks on plain stars too."""
    script, measure = load_script(TRAIN_DREAMBOOTH), load_script(REPO / "miniature" / "measure.py")
    base = REPO / "miniature" / "pipeline"
    measure.render.write_folder("subject", tmp_path / "photos", 5, seed=0)
    (tmp_path / "photos" / "metadata.jsonl").unlink()  # all have the caption of --instance_prompt
    settings = {
        "instance_data_dir": tmp_path / "photos",
        "instance_prompt": "a sks star",
        "resolution": 64,
        "train_text_encoder": True,
        "train_batch_size": 5,
        "max_train_steps": 240,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "snr_gamma": 5,
    }
    preservation = {
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "stars",
        "class_prompts": ["a star", *(f"a {colour} star" for colour in measure.render.COLOURS)],
        "num_class_images": 36,
        "sample_batch_size": 36,
        "prior_loss_weight": 0.5,
    }
    learnt, marked = {}, {}
    for name, more in (("with", preservation), ("without", {})):
        assert train(script, base, None, tmp_path / name, **settings, **more) == 0
        pipeline = measure.load_pipeline(tmp_path / name)
        subjects = measure.draw(pipeline, measure.subject_records(48), steps=12, guidance=2)
        stars = measure.draw(pipeline, measure.star_records(24), steps=12, guidance=2)
        learnt[name] = measure.score_subject(*subjects)["both"]
        marked[name] = measure.score_stars(*stars)["marked"]
    assert min(learnt.values()) >= 0.6
    assert marked["with"] <= marked["without"] - 0.4
