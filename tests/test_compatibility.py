"""Old command lines for diffusers' scripts go on, or are told what to say instead: what docs/flags.md says of them is
true."""

import re

import diffusers
import pytest
from conftest import load_script
from flags_page import read_flags
from running import (
    TRAIN_DREAMBOOTH,
    TRAIN_DREAMBOOTH_LORA,
    TRAIN_TEXT_TO_IMAGE,
    TRAIN_TEXT_TO_IMAGE_FLAX,
    TRAIN_TEXT_TO_IMAGE_LORA,
)

# The flags of diffusers' train_text_to_image.py, August 2026: name, a value to give (None: a switch), its default.
TEXT_TO_IMAGE = {
    "input_perturbation": ("0.1", 0),
    "pretrained_model_name_or_path": ("model", None),
    "revision": ("main", None),
    "variant": ("fp16", None),
    "dataset_name": ("user/images", None),
    "dataset_config_name": ("small", None),
    "train_data_dir": ("images", None),
    "image_column": ("picture", "image"),
    "caption_column": ("words", "text"),
    "max_train_samples": ("10", None),
    "validation_prompts": ("a prompt", None),
    "output_dir": ("result", "sd-model-finetuned"),
    "cache_dir": ("cache", None),
    "seed": ("42", None),
    "resolution": ("256", 512),
    "center_crop": (None, False),
    "random_flip": (None, False),
    "train_batch_size": ("1", 16),
    "num_train_epochs": ("3", 100),
    "max_train_steps": ("15000", None),
    "gradient_accumulation_steps": ("4", 1),
    "gradient_checkpointing": (None, False),
    "learning_rate": ("1e-05", 1e-4),
    "scale_lr": (None, False),
    "lr_scheduler": ("cosine", "constant"),
    "lr_warmup_steps": ("10", 500),
    "snr_gamma": ("5.0", None),
    "dream_training": (None, False),
    "dream_detail_preservation": ("1.0", 1.0),
    "use_8bit_adam": (None, False),
    "allow_tf32": (None, False),
    "use_ema": (None, False),
    "offload_ema": (None, False),
    "foreach_ema": (None, False),
    "non_ema_revision": ("main", None),
    "dataloader_num_workers": ("2", 0),
    "adam_beta1": ("0.8", 0.9),
    "adam_beta2": ("0.99", 0.999),
    "adam_weight_decay": ("0.1", 1e-2),
    "adam_epsilon": ("1e-06", 1e-8),
    "max_grad_norm": ("0.5", 1.0),
    "push_to_hub": (None, False),
    "hub_token": ("a-token", None),
    "prediction_type": ("v_prediction", None),
    "hub_model_id": ("user/model", None),
    "logging_dir": ("events", "logs"),
    "mixed_precision": ("fp16", None),
    "report_to": ("wandb", "tensorboard"),
    "local_rank": ("0", -1),
    "checkpointing_steps": ("100", 500),
    "checkpoints_total_limit": ("2", None),
    "resume_from_checkpoint": ("latest", None),
    "enable_xformers_memory_efficient_attention": (None, False),
    "noise_offset": ("0.05", 0),
    "validation_epochs": ("1", 5),
    "tracker_project_name": ("cats", "text2image-fine-tune"),
    "image_interpolation_mode": ("bicubic", "lanczos"),
}


def without(flags, names):
    """The flags but for those named."""
    return {flag: known for flag, known in flags.items() if flag not in names.split()}


# train_text_to_image_lora.py: what it has not, and what it has or defaults otherwise; so for those below.
TEXT_TO_IMAGE_LORA = without(
    TEXT_TO_IMAGE,
    """
    input_perturbation validation_prompts dream_training dream_detail_preservation use_ema offload_ema foreach_ema
    non_ema_revision tracker_project_name""",
) | {
    "output_dir": ("result", "sd-model-finetuned-lora"),
    "validation_prompt": ("a prompt", None),
    "num_validation_images": ("2", 4),
    "validation_epochs": ("2", 1),
    "rank": ("8", 4),
}

