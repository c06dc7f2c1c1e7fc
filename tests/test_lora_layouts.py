"""LoRA in diffusers' and kohya's layout: both give the trained model's images, as does the merged model, and
tools/convert_lora.py turns one into the other to the bit."""

import copy
import json
import math
import os
import re
import stat
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script
from diffusers import StableDiffusionPipeline
from image_data import snapshot, write_image_folder
from peft.tuners.tuners_utils import BaseTunerLayer
from running import REPO, TRAIN_TEXT_TO_IMAGE_LORA, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_text_encoder, make_tokenizer, make_unet
from training import same, train

TOOL = REPO / "tools" / "convert_lora.py"
WEIGHTS = "pytorch_lora_weights.safetensors"
# Rank and alpha differ, so that a scale that is lost or taken twice shows.
LORA = {
    "attention": {"lora_target": "attention", "rank": 4, "lora_alpha": 2},
    "attention-rs-text": {"lora_target": "attention", "rank": 3, "lora_alpha": 2, "use_rslora": True,
                          "train_text_encoder": True},
    "ff-text": {"lora_target": "attention+ff", "rank": 2, "lora_alpha": 3, "train_text_encoder": True},
    "ff-rs": {"lora_target": "attention+ff", "rank": 4, "lora_alpha": 3, "use_rslora": True},
    "all-text": {"lora_target": "all", "rank": 4, "lora_alpha": 2, "train_text_encoder": True},
    "all-rs-text": {"lora_target": "all", "rank": 3, "lora_alpha": 1, "use_rslora": True, "train_text_encoder": True},
}
DORA = {
    "dora-attention": {"lora_target": "attention", "rank": 3, "lora_alpha": 2, "use_dora": True},
    "dora-ff-text": {"lora_target": "attention+ff", "rank": 2, "lora_alpha": 3, "use_dora": True,
                     "train_text_encoder": True},
    "dora-all-rs-text": {"lora_target": "all", "rank": 4, "lora_alpha": 2, "use_dora": True, "use_rslora": True,
                         "train_text_encoder": True},
}
ALL = LORA | DORA


@pytest.fixture(scope="module")
def tool():
    """tools/convert_lora.py as a module."""
    return load_script(TOOL)


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tmp_path_factory):
    """Factory: trained(name of a case) -> its pipeline with the adapters as training left them, and its files. The
    learning rate is high, so that the adapters matter after three steps."""
    folder, made, models = tmp_path_factory.mktemp("lora_layouts"), {}, {}
    images = write_image_folder(folder / "images", 4, 32, [f"a secretcaption circle {index}" for index in range(4)])
    script = load_script(TRAIN_TEXT_TO_IMAGE_LORA)
    save_model = script.save_model

    def save_and_keep(args, trained_models, *rest):
        models.update(trained_models)
        return save_model(args, trained_models, *rest)

    script.save_model = save_and_keep

    def make(name):
        if name not in made:
            models.clear()
            output = folder / f"secretfolder-{name}"
            assert train(script, tiny_pipeline, images, output, **ALL[name], max_train_steps=3, learning_rate=0.05,
                         output_kohya_format=True, kohya_file_name="star") == 0
            for model in models.values():
                model.eval()
            pipeline = load(tiny_pipeline, **models)
            made[name] = SimpleNamespace(pipeline=pipeline, folder=output, diffusers=output / WEIGHTS,
                                         kohya=output / "star.safetensors", settings=ALL[name])
        return made[name]

    return make


