"""The single file that tests start from is what diffusers takes for an original Stable Diffusion 1 file."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from original_layout import original_state_dict, save_original

COMPONENTS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("fixture", ["tiny_pipeline", "tiny_pipeline_sd1"])
def test_single_file_gives_the_same_weights_to_the_bit(fixture, suffix, request, tmp_path):
    folder = request.getfixturevalue(fixture)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    path = save_original(pipeline, tmp_path / f"model.{suffix}")
    loaded = StableDiffusionPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, safety_checker=None
    )
    for name in COMPONENTS:
        expected, got = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert expected.keys() == got.keys(), name
        different = [key for key in expected if not torch.equal(expected[key], got[key])]
        assert not different, (name, different)
    assert loaded.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()


def test_names_are_those_of_published_files(tiny_pipeline_sd1):
    """Names known from Stable Diffusion 1 files, at the places where the numbering is easily off by one."""
    state = original_state_dict(StableDiffusionPipeline.from_pretrained(tiny_pipeline_sd1))
    prefix = "model.diffusion_model."
    for name in (
        "time_embed.2.bias",
        "input_blocks.0.0.weight",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.11.0.emb_layers.1.weight",
        "middle_block.1.proj_in.weight",
        "middle_block.2.out_layers.3.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.1.norm.weight",
        "out.2.weight",
    ):
        assert prefix + name in state
    assert prefix + "input_blocks.12.0.in_layers.0.weight" not in state
    assert prefix + "output_blocks.12.0.in_layers.0.weight" not in state
    for name in (
        "encoder.down.0.block.0.norm1.weight",
        "encoder.down.2.downsample.conv.weight",
        "encoder.mid.attn_1.q.weight",
        "decoder.up.3.upsample.conv.weight",
        "decoder.mid.block_2.conv2.bias",
        "decoder.norm_out.weight",
        "post_quant_conv.weight",
    ):
        assert "first_stage_model." + name in state
    assert state["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    name = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert name in state