DREAMBOOTH = without(
    TEXT_TO_IMAGE,
    """
    input_perturbation validation_prompts dream_training dream_detail_preservation use_ema offload_ema foreach_ema
    non_ema_revision tracker_project_name dataset_name dataset_config_name train_data_dir image_column caption_column
    max_train_samples cache_dir random_flip prediction_type noise_offset validation_epochs image_interpolation_mode
    """,
) | {
    "tokenizer_name": ("model", None),
    "instance_data_dir": ("dog", None),
    "class_data_dir": ("dogs", None),
    "instance_prompt": ("a sks dog", None),
    "class_prompt": ("a dog", None),
    "with_prior_preservation": (None, False),
    "prior_loss_weight": ("0.5", 1.0),
    "num_class_images": ("200", 100),
    "output_dir": ("result", "dreambooth-model"),
    "train_text_encoder": (None, False),
    "train_batch_size": ("1", 4),
    "sample_batch_size": ("1", 4),
    "num_train_epochs": ("3", 1),
    "learning_rate": ("1e-05", 5e-6),
    "lr_num_cycles": ("2", 1),
    "lr_power": ("2.0", 1.0),
    "validation_prompt": ("a prompt", None),
    "num_validation_images": ("2", 4),
    "validation_steps": ("50", 100),
    "prior_generation_precision": ("fp32", None),
    "set_grads_to_none": (None, False),
    "offset_noise": (None, False),
    "pre_compute_text_embeddings": (None, False),
    "tokenizer_max_length": ("77", None),
    "text_encoder_use_attention_mask": (None, False),
    "skip_save_text_encoder": (None, False),
    "validation_images": ("a.png", None),
    "class_labels_conditioning": ("timesteps", None),
    "validation_scheduler": ("DDPMScheduler", "DPMSolverMultistepScheduler"),
}

DREAMBOOTH_LORA = without(
    DREAMBOOTH,
    """
    snr_gamma offset_noise set_grads_to_none skip_save_text_encoder validation_steps validation_scheduler""",
) | {
    "output_dir": ("result", "lora-dreambooth-model"),
    "learning_rate": ("0.0001", 5e-4),
    "validation_epochs": ("10", 50),
    "rank": ("8", 4),
    "lora_dropout": ("0.1", 0.0),
    "image_interpolation_mode": ("bicubic", "lanczos"),
}

# train_text_to_image_flax.py, which diffusers dropped in 0.40.
TEXT_TO_IMAGE_FLAX = without(
    TEXT_TO_IMAGE,
    """
    input_perturbation validation_prompts gradient_accumulation_steps gradient_checkpointing lr_warmup_steps snr_gamma
    dream_training dream_detail_preservation use_8bit_adam allow_tf32 use_ema offload_ema foreach_ema non_ema_revision
    dataloader_num_workers prediction_type checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    enable_xformers_memory_efficient_attention noise_offset validation_epochs tracker_project_name
    image_interpolation_mode""",
) | {
    "seed": ("42", 0),
    "mixed_precision": ("bf16", "no"),
    "from_pt": (None, False),
}

UPSTREAM = {
    "text_to_image": TEXT_TO_IMAGE,
    "text_to_image_lora": TEXT_TO_IMAGE_LORA,
    "dreambooth": DREAMBOOTH,
    "dreambooth_lora": DREAMBOOTH_LORA,
    "text_to_image_flax": TEXT_TO_IMAGE_FLAX,
}
NUM_FLAGS = {
    "text_to_image": 57,
    "text_to_image_lora": 51,
    "dreambooth": 61,
    "dreambooth_lora": 59,
    "text_to_image_flax": 34,
}
PATHS = {
    "text_to_image": TRAIN_TEXT_TO_IMAGE,
    "text_to_image_lora": TRAIN_TEXT_TO_IMAGE_LORA,
    "dreambooth": TRAIN_DREAMBOOTH,
    "dreambooth_lora": TRAIN_DREAMBOOTH_LORA,
    "text_to_image_flax": TRAIN_TEXT_TO_IMAGE_FLAX,
}
every_script = pytest.mark.parametrize("name", UPSTREAM)


@pytest.fixture(scope="module")
def tables():
    """What docs/flags.md says of the flags that diffusers' scripts have: {script: {flag: text}}."""
    found = {name: {} for name in UPSTREAM}
    for stem, flags in read_flags().items():
        for flag, told in flags.items():
            if "what to do" in told:
                found[stem.removeprefix("train_")][flag] = f"refused: {told['what to do'].replace('`', '')}"
            elif told.get("in diffusers' script", "ours alone") != "ours alone":
                found[stem.removeprefix("train_")][flag] = told["in diffusers' script"]
    return found


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, by name."""
    return {name: load_script(path) for name, path in PATHS.items()}


@pytest.fixture
def script(scripts, name):
    """The script of this name."""
    return scripts[name]


@pytest.fixture
def table(tables, name):
    """What the table for the script of this name says, by flag."""
    return tables[name]


def words(flag, value):
    """A flag with its value, or a switch, as a command line has it."""
    return [f"--{flag}"] if value is None else [f"--{flag}={value}"]


def replaced_flags(script):
    """The flags of diffusers' script that this one refuses, with what it says instead."""
    return script.SUBJECT_REPLACED_FLAGS if "dreambooth" in script.__name__ else script.REPLACED_FLAGS


