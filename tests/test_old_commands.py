"""Commands of diffusers' tutorials run as they are printed, through their launcher; and what the flags in old commands
ask for is in the result."""

import os
import shlex
import shutil
import subprocess
import sys
from string import Template

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes most of the time

import numpy as np
import pytest
import torch
from conftest import load_script
from copies import free_port
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from image_data import write_image_folder
from PIL import Image
from running import (
    TRAIN_DREAMBOOTH,
    TRAIN_TEXT_TO_IMAGE,
    TRAIN_TEXT_TO_IMAGE_FLAX,
    TRAIN_TEXT_TO_IMAGE_LORA,
    environment,
)
from safetensors.torch import load_file
from tiny import BOS, EOS, WORDS, make_pipeline, make_tokenizer, train_bpe
from training import losses, parse, read_log, train, unet
from transformers import AutoTokenizer, CLIPTokenizer

from sdtune.flax.weights import write_flax
from sdtune.models import check_model, load_tokenizer

# As printed, but for `no` in the place of fp16, and without xFormers' attention: a CPU has neither.
FULL = """accelerate launch --mixed_precision="no" train_text_to_image.py --pretrained_model_name_or_path=$MODEL_NAME
    --dataset_name=$dataset_name --use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1
    --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05
    --max_grad_norm=1 --lr_scheduler="constant" --lr_warmup_steps=0 --output_dir="sd-pokemon-model" """
LORA = """accelerate launch --mixed_precision="no" train_text_to_image_lora.py
    --pretrained_model_name_or_path=$MODEL_NAME --dataset_name=$DATASET_NAME --caption_column="text" --resolution=512
    --random_flip --train_batch_size=1 --num_train_epochs=100 --checkpointing_steps=5000 --learning_rate=1e-04
    --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42 --output_dir="sd-pokemon-model-lora"
    --validation_prompt="cute dragon creature" --report_to="wandb" """
FLAX = """python train_text_to_image_flax.py --pretrained_model_name_or_path=$MODEL_NAME --dataset_name=$dataset_name
    --resolution=512 --center_crop --random_flip --train_batch_size=1 --mixed_precision="fp16"
    --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1 --output_dir="sd-pokemon-model" """
DREAMBOOTH = """accelerate launch train_dreambooth.py --pretrained_model_name_or_path=$MODEL_NAME
    --instance_data_dir=$INSTANCE_DIR --class_data_dir=$CLASS_DIR --output_dir=$OUTPUT_DIR --with_prior_preservation
    --prior_loss_weight=1.0 --instance_prompt="a photo of sks dog" --class_prompt="a photo of dog" --resolution=512
    --train_batch_size=1 --gradient_accumulation_steps=1 --gradient_checkpointing --use_8bit_adam --set_grads_to_none
    --learning_rate=2e-6 --lr_scheduler="constant" --lr_warmup_steps=0 --num_class_images=200 --max_train_steps=800 """
PLACES = {path.name: str(path) for path in (TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA, TRAIN_TEXT_TO_IMAGE_FLAX)}
PLACES[TRAIN_DREAMBOOTH.name] = str(TRAIN_DREAMBOOTH)
SHORT = {"resolution": 32, "max_train_steps": 2, "num_train_epochs": 2, "num_class_images": 3}


def run(printed, folder, more=(), status=0, **names):
    """Runs a command in a folder with its $NAMES put in, on small images and for few steps; returns what it says."""
    found = []
    for word in shlex.split(Template(printed).substitute(names)):
        flag, _, value = word.removeprefix("--").partition("=")
        found.append(f"--{flag}={SHORT[flag]}" if flag in SHORT and value else PLACES.get(word, word))
    module = ["-m", "accelerate.commands.accelerate_cli"] if found[0] == "accelerate" else []
    command = [sys.executable, *module, *found[1:], *more]
    additions = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "WANDB_DIR": str(folder)}
    done = subprocess.run(
        command, env=environment(additions), cwd=folder, timeout=300, text=True, capture_output=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 4)


