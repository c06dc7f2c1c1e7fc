"""Check and load the models of a Stable Diffusion pipeline."""

import contextlib
import logging
import os
import re
import shlex
import warnings
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import transformers
from safetensors import safe_open

from sdtune.arguments import missing_here, nearest_beside
from sdtune.errors import InputError, last_line, remedy_for_missing
from sdtune.lora_layouts import LORA_FILE

LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # of a pipeline's parts; the last is diffusers'
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def quiet_libraries():
    """Turns off the bars and remarks of libraries, which would drown ours."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # diffusers imports bitsandbytes, which warns on a CPU that it lacks a kernel for models in 4 bits: here are none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # diffusers itself gives this argument, when it reads a config from the Hub.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated")
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # or it would say at each model that it is
        huggingface_hub.utils.logging.set_verbosity_error()
    if not torch.accelerator.is_available():
        # Or DeepSpeed, which accelerate imports to save a model, wherever it is installed, says that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def config_source(args):
    """Where the configs and the tokenizer of the base are read from: (folder or Hub id, keywords of its loaders)."""
    return (
        args.single_file_config or args.pretrained_model_name_or_path,
        {"revision": args.revision, **how_to_reach(args)},
    )


def how_to_reach(args):
    """Keywords of what loads from the Hub: where that is kept, and a token, by which private models are reached."""
    return {"cache_dir": args.cache_dir, "token": args.hub_token}


def check_model(args):
    """Lists what is wrong with the base's configs, or between them and the flags; reads no weights."""
    source = args.pretrained_model_name_or_path or ""
    name = f"--pretrained_model_name_or_path={source}"
    single_file = source.endswith((".ckpt", ".safetensors"))
    problems = []
    if args.revision and Path(source).exists():
        problems.append(f"--revision={args.revision}: does nothing without a model on the Hub; drop this")
    if args.variant and args.single_file_config:
        problems.append(f"--variant={args.variant}: does nothing with a single file; drop this")
    if not source:
        told = "is missing: name a pipeline folder, a Hub id or a file"
        return [*problems, f"--pretrained_model_name_or_path {told}"]
    if remedy := remedy_for_missing(source):
        return [*problems, f"{name}: does not exist; {remedy}"]
    if single_file and not Path(source).is_file():
        return [*problems, f"{name}: there is no such file; name a pipeline folder, a Hub id or a file"]
    if single_file and not args.single_file_config:
        return [*problems, f"{name}: a single file needs --single_file_config (see --help); add that"]
    if args.single_file_config and not single_file:
        told = "is for a single file alone"
        return [*problems, f"--single_file_config={args.single_file_config}: {told}; drop this, or name one as model"]

    source, where = config_source(args)
    try:
        parts = diffusers.StableDiffusionPipeline.load_config(source, **where)
        if foreign := {"text_encoder_2", "transformer"} & parts.keys():
            remedy = "use a Stable Diffusion 1.x or 2.x model"
            return [*problems, f"{name}: has a {min(foreign)} (SDXL, SD 3 or the like); {remedy}"]
        if strange := foreign_code(parts):
            return [*problems, f"{name}: {strange}"]
        unet = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet", **where)
        vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **where)
        scheduler = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **where)
        text_config = transformers.CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
        text_settings = transformers.CLIPTextConfig.get_config_dict(source, subfolder="text_encoder", **where)[0]
        if not text_settings:
            raise OSError("it has no text encoder")  # for which transformers would take a default
        if strange := foreign_kernel(text_settings):
            return [*problems, f"{name}: its text_encoder {strange}"]
        if len(transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)) < 3:
            raise OSError("its tokenizer knows no words")  # nor does transformers' for a folder without one
    except (OSError, ValueError) as error:
        return [*problems, f"{source}: {tell_no_pipeline(source, error)}"]

    problems += check_tokenizer(args, text_config)
    factor = vae_factor(vae)
    if args.resolution % factor:
        usable = args.resolution // factor * factor or factor
        problems.append(f"--resolution={args.resolution}: must be a multiple of {factor} for this VAE; use {usable}")
    if unet["in_channels"] != vae["latent_channels"]:
        problems.append(f"{name}: its UNet takes {unet['in_channels']} channels; use a text-to-image model")
    variant = None if args.variant or args.single_file_config else only_variant(source)
    if variant:
        problems.append(f"{name}: holds {variant} weights alone; add --variant={variant}")
    prediction_type = args.prediction_type or scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        problems.append(f"{name}: predicts {prediction_type!r}; only epsilon and v_prediction can be trained")
    zero_snr = args.rescale_betas_zero_snr or scheduler.get("rescale_betas_zero_snr")
    if prediction_type == "epsilon" and zero_snr:
        problems.append("--rescale_betas_zero_snr: useless for epsilon; drop it or add --prediction_type=v_prediction")
    if prediction_type == "v_prediction" and zero_snr and args.snr_gamma:
        given, remedy = "--rescale_betas_zero_snr", "drop one"
        if not args.rescale_betas_zero_snr:
            given, remedy = "the zero terminal SNR of this base", "drop this"
        problems.append(
            f"--snr_gamma={args.snr_gamma}: with {given} the last timesteps, for which betas are rescaled, would get "
            f"no weight (arXiv 2305.08891 trains by the plain loss); {remedy}"
        )
    return problems


