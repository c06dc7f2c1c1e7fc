"""An old command line for diffusers' script goes on, or is told what to say instead: the README's table is true."""

import re

import pytest

# The flags of diffusers' train_text_to_image.py, August 2026: name, a value to give (None: a switch), its default.
UPSTREAM = {
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


@pytest.fixture(scope="module")
def table(repo):
    """The rows of the README's table: {flag: what it says}."""
    text = (repo / "examples" / "text_to_image" / "README.md").read_text(encoding="utf-8")
    lines = text.split("| diffusers flag | here |\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    rows = [re.fullmatch(r"\| `--(\w+)` \| (.+) \|", line).groups() for line in lines]
    assert len(dict(rows)) == len(rows)  # none twice
    return dict(rows)


def words(flag):
    value = UPSTREAM[flag][0]
    return [f"--{flag}"] if value is None else [f"--{flag}={value}"]


def test_the_table_has_every_flag_and_no_other(table):
    assert len(UPSTREAM) == 57
    assert table.keys() == UPSTREAM.keys()
    kinds = {text.split()[0].rstrip(";,:") for text in table.values()}
    assert kinds == {"same", "default", "refused"}


@pytest.mark.parametrize("flag", UPSTREAM)
def test_flag_is_what_the_table_says(train_script, table, capsys, flag):
    value, there = UPSTREAM[flag]
    says = table[flag]
    if says.startswith("refused"):
        with pytest.raises(SystemExit) as caught:
            train_script.parse_args(words(flag))
        assert caught.value.code == 2
        replacement = says.removeprefix("refused: ")
        assert capsys.readouterr().err.strip().endswith(f"--{flag} is not taken: {replacement}")
        return
    given = getattr(train_script.parse_args(words(flag)), flag)
    if value is None:
        assert given is True
    elif isinstance(given, list):
        assert given == [value]
    elif isinstance(given, int | float):
        assert given == float(value)
    else:
        assert given == value
    here = getattr(train_script.parse_args([]), flag)
    if says.startswith("default"):
        assert says.startswith(
            f"default {'none' if here is None else here}, there {'none' if there is None else there}"
        )
        assert here != there
    else:
        assert here == there
        assert type(here) is type(there) or isinstance(here, int | float)


def test_flags_and_values_may_stand_apart_as_well(train_script):
    argv = [word for flag in UPSTREAM if f"--{flag}" not in train_script.REPLACED_FLAGS for word in words(flag)]
    apart = [part for word in argv for part in word.split("=", 1)]
    assert train_script.parse_args(apart) == train_script.parse_args(argv)


def test_every_replaced_flag_is_one_of_upstream(train_script, table):
    refused = {f"--{flag}" for flag, says in table.items() if says.startswith("refused")}
    assert refused == train_script.REPLACED_FLAGS.keys()


OLD = """
    --dataset_name={images} --use_ema --resolution=32 --center_crop --random_flip --train_batch_size=1
    --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05
    --max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0 --checkpointing_steps=500
    --checkpoints_total_limit=2 --validation_epochs=5 --validation_prompts yoda --seed=1337 --report_to=wandb
    --enable_xformers_memory_efficient_attention --mixed_precision=fp16 --use_8bit_adam --allow_tf32 --push_to_hub
    --output_dir={output} --pretrained_model_name_or_path={model} --image_interpolation_mode=lanczos
"""


def test_a_whole_old_command_line_passes_where_there_is_a_gpu_but_for_what_is_replaced(
    train_script, tiny_pipeline, image_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_script.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(train_script, "is_xformers_available", lambda: True)
    argv = OLD.format(images=image_folder(), output=tmp_path / "out", model=tiny_pipeline).split()
    with pytest.raises(SystemExit):
        train_script.parse_args(argv)
    assert "--validation_epochs is not taken: use --validation_steps" in capsys.readouterr().err
    argv[argv.index("--validation_epochs=5")] = "--validation_steps=500"
    train_script.check_args(train_script.parse_args(argv))


@pytest.mark.parametrize(
    "flag, value, says",
    [  # what the table's remarks promise
        ("lr_warmup_steps", "500", "constant_with_warmup"),
        ("offload_ema", None, "--use_ema"),
        ("foreach_ema", None, "--use_ema"),
        ("hub_model_id", "me/it", "--push_to_hub"),
        ("dataset_config_name", "small", "--dataset_name"),
        ("dataset_name", "a/b", "--train_data_dir"),
        ("mixed_precision", "fp16", "bf16"),
        ("allow_tf32", None, "NVIDIA"),
        ("enable_xformers_memory_efficient_attention", None, "drop"),
    ],
)
def test_what_diffusers_would_ignore_is_refused(
    train_script, tiny_pipeline, image_folder, tmp_path, table, flag, value, says
):
    argv = [f"--pretrained_model_name_or_path={tiny_pipeline}", f"--train_data_dir={image_folder()}"]
    argv += [f"--output_dir={tmp_path / 'out'}", "--resolution=32", f"--{flag}" + (f"={value}" if value else "")]
    with pytest.raises(train_script.InputError, match=f"--{flag}") as caught:
        train_script.check_args(train_script.parse_args(argv))
    assert says in str(caught.value)
    assert "refused" in table[flag] or flag == "dataset_name"