def load(folder, **parts):
    """The pipeline in a folder, in float32, `parts` in the place of its own."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, scale=None):
    """Two images of 32 x 32 pixels in [0, 1], with the adapters at `scale`."""
    return pipeline(["a red circle on the left", "a photo of a small green star"], num_inference_steps=3, height=32,
                    width=32, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="np",
                    cross_attention_kwargs=None if scale is None else {"scale": scale}).images


def with_lora(base, path, scale=None):
    """Images of the base with the LoRA file as diffusers loads it."""
    pipeline = load(base)
    pipeline.load_lora_weights(path)
    return draw(pipeline, scale)


def merged(tool, lora, base, output, *words):
    """The pipeline that the tool made of a LoRA and its base."""
    tool.main([str(lora), str(output), "--merge", str(base), *words])
    return load(output)


def weights_of(pipeline):
    """All weights of UNet and text encoder by name, with the adapters that they have merged into a copy of them."""
    weights = {}
    for part in ("unet", "text_encoder"):
        model = copy.deepcopy(getattr(pipeline, part))
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        weights |= {f"{part}.{name.replace('.base_layer', '')}": value.detach()
                    for name, value in model.named_parameters() if ".lora_" not in name}
    return weights


def apply_kohya(path, base):
    """Applies a file in kohya's layout to the weights of `base` as the format is described: W + up @ down * alpha /
    rank, for DoRA (arXiv 2402.09353, equation 5) times dora_scale over the norm, with one norm per output. All of the
    file must be used, and so must be some of it. Works from the names of the layers that the base has."""
    file, used, result = load_file(path), set(), {}
    for name, weight in weights_of(base).items():
        model, layer = name.removesuffix(".weight").split(".", 1)
        layer = f"{'lora_unet' if model == 'unet' else 'lora_te_text_model'}_{layer.replace('.', '_')}"
        result[name] = weight
        if f"{layer}.lora_down.weight" not in file:
            continue
        keys = [f"{layer}.{kind}" for kind in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")]
        down, up, alpha, length = [file[key].double() if key in file else None for key in keys]
        delta = torch.einsum("or,r...->o...", up.reshape(up.shape[:2]), down) * alpha / len(down)
        updated = weight.double() + delta
        if length is not None:
            assert length.shape == (len(weight), *[1] * (weight.ndim - 1))
            updated *= length / updated.flatten(1).norm(dim=1).reshape(length.shape)
        result[name] = updated.float()
        used |= set(keys) & file.keys()
    assert used == file.keys()
    assert used
    return result


def largest_difference(first, second):
    """The largest difference between two arrays, or between two dictionaries of tensors with the same names."""
    if isinstance(first, np.ndarray):
        return float(np.abs(first - second).max())
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def tensors(path):
    """A LoRA file's tensors; of the two names of a DoRA's lengths that peft reads, the shorter one."""
    return {key.replace("_vector.weight", "_vector"): value for key, value in load_file(path).items()}


def settings_in(path):
    """peft's settings in the header of a file in diffusers' layout."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


# ------------------------------------------------------------------------------------------------------- same images


@pytest.mark.parametrize("name", LORA)
def test_images_are_those_of_the_trained_model(tool, trained, tiny_pipeline, tmp_path, name):
    run, plain = trained(name), draw(load(tiny_pipeline))
    for scale in (1.0, 0.5):
        expected = draw(run.pipeline, scale)
        assert largest_difference(expected, plain) > 1e-2  # a hundred times what is allowed below
        assert largest_difference(with_lora(tiny_pipeline, run.folder / WEIGHTS, scale), expected) < 1e-4
        assert largest_difference(with_lora(tiny_pipeline, run.kohya, scale), expected) < 1e-4
        pipeline = merged(tool, run.folder, tiny_pipeline, tmp_path / str(scale), "--scale", str(scale))
        assert largest_difference(draw(pipeline), expected) < 1e-4
    assert largest_difference(draw(run.pipeline), with_lora(tiny_pipeline, run.folder)) < 1e-4  # scale 1 is usual
    assert largest_difference(draw(run.pipeline, 0.5), draw(run.pipeline)) > 1e-3


