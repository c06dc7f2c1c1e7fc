"""The model card, README.md of a result: how to use it, what made it and how well it learnt."""

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from sdtune.arguments import is_hub_id, is_place
from sdtune.batches import max_samples_per_step
from sdtune.errors import counted
from sdtune.lora import kohya_name
from sdtune.runs import INTERVAL, MIN_FOR_INTERVAL

# What `sdtune push-model` knows the line by that names the model in a card's code.
NAMES_MODEL = "  # its name on the Hub, or the path of its folder"
TAGS = ["text-to-image", "stable-diffusion", "stable-diffusion-diffusers"]
# Settings that say how a run was carried out, not what was trained; steps and epochs stand in the text.
NOT_ON_CARD = set(
    """
    allow_changed_resume cache_latents cache_text_embeddings caption_column checkpointing_steps
    checkpoints_total_limit config coordinator_address dataloader_num_workers dataset_config_name dry_run
    follow_symlinks foreach_ema from_flax from_pt host_index hub_private_repo image_column keep_best local_rank
    logging_steps max_nan_steps max_train_samples max_train_steps num_hosts num_train_epochs num_validation_images
    num_validation_samples offload_ema output_kohya_format overwrite_output_dir push_to_hub report_to save_flax
    set_grads_to_none shuffle_buffer_size skip_bad_images skip_save_text_encoder validation_epochs
    validation_guidance_scale validation_negative_prompt validation_num_inference_steps validation_prompt
    validation_prompts validation_scheduler validation_steps
    """.split()
)


@dataclasses.dataclass
class Usage:
    """How the result is drawn with, in Python."""

    imports: list  # lines
    loading: list  # lines that make `pipe`
    call: dict  # what is given to it beside the prompt
    notes: list  # paragraphs on what to mind


@dataclasses.dataclass
class Training:
    """What only a script knows of what it trained, for the card."""

    trained: str  # the result, before the name of its base: "LoRA adapters for"
    images: str  # what it was trained on: "5 photos of one subject"
    trigger: str | None  # what a prompt has to hold
    tags: list


