"""What is wrong with a command line is said at once, briefly and with the remedy, before any model loads."""

import json
import re
import shutil

import pytest
from accelerate.state import AcceleratorState
from conftest import load_script
from running import (
    TRAIN_DREAMBOOTH,
    TRAIN_DREAMBOOTH_LORA,
    TRAIN_TEXT_TO_IMAGE,
    TRAIN_TEXT_TO_IMAGE_FLAX,
    TRAIN_TEXT_TO_IMAGE_LORA,
)

MAX_LINES = 12  # of a message
SCRIPTS = [TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA, TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA,
           TRAIN_TEXT_TO_IMAGE_FLAX]


@pytest.fixture
def command(tiny_pipeline, image_folder, tmp_path):
    """Factory of a command line that works, with more words at its end."""

    def make(*more, model=tiny_pipeline, resolution=32):
        words = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={tmp_path / 'images'}"]
        words += [f"--output_dir={tmp_path / 'out'}", f"--resolution={resolution}", "--report_to=none"]
        return [*words, "--train_batch_size=2", "--max_train_steps=2", *map(str, more)]

    image_folder(4)
    return make


@pytest.fixture
def refused(train_script, monkeypatch, capsys):
    """refused(argv) -> the message with which main() ends, with all that holds for every one of them asserted."""
    monkeypatch.setattr(train_script, "load_models", lambda *_, **__: pytest.fail("a model was loaded"))

    def run(argv):
        with pytest.raises(SystemExit) as caught:
            train_script.main(argv)
        said = capsys.readouterr()
        assert caught.value.code == 2
        assert "Traceback" not in said.err
        assert 1 <= len(said.err.strip().splitlines()) <= MAX_LINES
        assert len(said.err) < 2500  # lines may not be endless either
        return said.err

    return run


def problems(train_script, argv):
    """The text of what check_args raises, or "" if it has nothing to say."""
    try:
        train_script.check_args(train_script.parse_args(argv))
    except train_script.InputError as error:
        return str(error)
    return ""


def changed_model(folder, tmp_path, part, changes):
    """A copy of a pipeline with another value in one of its JSON files."""
    copy = tmp_path / "changed_model"
    shutil.copytree(folder, copy)
    config = json.loads((copy / part).read_text())
    (copy / part).write_text(json.dumps({**config, **changes}))
    return copy


def test_the_command_that_all_others_here_vary_is_right(train_script, command):
    assert problems(train_script, command()) == ""


# ---- acceptance: short messages


@pytest.mark.parametrize("model", ["no/such_folder/at_all", "nobody/nothing", "./nowhere", "model.safetensors"])
def test_wrong_model_path(refused, command, model):
    message = refused(command(model=model))
    assert model in message
    assert "name" in message


def test_folder_that_is_no_pipeline(refused, command, tmp_path):
    message = refused(command(model=tmp_path))
    assert str(tmp_path) in message
    assert "no whole pipeline" in message


def test_no_model_at_all(refused, tmp_path):
    assert "--pretrained_model_name_or_path" in refused([f"--train_data_dir={tmp_path}"])


@pytest.mark.parametrize("resolution, usable", [(60, 56), (33, 32), (7, 8)])
def test_resolution_that_the_vae_cannot_divide(refused, command, resolution, usable):
    message = refused(command(resolution=resolution))
    assert f"--resolution={resolution}" in message
    assert "multiple of 8" in message
    assert f"use {usable}" in message


