"""LoRA in diffusers' and kohya's layout: both give the trained model's images, as does the merged model, and
`sdtune convert-lora` turns one into the other to the bit."""

import copy
import dataclasses
import json
import math
import os
import re
import stat
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script
from diffusers import StableDiffusionPipeline
from image_data import snapshot, write_image_folder
from peft.tuners.tuners_utils import BaseTunerLayer
from running import REPO, TRAIN_TEXT_TO_IMAGE_LORA, run_command
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_text_encoder, make_tokenizer, make_unet
from training import same, train

from sdtune.__main__ import main as sdtune_main
from sdtune.commands import convert_lora
from sdtune.lora_layouts import layer_name

WEIGHTS = "pytorch_lora_weights.safetensors"
PROMPTS = ["a red circle on the left", "a photo of a small green star"]
TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"  # in kohya's layout
# Rank and alpha differ, so that a scale that is lost or taken twice shows.
LORA = {
    "attention": {"lora_target": "attention", "rank": 4, "lora_alpha": 2},
    "attention-rs-text": {
        "lora_target": "attention",
        "rank": 3,
        "lora_alpha": 2,
        "use_rslora": True,
        "train_text_encoder": True,
    },
    "ff-text": {"lora_target": "attention+ff", "rank": 2, "lora_alpha": 3, "train_text_encoder": True},
    "ff-rs": {"lora_target": "attention+ff", "rank": 4, "lora_alpha": 3, "use_rslora": True},
    "all-text": {"lora_target": "all", "rank": 4, "lora_alpha": 2, "train_text_encoder": True},
    "all-rs-text": {"lora_target": "all", "rank": 3, "lora_alpha": 1, "use_rslora": True, "train_text_encoder": True},
}
DORA = {
    "dora-attention": {"lora_target": "attention", "rank": 3, "lora_alpha": 2, "use_dora": True},
    "dora-ff-text": {
        "lora_target": "attention+ff",
        "rank": 2,
        "lora_alpha": 3,
        "use_dora": True,
        "train_text_encoder": True,
    },
    "dora-all-rs-text": {
        "lora_target": "all",
        "rank": 4,
        "lora_alpha": 2,
        "use_dora": True,
        "use_rslora": True,
        "train_text_encoder": True,
    },
}
ALL = LORA | DORA


@dataclasses.dataclass
class TrainedLora:
    """A training's settings, its pipeline with the adapters as training left them, and what it wrote."""

    settings: dict
    pipeline: StableDiffusionPipeline
    folder: Path
    drawn: dict = dataclasses.field(default_factory=dict)  # images by scale
    merged: dict = dataclasses.field(default_factory=dict)  # pipelines by layout

    @property
    def diffusers(self):
        """The file in diffusers' layout."""
        return self.folder / WEIGHTS

    @property
    def kohya(self):
        """The file in kohya's layout."""
        return self.folder / "star.safetensors"

    def images(self, scale):
        """What the pipeline draws with its adapters at a scale."""
        if scale not in self.drawn:
            self.drawn[scale] = draw(self.pipeline, scale)
        return self.drawn[scale]

    def merged_from(self, layout, base):
        """The pipeline made of the base and the file in a layout."""
        if layout not in self.merged:
            lora = self.kohya if layout == "kohya" else self.diffusers
            self.merged[layout] = merged(lora, base, self.folder.with_name(f"{self.folder.name}-{layout}"))
        return self.merged[layout]


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tmp_path_factory):
    """Factory: trained(name of a case) -> TrainedLora. The learning rate is high, so that the adapters matter after
    three steps."""
    folder = tmp_path_factory.mktemp("lora_layouts")
    images = write_image_folder(folder / "images", 4, 32, [f"a secretcaption circle {index}" for index in range(4)])
    script = load_script(TRAIN_TEXT_TO_IMAGE_LORA)
    save_model = script.save_model
    made, models = {}, {}

    def save_and_keep(args, pipeline, trained_models, *rest):
        models.update(trained_models)
        return save_model(args, pipeline, trained_models, *rest)

    script.save_model = save_and_keep

    def make(name):
        if name in made:
            return made[name]
        models.clear()
        output = folder / f"secretfolder-{name}"
        settings = {
            **ALL[name],
            "max_train_steps": 3,
            "learning_rate": 0.05,
            "output_kohya_format": True,
            "kohya_file_name": "star",
        }
        assert train(script, tiny_pipeline, images, output, **settings) == 0
        for model in models.values():
            model.eval()
        made[name] = TrainedLora(ALL[name], load(tiny_pipeline, **models), output)
        return made[name]

    return make