def plain(text):
    """A text of somebody's as Markdown that shows it in one line, and does nothing else."""
    return re.sub(r"([\\`*~\[\]<>|&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))


def in_python(text):
    """A text as a literal of Python."""
    return json.dumps(text, ensure_ascii=False)


def name_base(args):
    """The name of the base: that on the Hub, or of a local folder or file its own without the path to it."""
    base = args.pretrained_model_name_or_path
    return os.path.basename(os.path.abspath(base)) if os.path.exists(base) else base


def find_trigger(rows):
    """The words before the first comma that the captions of all rows begin with, such as a trigger word; None if there
    are none, or for None, where images are a stream."""
    if rows is None:
        return None
    starts, num_captions = set(), 0
    for captions in rows["captions"]:
        for caption in captions:
            start, comma, _ = caption.partition(",")
            starts.add(start.strip() if comma else "")
            num_captions += 1
        if len(starts) > 1:
            return None
    return starts.pop() or None if starts and num_captions > 1 else None


def describe_images(run):
    """What images a run is trained on, as a text."""
    number = run.counts.num_images
    if number is None:
        return "a stream of images with captions"
    return f"{counted(number, 'image')} with captions"


def describe_subject(args, num_photos, num_class_images):
    """What DreamBooth is trained on, as a text; a photo counts --repeats times in `num_photos`."""
    number = num_photos // args.repeats
    text = f"{counted(number, 'photo')} of one subject"
    return text + (f", beside {counted(num_class_images, 'image')} of its class" if num_class_images else "")


def name_result(args, repo_id):
    """The name of the result: of its repository on the Hub, or of its folder."""
    return repo_id or Path(args.output_dir).resolve().name


# ------------------------------------------------------------------------------------------------------------- usage
def call_of(args, pipeline):
    """What `pipe` is given beside the prompt: how samples were drawn, and their size if it isn't the model's own."""
    call = {
        "negative_prompt": args.validation_negative_prompt,
        "num_inference_steps": args.validation_num_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
    }
    side = pipeline.unet.config.sample_size
    if isinstance(side, int) and side * pipeline.vae_scale_factor != args.resolution:
        call |= {"height": args.resolution, "width": args.resolution}
    return {name: value for name, value in call.items() if value is not None}


def load_base_lines(args):
    """Returns (lines of Python that name the base, the call that loads it)."""
    base, is_local = args.pretrained_model_name_or_path, not is_hub_id(args.pretrained_model_name_or_path)
    given, loader = ["base"], "from_pretrained"
    if Path(base).is_file():
        loader = "from_single_file"
        if args.single_file_config and not Path(args.single_file_config).exists():
            given.append(f"config={in_python(args.single_file_config)}")
    elif not is_local:
        asked = {"revision": args.revision, "variant": args.variant}
        given += [f"{name}={in_python(value)}" for name, value in asked.items() if value]
    remark = "  # which is not on the Hub: give the path to it" if is_local else ""
    return [f"base = {in_python(name_base(args))}{remark}"], f"StableDiffusionPipeline.{loader}({', '.join(given)})"


def use_of_pipeline(args, pipeline, repo_id):
    """How a pipeline folder is drawn with; `pipeline` is what was saved."""
    usage = Usage(
        imports=["import torch", "from diffusers import StableDiffusionPipeline"],
        loading=[
            f"model = {in_python(name_result(args, repo_id))}{NAMES_MODEL}",
            "pipe = StableDiffusionPipeline.from_pretrained(model)",
        ],
        call=call_of(args, pipeline),
        notes=describe_scheduler(pipeline.scheduler.config),
    )
    if pipeline.text_encoder is None:  # which is the base's
        base_lines, load = load_base_lines(args)
        usage.loading[1:] = [
            *base_lines,
            f"text_encoder = {load}.text_encoder",
            "pipe = StableDiffusionPipeline.from_pretrained(model, text_encoder=text_encoder)",
        ]
        usage.notes.append("The text encoder is that of the base, and not among these files.")
    return usage


def use_of_adapters(args, pipeline, noise_scheduler, file, repo_id):
    """How LoRA adapters in a file are drawn with: the base is `pipeline`, on which they were trained under
    `noise_scheduler`."""
    base_lines, load = load_base_lines(args)
    usage = Usage(
        imports=["import torch", "from diffusers import StableDiffusionPipeline"],
        loading=[
            *base_lines,
            f"model = {in_python(name_result(args, repo_id))}{NAMES_MODEL}",
            f"pipe = {load}",
            f'pipe.load_lora_weights(model, weight_name="{file}")',
        ],
        call={**call_of(args, pipeline), "cross_attention_kwargs": {"scale": 1.0}},
        notes=["`scale` is the strength of the adapters: 1 as trained, less for less of them, 0 for the base."],
    )
    if args.output_kohya_format:
        other = plain(f"{kohya_name(args)}.safetensors")
        usage.notes.append(f"Beside `{file}` *{other}* holds the same adapters for A1111, Forge and ComfyUI.")
    base, trained = pipeline.scheduler.config, noise_scheduler.config
    kind, changes = "type(pipe.scheduler)", {}
    if trained.prediction_type != base.get("prediction_type", "epsilon"):
        changes["prediction_type"] = trained.prediction_type
    if trained.rescale_betas_zero_snr and not base.get("rescale_betas_zero_snr"):
        kind = "DDIMScheduler"  # few samplers can start from pure noise
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        usage.imports[1] = "from diffusers import DDIMScheduler, StableDiffusionPipeline"
    if changes:
        usage.loading += [
            "settings = dict(pipe.scheduler.config)",
            f"settings.update({in_call(changes)})",
            f"pipe.scheduler = {kind}.from_config(settings)",
        ]
        usage.notes.append("The adapters were trained under another schedule than the base's; the code sets it.")
    usage.notes += describe_scheduler(trained)
    return usage


def describe_scheduler(config):
    """Paragraphs on what another sampler, or another program, has to know of how noise was predicted."""
    notes = []
    if config.prediction_type != "epsilon":
        notes.append(
            f"It predicts `{config.prediction_type}`. Make other samplers from the scheduler's settings, as by "
            "`DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`; other programs have to be told."
        )
    if config.get("rescale_betas_zero_snr"):
        notes.append(
            "It was trained to zero terminal SNR (arXiv 2305.08891): samplers need `rescale_betas_zero_snr=True` and "
            '`timestep_spacing="trailing"`. If pictures look burnt, give `guidance_rescale=0.7` to `pipe`.'
        )
    return notes


def in_call(values):
    """Values by name as the arguments of a call in Python."""
    return ", ".join(f"{name}={value if value is True else in_python(value)}" for name, value in values.items())


def code_of(usage, prompt):
    """The Python code that draws a picture, as a block of Markdown."""
    given = [in_python(prompt), *[in_call({name: value}) for name, value in usage.call.items()]]
    lines = [
        *usage.imports,
        "",
        *usage.loading,
        'pipe.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")',
        "image = pipe(",
        *[f"    {argument}," for argument in given],
        ").images[0]",
        'image.save("picture.png")',
    ]
    return "\n".join(["```python", *lines, "```"])


# ---------------------------------------------------------------------------------------------------------- training
def describe_steps(args, run):
    """How long a run was, as it was: one that was resumed counts its steps from the first one."""
    counts, steps = run.counts, run.progress["global_step"]
    text = f"{counted(steps, 'step')} of {counted(max_samples_per_step(counts), 'image')} each"
    if counts.steps_per_epoch:
        epochs = f"{steps / counts.steps_per_epoch:,.1f}".removesuffix(".0")
        text += f", which is {epochs} {'epoch' if epochs == '1' else 'epochs'}"
    text += f", at a learning rate of at most {run.settings['peak_learning_rate']:g}"
    if args.use_ema:
        text += "; the weights are an average over the steps (EMA)"
    if args.allow_changed_resume:
        text += ". The run was resumed under changed settings: those below are of its last part"
    return text


def describe_gain(args, run):
    """How far the loss on held-out images fell, by the log; None if no image was held out."""
    rows = []
    with contextlib.suppress(OSError, ValueError, TypeError):  # somebody may have moved the log, or written into it
        lines = Path(args.output_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if {"held_out_loss", "held_out_gain", "gain_error"} <= {*row}]
    if not rows or not run.progress["base_losses"]:
        return None
    number, last = len(run.progress["base_losses"]), rows[-1]
    loss, gain, error = last["held_out_loss"], last["held_out_gain"], last["gain_error"]
    images = counted(number, "image that was", "images that were")
    change = f"fell by {gain:.4f}" if gain >= 0 else f"rose by {-gain:.4f}"
    text = f"On {images} not trained on, the loss {change}, from {loss + gain:.4f} to {loss:.4f}"
    if number < MIN_FOR_INTERVAL:
        return f"{text}; these are too few to say how sure that is"
    low, high = gain - INTERVAL * error, gain + INTERVAL * error
    text += f". With a confidence of about 95 % the gain is between {low:.4f} and {high:.4f}"
    return text if low > 0 or high < 0 else f"{text}: it may be chance"


def list_settings(args, parser, run):
    """Rows of the settings that are not the script's defaults, as Markdown: no paths, no names of files, no
    secrets."""
    rows = ["Settings that are not the script's defaults:", "", "| setting | here | default |", "|---|---|---|"]
    used = {**vars(args), "mixed_precision": run.settings["mixed_precision"]}
    defaults = {"mixed_precision": "no"}
    for flag in parser._actions:
        value, default = used.get(flag.dest), defaults.get(flag.dest, flag.default)
        is_private = is_place(flag) or flag.dest in NOT_ON_CARD
        is_file = isinstance(value, str) and os.path.exists(value)
        if flag.dest in used and value != default and not is_private and not is_file:
            rows.append(f"| `--{flag.dest}` | {plain(value)} | {'-' if default is None else plain(default)} |")
    return rows if len(rows) > 4 else ["All settings are the script's defaults."]


# ----------------------------------------------------------------------------------------------------------- licence
def find_licence(args):
    """What the card of the base says of its licence, on disk or on the Hub: license, and maybe license_name and
    license_link; {} if nothing is found."""
    base = args.pretrained_model_name_or_path
    with contextlib.suppress(Exception):  # no card, no connection, bad YAML: a licence must not cost a result
        data = ModelCard.load(base if is_hub_id(base) else Path(base, "README.md"), token=args.hub_token).data
        found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
        if found["license_link"] and not re.match("https?://", str(found["license_link"])):  # a file beside that card
            found["license_link"] = f"https://huggingface.co/{base}" if is_hub_id(base) else None
        if isinstance(found["license"], str):
            return {name: value for name, value in found.items() if isinstance(value, str)}
    return {}


def describe_licence(licence):
    """What holds, as a sentence."""
    if not licence:
        return "Not known here: the licence of the base holds."
    name = licence.get("license_name", licence["license"])
    link = licence.get("license_link")
    shown = f"[{plain(name)}](<{link}>)" if link and re.fullmatch(r"https?://[^\s<>]+", link) else plain(name)
    return f"{shown}, which is that of the base."


# -------------------------------------------------------------------------------------------------------------- card
def list_samples(args, run, prompts):
    """The newest samples and those of the base, as lines of Markdown, and the path of the newest; ([], None) if there
    are none."""
    names = sorted(path.name for path in Path(args.output_dir, "samples").glob("step-*.png"))
    names = [name for name in names if name <= f"step-{run.progress['global_step']:06d}.png"]
    if not names or not prompts:
        return [], None
    last = f"samples/{names[-1]}"
    different = list(dict.fromkeys(prompts))
    label = "Prompt" if len(different) == 1 else "Prompts, in the order of the pictures"
    lines = [f"![samples]({last})", "", f"{label}: {'; '.join(map(plain, different))}", ""]
    if names[0] == "step-000000.png" != names[-1]:
        lines += ["The base draws this of the same noise:", "", f"![samples of the base](samples/{names[0]})", ""]
    return lines, last


def make_front_matter(args, licence, prompts, picture, training):
    """What the Hub reads of the card."""
    base, data = args.pretrained_model_name_or_path, args.dataset_name or ""
    is_local = not is_hub_id(base)
    different = list(dict.fromkeys(prompts))
    widget = [{"text": prompt} for prompt in different]
    if picture and len(different) == 1:
        widget[0]["output"] = {"url": picture}
    if not licence:
        licence = {"license": "other", "license_name": "as-the-base"}
        if not is_local:
            licence["license_link"] = f"https://huggingface.co/{base}"
    return ModelCardData(
        **licence,
        base_model=None if is_local else base,
        datasets=[data] if is_hub_id(data) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, *training.tags],
        instance_prompt=training.trigger,
        widget=widget or None,
    )