def assert_moved(folder, base):
    """Asserts that the UNet was trained: nearly every weight is finite and another one."""
    before, after = unet(base), unet(folder)
    assert before.keys() == after.keys()
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 0.9 * len(before)


@pytest.mark.slow
def test_the_tutorial_on_the_whole_unet(tiny_pipeline, images, tmp_path):
    run(FULL, tmp_path, MODEL_NAME=tiny_pipeline, dataset_name=images)
    assert_moved(tmp_path / "sd-pokemon-model", tiny_pipeline)
    assert len(losses(tmp_path / "sd-pokemon-model")) == 1  # of ten steps, or the last
    StableDiffusionPipeline.from_pretrained(tmp_path / "sd-pokemon-model")


@pytest.mark.slow
def test_the_tutorial_on_lora(tiny_pipeline, images, tmp_path):
    """Two epochs of four images; four samples before and after; the adapters load and change what is drawn."""
    run(LORA, tmp_path, MODEL_NAME=tiny_pipeline, DATASET_NAME=images)
    folder = tmp_path / "sd-pokemon-model-lora"
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-000000.png", "step-000008.png"]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    before = drawn(pipeline, "cute dragon creature", 42)
    assert np.abs(tiles(folder / "samples" / "step-000000.png", 4) - before).max() <= 1
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    after = drawn(pipeline, "cute dragon creature", 42)
    assert np.abs(tiles(folder / "samples" / "step-000008.png", 4) - after).max() <= 1
    assert not np.array_equal(before, after)
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert log.stat().st_size > 1000


@pytest.mark.slow
def test_the_tutorial_on_flax(images, tmp_path):
    """From a folder that has Flax weights alone."""
    base, flax_base = tmp_path / "base", tmp_path / "flax_base"
    pipeline = make_pipeline(num_blocks=1)
    pipeline.save_pretrained(base)
    shutil.copytree(base, flax_base)
    write_flax(pipeline, flax_base)
    for file in flax_base.glob("*/*.safetensors"):
        file.unlink()
    run(FLAX, tmp_path, MODEL_NAME=flax_base, dataset_name=images)
    assert_moved(tmp_path / "sd-pokemon-model", base)
    far = [(a - b).abs().max() for a, b in zip(unet(tmp_path / "sd-pokemon-model").values(), unet(base).values())]
    assert max(far) < 1e-4  # two steps at 1e-5 from the weights of that folder
    StableDiffusionPipeline.from_pretrained(tmp_path / "sd-pokemon-model")


@pytest.fixture
def dreambooth(tiny_pipeline, images, tmp_path):
    """The $NAMES of the tutorial on DreamBooth."""
    names = {"INSTANCE_DIR": images, "CLASS_DIR": tmp_path / "classes", "OUTPUT_DIR": tmp_path / "out"}
    return {"MODEL_NAME": tiny_pipeline, **names}


@pytest.mark.slow
def test_the_tutorial_on_dreambooth(dreambooth, tiny_pipeline, tmp_path):
    run(DREAMBOOTH, tmp_path, **dreambooth)
    assert_moved(tmp_path / "out", tiny_pipeline)
    classes = sorted((tmp_path / "classes").iterdir())
    assert [path.name for path in classes] == ["class-00000.png", "class-00001.png", "class-00002.png"]
    for path in classes:
        with Image.open(path) as image:
            assert image.size == (32, 32)


@pytest.mark.slow
def test_what_a_cpu_cannot_do_is_said_in_a_line_each(dreambooth, tmp_path):
    printed = DREAMBOOTH.replace("launch", 'launch --mixed_precision="fp16"')
    said = run(printed, tmp_path, ["--enable_xformers_memory_efficient_attention"], status=1, **dreambooth)
    lines = [line.strip() for line in said.splitlines() if "--mixed_precision=" in line or "--enable_xformers" in line]
    lines = [line.removeprefix("train_dreambooth.py: ") for line in lines if "CalledProcessError" not in line]
    assert "--enable_xformers_memory_efficient_attention=True: needs a GPU and xformers; " in lines[0]
    assert (
        "--mixed_precision=fp16 (or accelerate's config): a CPU cannot train in fp16; use --mixed_precision=no"
        in lines[1]
    )
    assert len(lines) == 2
    assert not (tmp_path / "out").exists()
    # And that is what helps.
    assert "Plan" in run(printed, tmp_path, ["--mixed_precision=no", "--dry_run"], **dreambooth)