def tell_no_pipeline(source, error):
    """What is wrong with a folder or Hub id whose configs cannot be read, for an exception."""
    if told := tell_checkpoint(source):
        return told
    if Path(source, LORA_FILE).is_file():
        return "holds LoRA weights; name the model that they were trained on"
    return tell_unread("whole pipeline", source, error, "name one that is whole")


def tell_checkpoint(source):
    """What to do with a folder that is a checkpoint of a training, where a model is wanted; "" if it is none."""
    if not Path(source, "progress.json").is_file():
        return ""
    return f"is a checkpoint of a training; make a model of it by `sdtune export {shlex.quote(str(source))} OUTPUT`"


def tell_unread(what, source, error, remedy="name another"):
    """What is wrong with a folder or Hub id that should be a `what` and cannot be read, for an exception. Libraries
    speak of a connection where a path is wrong, too, and where nobody wants one."""
    if os.path.exists(source):
        return f"no {what} ({last_line(error)}); {remedy}"
    told = f"there is no such folder here{nearest_beside(source)}"
    if not is_repo_name(source):
        return f"{told}; {remedy}"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"{told}, no whole copy in the Hub's cache, and HF_HUB_OFFLINE=1 is set; drop that, or {remedy}"
    if missing_here(source):
        told += "; looked for a model of that name on the Hub too, which cannot be loaded"
    else:
        told = f"no {what}, no name of one on the Hub, or no connection"
    return f"{told} ({last_line(error)}); {remedy}"


def is_repo_name(source):
    """Whether the Hub can have a repository of that name, with or without an owner."""
    try:
        huggingface_hub.utils.validate_repo_id(source)
    except ValueError:
        return False
    return True


def foreign_code(parts):
    """What is wrong with a pipeline's model_index.json that names classes of others, which are not run, or None."""
    kind = parts.get("_class_name", "")
    if not isinstance(kind, str):
        return f"its model_index.json names code of its own, {kind}, which is not run; use another model"
    for part, entry in parts.items():
        if not part.startswith("_") and isinstance(entry, list | tuple) and entry and entry[0] not in LIBRARIES:
            told = f"its {part} is of {'.'.join(map(str, entry))}, code that is not run"
            return f"{told}; use a model whose parts are of diffusers and transformers"
    return None


def only_variant(folder):
    """The variant, such as fp16, in the names of a pipeline folder's UNet, if there are no weights without one."""
    pattern = r"diffusion_pytorch_model[-\w]*(?:\.(\w+))?\.(?:safetensors|bin|msgpack)"  # the dash is of parts
    matches = [re.fullmatch(pattern, path.name) for path in Path(folder, "unet").glob("*")]
    variants = {match.group(1) for match in matches if match}
    return None if None in variants else min(variants, default=None)


def vae_factor(config):
    """Pixels along one side of a latent, of a VAE with this config: 8 for Stable Diffusion's."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def load_tokenizer(args):
    """The tokenizer, the base's or that of --tokenizer_name, which cuts captions where the text encoder has to."""
    source, where = config_source(args)
    if args.tokenizer_name:
        tokenizer = load_named_tokenizer(args)
    else:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)
    text_config = transformers.CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
    tokenizer.model_max_length = args.tokenizer_max_length or text_config.max_position_embeddings
    return tokenizer


def load_named_tokenizer(args):
    """The tokenizer of --tokenizer_name, whose own code is not run: else transformers asks in the terminal."""
    return transformers.AutoTokenizer.from_pretrained(
        args.tokenizer_name, trust_remote_code=False, **how_to_reach(args)
    )


def parts_instead(args):
    """The parts of a pipeline that flags put in the place of the base's, by name."""
    return {"tokenizer": load_tokenizer(args)} if args.tokenizer_name or args.tokenizer_max_length else {}