@pytest.fixture(scope="module")
def plain(tiny_pipeline):
    """What the base draws."""
    return draw(load(tiny_pipeline))


@pytest.fixture(scope="module")
def base_weights(tiny_pipeline):
    """The base's weights."""
    return weights_of(load(tiny_pipeline))


@pytest.fixture
def refused(capsys):
    """Runs the command, which must refuse with status 2 and one line, and returns that."""

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            convert(*words)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert message.startswith("sdtune convert-lora: ")
        return message

    return run


def load(folder, **parts):
    """The pipeline in a folder, in float32, `parts` in the place of its own."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, scale=None):
    """Two images of 32 x 32 pixels in [0, 1], with the adapters at `scale`."""
    return pipeline(
        PROMPTS,
        num_inference_steps=3,
        height=32,
        width=32,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        cross_attention_kwargs=None if scale is None else {"scale": scale},
    ).images


def with_lora(base, path, scale=None):
    """Images of the base with the LoRA file as diffusers loads it."""
    pipeline = load(base)
    pipeline.load_lora_weights(path)
    return draw(pipeline, scale)


def convert(*words):
    """Runs the command in this process."""
    convert_lora.main([str(word) for word in words])


def merged(lora, base, output, *words):
    """The pipeline that the command made of a LoRA and its base."""
    convert(lora, output, "--merge", base, *words)
    return load(output)


def weights_of(pipeline):
    """All weights of UNet and text encoder by name, with the adapters that they have merged into a copy of them."""
    weights = {}
    for part in ("unet", "text_encoder"):
        model = copy.deepcopy(getattr(pipeline, part))
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        for name, value in model.named_parameters():
            if ".lora_" not in name:
                weights[f"{part}.{name.replace('.base_layer', '')}"] = value.detach()
    return weights


def apply_kohya(path, base_weights):
    """Applies a file in kohya's layout to the weights of a base as the format is described: W + up @ down * alpha /
    rank, for DoRA (arXiv 2402.09353, equation 5) times dora_scale over the norm, with one norm per output. All of the
    file must be used, and so must be some of it. Works from the names of the layers that the base has."""
    file, used, result = load_file(path), set(), {}
    for name, weight in base_weights.items():
        model, layer = name.removesuffix(".weight").split(".", 1)
        prefix = "lora_unet" if model == "unet" else "lora_te_text_model"
        layer = f"{prefix}_{layer.replace('.', '_')}"
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


def header(path):
    """The strings in a file's header, by name."""
    with safe_open(path, "pt") as file:
        return file.metadata()


def settings_in(path):
    """peft's settings in the header of a file in diffusers' layout."""
    return json.loads(header(path)["lora_adapter_metadata"])


# ------------------------------------------------------------------------------------------------------- same images
@pytest.mark.parametrize("name", LORA)
def test_images_are_those_of_the_trained_model(trained, tiny_pipeline, plain, tmp_path, name):
    run = trained(name)
    whole = run.merged_from("diffusers", tiny_pipeline)
    half = merged(run.folder, tiny_pipeline, tmp_path / "half", "--scale", 0.5)
    for scale, pipeline in ((1.0, whole), (0.5, half)):
        expected = run.images(scale)
        assert largest_difference(expected, plain) > 1e-2  # a hundred times what is allowed below
        assert largest_difference(with_lora(tiny_pipeline, run.diffusers, scale), expected) < 1e-4
        assert largest_difference(with_lora(tiny_pipeline, run.kohya, scale), expected) < 1e-4
        assert largest_difference(draw(pipeline), expected) < 1e-4
    usual = run.images(None)
    assert largest_difference(usual, with_lora(tiny_pipeline, run.folder)) < 1e-4  # which is at scale 1
    assert largest_difference(run.images(0.5), usual) > 1e-3