def write_card(args, parser, folder, run, prompts, usage, training):
    """Writes the model card into a folder: how to use the result, samples, what it was trained on and how well it
    learnt, the settings that are not the defaults of `parser`, the licence; no paths, no secrets. `prompts` are those
    of the samples; `usage` and `training` are what only the script knows."""
    base, licence = args.pretrained_model_name_or_path, find_licence(args)
    samples, picture = list_samples(args, run, prompts)
    data = make_front_matter(args, licence, prompts, picture, training)
    shown = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"*{plain(name_base(args))}*"
    trigger = f" Put **{plain(training.trigger)}** into a prompt to draw what it learnt." if training.trigger else ""
    shape = "in shapes of the area of" if run.counts.buckets is not None else "at"
    gain = describe_gain(args, run)
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {plain(Path(args.output_dir).resolve().name)}",
        "",
        f"{training.trained} {shown}, trained on {training.images}.{trigger}",
        "",
        *samples,
        "## How to draw with it",
        "",
        code_of(usage, (prompts or [training.trigger or "a picture"])[0]),
        "",
        *[line for note in usage.notes for line in (note, "")],
        "## How it was trained",
        "",
        f"- On {training.images}, {shape} {args.resolution} x {args.resolution} pixels.",
        f"- For {describe_steps(args, run)}.",
        f"- {gain}." if gain else "- No images were held out to measure how well it learnt.",
        "",
        *list_settings(args, parser, run),
        "",
        "## Licence",
        "",
        describe_licence(licence),
        "",
    ]
    Path(folder, "README.md").write_text("\n".join(lines), encoding="utf-8")
