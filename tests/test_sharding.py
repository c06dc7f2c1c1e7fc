"""FSDP2 by the scripts themselves: the same training as without, shards in checkpoints, whole weights at the end.

Accelerate has FSDP2 on GPUs alone; `ShardedOnCpus` has it share out weights on CPUs. What is untested here is NCCL.
"""

import json

import pytest
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import load_script
from copies import run_copies
from diffusers import StableDiffusionPipeline
from image_data import write_image_folder
from running import TRAIN_TEXT_TO_IMAGE_LORA, status_of
from safetensors.torch import load_file
from training import losses, parse, read_log, same, unet, words

from sdtune.commands import export
from sdtune.lora_layouts import LORA_FILE
from sdtune.sharding import check_sharding

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
SETTINGS = {
    "num_validation_samples": 3,
    "validation_steps": 2,
    "validation_prompts": ["a red circle"],
    "validation_num_inference_steps": 2,
    "checkpointing_steps": 2,
    "use_ema": True,
    "lr_scheduler": "cosine",
}


class ShardedOnCpus(Accelerator):
    """What accelerate does on GPUs when its config asks for FSDP."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 9)


@pytest.fixture
def sharded(tiny_pipeline, images, tmp_path, monkeypatch):
    """Factory: sharded(script, output_dir, number, **settings) trains in so many processes under FSDP2."""

    def run(script, output_dir, number, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(script, "Accelerator", ShardedOnCpus)
            for name, value in FSDP.items():
                patch.setenv(name, value)
            said = tmp_path / "said"
            settings = {**SETTINGS, "train_batch_size": 6 // number, **settings}
            statuses = run_copies(script, words(tiny_pipeline, images, output_dir, **settings), said, number)
        assert not any(statuses), said.read_text()

    return run


@pytest.fixture
def alone(tiny_pipeline, images, tmp_path):
    """Factory: alone(script, output_dir, **settings) trains in one process."""

    def run(script, output_dir, **settings):
        line = words(tiny_pipeline, images, output_dir, **{**SETTINGS, "train_batch_size": 6, **settings})
        assert run_copies(script, line, tmp_path / "said", 1) == [0], (tmp_path / "said").read_text()

    return run


def distance(a, b):
    """How far two models' weights, by name, are apart: AdamW makes much of the rounding of a gradient near zero, but
    of few."""
    assert a.keys() == b.keys()
    return sum((a[key].float() - b[key].float()).square().sum() for key in a).sqrt().item()


@pytest.mark.slow
def test_shards_train_as_one_process_does(train_script, tiny_pipeline, sharded, alone, tmp_path):
    """The whole UNet with its average: losses, held-out losses, the result, resumed by two processes and by three."""
    one, two, again, three = (tmp_path / name for name in ("one", "two", "again", "three"))
    settings = {"learning_rate": 1e-4}
    alone(train_script, one, **settings)
    sharded(train_script, two, 2, **settings)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    held_out = [[row["held_out_loss"] for row in read_log(run) if "held_out_loss" in row] for run in (one, two)]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)
    assert len(held_out[1]) == 3
    moved = distance(unet(one), unet(tiny_pipeline))
    assert moved > 0.01
    assert distance(unet(two), unet(one)) < 0.01 * moved
    pipeline = StableDiffusionPipeline.from_pretrained(two)
    assert same(dict(pipeline.unet.state_dict()), unet(two))
    assert json.loads((two / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    picture = "samples/step-000004.png"
    assert (two / picture).stat().st_size > 0

    # Each process wrote its own half of weights, average and moments, and none wrote a pickle.
    checkpoint = two / "checkpoint-2"
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    shards = [f"shards/shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert names == sorted(["args.json", "digests.json", "progress.json", "state.json", *shards])
    first, second = (load_file(checkpoint / name) for name in shards)
    weight = "unet.mid_block.resnets.0.conv1.weight"
    assert first[weight].shape == second[weight].shape
    assert 2 * len(first[weight]) == len(unet(two)[weight.removeprefix("unet.")])

    # One process puts them together; at the last step they are the result.
    assert status_of(export.main, two / "checkpoint-4", tmp_path / "exported") == 0
    assert same(unet(tmp_path / "exported"), unet(two))
    assert status_of(export.main, two / "checkpoint-4", tmp_path / "trained", "--weights=trained") == 0
    assert 0 < distance(unet(tmp_path / "trained"), unet(two)) < moved

    sharded(train_script, again, 2, **settings, resume_from_checkpoint=two / "checkpoint-2")
    assert same(unet(again), unet(two))
    assert losses(again) == losses(two)[2:]
    sharded(train_script, three, 3, **settings, resume_from_checkpoint=two / "checkpoint-2")
    assert losses(three) == pytest.approx(losses(two)[2:], rel=1e-5)
    assert distance(unet(three), unet(two)) < 0.01 * moved


@pytest.mark.slow
def test_adapters_are_shared_out(sharded, alone, tmp_path):
    """The base is shared out with them; what is saved is the adapters. Passes in bfloat16 are autocast as without."""
    script = load_script(TRAIN_TEXT_TO_IMAGE_LORA)
    settings = {"rank": 4, "learning_rate": 1e-2, "gradient_checkpointing": True, "use_ema": False}
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    alone(script, one, **settings)
    sharded(script, two, 2, **settings)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    whole, shared = load_file(one / LORA_FILE), load_file(two / LORA_FILE)
    assert distance(shared, whole) < 1e-3 * distance(whole, {key: 0 * value for key, value in whole.items()})
    shard = load_file(two / "checkpoint-2" / "shards" / "shard-00001-model-00001-of-00001.safetensors")
    assert all(".lora_" in name for name in shard)
    assert status_of(export.main, two / "checkpoint-4", tmp_path / "exported") == 0
    assert same(load_file(tmp_path / "exported" / LORA_FILE), shared)
    sharded(script, again, 2, **settings, resume_from_checkpoint=two / "checkpoint-2")
    assert same(load_file(again / LORA_FILE), load_file(two / LORA_FILE))

    half = [tmp_path / name for name in ("half_one", "half_two")]
    alone(script, half[0], **settings, mixed_precision="bf16")
    sharded(script, half[1], 2, **settings, mixed_precision="bf16")
    assert losses(half[1]) == pytest.approx(losses(half[0]), rel=2e-2)


@pytest.mark.parametrize(
    "variables, words, told",
    [
        ({"FSDP_VERSION": "1"}, [], "accelerate's config asks for FSDP 1, which is not obeyed; use fsdp_version: 2"),
        (
            {"FSDP_OFFLOAD_PARAMS": "true"},
            [],
            "accelerate's config asks for FSDP with fsdp_offload_params, which is not obeyed; use false, and more "
            "processes",
        ),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            [],
            "accelerate's config asks for FSDP with fsdp_activation_checkpointing, which is not obeyed; use false, "
            "and --gradient_checkpointing",
        ),
        (
            {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
            [],
            "accelerate's config asks for FSDP with fsdp_state_dict_type: FULL_STATE_DICT; use SHARDED_STATE_DICT",
        ),
        (
            {},
            ["--mixed_precision=fp16"],
            "--mixed_precision=fp16 (or accelerate's config): does not go with FSDP; use bf16",
        ),
        ({}, ["--use_8bit_adam"], "--use_8bit_adam=True: does not go with FSDP; use --optimizer=adamw"),
        ({}, ["--optimizer=prodigy"], "--optimizer=prodigy: does not go with FSDP; use --optimizer=adamw"),
        ({}, ["--compile"], "--compile=True: does not go with FSDP; drop this, or choose GPUs alone"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(monkeypatch, variables, words, told):
    for name, value in {**FSDP, **variables}.items():
        monkeypatch.setenv(name, value)
    assert check_sharding(parse(*words)) == [told]


def test_nothing_is_refused_without_it(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert check_sharding(parse("--use_8bit_adam", "--compile")) == []