@pytest.mark.parametrize("name", DORA)
def test_dora_images_are_those_of_the_trained_model(tool, trained, tiny_pipeline, tmp_path, name):
    run, converted = trained(name), tmp_path / WEIGHTS
    tool.main([str(run.kohya), str(converted), "--to", "diffusers"])
    for scale in (1.0, 0.5):
        expected = draw(run.pipeline, scale)
        assert largest_difference(with_lora(tiny_pipeline, converted, scale), expected) < 1e-4
        pipeline = merged(tool, run.kohya, tiny_pipeline, tmp_path / str(scale), "--scale", str(scale))
        assert largest_difference(draw(pipeline), expected) < 1e-4
    assert largest_difference(expected, draw(load(tiny_pipeline))) > 1e-2


@pytest.mark.parametrize("name", DORA)
def test_dora_file_loads_as_trained(trained, tiny_pipeline, name):
    run = trained(name)
    assert largest_difference(with_lora(tiny_pipeline, run.folder), draw(run.pipeline)) < 1e-4


def test_unet_loads_the_adapter_by_itself(trained, tiny_pipeline):
    run, pipeline = trained("all-text"), load(tiny_pipeline)
    pipeline.unet.load_lora_adapter(run.folder, prefix="unet", weight_name=WEIGHTS)
    expected = load(tiny_pipeline, unet=run.pipeline.unet)
    assert largest_difference(draw(pipeline), draw(expected)) < 1e-4


# ------------------------------------------------------------------------------------------------------ same weights


@pytest.mark.parametrize("name", ALL)
def test_kohya_file_holds_the_trained_weights(tool, trained, tiny_pipeline, tmp_path, name):
    run, base = trained(name), load(tiny_pipeline)
    expected, result, before = weights_of(run.pipeline), apply_kohya(run.kohya, base), weights_of(base)
    assert largest_difference(expected, before) > 1e-2
    assert largest_difference(result, expected) < 2e-6  # of float32 weights of about 1, once through a product
    for lora in (run.kohya, run.diffusers):
        pipeline = merged(tool, lora, tiny_pipeline, tmp_path / lora.stem)
        assert largest_difference(weights_of(pipeline), expected) < 2e-6
    changed = [key for key in expected if not torch.equal(expected[key], before[key])]
    assert 3 * len(changed) <= len(load_file(run.kohya)) <= 4 * len(changed)  # down, up, alpha, maybe dora_scale


def test_ranks_and_alphas_of_each_layer_are_kept(tool, trained, tiny_pipeline, tmp_path):
    """A file with a rank and an alpha of its own in some layers, in half precision, one alpha missing."""
    file, base = load_file(trained("all-text").kohya), load(tiny_pipeline)
    for number, layer in enumerate(sorted({key.split(".")[0] for key in file})):
        down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
        rank = 2 if number % 3 == 0 else 4
        file[down], file[up] = file[down][:rank].clone(), file[up][:, :rank].clone()
        file[f"{layer}.alpha"] = torch.tensor(number % 2 + 0.5)
    file = {key: value.half() for key, value in file.items()}
    start, middle, end = (tmp_path / f"{name}.safetensors" for name in ("start", "middle", "end"))
    save_file(file, start)
    tool.main([str(start), str(middle), "--to", "diffusers"])
    tool.main([str(middle), str(end), "--to", "kohya"])
    assert same(load_file(end), file)
    settings = settings_in(middle)
    assert settings["unet.r"] == 4
    assert set(settings["unet.rank_pattern"].values()) == {2}
    assert set(settings["unet.alpha_pattern"].values()) | {settings["unet.lora_alpha"]} == {0.5, 1.5}
    expected = apply_kohya(start, base)
    pipeline = load(tiny_pipeline)
    pipeline.load_lora_weights(middle)
    assert largest_difference(weights_of(pipeline), expected) < 2e-6
    assert largest_difference(weights_of(merged(tool, start, tiny_pipeline, tmp_path / "merged")), expected) < 2e-6

    for key in [key for key in file if key.endswith(".alpha")]:  # without one, alpha is the rank
        del file[key]
    save_file(file, start)
    tool.main([str(start), str(middle), "--to", "diffusers", "--overwrite"])
    tool.main([str(middle), str(end), "--to", "kohya", "--overwrite"])
    assert all(value == len(file[key.replace(".alpha", ".lora_down.weight")])
               for key, value in load_file(end).items() if key.endswith(".alpha"))


