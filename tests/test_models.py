"""A base that cannot be trained is refused by its configs, before any of its weights is read."""

import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import XFormersAttnProcessor
from fake_hub import files_of
from reach_hub import reaching
from running import TRAIN_DREAMBOOTH, TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA
from tiny import changed_pipeline, make_scheduler
from training import parse, same

from sdtune.clip import check_clip
from sdtune.errors import InputError
from sdtune.inference import read_configs
from sdtune.models import (
    check_model,
    drop_weights,
    enable_memory_savers,
    frozen,
    load_base,
    load_tokenizer,
    load_unet,
    make_noise_scheduler,
    on_device,
    read_latent_layout,
    read_num_timesteps,
    with_whole_parts,
)
from sdtune.plan import warn_of_name


def flags(model, *words):
    return parse(f"--pretrained_model_name_or_path={model}", "--resolution=32", *words)


def test_stable_diffusion_is_right(tiny_pipeline, tiny_pipeline_v, tiny_pipeline_sd1):
    for model in (tiny_pipeline, tiny_pipeline_v, tiny_pipeline_sd1):
        assert check_model(flags(model)) == []


@pytest.mark.parametrize("model", ["no/such_folder/at_all", "nobody/nothing", "./nowhere"])
def test_a_model_that_is_nowhere_is_named(model):
    (problem,) = check_model(flags(model))
    told = "there is no such folder here"
    if model == "nobody/nothing":  # which the Hub could have
        told += ", no whole copy in the Hub's cache, and HF_HUB_OFFLINE=1 is set; drop that, or name one that is whole"
    else:
        told += "; name one that is whole"
    assert problem == f"{model}: {told}"


@pytest.mark.parametrize("name, meant", [("tiny_pipelin", "tiny_pipeline"), ("another", None)])
def test_a_model_that_is_not_here_is_told_by_what_is(tiny_pipeline, name, meant, tmp_path, monkeypatch):
    """By its path, and by a name that the Hub could have, too, which is not asked."""
    (tmp_path / "tiny_pipeline").symlink_to(tiny_pipeline)
    beside = f" (did you mean {tmp_path / meant}?)" if meant else ""
    (problem,) = check_model(flags(tmp_path / name))
    assert problem == f"{tmp_path / name}: there is no such folder here{beside}; name one that is whole"
    monkeypatch.chdir(tmp_path)
    beside = f" (did you mean {meant}?)" if meant else ""
    offline = "no whole copy in the Hub's cache, and HF_HUB_OFFLINE=1 is set; drop that, or name "
    (problem,) = check_model(flags(name))
    assert problem == f"{name}: there is no such folder here{beside}, {offline}one that is whole"
    (problem,) = check_clip(name)
    assert problem == f"--clip_model={name}: there is no such folder here{beside}, {offline}another"


def test_private_models_are_reached_by_the_token(tiny_pipeline, tiny_pipeline_v, tmp_path, fake_hub, monkeypatch):
    """As configs are checked, and as weights and another tokenizer are loaded; the stored token is another one."""
    fake_hub.add_repo("somebody/base", files_of(tiny_pipeline), private=True)
    fake_hub.add_repo("somebody/words", files_of(tiny_pipeline_v / "tokenizer"), private=True)
    fake_hub.readers = {"somebody/base": "hf_reader", "somebody/words": "hf_reader"}
    words = ["--tokenizer_name=somebody/words", f"--cache_dir={tmp_path / 'cache'}"]
    args = flags("somebody/base", *words, "--hub_token=hf_reader")
    with reaching(fake_hub, monkeypatch):
        (problem,) = check_model(flags("somebody/base", *words))
        assert problem.startswith("somebody/base: no whole pipeline, no name of one on the Hub, or no connection (")
        (problem,) = check_model(flags(tiny_pipeline, *words))
        assert problem.startswith("--tokenizer_name=somebody/words: no folder of a tokenizer, no name of one on the ")
        assert check_model(args) == []
        loaded, again = load_base(args), load_unet(args, None)
        vocabulary = load_tokenizer(args).get_vocab()
    whole = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    assert same(loaded.unet.state_dict(), whole.unet.state_dict())
    assert same(again.state_dict(), whole.unet.state_dict())
    assert loaded.tokenizer.get_vocab() == vocabulary == whole.tokenizer.get_vocab()


def test_a_token_is_not_saved_with_a_tokenizer(tiny_pipeline, tmp_path):
    args = flags(tiny_pipeline, f"--tokenizer_name={tiny_pipeline / 'tokenizer'}", "--hub_token=hf_other")
    load_base(args).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer" / "tokenizer_config.json").is_file()
    assert not [path for path, content in files_of(tmp_path / "model").items() if b"hf_other" in content]


