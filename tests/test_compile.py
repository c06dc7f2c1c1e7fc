"""`--compile` and `--channels_last`: the same training but for rounding, the same files, an exact resume."""

import shutil

import pytest
import torch
from conftest import load_script
from image_data import write_image_folder
from running import TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA
from safetensors.torch import load_file
from training import checkpoint_state, losses, parse, read_log, same, train

from sdtune import training
from sdtune.optimization import check_layout
from sdtune.training import check_hardware

SETTINGS = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "train_batch_size": 2,
    "gradient_checkpointing": True,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four: three a step leave one, of another size of batch."""
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 4)


def weights(folder):
    """What was trained, by name: the UNet, or adapters."""
    file = folder / "pytorch_lora_weights.safetensors"
    return load_file(file if file.exists() else folder / "unet" / "diffusion_pytorch_model.safetensors")


def distance(own, other):
    return max((own[name] - other[name]).abs().max().item() for name in other)


@pytest.mark.slow
@pytest.mark.parametrize("path", [TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA], ids=lambda path: path.stem)
def test_a_compiled_run_is_the_same_but_for_rounding(path, tiny_pipeline, images, tmp_path, capsys):
    """Losses, held-out losses and weights, under AdamW with a large epsilon, by which a step is as small as its
    gradient; a resume of it is exact, and another one is refused."""
    script, settings = load_script(path), {**SETTINGS, "adam_epsilon": 1}
    if path == TRAIN_TEXT_TO_IMAGE:  # a program more, for passes without gradients
        settings["num_validation_samples"] = 1
    plain, compiled, again = (tmp_path / name for name in ("plain", "compiled", "again"))
    assert train(script, tiny_pipeline, images, plain, **settings) == 0
    assert "Compiled" not in capsys.readouterr().out
    assert train(script, tiny_pipeline, images, compiled, **settings, compile=True) == 0
    said = capsys.readouterr().out
    assert said.count("Compiled: the first step took ") == 1
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    for row, other in zip(read_log(compiled), read_log(plain), strict=True):
        assert row.get("held_out_loss", 0) == pytest.approx(other.get("held_out_loss", 0), rel=1e-4)
    assert weights(compiled).keys() == weights(plain).keys()
    moved = distance(weights(plain), weights(plain / "checkpoint-2"))
    assert moved > 0
    assert distance(weights(compiled), weights(plain)) < 0.05 * moved

    shutil.copytree(compiled, again)
    shutil.rmtree(again / "checkpoint-4")
    assert train(script, tiny_pipeline, images, again, **settings, compile=True, resume_from_checkpoint="latest") == 0
    assert same(checkpoint_state(again / "checkpoint-4"), checkpoint_state(compiled / "checkpoint-4"))
    shutil.rmtree(again / "checkpoint-4")
    assert train(script, tiny_pipeline, images, again, **settings, resume_from_checkpoint="latest") == 2
    assert "compile: True there, False now" in capsys.readouterr().err


@pytest.mark.slow
def test_sizes_that_vary_are_not_compiled_anew(tiny_pipeline, images, tmp_path):
    """Steps of three images and of one alternate: both are compiled in the first epoch, and nothing in later ones."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    script, compiled = load_script(TRAIN_TEXT_TO_IMAGE), []
    take_step = script.take_step

    def counted(*arguments):
        result = take_step(*arguments)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return result

    script.take_step = counted
    settings = {"max_train_steps": 6, "train_batch_size": 3, "compile": True}
    assert train(script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    assert len(compiled) == 6
    assert compiled[0] > 0
    assert compiled[1:] == [compiled[1]] * 5


def test_channels_last_is_the_same_but_for_rounding(tiny_pipeline, images, tmp_path):
    script, laid_out = load_script(TRAIN_TEXT_TO_IMAGE), []
    save_model = script.save_model

    def look(args, pipeline, *rest):
        weight = pipeline.unet.conv_in.weight
        laid_out.append(weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous())
        return save_model(args, pipeline, *rest)

    script.save_model = look
    settings = {**SETTINGS, "adam_epsilon": 1, "use_ema": True}
    plain, changed, again = (tmp_path / name for name in ("plain", "changed", "again"))
    assert train(script, tiny_pipeline, images, plain, **settings) == 0
    assert train(script, tiny_pipeline, images, changed, **settings, channels_last=True) == 0
    assert laid_out == [False, True]
    assert losses(changed) == pytest.approx(losses(plain), rel=1e-4)
    assert distance(weights(changed), weights(plain)) < 1e-5
    shutil.copytree(changed, again)
    shutil.rmtree(again / "checkpoint-4")
    settings |= {"channels_last": True, "resume_from_checkpoint": "latest"}
    assert train(script, tiny_pipeline, images, again, **settings) == 0
    assert same(checkpoint_state(again / "checkpoint-4"), checkpoint_state(changed / "checkpoint-4"))


def test_what_cannot_be_obeyed_is_refused(monkeypatch):
    assert check_layout(parse("--channels_last")) == check_layout(parse("--use_8bit_adam")) == []
    told = "--channels_last=True: 8-bit AdamW undoes it in its first step; drop one"
    assert check_layout(parse("--channels_last", "--use_8bit_adam")) == [told]
    assert check_layout(parse("--channels_last", "--optimizer=adamw8bit")) == [told]
    assert check_hardware(parse("--compile")) == []
    monkeypatch.setattr(training.shutil, "which", lambda name: None)
    assert check_hardware(parse("--compile")) == ["--compile=True: needs a C++ compiler; install g++, or drop this"]
    assert check_hardware(parse()) == []