# --------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ALL)
def test_there_and_back_gives_the_same_bits(tool, trained, tmp_path, name):
    run = trained(name)
    kohya, diffusers = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    tool.main([str(run.folder), str(kohya), "--to", "kohya"])
    tool.main([str(run.kohya), str(diffusers), "--to", "diffusers"])
    assert same(load_file(kohya), load_file(run.kohya))
    assert same(tensors(diffusers), tensors(run.diffusers))
    tool.main([str(kohya), str(diffusers), "--to", "diffusers", "--overwrite"])
    assert same(tensors(diffusers), tensors(run.diffusers))
    tool.main([str(diffusers), str(kohya), "--to", "kohya", "--overwrite"])
    assert same(load_file(kohya), load_file(run.kohya))

    first, second = settings_in(run.diffusers), settings_in(diffusers)
    rank, alpha = run.settings["rank"], run.settings["lora_alpha"]
    for model in ["unet", "text_encoder"] if run.settings.get("train_text_encoder") else ["unet"]:
        assert (first[f"{model}.r"], first[f"{model}.lora_alpha"]) == (rank, alpha)
        rs = run.settings.get("use_rslora", False)
        assert second[f"{model}.lora_alpha"] == pytest.approx(alpha * math.sqrt(rank) if rs else alpha)
        assert (first[f"{model}.use_rslora"], second[f"{model}.use_rslora"]) == (rs, False)
        for key in ("r", "use_dora", "rank_pattern", "alpha_pattern", "base_model_name_or_path"):
            assert first[f"{model}.{key}"] == second[f"{model}.{key}"]
    assert first.keys() == second.keys()


def test_a_converted_file_loads_with_its_scale(tool, trained, tiny_pipeline, tmp_path):
    run = trained("all-rs-text")
    tool.main([str(run.kohya), str(tmp_path / WEIGHTS), "--to", "diffusers"])
    assert largest_difference(with_lora(tiny_pipeline, tmp_path), draw(run.pipeline)) < 1e-4


def test_older_names_of_diffusers_are_read(tool, trained, tmp_path):
    run = trained("ff-text")
    file, older, old, result = load_file(run.diffusers), {}, tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    for key, value in file.items():
        kind = "lora_linear_layer" if key.startswith("text") else "lora"
        key = key.replace("lora_A", f"{kind}.down").replace("lora_B", f"{kind}.up")
        older[key.replace("text_encoder.", "text_encoder.text_model.")] = value
    with safe_open(run.diffusers, "pt") as opened:
        header = opened.metadata()
    save_file(older, old, header)
    tool.main([str(old), str(result), "--to", "kohya"])
    assert same(load_file(result), load_file(run.kohya))
    save_file(older, old)  # and without a header: the alpha is the rank
    tool.main([str(old), str(result), "--to", "kohya", "--overwrite"])
    assert {value.item() for key, value in load_file(result).items() if key.endswith("alpha")} == {2.0}