def parse(script, argv):
    """What the script makes of a command line, in which no value is wrong."""
    args, problems = script.parse_flags(script.make_parser(), argv, replaced_flags(script))
    assert problems == []
    return args


def setting_of(script, flag):
    """The setting that a flag gives: that of its own name, but for a second name of another flag."""
    (action,) = [action for action in script.make_parser()._actions if f"--{flag}" in action.option_strings]
    return action.dest


def default(script, flag):
    """What a flag is if it is not given: some tell from None whether they were, and say the rest in their help."""
    value = getattr(parse(script, []), setting_of(script, flag))
    if value is not None:
        return value
    entry = re.search(rf"^  --{flag} .*(?:\n {{4,}}.*)*", script.make_parser().format_help(), re.M).group()
    said = re.search(
        r"([\d.]+|\bno|\w+Scheduler) if not given|, or ([\d.]+);|default: (\w+), if installed", " ".join(entry.split())
    )
    if not said:
        return None
    word = said.group(1) or said.group(2) or said.group(3)
    return word if word.isalpha() else float(word)


def as_table_says(value):
    """A default as the tables write it."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


@every_script
def test_the_table_has_every_flag_and_no_other(table, name):
    assert len(UPSTREAM[name]) == NUM_FLAGS[name]
    assert table.keys() == UPSTREAM[name].keys()
    kinds = {text.split()[0].rstrip(";,:") for text in table.values()}
    expected = {"same", "refused", "default"}
    if name == "text_to_image_flax":
        expected = {"same"}
    if name == "text_to_image_lora":  # nothing in it asks for what cannot be had here
        expected = {"same", "default"}
    assert kinds == expected


@pytest.mark.parametrize("name, flag", [(name, flag) for name, flags in UPSTREAM.items() for flag in flags])
def test_flag_is_what_the_table_says(script, table, name, flag):
    value, there = UPSTREAM[name][flag]
    says = table[flag]
    if says.startswith("refused"):
        _, problems = script.parse_flags(script.make_parser(), words(flag, value), replaced_flags(script))
        assert problems == [f"--{flag} is not taken: {says.removeprefix('refused: ')}"]
        return
    given = getattr(parse(script, words(flag, value)), setting_of(script, flag))
    if value is None:
        assert given is True
    elif isinstance(given, list):
        assert given == [value]
    elif isinstance(given, int | float):
        assert given == float(value)
    else:
        assert given == value
    here = default(script, flag)
    if says.startswith("default"):
        assert says.startswith(f"default {as_table_says(here)}, there {as_table_says(there)}")
        assert here != there
    else:
        assert here == there
        assert type(here) is type(there) or isinstance(here, int | float)


@every_script
def test_flags_and_values_may_stand_apart_as_well(script, name):
    argv = []
    for flag, (value, _) in UPSTREAM[name].items():
        if f"--{flag}" not in replaced_flags(script):
            argv += words(flag, value)
    apart = [part for word in argv for part in word.split("=", 1)]
    assert parse(script, apart) == parse(script, argv)


def test_every_replaced_flag_is_one_of_upstream(scripts, tables):
    """The DreamBooth scripts refuse alike what one of diffusers' has; the Flax script, what whoever comes from the
    torch script may give."""
    refused = {}
    for name, table in tables.items():
        refused[name] = {f"--{flag}" for flag, says in table.items() if says.startswith("refused")}
    replaced = {name: replaced_flags(script) for name, script in scripts.items()}
    for name in ("text_to_image", "text_to_image_lora"):
        assert refused[name] == replaced[name].keys()
    assert not refused["text_to_image_lora"]
    of_flax = replaced["text_to_image_flax"].keys()
    assert refused["text_to_image_flax"] < of_flax
    assert of_flax - refused["text_to_image_flax"] < {f"--{flag}" for flag in TEXT_TO_IMAGE}
    assert refused["dreambooth"] | refused["dreambooth_lora"] == replaced["dreambooth"].keys()
    assert replaced["dreambooth"] == replaced["dreambooth_lora"]


OLD = """
    --dataset_name={images} --use_ema --resolution=32 --center_crop --random_flip --train_batch_size=1
    --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05
    --max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0 --checkpointing_steps=500
    --checkpoints_total_limit=2 --validation_epochs=5 --validation_prompts yoda --seed=1337 --report_to=wandb
    --enable_xformers_memory_efficient_attention --mixed_precision=fp16 --use_8bit_adam --allow_tf32 --push_to_hub
    --output_dir={output} --pretrained_model_name_or_path={model} --image_interpolation_mode=lanczos