def check_tokenizer(args, text_config):
    """Lists what is wrong between the tokenizer that flags name and the text encoder, whose config is given."""
    problems, length = [], text_config.max_position_embeddings
    if args.tokenizer_max_length and args.tokenizer_max_length > length:
        problems.append(
            f"--tokenizer_max_length={args.tokenizer_max_length}: the text encoder takes {length} at most; use that"
        )
    if not args.tokenizer_name:
        return problems
    name = f"--tokenizer_name={args.tokenizer_name}"
    try:
        highest = max(load_named_tokenizer(args).get_vocab().values())
    except Exception as error:  # every format has its own way of being broken
        return [*problems, f"{name}: {tell_unread('folder of a tokenizer', args.tokenizer_name, error)}"]
    if highest >= text_config.vocab_size:
        told = (
            f"has {highest + 1:,} tokens, the text encoder knows {text_config.vocab_size:,}; use the one that it had"
        )
        problems.append(f"{name}: {told}")
    return problems


def read_latent_layout(args):
    """How many channels the latents of the base's VAE have, and how many pixels along a side one of them stands for:
    4 and 8 for Stable Diffusion."""
    source, where = config_source(args)
    vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **where)
    return vae["latent_channels"], vae_factor(vae)


def read_num_timesteps(args):
    """How many timesteps the base was trained on: 1000 for Stable Diffusion."""
    source, where = config_source(args)
    schedule = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **where)
    return schedule.get("num_train_timesteps", 1000)


def load_base(args, **given):
    """Loads the base's pipeline in float32, without its safety checker; parts that are `given`, by name, take the
    place of the base's, which are not loaded. Raises `InputError`."""
    base, (source, where) = args.pretrained_model_name_or_path, config_source(args)
    parts = {**parts_instead(args), **given}
    try:
        refuse_foreign_code(source, **where)
        if args.single_file_config:  # a .ckpt is read as weights only
            return diffusers.StableDiffusionPipeline.from_single_file(
                base, config=args.single_file_config, dtype=torch.float32, safety_checker=None, **where, **parts
            )
        options = {"dtype": torch.float32, "variant": args.variant, "safety_checker": None}
        return diffusers.StableDiffusionPipeline.from_pretrained(base, **where, **options, **parts)
    except Exception as error:  # every format has its own way of being broken
        if list(Path(base).glob("unet/*.msgpack")) and not list(Path(base).glob("unet/*.[sb]*")):
            told = "has Flax weights alone; use train_text_to_image_flax.py, whose result has PyTorch's too"
            raise InputError(f"{base}: {told}") from None
        raise InputError(f"{base}: cannot be loaded ({reason_of(error)}); mend it, or use another") from None


def foreign_kernel(config):
    """What is wrong with a config of transformers that names code on the Hub for its attention, which is fetched and
    run where `kernels` is installed, or None."""
    for key, value in config.items():
        if isinstance(value, dict) and (strange := foreign_kernel(value)):
            return strange
        if str(key).endswith("_implementation") and re.search(r"[/:]", str(value)):
            return f"asks for code on the Hub, {value}, as {key}, which is not run; remove that from its config.json"
    return None


def refuse_foreign_code(base, **where):
    """Raises `InputError` for a pipeline with classes of others, modules of which diffusers would import, or with a
    text encoder whose attention is code on the Hub."""
    if strange := foreign_code(diffusers.StableDiffusionPipeline.load_config(base, **where)):
        raise InputError(strange)
    if strange := foreign_kernel(
        transformers.CLIPTextConfig.get_config_dict(base, subfolder="text_encoder", **where)[0]
    ):
        raise InputError(f"its text_encoder {strange}")


def reason_of(error):
    """Why weights cannot be loaded, in a line."""
    cause = error
    while cause is not None:
        if type(cause).__name__ == "UnpicklingError":
            return "a file holds more than weights, maybe code, which is not run; get it as .safetensors"
        cause = cause.__cause__ or cause.__context__
    return last_line(error)


def load_unet(args, revision):
    """Loads the UNet that the base has at a revision, in float32. Raises `InputError`."""
    base = args.pretrained_model_name_or_path
    try:
        where = {"subfolder": "unet", "revision": revision, **how_to_reach(args)}
        return diffusers.UNet2DConditionModel.from_pretrained(base, dtype=torch.float32, **where)
    except Exception as error:  # every format has its own way of being broken
        raise InputError(f"{base}: its UNet of {revision} cannot be loaded ({reason_of(error)})") from None