def test_names_of_all_layers_survive_kohyas_underscores(tool):
    with torch.device("meta"):
        models = [make_unet(4, 2), make_unet(use_linear_projection=True), make_text_encoder(make_tokenizer())]
    layers = {name for model in models for name, module in model.named_modules()
              if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    assert {"time_embedding.linear_1", "conv_in", "up_blocks.1.upsamplers.0.conv", "mid_block.resnets.1.time_emb_proj",
            "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj", "encoder.layers.0.mlp.fc1"} <= layers
    assert {name: tool.layer_name(name.replace(".", "_")) for name in layers} == {name: name for name in layers}


# ----------------------------------------------------------------------------------------------------------- headers


def test_headers_tell_rank_and_alpha_and_no_secrets(tool, trained, tmp_path):
    run, converted = trained("all-rs-text"), tmp_path / "comet.safetensors"
    tool.main([str(run.folder), str(converted), "--to", "kohya"])
    for path, name in ((run.kohya, "star"), (converted, "comet")):
        with safe_open(path, "pt") as file:
            header = file.metadata()
        assert header["ss_network_module"] == "networks.lora"
        assert header["ss_network_dim"] == "3"
        assert float(header["ss_network_alpha"]) == pytest.approx(math.sqrt(3))
        assert header["ss_output_name"] == name
    for path in (run.kohya, run.diffusers, converted):
        content = path.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
        for secret in ("secretcaption", "circle", "secretfolder", tempfile.gettempdir(), str(REPO)):
            assert secret not in header
        assert not re.search(r"/(?!lora)", header)  # no path at all: the one slash is in stable-diffusion-v1/lora


# ------------------------------------------------------------------------------------------------------------ mistakes


def refused(tool, capsys, *words):
    """The message with which the tool ends, which must be one line without a traceback, and its status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        tool.main([str(word) for word in words])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("convert_lora.py: ")
    return message


def test_existing_output_is_kept_unless_told(tool, trained, tiny_pipeline, tmp_path, capsys):
    run, file, folder = trained("attention"), tmp_path / "sub" / "a.safetensors", tmp_path / "model"
    convert, merge = (run.folder, file, "--to", "kohya"), (run.folder, folder, "--merge", tiny_pipeline)
    umask = os.umask(0o027)
    try:
        tool.main([str(word) for word in convert])
        tool.main([str(word) for word in merge])
    finally:
        os.umask(umask)
    for path in (file, *folder.rglob("*.safetensors")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    before, base = snapshot(tmp_path), snapshot(tiny_pipeline)
    for words in (convert, merge):
        assert "exists; give another name, or --overwrite" in refused(tool, capsys, *words)
    assert snapshot(tmp_path) == before
    file.write_text("other")
    (folder / "unet" / "config.json").write_text("other")
    for words in (convert, merge):
        tool.main([str(word) for word in (*words, "--overwrite")])
    assert snapshot(tmp_path).keys() == before.keys()  # nothing of the work beside it is left
    assert file.read_text(errors="replace") != "other"
    load(folder)
    (folder / "photos").mkdir()
    assert "holds photos, which is no part of a pipeline" in refused(tool, capsys, *merge, "--overwrite")
    assert "is a file" in refused(tool, capsys, run.folder, file, "--merge", tiny_pipeline, "--overwrite")
    output = tmp_path / "b.safetensors"
    output.mkdir()
    assert "is a folder" in refused(tool, capsys, run.folder, output, "--to", "kohya", "--overwrite")
    assert (folder / "photos").is_dir()
    assert snapshot(tiny_pipeline) == base


def test_files_of_other_kinds_are_refused_by_name(tool, trained, tmp_path, capsys):
    kohya, diffusers = load_file(trained("dora-attention").kohya), load_file(trained("dora-attention").diffusers)
    one, layer = torch.ones(2, 2), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    without_up = {key: value for key, value in kohya.items() if key != f"{layer}.lora_up.weight"}
    per_input = {**kohya, f"{layer}.dora_scale": torch.ones(1, 64)}
    cases = {
        "is of LoKr": {f"{layer}.lokr_w1": one},
        "is of LoHa": {f"{layer}.hada_w1_a": one},
        "is of LoCon with three factors": kohya | {f"{layer}.lora_mid.weight": one},
        "is of Stable Diffusion XL (lora_te1": {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": one},
        "is of Stable Diffusion XL (lora_te2": kohya | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": one},
        "is of Stable Diffusion XL (text_encoder_2": diffusers | {"text_encoder_2.layers.0.fc1.lora_A.weight": one},
        "is of Stable Diffusion XL (lora_unet_input": {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": one},
        "is of a transformer": {"transformer.single_blocks.0.lora_A.weight": one},
        "holds conv.weight, which is in neither": {"conv.weight": one},
        "holds nothing, which is in neither": {},
        "mixes diffusers' and kohya's layout": kohya | diffusers,
        f"lacks a part of unet.{tool.layer_name(layer.removeprefix('lora_unet_'))}": without_up,
        "has a length per input of unet.mid_block": per_input,
        "the alpha of unet.mid_block": {**kohya, f"{layer}.alpha": torch.tensor(math.nan)},
        "has a layer unet.blocks, which Stable": {"unet.blocks.lora_A.weight": one},
    }
    path, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    for message, content in cases.items():
        save_file(content, path)
        assert message in refused(tool, capsys, path, output, "--to", "kohya")
    path.write_bytes(b"PK not safetensors")
    assert "is no LoRA in a .safetensors file" in refused(tool, capsys, path, output, "--to", "kohya")
    assert not output.exists()


def test_wrong_words_are_refused(tool, trained, tiny_pipeline, tmp_path, capsys):
    run, output, folder = trained("attention"), tmp_path / "out.safetensors", tmp_path / "model"
    for message, words in {
        "does not exist; give a LoRA file": (tmp_path / "no.safetensors", output, "--to", "kohya"),
        f"{WEIGHTS}: does not exist": (tmp_path, output, "--to", "kohya"),
        "is in the layout of kohya already": (run.kohya, output, "--to", "kohya"),
        "is in the layout of diffusers already": (run.folder, output, "--to", "diffusers"),
        "end the name of the file to write in .safetensors": (run.folder, folder, "--to", "kohya"),
        "--scale=0.5: is for --merge": (run.folder, output, "--to", "kohya", "--scale", "0.5"),
        "--scale=nan: give a number": (run.folder, folder, "--merge", tiny_pipeline, "--scale", "nan"),
        "is no pipeline folder with a model_index.json": (run.folder, folder, "--merge", run.folder),
        "holds what is read": (run.folder, tiny_pipeline, "--merge", tiny_pipeline, "--overwrite"),
        f"{WEIGHTS}: holds what is read": (run.folder, run.diffusers, "--to", "kohya", "--overwrite"),
    }.items():
        assert message in refused(tool, capsys, *words)
    for words in (["a", "b"], ["a", "b", "--to", "other"], ["a", "b", "--to", "kohya", "--merge", "c"], ["a"]):
        with pytest.raises(SystemExit) as stop:
            tool.main(words)
        assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_lora_of_another_base_is_not_merged(tool, trained, tiny_pipeline, tmp_path, capsys):
    file = load_file(trained("attention").kohya)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path, output = tmp_path / "in.safetensors", tmp_path / "out"
    save_file({**file, f"{layer}.lora_down.weight": torch.ones(4, 320)}, path)
    message = refused(tool, capsys, path, output, "--merge", tiny_pipeline)
    assert "attn1.to_q of shape (64, 64), the LoRA is for (64, 320); give the base" in message
    save_file({key.replace("mid_block", "down_blocks_3"): value for key, value in file.items()}, path)
    assert "of shape None" in refused(tool, capsys, path, output, "--merge", tiny_pipeline)
    sdxl = tmp_path / "xl"
    sdxl.mkdir()
    (sdxl / "model_index.json").write_text('{"unet": [], "text_encoder": [], "text_encoder_2": []}')
    assert "is no Stable Diffusion 1 or 2" in refused(tool, capsys, path, output, "--merge", sdxl)
    (sdxl / "model_index.json").write_text('{"unet": [], "text_encoder": []}')
    assert "cannot be loaded" in refused(tool, capsys, path, output, "--merge", sdxl)
    assert not output.exists()


def test_the_tool_runs_alone(trained, tmp_path):
    script = tmp_path / "convert_lora.py"
    script.write_bytes(TOOL.read_bytes())
    run = trained("attention")
    done = run_script([run.kohya, "out.safetensors", "--to", "diffusers"], script=script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Wrote out.safetensors: ")
    assert same(load_file(tmp_path / "out.safetensors"), load_file(run.diffusers))