@pytest.mark.parametrize("name", DORA)
def test_dora_images_are_those_of_the_trained_model(trained, tiny_pipeline, plain, tmp_path, name):
    run, converted = trained(name), tmp_path / WEIGHTS
    convert(run.kohya, converted, "--to", "diffusers")
    whole = run.merged_from("kohya", tiny_pipeline)
    half = merged(run.kohya, tiny_pipeline, tmp_path / "half", "--scale", 0.5)
    for scale, pipeline in ((1.0, whole), (0.5, half)):
        expected = run.images(scale)
        assert largest_difference(with_lora(tiny_pipeline, converted, scale), expected) < 1e-4
        assert largest_difference(draw(pipeline), expected) < 1e-4
    assert largest_difference(run.images(0.5), plain) > 1e-2


@pytest.mark.parametrize("name", DORA)
def test_dora_file_loads_as_trained(trained, tiny_pipeline, name):
    run = trained(name)
    assert largest_difference(with_lora(tiny_pipeline, run.folder), run.images(None)) < 1e-4


def test_unet_loads_the_adapter_by_itself(trained, tiny_pipeline):
    run, pipeline = trained("all-text"), load(tiny_pipeline)
    pipeline.unet.load_lora_adapter(run.folder, prefix="unet", weight_name=WEIGHTS)
    expected = load(tiny_pipeline, unet=run.pipeline.unet)
    assert largest_difference(draw(pipeline), draw(expected)) < 1e-4


# ------------------------------------------------------------------------------------------------------ same weights
@pytest.mark.parametrize("name", ALL)
def test_kohya_file_holds_the_trained_weights(trained, tiny_pipeline, base_weights, name):
    run = trained(name)
    expected = weights_of(run.pipeline)
    assert largest_difference(expected, base_weights) > 1e-2
    # Of float32 weights of about 1, once through a product.
    assert largest_difference(apply_kohya(run.kohya, base_weights), expected) < 2e-6
    for layout in ("kohya", "diffusers"):
        assert largest_difference(weights_of(run.merged_from(layout, tiny_pipeline)), expected) < 2e-6
    changed = [key for key in expected if not torch.equal(expected[key], base_weights[key])]
    assert 3 * len(changed) <= len(load_file(run.kohya)) <= 4 * len(changed)  # down, up, alpha, maybe dora_scale


def test_ranks_and_alphas_of_each_layer_are_kept(trained, tiny_pipeline, base_weights, tmp_path):
    """A file with a rank and an alpha of its own in some layers, in half precision."""
    file = {}
    whole = load_file(trained("all-text").kohya)
    for number, layer in enumerate(sorted({key.split(".")[0] for key in whole})):
        rank = 2 if number % 3 == 0 else 4
        file[f"{layer}.lora_down.weight"] = whole[f"{layer}.lora_down.weight"][:rank].half()
        file[f"{layer}.lora_up.weight"] = whole[f"{layer}.lora_up.weight"][:, :rank].half()
        file[f"{layer}.alpha"] = torch.tensor(number % 2 + 0.5).half()
    assert file.keys() == whole.keys()
    file = {key: value.contiguous() for key, value in file.items()}
    start, middle, end = [tmp_path / f"{name}.safetensors" for name in ("start", "middle", "end")]
    save_file(file, start)
    convert(start, middle, "--to", "diffusers")
    convert(middle, end, "--to", "kohya")
    assert same(load_file(end), file)

    settings = settings_in(middle)
    assert settings["unet.r"] == 4
    assert set(settings["unet.rank_pattern"].values()) == {2}
    assert {settings["unet.lora_alpha"], *settings["unet.alpha_pattern"].values()} == {0.5, 1.5}
    expected = apply_kohya(start, base_weights)
    pipeline = load(tiny_pipeline)
    pipeline.load_lora_weights(middle)
    assert largest_difference(weights_of(pipeline), expected) < 2e-6
    assert largest_difference(weights_of(merged(start, tiny_pipeline, tmp_path / "merged")), expected) < 2e-6