def test_pipeline_without_a_tokenizer(train_script, command, tiny_pipeline, tmp_path):
    """transformers would go on with a tokenizer that knows nothing."""
    shutil.copytree(tiny_pipeline, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer"))
    message = problems(train_script, command(f"--pretrained_model_name_or_path={tmp_path / 'model'}"))
    assert "no whole pipeline" in message


def test_empty_folder(refused, command, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(command(f"--train_data_dir={empty}"))
    assert str(empty) in message
    assert "holds no images" in message
    assert ".jpg" in message  # what would be one


@pytest.mark.parametrize("resolution", [0, -8])
def test_resolution_has_to_be_positive(refused, command, resolution):
    assert f"--resolution={resolution}: must be in [1, inf)" in refused(command(resolution=resolution))


def test_missing_folder(refused, command, tmp_path):
    assert "does not exist" in refused(command(f"--train_data_dir={tmp_path / 'nowhere'}"))


def test_unknown_yaml_key(refused, command, tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rte: 1e-5\nseed: 1\n")
    message = refused(command("--config", tmp_path / "recipe.yaml"))
    assert "learning_rte" in message
    assert "recipe.yaml" in message
    assert "seed" not in message


def test_two_contradictory_flags(refused, command):
    message = refused(command("--dataset_name=a/b"))
    assert "--train_data_dir" in message
    assert "--dataset_name" in message


def test_neither_folder_nor_dataset(train_script, tiny_pipeline, tmp_path):
    argv = [f"--pretrained_model_name_or_path={tiny_pipeline}", f"--output_dir={tmp_path / 'out'}"]
    message = problems(train_script, [*argv, "--report_to=none"])
    assert "--train_data_dir=None: give this or --dataset_name" in message


def test_several_problems_are_reported_at_once(refused, command):
    message = refused(command("--learning_rate=-1", "--ema_decay=0.9", "--mixed_precision=fp16", resolution=33))
    for flag in ("--learning_rate=-1", "--ema_decay=0.9", "--mixed_precision=fp16", "--resolution=33"):
        assert message.count(flag) == 1


def test_unknown_flags_wrong_types_and_choices(refused, command):
    assert "--learning_rte" in refused(command("--learning_rte=1"))
    assert "--seed" in refused(command("--seed=one"))
    assert "bf16" in refused(command("--mixed_precision=half"))
    assert "cosine" in refused(command("--lr_scheduler=cosin"))
    assert "--use_em" in refused(command("--use_em"))  # an abbreviation would bind users to today's set of flags


# ---- every range

RANGES = {
    "1 or more": (
        "train_batch_size gradient_accumulation_steps logging_steps num_train_epochs max_train_steps "
        "checkpointing_steps checkpoints_total_limit validation_steps "
        "max_train_samples lr_num_cycles",
        [0, -1],
        [1, 8],
    ),
    "0 or more": ("seed dataloader_num_workers lr_warmup_steps num_validation_samples", [-1], [0, 3]),
    "0 or more, a number": ("noise_offset input_perturbation adam_weight_decay", [-0.1, "nan"], [0, 0.1, 2]),
    "above 0": ("learning_rate max_grad_norm adam_epsilon snr_gamma lr_power", [0, -1, "nan"], [1e-9, 5]),
    "from 0 to 1": ("caption_dropout ema_decay", [-0.1, 1.1, "nan"], [0, 0.5, 1]),
    "from 0 to below 1": ("adam_beta1 adam_beta2", [-0.1, 1, "nan"], [0, 0.999]),
}
RANGE_CASES = [(flag, bad, good) for flags, bad, good in RANGES.values() for flag in flags.split()]


@pytest.mark.parametrize("flag, bad, good", RANGE_CASES, ids=[case[0] for case in RANGE_CASES])
def test_range(train_script, command, flag, bad, good):
    for value in bad:
        message = problems(train_script, command(f"--{flag}={value}"))
        (line,) = [
            line for line in message.splitlines() if line.strip().startswith(f"--{flag}=") and "must be" in line
        ]
        assert len(line) < 200
    for value in good:
        message = problems(train_script, command(f"--{flag}={value}"))
        assert "must be in" not in message


def test_every_number_has_a_range(train_script):
    """A new flag with a number has to be thought about: its interval belongs into its help and into this file."""
    args = vars(train_script.parse_args([]))
    numbers = {name for name, value in args.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    assert numbers <= {flag for flag, _, _ in RANGE_CASES} | {"resolution"}  # tested with the VAE


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_help_ends_with_the_range_of_every_number_and_names_flags_that_exist(path):
    """`check_flags` finds nothing to check in a help of another form."""
    text = path.read_text(encoding="utf-8")
    flags = re.findall(r'    add\("--(\w+)"(.*?)\)$', text[: text.index("def parse_words")], flags=re.M | re.S)
    numbers = [name for name, rest in flags if re.search(r"type=(int|float)", rest)]
    without = [name for name, rest in flags if name in numbers and not re.search(r' [\[(]\S+, \S+[\])]"$', rest)]
    assert len(numbers) > 20
    assert without == []
    needed = {word for _, rest in flags for word in re.findall(r"needs --(\w+)", rest)}
    assert needed
    assert needed <= {name for name, _ in flags}


def test_infinite_norm_is_no_clipping(train_script, command):
    assert problems(train_script, command("--max_grad_norm=inf")) == ""


# ---- flags that need another flag

NEEDS = [
    ("--ema_decay=0.9", "--use_ema", []),
    ("--ema_warmup", "--use_ema", []),
    ("--offload_ema", "--use_ema", []),
    ("--foreach_ema", "--use_ema", []),
    ("--hub_model_id=me/it", "--push_to_hub", []),
    ("--hub_private_repo", "--push_to_hub", []),
    ("--allow_changed_resume", "--resume_from_checkpoint=latest", []),
    ("--validation_steps=2", "--validation_prompts=a", []),
    ("--validation_steps=3", "--num_validation_samples=1", []),
    ("--lr_num_cycles=2", "--lr_scheduler=cosine_with_restarts", ["--lr_scheduler=cosine"]),
    ("--lr_power=2", "--lr_scheduler=polynomial", ["--lr_scheduler=linear"]),
    ("--lr_step_rules=1:10,0.1", "--lr_scheduler=piecewise_constant", ["--lr_scheduler=constant"]),
    ("--lr_warmup_steps=3", "--lr_scheduler=constant_with_warmup", ["--lr_scheduler=constant"]),
]


@pytest.mark.parametrize("flag, needed, instead", NEEDS, ids=[case[0].split("=")[0].strip("-") for case in NEEDS])
def test_flag_that_does_nothing_without_another(train_script, command, flag, needed, instead):
    assert problems(train_script, command(flag, needed)) == ""
    message = problems(train_script, command(flag, *instead))
    assert flag.split("=")[0] in message
    assert needed.split("=")[0] in message or needed.split("=")[1] in message
    assert "add that or drop this" in message


def test_dataset_config_needs_a_dataset(train_script, command):
    assert "without --dataset_name" in problems(train_script, command("--dataset_config_name=small"))


@pytest.mark.parametrize("rules", [None, "1", "10:1", "1:10,0.1:20", "ten:1,2", "1:10 0.1", ""])
def test_piecewise_constant_needs_rules_that_can_be_read(train_script, command, rules):
    words = ["--lr_scheduler=piecewise_constant"] + ([f"--lr_step_rules={rules}"] if rules is not None else [])
    message = problems(train_script, command(*words))
    assert "--lr_step_rules" in message
    assert "1:10,0.1:20,0.01" in message
    assert problems(train_script, command(words[0], "--lr_step_rules=1:10,0.1:20,1e-2")) == ""


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"]
)
def test_schedules_that_warm_up(train_script, command, schedule):
    assert problems(train_script, command(f"--lr_scheduler={schedule}", "--lr_warmup_steps=1")) == ""


def test_tracker_that_is_not_installed(train_script, command):
    message = problems(train_script, command("--report_to=tensorbord"))
    assert "--report_to=tensorbord" in message
    assert "tensorboard" in message.split(":", 1)[1]
    for tracker in ("tensorboard", "wandb", "all", "none"):
        assert problems(train_script, command(f"--report_to={tracker}")) == ""


# ---- the machine


def test_fp16_on_a_cpu_is_refused_by_flag_and_by_environment(train_script, command, monkeypatch):
    assert "fp16" in problems(train_script, command("--mixed_precision=fp16"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    message = problems(train_script, command())
    assert "fp16" in message
    assert "bf16" in message
    assert "accelerate's config" in message
    assert problems(train_script, command("--mixed_precision=bf16")) == ""  # the flag wins
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert problems(train_script, command()) == ""


def test_fp16_is_refused_where_accelerate_is_told_to_use_the_cpu(train_script, command, monkeypatch):
    monkeypatch.setattr(train_script.torch.accelerator, "is_available", lambda: True)
    assert problems(train_script, command("--mixed_precision=fp16")) == ""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert "fp16" in problems(train_script, command("--mixed_precision=fp16"))


@pytest.mark.parametrize("flag", ["allow_tf32", "enable_xformers_memory_efficient_attention"])
def test_what_needs_a_gpu_is_refused_without(train_script, command, flag):
    assert f"--{flag}" in problems(train_script, command(f"--{flag}"))


def test_8bit_adam_needs_its_package(train_script, command, monkeypatch):
    assert problems(train_script, command("--use_8bit_adam")) == ""
    monkeypatch.setattr(train_script, "is_bitsandbytes_available", lambda: False)
    assert "--use_8bit_adam" in problems(train_script, command("--use_8bit_adam"))


# ---- the model


@pytest.mark.parametrize("part", ["text_encoder_2", "transformer"])
def test_models_of_another_kind_are_refused_by_name(refused, command, tiny_pipeline, tmp_path, part):
    changes = {part: ["transformers", "CLIPTextModelWithProjection"], "_class_name": "StableDiffusionXLPipeline"}
    message = refused(command(model=changed_model(tiny_pipeline, tmp_path, "model_index.json", changes)))
    assert part in message
    assert "Stable Diffusion 1.x or 2.x" in message


def test_inpainting_models_are_refused(refused, command, tiny_pipeline, tmp_path):
    model = changed_model(tiny_pipeline, tmp_path, "unet/config.json", {"in_channels": 9})
    message = refused(command(model=model))
    assert "9 channels" in message
    assert "text-to-image" in message


def test_other_prediction_types_are_refused(refused, command, tiny_pipeline, tmp_path):
    model = changed_model(tiny_pipeline, tmp_path, "scheduler/scheduler_config.json", {"prediction_type": "sample"})
    assert "'sample'" in refused(command(model=model))


def test_zero_terminal_snr_needs_v_prediction(train_script, command, tiny_pipeline, tiny_pipeline_v, tmp_path):
    for words in ([], ["--prediction_type=epsilon"]):
        message = problems(train_script, command("--rescale_betas_zero_snr", *words))
        assert "--prediction_type=v_prediction" in message
    assert problems(train_script, command("--rescale_betas_zero_snr", "--prediction_type=v_prediction")) == ""
    assert problems(train_script, command("--rescale_betas_zero_snr", model=tiny_pipeline_v)) == ""
    changes = {"rescale_betas_zero_snr": True}  # the base's own, not a flag
    model = changed_model(tiny_pipeline, tmp_path, "scheduler/scheduler_config.json", changes)
    assert "--prediction_type=v_prediction" in problems(train_script, command(model=model))


def test_single_file_and_its_config_belong_together(train_script, command, tiny_pipeline, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "--single_file_config" in problems(train_script, command(model=path))
    assert problems(train_script, command(f"--single_file_config={tiny_pipeline}", model=path)) == ""
    assert "--single_file_config" in problems(train_script, command(f"--single_file_config={tiny_pipeline}"))
    assert "no such file" in problems(train_script, command(model=tmp_path / "missing.ckpt"))


# ---- output and resuming


def test_a_folder_in_use_is_not_written_over(train_script, refused, command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    message = refused(command())
    assert str(out) in message
    assert "--resume_from_checkpoint=latest" in message
    assert "--overwrite_output_dir" in message
    assert (out / "notes.txt").read_text() == "mine"
    # No run of ours is there to be written over, so that flag does not help.
    assert str(out) in refused(command("--overwrite_output_dir"))
    (out / "args.json").write_text("{}")
    assert problems(train_script, command("--overwrite_output_dir")) == ""


def test_an_empty_folder_may_be_there_but_not_a_file(train_script, command, tmp_path):
    (tmp_path / "out").mkdir()
    assert problems(train_script, command()) == ""
    (tmp_path / "file").write_text("")
    assert "is a file" in problems(train_script, command(f"--output_dir={tmp_path / 'file'}"))


def test_output_among_the_images_is_refused(train_script, command, tmp_path):
    """Its samples would be taken for images that lack a caption."""
    message = problems(train_script, command(f"--output_dir={tmp_path / 'images' / 'out'}"))
    assert "lies in the folder of the images" in message


def test_output_among_the_images_of_a_dataset_is_refused(train_script, command, tmp_path):
    words = [word for word in command() if not word.startswith(("--train_data_dir", "--output_dir"))]
    words += [f"--dataset_name={tmp_path / 'images'}", f"--output_dir={tmp_path / 'images' / 'out'}"]
    assert "lies in the folder of the images" in problems(train_script, words)


@pytest.mark.parametrize("path, other", [(TRAIN_TEXT_TO_IMAGE, "pytorch_lora_weights.safetensors"),
                                         (TRAIN_TEXT_TO_IMAGE_LORA, "model_index.json")])
def test_a_result_of_another_kind_is_not_written_over(path, other, command, tmp_path):
    """Both in one folder would be taken for one result, by its name."""
    script, out = load_script(path), tmp_path / "out"
    out.mkdir()
    (out / "args.json").write_text("{}")
    assert problems(script, command("--overwrite_output_dir")) == ""
    (out / other).write_text("{}")
    assert "is in use; name another" in problems(script, command("--overwrite_output_dir"))


def test_output_that_cannot_be_written_is_refused(train_script, command, tmp_path):
    (tmp_path / "file").write_text("")
    assert "name another folder" in problems(train_script, command(f"--output_dir={tmp_path / 'file' / 'out'}"))


def test_home_is_expanded(train_script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train_script.parse_args(["--output_dir=~/out"]).output_dir == str(tmp_path / "out")


def test_a_polynomial_needs_room_above_its_end(train_script, command):
    words = ["--lr_scheduler=polynomial", "--learning_rate=1e-7"]
    assert "--learning_rate=1e-07: must be above 1e-7" in problems(train_script, command(*words))
    assert problems(train_script, command(words[0], "--learning_rate=2e-7")) == ""


def test_home_is_expanded_for_the_config_itself(train_script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 7\n")
    assert train_script.parse_args(["--config=~/mine.yaml"]).seed == 7


def test_resuming_and_overwriting_exclude_each_other(train_script, command):
    message = problems(train_script, command("--resume_from_checkpoint=latest", "--overwrite_output_dir"))
    assert "--overwrite_output_dir" in message
    assert "--resume_from_checkpoint" in message


def test_a_checkpoint_has_to_be_whole(train_script, command, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    message = problems(train_script, command(f"--resume_from_checkpoint={checkpoint}"))
    assert str(checkpoint) in message
    assert "latest" in message
    checkpoint.mkdir()
    (checkpoint / "state.pt").write_bytes(b"")
    assert "no whole checkpoint" in problems(train_script, command(f"--resume_from_checkpoint={checkpoint}"))


@pytest.fixture
def run(train_script, command, tmp_path):
    """A run of two steps with a checkpoint after each."""
    train_script.main(command("--checkpointing_steps=1"))
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    return tmp_path / "out"


CHANGES = [  # what changes the result, and how it is called in the message
    (["--learning_rate=2e-4"], "learning_rate"),
    (["--seed=1"], "seed"),
    (["--snr_gamma=5"], "snr_gamma"),
    (["--random_flip"], "random_flip"),
    (["--caption_dropout=0.1"], "caption_dropout"),
    (["--mixed_precision=bf16"], "mixed_precision"),
    (["--train_batch_size=4"], "samples_per_step"),
    (["--num_validation_samples=1"], "captioned_images"),
    (["--lr_scheduler=cosine"], "lr_scheduler"),
    (["--use_ema"], "use_ema"),
]


@pytest.mark.parametrize("words, name", CHANGES, ids=[name for _, name in CHANGES])
def test_resuming_under_settings_that_change_the_result_is_refused(train_script, command, run, capsys, words, name):
    words = ["--resume_from_checkpoint=latest", "--max_train_steps=3", *words]
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        train_script.main(command(*words))
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"{name}: " in message
    # State of another kind does not fit, so no flag lets these change.
    assert ("--allow_changed_resume" in message) == (name not in ("mixed_precision", "use_ema"))
    assert len(message.strip().splitlines()) <= MAX_LINES
    assert not (run / "checkpoint-3").exists()


def test_precision_of_accelerates_config_is_a_setting(train_script, command, run, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SystemExit) as caught:
        train_script.main(command("--resume_from_checkpoint=latest", "--max_train_steps=3"))
    assert caught.value.code == 2
    assert "mixed_precision: no there, bf16 now" in capsys.readouterr().err


def test_other_images_are_other_settings(train_script, command, run, capsys, image_folder):
    image_folder(4, size=40)  # in place of the first ones
    with pytest.raises(SystemExit) as caught:
        train_script.main(command("--resume_from_checkpoint=latest", "--max_train_steps=3"))
    assert caught.value.code == 2
    assert "captioned_images: " in capsys.readouterr().err


def last_step(run):
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]


def test_changed_settings_can_be_allowed_and_are_said(train_script, command, run, capsys):
    words = ["--resume_from_checkpoint=latest", "--max_train_steps=3", "--learning_rate=2e-4"]
    train_script.main(command(*words, "--allow_changed_resume"))
    assert "learning_rate: 0.0001 there, 0.0002 now" in capsys.readouterr().out
    assert last_step(run) == 3
    rates = [json.loads(line).get("lr") for line in (run / "log.jsonl").read_text().splitlines()]
    assert [rate for rate in rates if rate] == [1e-4, 2e-4]


def test_a_checkpoint_beyond_the_last_step_is_refused(train_script, command, run, capsys):
    with pytest.raises(SystemExit) as caught:
        train_script.main(command("--resume_from_checkpoint=latest", "--max_train_steps=1"))
    assert caught.value.code == 2
    assert "beyond the last step, 1" in capsys.readouterr().err
    assert last_step(run) == 2


def test_settings_that_leave_the_result_alone_may_change(train_script, command, run, capsys, tmp_path):
    shutil.rmtree(run / "checkpoint-2")
    words = ["--resume_from_checkpoint", run / "checkpoint-1", "--max_train_steps=3", "--checkpointing_steps=2"]
    words += ["--train_batch_size=1", "--gradient_accumulation_steps=2", "--logging_steps=1", "--save_precision=fp16"]
    train_script.main(command(*words, "--dataloader_num_workers=0", "--gradient_checkpointing"))
    assert "steps      1 to 3" in capsys.readouterr().out
    assert last_step(run) == 3


def test_checkpoints_are_found_by_their_name_in_the_output_folder(train_script, command, run, capsys):
    """As diffusers' users write it. The path as it stands is tested above."""
    assert "newer" in problems(train_script, command("--resume_from_checkpoint=checkpoint-1"))
    shutil.rmtree(run / "checkpoint-2")
    train_script.main(command("--resume_from_checkpoint=checkpoint-1", "--max_train_steps=3", "--dry_run"))
    assert "steps      1 to 3" in capsys.readouterr().out
    assert "no whole checkpoint" in problems(train_script, command("--resume_from_checkpoint=checkpoint-7"))


def test_latest_without_a_checkpoint_starts_from_the_beginning(train_script, command, capsys):
    train_script.main(command("--resume_from_checkpoint=latest", "--dry_run"))
    assert "steps      0 to 2" in capsys.readouterr().out


# ---- --config


@pytest.fixture
def parse(train_script, tmp_path):
    """parse(text, *words) -> the arguments of a YAML text and a command line."""

    def run(text, *words):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return train_script.parse_args(["--config", str(path), *words])

    return run


def test_config_sets_flags_of_every_type(parse):
    args = parse(
        "learning_rate: 1e-5\nresolution: 64\nuse_ema: true\nrandom_flip: false\ntrain_data_dir: my images\n"
        "validation_prompts:\n  - a red circle\n  - '--a strange one'\nmixed_precision: no\nsnr_gamma:\n"
    )
    assert args.learning_rate == 1e-5  # a string to YAML, which wants a dot in it
    assert args.resolution == 64
    assert args.use_ema is True
    assert args.random_flip is False
    assert args.train_data_dir == "my images"
    assert args.mixed_precision == "no"
    assert args.snr_gamma is None
    assert args.validation_prompts == ["a red circle", "--a strange one"]


def test_config_may_stand_under_training_and_evaluation_is_left_alone(parse):
    args = parse("seed: 1\noutput_dir: top\ntraining:\n  seed: 2\nevaluation:\n  prompts: [a]\n  anything: 1\n")
    assert args.seed == 2
    assert args.output_dir == "top"


@pytest.mark.parametrize("section", ["", "training:\n  "])
def test_command_line_wins_over_config(parse, section):
    text = f"{section}use_ema: true\n" if section else "use_ema: true\nvalidation_prompts: [a, b]\nseed: 1\n"
    args = parse(text, "--no-use_ema", "--seed=2", "--validation_prompts", "c")
    assert args.use_ema is False
    assert args.seed == 2
    assert args.validation_prompts == ["c"]


def test_command_line_wins_wherever_config_stands(train_script, tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    for argv in (
        ["--seed=2", f"--config={tmp_path / 'recipe.yaml'}"],
        ["--config", tmp_path / "recipe.yaml", "--seed=2"],
    ):
        assert train_script.parse_args(list(map(str, argv))).seed == 2


def test_empty_config_is_none(parse):
    assert parse("") == parse("# nothing\n")


def test_the_demo_is_a_recipe_of_flags(train_script, repo):
    assert train_script.parse_args(["--config", str(repo / "examples/configs/demo_creatures.yaml")]).resolution == 64


@pytest.mark.parametrize(
    "text, says",
    [
        ("sead: 1\n", "sead"),
        ("training:\n  sead: 1\n", "sead"),
        ("1: 2\n", "unknown key 1"),
        ("config: other.yaml\n", "config"),
        ("--seed: 1\n", "--seed"),
        ("seed: one\n", "--seed"),
        ("seed: [1, 2]\n", "2"),
        ("seed: {a: 1}\n", "--seed"),
        ("use_ema: 1\n", "--use_ema"),
        ("max_train_steps: true\n", "--max_train_steps"),
        ("lr_scheduler: cosin\n", "--lr_scheduler"),
        ("- a\n- list\n", "no YAML file of flags"),
        ("just text\n", "no YAML file of flags"),
        ("training: [1]\n", "no YAML file of flags"),
        ("training:\n  training:\n    seed: 1\n", "unknown key training"),
        ("a: [1\n", "no YAML file of flags"),
        ("\tseed: 1\n", "no YAML file of flags"),
    ],
)
def test_config_that_cannot_be_obeyed(refused, tmp_path, text, says):
    (tmp_path / "recipe.yaml").write_text(text)
    assert says in refused(["--config", str(tmp_path / "recipe.yaml")])


def test_config_that_is_not_there(refused, tmp_path):
    assert str(tmp_path / "nowhere.yaml") in refused([f"--config={tmp_path / 'nowhere.yaml'}"])
    assert str(tmp_path) in refused([f"--config={tmp_path}"])


def test_config_of_bytes(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00 \x80")
    assert "no YAML file of flags" in refused([f"--config={tmp_path / 'recipe.yaml'}"])


# ---- replaced flags


@pytest.mark.parametrize("form", ["{0}=1", "{0} 1"])
def test_replaced_flags_name_their_replacement(train_script, refused, command, form):
    assert train_script.REPLACED_FLAGS
    for flag, replacement in train_script.REPLACED_FLAGS.items():
        message = refused(command(*form.format(flag).split()))
        assert flag in message
        assert replacement in message


def test_switches_have_a_form_that_says_no(train_script):
    args = train_script.parse_args(["--use_ema", "--no-use_ema", "--random_flip"])
    assert args.use_ema is False
    assert args.random_flip is True


def test_help_ends_well(train_script, capsys):
    with pytest.raises(SystemExit) as caught:
        train_script.main(["--help"])
    assert caught.value.code == 0
    assert "--snr_gamma" in capsys.readouterr().out