def test_a_mistyped_folder_is_looked_for_on_the_hub_and_said(tmp_path, monkeypatch, fake_hub):
    """Where a folder lies that has the first part of the name; the base of a plan, which the Hub had, is warned of."""
    (tmp_path / "clients" / "acme-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, meant in (("clients/acme", " (did you mean clients/acme-1?)"), ("clients/other", "")):
        told = f"there is no such folder here{meant}; "
        looked = f"{told}looked for a model of that name on the Hub too, which cannot be loaded ("
        with reaching(fake_hub, monkeypatch):
            (problem,) = check_model(flags(name))
            with pytest.raises(InputError) as error:
                read_configs("MODEL", name)
        assert problem.startswith(f"{name}: {looked}")
        assert problem.endswith("); name one that is whole")
        assert str(error.value).startswith(f"MODEL={name}: {looked}")
        flag = f"--pretrained_model_name_or_path={name}"
        assert warn_of_name(flags(name)) == [f"{flag}: {told}it is the Hub's model of that name"]
    for name in ("clients/acme-1", "somebody/acme", "acme"):
        assert warn_of_name(flags(name)) == []


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_a_folder_without_a_part_is_no_pipeline(tiny_pipeline, tmp_path, part):
    """Without a tokenizer transformers would go on with one that knows nothing."""
    shutil.copytree(tiny_pipeline, tmp_path / "model", ignore=shutil.ignore_patterns(part))
    (problem,) = check_model(flags(tmp_path / "model"))
    assert problem.startswith(f"{tmp_path / 'model'}: no whole pipeline")


@pytest.mark.parametrize("part", ["text_encoder_2", "transformer"])
def test_models_of_another_kind_are_refused_by_the_name_of_their_part(tiny_pipeline, tmp_path, part):
    changes = {part: ["transformers", "CLIPTextModelWithProjection"], "_class_name": "StableDiffusionXLPipeline"}
    (problem,) = check_model(flags(changed_pipeline(tiny_pipeline, tmp_path / "changed", "model_index.json", changes)))
    assert f"has a {part}" in problem
    assert "use a Stable Diffusion 1.x or 2.x model" in problem


def test_inpainting_models_are_refused(tiny_pipeline, tmp_path):
    (problem,) = check_model(
        flags(changed_pipeline(tiny_pipeline, tmp_path / "changed", "unet/config.json", {"in_channels": 9}))
    )
    assert "its UNet takes 9 channels; use a text-to-image model" in problem


def test_other_prediction_types_are_refused(tiny_pipeline, tmp_path):
    changes = {"prediction_type": "sample"}
    model = changed_pipeline(tiny_pipeline, tmp_path / "changed", "scheduler/scheduler_config.json", changes)
    (problem,) = check_model(flags(model))
    assert "predicts 'sample'; only epsilon and v_prediction can be trained" in problem
    assert check_model(flags(model, "--prediction_type=epsilon")) == []


@pytest.mark.parametrize("resolution, usable", [(60, 56), (33, 32), (7, 8)])
def test_resolution_that_the_vae_cannot_divide(tiny_pipeline, resolution, usable):
    (problem,) = check_model(flags(tiny_pipeline, f"--resolution={resolution}"))
    assert problem == f"--resolution={resolution}: must be a multiple of 8 for this VAE; use {usable}"


def test_zero_terminal_snr_needs_v_prediction(tiny_pipeline, tiny_pipeline_v, tmp_path):
    flag, v_prediction = "--rescale_betas_zero_snr", "--prediction_type=v_prediction"
    for words in ([], ["--prediction_type=epsilon"]):
        (problem,) = check_model(flags(tiny_pipeline, flag, *words))
        assert v_prediction in problem
    assert check_model(flags(tiny_pipeline, flag, v_prediction)) == []
    assert check_model(flags(tiny_pipeline_v, flag)) == []
    changes = {"rescale_betas_zero_snr": True}  # the base's own, not a flag
    model = changed_pipeline(tiny_pipeline, tmp_path / "changed", "scheduler/scheduler_config.json", changes)
    (problem,) = check_model(flags(model))
    assert v_prediction in problem
    assert check_model(flags(model, v_prediction)) == []


def test_min_snr_would_leave_out_what_zero_terminal_snr_is_for(tiny_pipeline_v, tiny_pipeline, tmp_path):
    flag, gamma = "--rescale_betas_zero_snr", "--snr_gamma=5"
    told = (
        "the last timesteps, for which betas are rescaled, would get no weight (arXiv 2305.08891 trains by the plain "
    )
    told += "loss); drop"
    (problem,) = check_model(flags(tiny_pipeline_v, flag, gamma))
    assert problem == f"--snr_gamma=5.0: with --rescale_betas_zero_snr {told} one"
    v_prediction = "--prediction_type=v_prediction"
    (problem,) = check_model(flags(tiny_pipeline, flag, v_prediction, "--snr_gamma=0.5"))
    assert problem == f"--snr_gamma=0.5: with --rescale_betas_zero_snr {told} one"
    changes = {"rescale_betas_zero_snr": True}  # the base's own, not a flag
    model = changed_pipeline(tiny_pipeline_v, tmp_path / "changed", "scheduler/scheduler_config.json", changes)
    (problem,) = check_model(flags(model, gamma))
    assert problem == f"--snr_gamma=5.0: with the zero terminal SNR of this base {told} this"
    for words in ([gamma], [flag]):
        assert check_model(flags(tiny_pipeline_v, *words)) == []
    assert check_model(flags(tiny_pipeline, gamma)) == []


def test_single_file_and_its_config_belong_together(tiny_pipeline, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    config = f"--single_file_config={tiny_pipeline}"
    (problem,) = check_model(flags(path))
    assert "--single_file_config" in problem
    assert check_model(flags(path, config)) == []
    (problem,) = check_model(flags(tiny_pipeline, config))
    assert "--single_file_config" in problem
    (problem,) = check_model(flags(tmp_path / "missing.ckpt"))
    assert "no such file" in problem


def test_flags_of_a_model_that_do_nothing_are_refused(tiny_pipeline, tmp_path):
    (problem,) = check_model(flags(tiny_pipeline, "--revision=main"))
    assert "--revision=main: does nothing without a model on the Hub" in problem
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    (problem,) = check_model(flags(path, f"--single_file_config={tiny_pipeline}", "--variant=fp16"))
    assert "--variant=fp16: does nothing with a single file" in problem


@pytest.mark.parametrize("variant, suffix", [("fp16", "safetensors"), ("non_ema", "bin")])
def test_a_folder_of_a_variant_alone_is_told_how_to_load(tiny_pipeline, tmp_path, variant, suffix):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    plain = model / "unet" / "diffusion_pytorch_model.safetensors"
    part = "-00001-of-00002" if suffix == "bin" else ""
    name = f"{plain.stem}{part}.{variant}.{suffix}"
    shutil.copy(plain, plain.with_name(name))
    assert check_model(flags(model)) == []
    plain.unlink()
    (problem,) = check_model(flags(model))
    told = f"holds {variant} weights alone; add --variant={variant}"
    assert problem == f"--pretrained_model_name_or_path={model}: {told}"
    assert check_model(flags(model, f"--variant={variant}")) == []
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert check_model(flags(path, f"--single_file_config={model}")) == []


def test_what_a_dataset_needs_to_know_of_a_base(tiny_pipeline, tmp_path):
    args = flags(tiny_pipeline, "--resolution=64")
    assert read_latent_layout(args) == (4, 8)
    assert read_num_timesteps(args) == 1000
    tokenizer = load_tokenizer(args)
    assert tokenizer.model_max_length == 77
    changed = changed_pipeline(
        tiny_pipeline, tmp_path / "changed", "text_encoder/config.json", {"max_position_embeddings": 20}
    )
    assert load_tokenizer(flags(changed)).model_max_length == 20  # as far as the text encoder reads


@pytest.fixture
def fake_xformers(monkeypatch):
    """A function that puts a stand-in for xFormers in place, on a card that can do some precisions and sizes of heads;
    returns the list of what was asked of it."""

    def put(dtypes, largest=1000):
        asked = []

        def attention(query, key, value, **options):
            asked.append((query.dtype, query.shape[-1], query.requires_grad))
            if query.dtype not in dtypes or query.shape[-1] > largest:
                raise NotImplementedError("No operator found\nrequires device with capability > (8, 0)")
            return F.scaled_dot_product_attention(query, key, value)

        package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
        package.ops, ops.memory_efficient_attention = ops, attention
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        return asked

    return put


XFORMERS = "--enable_xformers_memory_efficient_attention"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_xformers_is_probed_in_the_precision_of_training(tiny_pipeline, fake_xformers, dtype):
    """A card that cannot do float32, which diffusers would probe, trains in what it can do."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    asked = fake_xformers([dtype])
    with torch.no_grad():  # as where class images are drawn
        enable_memory_savers(parse(XFORMERS), unet, torch.device("cpu"), dtype)
    assert asked == [(dtype, 8, True), (dtype, 16, True)]  # 32 and 64 channels in 4 heads
    assert {type(processor) for processor in unet.attn_processors.values()} == {XFormersAttnProcessor}


@pytest.mark.parametrize(
    "dtypes, largest, dtype",
    [
        ([torch.float32], 1000, torch.bfloat16),
        ([torch.bfloat16], 1000, torch.float16),
        ([torch.float16], 8, torch.float16),
    ],
)
def test_xformers_that_cannot_do_what_is_trained_is_refused_by_its_flag(
    tiny_pipeline_sd1, fake_xformers, dtypes, largest, dtype
):
    """In another precision, or with heads of 16 channels."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_sd1, subfolder="unet")
    before = unet.attn_processors
    fake_xformers(dtypes, largest)
    with pytest.raises(InputError) as raised:
        enable_memory_savers(parse(XFORMERS), unet, torch.device("cpu"), dtype)
    told = f"xFormers cannot run here in {dtype} (requires device with capability > (8, 0)); drop this"
    assert str(raised.value) == f"{XFORMERS}=True: {told}"
    assert unet.attn_processors == before


@pytest.mark.parametrize(
    "path", [TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA, TRAIN_DREAMBOOTH], ids=lambda p: p.stem
)
@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_every_script_probes_its_own_precision(tiny_pipeline, fake_xformers, path, precision, dtype):
    script, asked = load_script(path), fake_xformers([])
    words = [f"--pretrained_model_name_or_path={tiny_pipeline}", XFORMERS]
    load = script.load_models_with_adapters if "lora" in path.stem else script.load_models
    accelerator = SimpleNamespace(mixed_precision=precision, device=torch.device("cpu"))
    with pytest.raises(
        script.InputError, match="--enable_xformers_memory_efficient_attention=True: xFormers cannot run"
    ):
        load(script.make_parser().parse_args(words), accelerator)
    assert [asked_dtype for asked_dtype, _, _ in asked] == [dtype]


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], ("epsilon", False, "leading")),
        (["--prediction_type=v_prediction"], ("v_prediction", False, "leading")),
        (["--prediction_type=v_prediction", "--rescale_betas_zero_snr"], ("v_prediction", True, "trailing")),
    ],
)
def test_noise_scheduler_is_that_of_the_objective(tiny_pipeline, words, expected):
    class Pipeline:
        scheduler = make_scheduler()

    config = make_noise_scheduler(flags(tiny_pipeline, *words), Pipeline).config
    assert (config.prediction_type, config.rescale_betas_zero_snr, config.timestep_spacing) == expected
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parts_are_held_once_and_come_back_from_the_base_for_the_result(tiny_pipeline, dtype):
    args = flags(tiny_pipeline)
    pipeline, base = load_base(args), load_base(args)
    vae, text_encoder = pipeline.vae, pipeline.text_encoder
    assert frozen(vae, "cpu", dtype) is vae
    assert {parameter.dtype for parameter in vae.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    with torch.no_grad():
        pipeline.unet.conv_in.weight.add_(1)
    whole = with_whole_parts(args, pipeline, {"unet"})
    assert (whole is pipeline) == (dtype == torch.float32)
    assert whole.unet is pipeline.unet
    assert whole.text_encoder is text_encoder
    for key, value in base.vae.state_dict().items():
        assert torch.equal(whole.vae.state_dict()[key], value)


def test_weights_that_nothing_needs_leave_the_memory_and_come_back_for_the_result(tiny_pipeline):
    args = flags(tiny_pipeline)
    pipeline, base = load_base(args), load_base(args)
    text_encoder = pipeline.text_encoder
    drop_weights(pipeline.vae, still_needed=False)
    drop_weights(text_encoder, still_needed=True)
    assert {parameter.device.type for parameter in pipeline.vae.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in text_encoder.parameters()} == {"cpu"}
    assert pipeline.vae.config.scaling_factor == base.vae.config.scaling_factor
    other = torch.nn.Module()
    other.device, other.seen = torch.device("cpu"), []
    other.to = other.seen.append
    with on_device("cuda", other):
        assert other.seen == ["cuda"]
    assert other.seen == ["cuda", torch.device("cpu")]
    whole = with_whole_parts(args, pipeline, {"unet", "text_encoder"})
    assert whole.text_encoder is text_encoder
    for key, value in base.vae.state_dict().items():
        assert torch.equal(whole.vae.state_dict()[key], value)