def test_without_an_alpha_it_is_the_rank(trained, tmp_path):
    start, middle, end = [tmp_path / f"{name}.safetensors" for name in ("start", "middle", "end")]
    whole = load_file(trained("all-text").kohya)
    file = {key: value for key, value in whole.items() if not key.endswith(".alpha")}
    save_file(file, start)
    convert(start, middle, "--to", "diffusers")
    convert(middle, end, "--to", "kohya")
    result = load_file(end)
    assert result.keys() == whole.keys()
    for key in whole.keys() - file.keys():
        assert result[key] == len(file[key.replace(".alpha", ".lora_down.weight")]) == 4


# --------------------------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("name", ALL)
def test_there_and_back_gives_the_same_bits(trained, tmp_path, name):
    run = trained(name)
    kohya, diffusers = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    convert(run.folder, kohya, "--to", "kohya")
    convert(run.kohya, diffusers, "--to", "diffusers")
    assert same(load_file(kohya), load_file(run.kohya))
    assert same(tensors(diffusers), tensors(run.diffusers))
    convert(kohya, diffusers, "--to", "diffusers", "--overwrite")
    assert same(tensors(diffusers), tensors(run.diffusers))
    convert(diffusers, kohya, "--to", "kohya", "--overwrite")
    assert same(load_file(kohya), load_file(run.kohya))

    first, second = settings_in(run.diffusers), settings_in(diffusers)
    rank, alpha = run.settings["rank"], run.settings["lora_alpha"]
    use_rslora = run.settings.get("use_rslora", False)
    scaled_alpha = alpha * math.sqrt(rank) if use_rslora else alpha
    for model in ["unet", "text_encoder"] if run.settings.get("train_text_encoder") else ["unet"]:
        assert first[f"{model}.r"] == rank
        assert first[f"{model}.lora_alpha"] == alpha
        assert second[f"{model}.lora_alpha"] == pytest.approx(scaled_alpha)
        assert first[f"{model}.use_rslora"] == use_rslora
        assert second[f"{model}.use_rslora"] is False
        for key in ("r", "use_dora", "rank_pattern", "alpha_pattern", "base_model_name_or_path"):
            assert first[f"{model}.{key}"] == second[f"{model}.{key}"]
    assert first.keys() == second.keys()


def test_a_converted_file_loads_with_its_scale(trained, tiny_pipeline, tmp_path):
    run = trained("all-rs-text")
    convert(run.kohya, tmp_path / WEIGHTS, "--to", "diffusers")
    assert largest_difference(with_lora(tiny_pipeline, tmp_path), run.images(None)) < 1e-4


@pytest.mark.parametrize("level", ["", "text_model."])
def test_older_names_of_diffusers_are_read(trained, tmp_path, level):
    """Also without the level of the text encoder, as these scripts wrote them for a while."""
    run = trained("ff-text")
    old, result = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    file = {}
    for key, value in load_file(run.diffusers).items():
        kind = "lora_linear_layer" if key.startswith("text") else "lora"
        key = key.replace("lora_A", f"{kind}.down").replace("lora_B", f"{kind}.up")
        file[key.replace("text_encoder.text_model.", f"text_encoder.{level}")] = value
    assert file.keys() != load_file(run.diffusers).keys()
    save_file(file, old, header(run.diffusers))
    convert(old, result, "--to", "kohya")
    assert same(load_file(result), load_file(run.kohya))
    save_file(file, old)  # and without a header: the alpha is the rank
    convert(old, result, "--to", "kohya", "--overwrite")
    alphas = [value.item() for key, value in load_file(result).items() if key.endswith("alpha")]
    assert set(alphas) == {2.0}


def test_names_of_all_layers_survive_kohyas_underscores():
    with torch.device("meta"):
        models = [make_unet(4, 2), make_unet(use_linear_projection=True), make_text_encoder(make_tokenizer())]
    layers = set()
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                layers.add(name)
    assert layers >= {
        "time_embedding.linear_1",
        "conv_in",
        "up_blocks.1.upsamplers.0.conv",
        "mid_block.resnets.1.time_emb_proj",
        "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj",
        "encoder.layers.0.mlp.fc1",
    }
    for name in layers:
        assert layer_name(name.replace(".", "_")) == name