"""


def test_a_whole_old_command_line_passes_where_there_is_a_gpu(
    train_script, tiny_pipeline, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_script.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(diffusers.utils, "is_xformers_available", lambda: True)
    argv = OLD.format(images=image_folder(), output=tmp_path / "out", model=tiny_pipeline).split()
    assert train_script.check_args(parse(train_script, argv)) == []


OLD_DREAMBOOTH = """
    --pretrained_model_name_or_path={model} --instance_data_dir={images} --class_data_dir={classes}
    --output_dir={output} --with_prior_preservation --prior_loss_weight=1.0 --resolution=32 --train_batch_size=1
    --sample_batch_size=1 --gradient_accumulation_steps=1 --gradient_checkpointing --learning_rate=5e-6
    --lr_scheduler=constant --lr_warmup_steps=0 --num_class_images=200 --max_train_steps=800 --use_8bit_adam
    --mixed_precision=fp16 --train_text_encoder --prior_generation_precision=fp16 --report_to=wandb --push_to_hub
    --enable_xformers_memory_efficient_attention --validation_prompt=yoda --seed=0 --checkpointing_steps=500
"""


@pytest.mark.parametrize(
    "name, more",
    [
        ("dreambooth", ["--set_grads_to_none", "--offset_noise", "--validation_scheduler=DDPMScheduler"]),
        ("dreambooth_lora", ["--validation_epochs=50", "--num_validation_images=2", "--local_rank=-1"]),
    ],
)
def test_an_old_command_line_for_dreambooth_passes(
    script, name, tiny_pipeline, image_folder, tmp_path, monkeypatch, more
):
    monkeypatch.setattr(script.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(diffusers.utils, "is_xformers_available", lambda: True)
    places = {"images": image_folder(), "output": tmp_path / "out", "classes": tmp_path / "classes"}
    argv = OLD_DREAMBOOTH.format(model=tiny_pipeline, **places).split()
    argv += ["--instance_prompt=a photo of sks dog", "--class_prompt=a photo of dog", *more]
    assert script.check_args(parse(script, argv)) == []


REFUSED = [  # what the tables' remarks promise: script, flag, value, what the message names
    ("text_to_image", "lr_warmup_steps", "500", "constant_with_warmup"),
    ("text_to_image", "offload_ema", None, "--use_ema"),
    ("text_to_image", "hub_model_id", "me/it", "--push_to_hub"),
    ("text_to_image", "dataset_config_name", "small", "--dataset_name"),
    ("text_to_image", "dataset_name", "a/b", "--train_data_dir"),
    ("text_to_image", "mixed_precision", "fp16", "use --mixed_precision=no"),
    ("text_to_image", "allow_tf32", None, "NVIDIA"),
    ("text_to_image", "enable_xformers_memory_efficient_attention", None, "drop"),
    ("dreambooth", "num_validation_images", "2", "--validation_prompt"),
    ("dreambooth_lora", "num_validation_images", "2", "--validation_prompt"),
    ("dreambooth", "validation_steps", "50", "--validation_prompts or --num_validation_samples"),
    ("dreambooth", "lr_num_cycles", "2", "cosine_with_restarts"),
    ("dreambooth", "lr_power", "2", "polynomial"),
]
OF_CLASS_IMAGES = [
    ("class_data_dir", "dogs"),
    ("class_prompt", "a dog"),
    ("num_class_images", "200"),
    ("sample_batch_size", "1"),
    ("prior_loss_weight", "0.5"),
    ("prior_generation_precision", "fp32"),
]
for dreambooth_script in ("dreambooth", "dreambooth_lora"):
    REFUSED += [(dreambooth_script, flag, value, "--with_prior_preservation") for flag, value in OF_CLASS_IMAGES]


@pytest.mark.parametrize("name, flag, value, says", REFUSED)
def test_what_diffusers_would_ignore_is_refused(
    script, tiny_pipeline, image_folder, tmp_path, table, name, flag, value, says
):
    folder = "train_data_dir" if name.startswith("text_to_image") else "instance_data_dir"
    argv = [
        f"--pretrained_model_name_or_path={tiny_pipeline}",
        f"--{folder}={image_folder()}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=32",
        *words(flag, value),
    ]
    problems = script.check_args(parse(script, argv))
    assert any(f"--{flag}" in problem and says in problem for problem in problems), problems
    assert "refused" in table[flag] or flag == "dataset_name"