def write_text_encoder(text_encoder, folder):
    """Writes the weights of a CLIP text encoder under their published names, text_model.embeddings and so on, which
    libraries before transformers 5 need. Else `save_pretrained` names them as the file did that they came from."""
    weights = {f"text_model.{name}": value for name, value in text_encoder.state_dict().items()}
    text_encoder.save_pretrained(folder, state_dict=weights, save_original_format=False)


def enable_memory_savers(args, unet, device, dtype):
    """Turns on what makes a UNet's passes smaller, as the flags ask for; they will be on a device and in a precision.
    Raises `InputError`."""
    if args.enable_xformers_memory_efficient_attention:
        from diffusers.models.attention_processor import XFormersAttnProcessor

        try:
            probe_xformers(unet, device, dtype)
        except Exception as error:  # xFormers has one for every mismatch
            told = f"xFormers cannot run here in {dtype} ({last_line(error)}); drop this"
            raise InputError(f"--enable_xformers_memory_efficient_attention=True: {told}") from None
        unet.set_attn_processor(XFormersAttnProcessor())
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()


def make_faster(args, unet):
    """Compiles the blocks of a UNet, in its first pass, and lays out its weights, as the flags ask for."""
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)  # which what convolutions give then has too
    if args.compile:
        # A program for each width of the blocks, for training and for drawing: more than it would keep otherwise.
        torch._dynamo.config.recompile_limit = 64
        unet.compile_repeated_blocks(dynamic=True)  # for sizes of images and batches that vary


def probe_xformers(unet, device, dtype):
    """Raises what xFormers raises, if it has no attention for the sizes of a UNet's heads, forward or backward. Where
    diffusers enables it, float32 is probed whatever the precision."""
    from diffusers.models.attention_processor import Attention
    from xformers.ops import memory_efficient_attention

    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    for size in sorted({module.inner_dim // module.heads for module in attentions}):
        query = torch.ones(1, 2, size, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            memory_efficient_attention(query, query, query).sum().backward()


def make_noise_scheduler(args, pipeline):
    """The scheduler that adds noise in training, for the objective that the flags name or else the base's."""
    changes = {}
    if args.prediction_type:
        changes["prediction_type"] = args.prediction_type
    if args.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, **changes)


def frozen(model, device, dtype):
    """The model itself, which is only used and not trained from now on, on a device in `dtype`."""
    return model.requires_grad_(False).eval().to(device, dtype=dtype)


def drop_weights(model, still_needed):
    """Takes a frozen model off its device: into the CPU's memory where it is `still_needed` now and then, else only
    its config stays."""
    model.to("cpu" if still_needed else "meta")


@contextlib.contextmanager
def on_device(device, *models):
    """Moves models to a device for a while, and then to where they were."""
    places = [model.device for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, place in zip(models, places, strict=True):
            model.to(place)


def numel_of(parameter):
    """How many numbers a parameter has, in all processes together: where DeepSpeed shares it out, it seems empty."""
    return getattr(parameter, "ds_numel", parameter.numel())


def is_of_base(model):
    """Whether a frozen model still is what the base has in float32: not cast, nor dropped."""
    return model.dtype == torch.float32 and model.device.type != "meta"


def with_whole_parts(args, pipeline, trained):
    """The pipeline with VAE and text encoder as the base has them in float32, read again where they are not at hand
    any more; parts that are `trained`, by name, stay. Raises `InputError`."""
    kept = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    kept = {name: part for name, part in kept.items() if name in trained or is_of_base(part)}
    return pipeline if len(kept) == 3 else load_base(args, **kept)


def write_models(models, folder, suffix=""):
    """Writes models, by name, each into a folder of that name and suffix from which `from_pretrained` loads it."""
    for name, model in models.items():
        if name == "text_encoder":
            write_text_encoder(model, folder / f"{name}{suffix}")
        else:
            model.register_to_config(_name_or_path=None)  # which is a path here
            model.save_pretrained(folder / f"{name}{suffix}")


@torch.no_grad()
def read_models(models, folder, suffix=""):
    """Reads what `write_models` wrote into models of the same shapes, tensor by tensor. Raises `ValueError` for
    weights of another model."""
    for name, model in models.items():
        own, num_read = model.state_dict(), 0
        for path in sorted(Path(folder, f"{name}{suffix}").glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    tensor, saved = own.get(key.removeprefix("text_model.")), file.get_tensor(key)
                    if tensor is None or tensor.shape != saved.shape:
                        raise ValueError(f"{path.parent.name} is of another model, or not whole")
                    tensor.copy_(saved)
                    num_read += 1
        if num_read != len(own):
            raise ValueError(f"{name}{suffix} is of another model, or not whole")