# ----------------------------------------------------------------------------------------------------------- headers
def test_headers_tell_rank_and_alpha_and_no_secrets(trained, tmp_path):
    run, converted = trained("all-rs-text"), tmp_path / "comet.safetensors"
    convert(run.folder, converted, "--to", "kohya")
    for path, name in ((run.kohya, "star"), (converted, "comet")):
        told = header(path)
        assert told["ss_network_module"] == "networks.lora"
        assert told["ss_network_dim"] == "3"
        assert float(told["ss_network_alpha"]) == pytest.approx(math.sqrt(3))
        assert told["ss_output_name"] == name
    for path in (run.kohya, run.diffusers, converted):
        content = path.read_bytes()
        text = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
        for secret in ("secretcaption", "circle", "secretfolder", tempfile.gettempdir(), str(REPO)):
            assert secret not in text
        assert not re.search(r"/(?!lora)", text)  # no path at all: the one slash is in stable-diffusion-v1/lora


def test_a_merge_says_one_line(trained, tiny_pipeline, tmp_path):
    """Whatever libraries would say, as they are first imported."""
    result = run_command(["convert-lora", trained("attention").folder, "out", "--merge", tiny_pipeline], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"Wrote out: \d+ layers of rank \d+\.\n", result.stdout)


# ------------------------------------------------------------------------------------------------------------ mistakes
def test_existing_output_is_kept_unless_told(trained, tiny_pipeline, tmp_path, refused):
    run, file, folder = trained("attention"), tmp_path / "sub" / "a.safetensors", tmp_path / "model"
    to_file, to_folder = (run.folder, file, "--to", "kohya"), (run.folder, folder, "--merge", tiny_pipeline)
    umask = os.umask(0o027)
    try:
        convert(*to_file)
        convert(*to_folder)
    finally:
        os.umask(umask)
    for path in (file, *folder.rglob("*.safetensors")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    before, base = snapshot(tmp_path), snapshot(tiny_pipeline)
    for words in (to_file, to_folder):
        assert "exists; give another name, or --overwrite" in refused(*words)
    assert snapshot(tmp_path) == before
    file.write_text("other")
    (folder / "unet" / "config.json").write_text("other")
    for words in (to_file, to_folder):
        convert(*words, "--overwrite")
    assert snapshot(tmp_path).keys() == before.keys()  # nothing of the work beside it is left
    assert file.read_text(errors="replace") != "other"
    load(folder)

    (folder / "photos").mkdir()
    assert "holds photos, which is no part of a pipeline" in refused(*to_folder, "--overwrite")
    assert "is a file" in refused(run.folder, file, "--merge", tiny_pipeline, "--overwrite")
    output = tmp_path / "b.safetensors"
    output.mkdir()
    assert "is a folder" in refused(run.folder, output, "--to", "kohya", "--overwrite")
    assert (folder / "photos").is_dir()
    assert snapshot(tiny_pipeline) == base


def test_files_of_other_kinds_are_refused_by_name(trained, tmp_path, refused):
    run = trained("dora-attention")
    kohya, diffusers = load_file(run.kohya), load_file(run.diffusers)
    one = torch.ones(2, 2)
    without_up = {key: value for key, value in kohya.items() if key != f"{TO_Q}.lora_up.weight"}
    cases = {
        "is of LoKr": {f"{TO_Q}.lokr_w1": one},
        "is of LoHa": {f"{TO_Q}.hada_w1_a": one},
        "is of LoCon with three factors": {**kohya, f"{TO_Q}.lora_mid.weight": one},
        "is of Stable Diffusion XL (lora_te1": {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": one},
        "is of Stable Diffusion XL (lora_te2": {**kohya, "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": one},
        "is of Stable Diffusion XL (text_encoder_2": {**diffusers, "text_encoder_2.layers.0.fc1.lora_A.weight": one},
        "is of Stable Diffusion XL (lora_unet_input": {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": one},
        "is of a transformer": {"transformer.single_blocks.0.lora_A.weight": one},
        "holds conv.weight, which is in neither": {"conv.weight": one},
        "holds nothing, which is in neither": {},
        "mixes diffusers' and kohya's layout": {**kohya, **diffusers},
        f"lacks a part of unet.{layer_name(TO_Q.removeprefix('lora_unet_'))}": without_up,
        "has a length per input of unet.mid_block": {**kohya, f"{TO_Q}.dora_scale": torch.ones(1, 64)},
        "the alpha of unet.mid_block": {**kohya, f"{TO_Q}.alpha": torch.tensor(math.nan)},
        "has a layer unet.blocks, which Stable": {"unet.blocks.lora_A.weight": one},
    }
    path, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    for message, content in cases.items():
        save_file(content, path)
        assert message in refused(path, output, "--to", "kohya")
    path.write_bytes(b"PK not safetensors")
    assert "is no LoRA in a .safetensors file" in refused(path, output, "--to", "kohya")
    assert not output.exists()


def test_wrong_words_are_refused(trained, tiny_pipeline, tmp_path, refused):
    run, output, folder = trained("attention"), tmp_path / "out.safetensors", tmp_path / "model"
    cases = {
        "does not exist; give a LoRA file": (tmp_path / "no.safetensors", output, "--to", "kohya"),
        f"{WEIGHTS}: does not exist": (tmp_path, output, "--to", "kohya"),
        "is in the layout of kohya already": (run.kohya, output, "--to", "kohya"),
        "is in the layout of diffusers already": (run.folder, output, "--to", "diffusers"),
        "end the name of the file to write in .safetensors": (run.folder, folder, "--to", "kohya"),
        "--scale=0.5: is for --merge": (run.folder, output, "--to", "kohya", "--scale", "0.5"),
        "--scale: must be a number, such as 1.0": (run.folder, folder, "--merge", tiny_pipeline, "--scale", "nan"),
        "is no pipeline folder with a model_index.json": (run.folder, folder, "--merge", run.folder),
        "holds what is read": (run.folder, tiny_pipeline, "--merge", tiny_pipeline, "--overwrite"),
        f"{WEIGHTS}: holds what is read": (run.folder, run.diffusers, "--to", "kohya", "--overwrite"),
        "give either --to, a layout to convert to, or --merge": ("a", "b"),
        "--to: invalid choice: 'other'": (run.folder, folder, "--merge", tiny_pipeline, "--to", "other"),
        "give what to read and what to write": ("a",),
    }
    for message, words in cases.items():
        assert message in refused(*words)
    assert "either --to" in refused("a", "b", "--to", "kohya", "--merge", "c")
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_told_at_once(tiny_pipeline, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        convert(tmp_path / "a.safetensors", tiny_pipeline, "--merge", tmp_path, "--scale", "x")
    assert stop.value.code == 2
    first, *problems = capsys.readouterr().err.splitlines()
    assert first.strip() == "sdtune convert-lora:"
    assert len(problems) == 4
    assert "--scale: must be" in problems[0]
    assert "does not exist" in problems[1]
    assert "is no pipeline folder" in problems[2]
    assert "exists; give another name" in problems[3]


def test_a_lora_of_another_base_is_not_merged(trained, tiny_pipeline, tmp_path, refused):
    file = load_file(trained("attention").kohya)
    path, output = tmp_path / "in.safetensors", tmp_path / "out"
    save_file({**file, f"{TO_Q}.lora_down.weight": torch.ones(4, 320)}, path)
    message = refused(path, output, "--merge", tiny_pipeline)
    assert "attn1.to_q of shape (64, 64), the LoRA is for (64, 320); give the base" in message
    save_file({key.replace("mid_block", "down_blocks_3"): value for key, value in file.items()}, path)
    assert "of shape None" in refused(path, output, "--merge", tiny_pipeline)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"unet": [], "text_encoder": [], "text_encoder_2": []}')
    assert "is no Stable Diffusion 1 or 2" in refused(path, output, "--merge", other)
    (other / "model_index.json").write_text('{"unet": [], "text_encoder": []}')
    assert "cannot be loaded" in refused(path, output, "--merge", other)
    assert not output.exists()


def test_as_one_of_the_commands(trained, tmp_path, monkeypatch, capsys):
    run = trained("attention")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sdtune"])  # which the command changes
    assert not sdtune_main(["convert-lora", str(run.kohya), "out.safetensors", "--to", "diffusers"])
    num_layers = len(load_file(run.diffusers)) // 2
    assert capsys.readouterr().out == f"Wrote out.safetensors: {num_layers} layers of rank 4.\n"
    assert same(load_file(tmp_path / "out.safetensors"), load_file(run.diffusers))