@pytest.mark.slow
def test_an_old_launcher_says_the_rank_to_each_process(tiny_pipeline, images, tmp_path):
    """--local-rank=0 to one, --local-rank=1 to the other."""
    launcher = [
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        str(TRAIN_TEXT_TO_IMAGE),
    ]
    words = [f"--pretrained_model_name_or_path={tiny_pipeline}", f"--train_data_dir={images}", "--resolution=32"]
    words += ["--train_batch_size=1", "--max_train_steps=1", f"--output_dir={tmp_path / 'out'}", "--report_to=none"]
    done = subprocess.run(
        [sys.executable, *launcher, *words],
        env=environment({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}),
        timeout=120,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 images: 1 a pass x 1 pass x 2 ranks" in done.stdout
    assert_moved(tmp_path / "out", tiny_pipeline)


# ---- what old flags ask for


def drawn(pipeline, prompt, seed, number=4, **settings):
    """What a user's own code draws as the samples of a run are: pixels (number, 32, 32, 3)."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for k in range(number):
        generator = torch.Generator().manual_seed(seed + k)
        settings = {"num_inference_steps": 25, "guidance_scale": 7.5, "height": 32, "width": 32, **settings}
        images.append(np.array(pipeline(prompt, generator=generator, **settings).images[0], int))
    return np.stack(images)


def tiles(path, number):
    """The images in a row of samples, pixels (number, 32, 32, 3)."""
    pixels = np.array(Image.open(path), int)
    assert pixels.shape == (32, 32 * number, 3)
    return pixels.reshape(32, number, 32, 3).swapaxes(0, 1)


def write_other_tokenizer(folder, num_more=0):
    """A tokenizer with the words of the tests' own one under other numbers, and so many words more."""
    tokens = [token for token, _ in sorted(make_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    moved = [BOS, EOS, *tokens[:1:-1], *[f"more{k}</w>" for k in range(num_more)]]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(moved)},
        merges=train_bpe(WORDS.split(), num_merges=160),
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    return write_other_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def scripts(train_script):
    """Scripts as modules, by name."""
    return {"full": train_script, "lora": load_script(TRAIN_TEXT_TO_IMAGE_LORA)}


@pytest.mark.parametrize("name", ["full", "lora"])
def test_another_tokenizer_is_used_in_training_samples_and_result(
    scripts, tiny_pipeline, images, other_tokenizer, tmp_path, name
):
    """A run with the flag is a run on a base that has that tokenizer, and not one on the base as it is."""
    changed = shutil.copytree(tiny_pipeline, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(other_tokenizer)
    assert tokenizer.model_max_length > 77  # which the text encoder takes
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(changed / "tokenizer")
    settings = {"max_train_steps": 2, "validation_prompts": ["a red circle"], "validation_num_inference_steps": 2}
    bases = {"flag": (tiny_pipeline, other_tokenizer), "changed": (changed, None), "plain": (tiny_pipeline, None)}
    for kind, (base, tokenizer) in bases.items():
        assert train(scripts[name], base, images, tmp_path / kind, tokenizer_name=tokenizer, **settings) == 0
    assert losses(tmp_path / "flag") == losses(tmp_path / "changed")
    assert losses(tmp_path / "flag") != losses(tmp_path / "plain")
    for sample in ("step-000000.png", "step-000002.png"):
        flag, there, plain = [tiles(tmp_path / kind / "samples" / sample, 1) for kind in bases]
        assert np.array_equal(flag, there)
        assert not np.array_equal(flag, plain)
    if name == "full":  # adapters have no tokenizer
        text = "a photo of a red circle"
        places = (tmp_path / "flag" / "tokenizer", other_tokenizer)
        result, given = (AutoTokenizer.from_pretrained(place) for place in places)
        assert result(text).input_ids == given(text).input_ids != make_tokenizer()(text).input_ids
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "flag")
        alone = drawn(pipeline, "a red circle", 0, 1, num_inference_steps=2)
        assert np.abs(tiles(tmp_path / "flag" / "samples" / "step-000002.png", 1) - alone).max() <= 1


def of_model(model, *words):
    return parse(f"--pretrained_model_name_or_path={model}", "--resolution=32", *words)


def test_a_tokenizer_that_does_not_fit_is_refused_before_models_load(tiny_pipeline, other_tokenizer, tmp_path):
    size = len(make_tokenizer())
    assert check_model(of_model(tiny_pipeline, f"--tokenizer_name={other_tokenizer}")) == []
    larger = write_other_tokenizer(tmp_path / "larger", 5)
    (problem,) = check_model(of_model(tiny_pipeline, f"--tokenizer_name={larger}"))
    told = f"has {size + 5} tokens, the text encoder knows {size}; use the one that it had"
    assert problem == f"--tokenizer_name={larger}: {told}"
    offline = ", no whole copy in the Hub's cache, and HF_HUB_OFFLINE=1 is set; drop that, or name another"
    for nowhere, told in ((tmp_path / "nowhere", "; name another"), ("nobody/nothing", offline)):
        (problem,) = check_model(of_model(tiny_pipeline, f"--tokenizer_name={nowhere}"))
        assert problem == f"--tokenizer_name={nowhere}: there is no such folder here{told}"


@pytest.mark.parametrize("length", [77, 12])
def test_length_of_captions(tiny_pipeline, other_tokenizer, length):
    for words in ([], [f"--tokenizer_name={other_tokenizer}"]):
        args = of_model(tiny_pipeline, f"--tokenizer_max_length={length}", *words)
        assert check_model(args) == []
        tokenizer = load_tokenizer(args)
        ids = tokenizer("a red circle on a blue square " * 20, padding="max_length", truncation=True).input_ids
        assert (tokenizer.model_max_length, len(ids)) == (length, length)
    (problem,) = check_model(of_model(tiny_pipeline, f"--tokenizer_max_length={77 + length}"))
    assert problem == f"--tokenizer_max_length={77 + length}: the text encoder takes 77 at most; use that"


def test_flax_weights_get_the_other_tokenizer_too(tiny_pipeline, other_tokenizer, tmp_path):
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    write_flax(StableDiffusionPipeline.from_pretrained(base), base)
    for file in base.glob("*/*.safetensors"):
        file.unlink()
    script = load_script(TRAIN_TEXT_TO_IMAGE_FLAX)
    words = [f"--pretrained_model_name_or_path={base}", f"--tokenizer_name={other_tokenizer}"]
    args, _ = script.parse_flags(script.make_parser(), words, {})
    pipeline, _ = script.load_models(args)
    text = "a red circle"
    assert pipeline.tokenizer(text).input_ids == AutoTokenizer.from_pretrained(other_tokenizer)(text).input_ids
    assert pipeline.tokenizer.model_max_length == 77


def test_offset_noise_is_a_noise_offset_of_a_tenth(train_script, tiny_pipeline, images, tmp_path):
    runs = {"old": {"offset_noise": True}, "new": {"noise_offset": 0.1}, "plain": {}}
    for name, settings in runs.items():
        assert train(train_script, tiny_pipeline, images, tmp_path / name, max_train_steps=2, **settings) == 0
    assert losses(tmp_path / "old") == losses(tmp_path / "new") != losses(tmp_path / "plain")


@pytest.mark.parametrize("epochs, looks", [(1, [0, 2, 4, 5]), (2, [0, 4, 5])])
def test_a_look_every_so_many_epochs(train_script, tiny_pipeline, images, tmp_path, epochs, looks):
    """Three images, two a step: epochs of two steps. No image is drawn of the prompt, where none is asked for."""
    settings = {"max_train_steps": 5, "num_validation_samples": 1, "validation_epochs": epochs}
    settings |= {"validation_prompt": "a red circle", "num_validation_images": 0, "set_grads_to_none": True}
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    assert [row["step"] for row in read_log(tmp_path / "out") if "held_out_loss" in row] == looks
    assert not (tmp_path / "out" / "samples").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "![" not in card
    assert "local_rank" not in card
    assert "- For 5 steps of 2 images each, which is 2.5 epochs, at " in card


def write_revisions(cache_dir, base, other_unet):
    """A repository of the Hub in the cache: `main` is the base, `non-ema` has another UNet."""
    folder = cache_dir / "models--user--base"
    (folder / "refs").mkdir(parents=True)
    for name, commit in (("main", "1" * 40), ("non-ema", "2" * 40)):
        (folder / "refs" / name).write_text(commit)
        shutil.copytree(base, folder / "snapshots" / commit)
    other_unet.save_pretrained(folder / "snapshots" / ("2" * 40) / "unet")


def test_the_unet_of_another_revision(train_script, tiny_pipeline, images, tmp_path, monkeypatch):
    """The average forgets where it began in its first step, as it does in diffusers' script."""
    cache_dir = tmp_path / "cache"
    other_unet = make_pipeline(seed=1).unet
    write_revisions(cache_dir, tiny_pipeline, other_unet)
    settings = {"max_train_steps": 1, "learning_rate": 1e-6, "use_ema": True, "cache_dir": cache_dir}
    assert train(train_script, "user/base", images, tmp_path / "out", non_ema_revision="non-ema", **settings) == 0
    after, before = unet(tmp_path / "out"), other_unet.state_dict()
    assert max((after[name] - before[name]).abs().max() for name in before) < 2e-6
    vae_file = "vae/diffusion_pytorch_model.safetensors"
    here, there = load_file(tmp_path / "out" / vae_file), load_file(tiny_pipeline / vae_file)
    assert all(torch.equal(here[name], there[name]) for name in there)
    assert UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").config.sample_size == 8


def test_a_revision_of_a_unet_that_is_nowhere(train_script, tiny_pipeline, images, tmp_path, capsys):
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", non_ema_revision="non-ema") == 2
    said = capsys.readouterr().err
    assert "--non_ema_revision=non-ema: does nothing without a model on the Hub; drop this" in said
    write_revisions(tmp_path / "cache", tiny_pipeline, make_pipeline(seed=1).unet)
    settings = {"non_ema_revision": "other", "cache_dir": tmp_path / "cache"}
    assert train(train_script, "user/base", images, tmp_path / "out", **settings) == 2
    assert "user/base: its UNet of other cannot be loaded (" in capsys.readouterr().err


def test_a_result_without_its_text_encoder(tiny_pipeline, images, tmp_path, capsys):
    script = load_script(TRAIN_DREAMBOOTH)
    settings = {"train_data_dir": None, "instance_data_dir": images, "instance_prompt": "a sks dog"}
    settings |= {"max_train_steps": 1, "skip_save_text_encoder": True}
    assert train(script, tiny_pipeline, None, tmp_path / "out", **settings) == 0
    assert not (tmp_path / "out" / "text_encoder").exists()
    assert_moved(tmp_path / "out", tiny_pipeline)
    text_encoder = StableDiffusionPipeline.from_pretrained(tiny_pipeline).text_encoder
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", text_encoder=text_encoder)
    assert drawn(pipeline, "a sks dog", 0, 1, num_inference_steps=2).shape == (1, 32, 32, 3)
    assert (
        "The text encoder is that of the base, and not among these files." in (tmp_path / "out/README.md").read_text()
    )
    assert train(script, tiny_pipeline, None, tmp_path / "no", train_text_encoder=True, **settings) == 2
    assert "--skip_save_text_encoder=True: would lose what --train_text_encoder trained" in capsys.readouterr().err
