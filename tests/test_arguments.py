"""What is wrong with a command line is said at once, briefly and with the remedy, before any model loads."""

import re

import diffusers
import pytest
from conftest import load_script
from running import SCRIPTS, TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_FLAX, TRAIN_TEXT_TO_IMAGE_LORA
from tiny import changed_pipeline
from training import parse

from sdtune.arguments import (
    LR_SCHEDULERS,
    check_old_flags,
    check_requirements,
    nearest,
    new_parser,
    noise_offset_of,
    parse_flags,
    positive_int,
)
from sdtune.commands import generate
from sdtune.training import check_environment, check_hardware

MAX_LINES = 12  # of a message
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])


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


@pytest.fixture(scope="module")
def scripts(train_script):
    """The training scripts as modules, by path."""
    return {path: train_script if path == TRAIN_TEXT_TO_IMAGE else load_script(path) for path in SCRIPTS}


def problems(script, argv):
    """The text of what is wrong with a command line, or "" if nothing is."""
    args, wrong = script.parse_flags(script.make_parser(), argv, {})
    return "\n".join(wrong + script.check_args(args))


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


def test_empty_folder(refused, command, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(command(f"--train_data_dir={empty}"))
    assert str(empty) in message
    assert "holds no images" in message
    assert ".jpg" in message  # what would be one


@pytest.mark.parametrize("resolution", [0, -8])
def test_resolution_has_to_be_positive(refused, command, resolution):
    message = refused(command(resolution=resolution))
    assert f"--resolution: must be a whole number in [1, inf), not '{resolution}'" in message


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


def test_several_problems_are_reported_at_once(refused, command):
    message = refused(command("--learning_rate=-1", "--ema_decay=0.9", "--mixed_precision=fp16", resolution=33))
    assert message.count("--learning_rate: must be in (0, inf), not '-1'") == 1
    for flag in ("--ema_decay=0.9", "--mixed_precision=fp16", "--resolution=33"):
        assert message.count(flag) == 1


def test_unknown_flags_wrong_types_and_choices(refused, command):
    assert "--learning_rte" in refused(command("--learning_rte=1"))
    assert "--seed" in refused(command("--seed=one"))
    assert "bf16" in refused(command("--mixed_precision=half"))
    assert "cosine" in refused(command("--lr_scheduler=cosin"))
    assert "--use_em" in refused(command("--use_em"))  # an abbreviation would bind users to today's set of flags


MISTAKES = {  # one or more of every part that checks flags, and how its message starts
    "--offload_ema": "--offload_ema=True: does nothing without --use_ema",
    "--ema_decay=0.9": "--ema_decay=0.9: does nothing without --use_ema",
    "--bucket_min=256": "--bucket_min=256: does nothing without --aspect_ratio_buckets",
    "--dataset_name=a/b": "{data}: give this or --dataset_name, not both",
    "--lr_power=2": "--lr_power=2.0: does nothing without --lr_scheduler=polynomial",
    "--use_8bit_adam": "--use_8bit_adam=True: needs bitsandbytes",
    "--mixed_precision=fp16": "--mixed_precision=fp16",
    "--report_to=nothing": "--report_to=nothing: installed are ",
    "--validation_steps=2": "--validation_steps=2: does nothing without --validation_prompt",
    "--local_rank=7": "--local_rank=7: is not what a launcher set; drop this",
    "--output_dir={file}": "--output_dir={file}: {file} is a file",
    "--pretrained_model_name_or_path={file}": "{file}: no whole pipeline",
    "--num_hosts=2": "--num_hosts=2: does nothing without --coordinator_address",
    "--with_prior_preservation": "--with_prior_preservation: needs --class_data_dir",
    "--rank=0": "--rank: must be a whole number in [1, inf), not '0'",
}


@every_script
def test_every_script_asks_every_part(scripts, path, tmp_path, monkeypatch):
    script, file = scripts[path], tmp_path / "file"
    file.write_text("")
    if hasattr(script, "is_installed"):
        monkeypatch.setattr(script, "is_installed", lambda package: False)
    data = f"--instance_data_dir={tmp_path}" if "dreambooth" in path.stem else f"--train_data_dir={tmp_path}"
    flags = vars(script.make_parser().parse_args([]))
    taken = {word: start for word, start in MISTAKES.items() if word.split("=")[0].removeprefix("--") in flags}
    if path == TRAIN_TEXT_TO_IMAGE_FLAX:  # which takes it, for what is frozen
        del taken["--mixed_precision=fp16"]
    assert len(taken) >= 8
    words = [data, *[word.format(file=file) for word in taken]]
    lines = problems(script, words).split("\n")
    for start in taken.values():
        assert [line for line in lines if line.startswith(start.format(file=file, data=data))], start


# ---- every range

RANGES = [  # flags of any script, their interval as help says it, values that are refused, values that are accepted
    (
        """
        train_batch_size gradient_accumulation_steps logging_steps num_train_epochs max_train_steps checkpointing_steps
        checkpoints_total_limit validation_steps validation_epochs max_train_samples lr_num_cycles resolution rank
        repeats num_class_images sample_batch_size validation_num_inference_steps num_hosts tokenizer_max_length
        bucket_step bucket_min bucket_max shuffle_buffer_size
        """,
        "[1, inf)",
        ["0", "-1", "1.5", "nan", "many"],
        [1, 8],
    ),
    (
        "dataloader_num_workers lr_warmup_steps max_nan_steps num_validation_images num_validation_samples host_index",
        "[0, inf)",
        ["-1", "0.5", "nan", ""],
        [0, 3],
    ),
    (
        "noise_offset input_perturbation adam_weight_decay prior_loss_weight",
        "[0, inf)",
        ["-0.1", "nan", "inf", "much"],
        [0, 0.1, 2],
    ),
    (
        "learning_rate adam_epsilon snr_gamma lr_power lora_alpha text_encoder_lr",
        "(0, inf)",
        ["0", "-1", "nan", "inf"],
        [1e-9, 5],
    ),
    ("max_grad_norm", "(0, inf]", ["0", "-1", "nan"], [1e-9, 5, float("inf")]),
    ("caption_dropout ema_decay", "[0, 1]", ["-0.1", "1.1", "nan"], [0, 0.5, 1]),
    ("adam_beta1 adam_beta2 lora_dropout", "[0, 1)", ["-0.1", "1", "nan"], [0, 0.999]),
    ("validation_guidance_scale", "[1, inf)", ["0.9", "-1", "nan", "inf"], [1, 2, 7.5]),
    ("local_rank", "[-1, inf)", ["-2", "0.5", "nan", "first"], [-1, 0, 3]),
    ("seed", "[0, 9e18]", ["-1", "10000000000000000000", "0.5", "one"], [0, 3, 9 * 10**18]),
]
RANGE_CASES = [(flag, *case) for flags, *case in RANGES for flag in flags.split()]
INTERVALS = {flag: interval for flag, interval, _, _ in RANGE_CASES}


@pytest.mark.parametrize("flag, interval, bad, good", RANGE_CASES, ids=list(INTERVALS))
def test_range(scripts, flag, interval, bad, good):
    script = next(script for script in scripts.values() if flag in vars(script.make_parser().parse_args([])))
    parser = script.make_parser()
    default = getattr(parser.parse_args([]), flag)
    for text in bad:
        args, wrong = parse_flags(parser, [f"--{flag}={text}"], {})
        (problem,) = wrong
        assert re.fullmatch(rf"--{flag}(/--[\w-]+)?: must be .*in {re.escape(interval)}, not {text!r}", problem)
        assert getattr(args, flag) == default
    for value in good:
        args, wrong = parse_flags(parser, [f"--{flag}={value}"], {})
        assert wrong == []
        assert getattr(args, flag) == value


TEXTS = ["path_name", "repo_name", "secret_token"]  # types of flags that are no numbers


@every_script
def test_every_number_has_a_range_and_its_help_says_which(scripts, path):
    """A new flag with a number has to be thought about: its interval belongs into its help and into this file."""
    actions = scripts[path].make_parser()._actions
    numbers = [action for action in actions if action.type and action.type.__name__ not in TEXTS]
    assert len(numbers) > 20
    for action in numbers:
        assert action.help.endswith(f" {INTERVALS[action.dest]}"), action.dest
    # A default that is a number is no switch's, and has a type.
    assert not [action.dest for action in actions if type(action.default) in (int, float) and not action.type]


@every_script
def test_help_names_flags_that_exist(scripts, path):
    actions = scripts[path].make_parser()._actions
    needed = {word for action in actions for word in re.findall(r"--(\w+)", action.help)}
    assert needed
    assert needed <= {action.dest for action in actions}


def test_infinite_norm_is_no_clipping(train_script, command):
    assert problems(train_script, command("--max_grad_norm=inf")) == ""


def test_all_wrong_values_are_told_and_leave_the_defaults():
    """argparse alone ends at the first one."""
    parser = new_parser("Trains.", "train [flags]")
    parser.add_argument("--seed", type=positive_int, default=3)
    parser.add_argument("--sizes", type=positive_int, nargs="+")
    parser.add_argument("--kind", choices=["a", "b"], default="a")
    parser.add_argument("--name")
    words = ["--seed", "0", "--name=it", "--sizes", "1", "x", "--kind=c", "--seed=2", "--seed=y"]
    args, wrong = parse_flags(parser, words, {})
    assert [problem.split(":")[0] for problem in wrong] == ["--seed", "--sizes", "--kind"]
    assert vars(args) == {"seed": 3, "sizes": None, "kind": "a", "name": "it"}


# ---- flags that need another flag

NEEDS = [
    ("--ema_decay=0.9", "--use_ema"),
    ("--ema_warmup", "--use_ema"),
    ("--offload_ema", "--use_ema"),
    ("--hub_model_id=me/it", "--push_to_hub"),
    ("--hub_private_repo", "--push_to_hub"),
    ("--allow_changed_resume", "--resume_from_checkpoint=latest"),
    ("--validation_steps=2", "--validation_prompts=a"),
    ("--validation_steps=3", "--num_validation_samples=1"),
    ("--validation_epochs=2", "--validation_prompt=a"),
    ("--validation_epochs=3", "--num_validation_samples=1"),
    ("--num_validation_images=2", "--validation_prompt=a"),
    ("--num_validation_images=0", "--validation_prompts=a"),
    ("--validation_guidance_scale=2", "--validation_prompts=a"),
    ("--validation_num_inference_steps=5", "--validation_prompt=a"),
    ("--validation_negative_prompt=b", "--validation_prompt=a"),
    ("--validation_scheduler=DDPMScheduler", "--validation_prompt=a"),
    ("--lr_num_cycles=2", "--lr_scheduler=cosine_with_restarts"),
    ("--lr_power=2", "--lr_scheduler=polynomial"),
    ("--lr_step_rules=1:10,0.1", "--lr_scheduler=piecewise_constant"),
    ("--lr_warmup_steps=3", "--lr_scheduler=constant_with_warmup"),
]


@pytest.mark.parametrize("flag, needed", NEEDS, ids=[case[0].strip("-") for case in NEEDS])
def test_flag_that_does_nothing_without_another(train_script, command, flag, needed):
    assert problems(train_script, command(flag, needed)) == ""
    message = problems(train_script, command(flag))
    assert flag.split("=")[0] in message
    assert needed.split("=")[0] in message or needed.split("=")[1] in message
    assert "add that or drop this" in message


OLD_FLAGS = [  # words, what is said of them
    (
        ["--offset_noise", "--noise_offset=0.05"],
        "--offset_noise=True: means --noise_offset=0.1, but --noise_offset=0.05",
    ),
    (["--local_rank=1"], "--local_rank=1: is not what a launcher set; drop this, and start with `accelerate launch`"),
    (["--offset_noise"], None),
    (["--offset_noise", "--noise_offset=0.1"], None),
    (["--local_rank=-1"], None),
    (["--local-rank=0"], None),
    (["--no-offset_noise", "--noise_offset=0.05"], None),
]


@pytest.mark.parametrize("words, says", OLD_FLAGS)
def test_flags_of_old_commands_say_what_others_say_or_are_refused(train_script, command, words, says):
    found = problems(train_script, command(*words))
    assert found.startswith(says) if says else found == ""
    assert noise_offset_of(parse("--offset_noise")) == 0.1
    assert noise_offset_of(parse("--noise_offset=0.05")) == 0.05


@pytest.mark.parametrize("rank", [0, 3])
def test_local_rank_is_what_the_launcher_set(monkeypatch, rank):
    """torch.distributed.launch sets both."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert check_old_flags(parse(f"--local-rank={rank}")) == []
    assert check_old_flags(parse()) == []
    (problem,) = check_old_flags(parse(f"--local_rank={rank + 1}"))
    assert problem.startswith(f"--local_rank={rank + 1}: is not what a launcher set")


def test_dataset_config_needs_a_dataset(train_script, command):
    assert "without --dataset_name" in problems(train_script, command("--dataset_config_name=small"))


def some_value(action):
    """A word that gives a flag a value that it takes."""
    if action.nargs == 0:
        return action.option_strings[0]
    value = action.choices[0] if action.choices else "1"
    return f"{action.option_strings[0]}={value}"


@every_script
def test_what_needs_another_flag_is_refused_without_by_every_script(scripts, path):
    script = scripts[path]
    parser = script.make_parser()
    actions = {action.dest: action for action in parser._actions}
    assert len(script.REQUIRES) >= 6
    for flag, needed in script.REQUIRES.items():
        assert f"needs --{needed}" in actions[flag].help
        word = some_value(actions[flag])
        args, wrong = parse_flags(parser, [word], {})
        (problem,) = wrong + check_requirements(args, script.REQUIRES)
        assert re.fullmatch(rf"--{flag}=\S+: does nothing without --{needed}; add that or drop this", problem)
        assert any(line.startswith(f"--{flag}=") for line in script.check_args(args))
        args, wrong = parse_flags(parser, [word, some_value(actions[needed])], {})
        assert wrong + check_requirements(args, script.REQUIRES) == []


@every_script
def test_settings_that_a_resume_may_or_cannot_change_are_flags(scripts, path):
    """Another name would be looked up nowhere, and so change in silence."""
    script = scripts[path]
    flags = set(vars(script.make_parser().parse_args([])))
    assert script.FREE_ON_RESUME - flags == set()
    # These are no flags, but made of several.
    made = (
        {"state"} | ({"stream"} if "streaming" in flags else set()) | ({"sharding"} if "optimizer" in flags else set())
    )
    if "skip_save_text_encoder" in flags:  # the script that trains all of the text encoder, or not
        made.add("text_encoder_apart")
    assert script.FIXED_ON_RESUME - flags == made
    assert not script.FREE_ON_RESUME & script.FIXED_ON_RESUME


# ---- the machine


def test_fp16_on_a_cpu_is_refused_by_flag_and_by_environment(monkeypatch):
    told = "--mixed_precision=fp16 (or accelerate's config): a CPU cannot train in fp16; use --mixed_precision=no"
    assert check_hardware(parse("--mixed_precision=fp16")) == [told]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert check_hardware(parse()) == [told]
    assert check_hardware(parse("--mixed_precision=bf16")) == []  # the flag wins
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert check_hardware(parse()) == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    told = "--mixed_precision=fp8 (or accelerate's config): must be no, fp16 or bf16; use bf16"
    assert check_hardware(parse()) == [told]


def test_fp16_is_refused_where_accelerate_is_told_to_use_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert check_hardware(parse("--mixed_precision=fp16")) == []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert "fp16" in check_hardware(parse("--mixed_precision=fp16"))[0]


@pytest.mark.parametrize("flag", ["allow_tf32", "enable_xformers_memory_efficient_attention"])
def test_what_needs_a_gpu_is_refused_without(train_script, command, flag):
    assert f"--{flag}" in problems(train_script, command(f"--{flag}"))


@pytest.mark.parametrize("has_gpu, has_xformers", [(True, False), (False, True)])
def test_xformers_is_asked_for_by_its_file(monkeypatch, has_gpu, has_xformers):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_gpu)
    monkeypatch.setattr(diffusers.utils, "is_xformers_available", lambda: has_xformers)
    assert check_hardware(parse("--enable_xformers_memory_efficient_attention")) == [
        "--enable_xformers_memory_efficient_attention=True: needs a GPU and xformers; run "
        "`pip install -r requirements_xformers.txt` there, or drop this"
    ]
    assert check_hardware(parse()) == []


@pytest.mark.parametrize("name", ["MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_ways_of_accelerates_config_that_are_not_obeyed_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert check_environment(parse()) == [
        f"accelerate's config asks for {name}, which cannot be used; choose GPUs alone"
    ]


# ---- the model


@pytest.mark.parametrize("part", ["text_encoder_2", "transformer"])
def test_models_of_another_kind_are_refused_by_name(refused, command, tiny_pipeline, tmp_path, part):
    changes = {part: ["transformers", "CLIPTextModelWithProjection"], "_class_name": "StableDiffusionXLPipeline"}
    message = refused(
        command(model=changed_pipeline(tiny_pipeline, tmp_path / "changed", "model_index.json", changes))
    )
    assert part in message
    assert "Stable Diffusion 1.x or 2.x" in message


def test_inpainting_models_are_refused(refused, command, tiny_pipeline, tmp_path):
    model = changed_pipeline(tiny_pipeline, tmp_path / "changed", "unet/config.json", {"in_channels": 9})
    message = refused(command(model=model))
    assert "9 channels" in message
    assert "text-to-image" in message


def test_other_prediction_types_are_refused(refused, command, tiny_pipeline, tmp_path):
    model = changed_pipeline(
        tiny_pipeline, tmp_path / "changed", "scheduler/scheduler_config.json", {"prediction_type": "sample"}
    )
    assert "'sample'" in refused(command(model=model))


# ---- output


def test_a_folder_in_use_is_not_written_over(refused, command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    message = refused(command())
    assert f"--output_dir={out}: is in use; name another (it holds no run of this script)" in message
    assert (out / "notes.txt").read_text() == "mine"
    # No run of ours is there to go on with or to be written over, so those flags do not help.
    assert "--resume_from_checkpoint" not in message
    assert "--overwrite_output_dir" not in message
    assert str(out) in refused(command("--overwrite_output_dir"))


@pytest.mark.parametrize(
    "path, other",
    [(TRAIN_TEXT_TO_IMAGE, "pytorch_lora_weights.safetensors"), (TRAIN_TEXT_TO_IMAGE_LORA, "model_index.json")],
)
def test_a_result_of_another_kind_is_not_written_over(path, other, command, tmp_path):
    """Both in one folder would be taken for one result, by its name."""
    script, out = load_script(path), tmp_path / "out"
    out.mkdir()
    (out / "args.json").write_text("{}")
    assert problems(script, command("--overwrite_output_dir")) == ""
    (out / other).write_text("{}")
    assert "holds no run of this script" in problems(script, command("--overwrite_output_dir"))


# ---- --config


@pytest.fixture
def parse_config(tmp_path):
    """parse_config(text, *words) -> the flags of a YAML text and a command line."""

    def run(text, *words):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return parse("--config", path, *words)

    return run


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--output_dir=~/out").output_dir == str(tmp_path / "out")


def test_home_is_expanded_for_the_config_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 7\n")
    assert parse("--config=~/mine.yaml").seed == 7


def test_config_sets_flags_of_every_type(parse_config):
    args = parse_config(
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


def test_config_may_stand_under_training_and_evaluation_is_left_alone(parse_config):
    args = parse_config("seed: 1\noutput_dir: top\ntraining:\n  seed: 2\nevaluation:\n  prompts: [a]\n  anything: 1\n")
    assert args.seed == 2
    assert args.output_dir == "top"


@pytest.mark.parametrize("section", ["", "training:\n  "])
def test_command_line_wins_over_config(parse_config, section):
    text = f"{section}use_ema: true\n" if section else "use_ema: true\nvalidation_prompts: [a, b]\nseed: 1\n"
    args = parse_config(text, "--no-use_ema", "--seed=2", "--validation_prompts", "c")
    assert args.use_ema is False
    assert args.seed == 2
    assert args.validation_prompts == ["c"]


@pytest.mark.parametrize("key", ["validation_prompts: [a, b]", "seed: 1"])
def test_a_stray_word_joins_no_list_of_the_config(refused, tmp_path, key):
    """It is refused as ever."""
    (tmp_path / "recipe.yaml").write_text(key)
    assert "'stray': is no flag, nor the value of one" in refused(["stray", f"--config={tmp_path / 'recipe.yaml'}"])


def test_config_sets_the_flags_of_old_commands(parse_config):
    args = parse_config(
        "validation_prompt: a dog\nnum_validation_images: 0\nvalidation_epochs: 2\nset_grads_to_none: true\n"
        "offset_noise: true\nlocal_rank: 0\ntokenizer_name: some/tokenizer\nvalidation_guidance_scale: 2\n"
        "validation_num_inference_steps: 9\nvalidation_negative_prompt: a cat\nvalidation_scheduler: DDPMScheduler\n"
    )
    assert (args.validation_prompt, args.num_validation_images, args.validation_epochs) == ("a dog", 0, 2)
    assert (args.set_grads_to_none, args.offset_noise, args.local_rank) == (True, True, 0)
    assert (args.tokenizer_name, args.validation_negative_prompt) == ("some/tokenizer", "a cat")
    assert (args.validation_guidance_scale, args.validation_num_inference_steps) == (2.0, 9)
    assert args.validation_scheduler == "DDPMScheduler"


def test_command_line_wins_wherever_config_stands(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    assert parse("--seed=2", f"--config={tmp_path / 'recipe.yaml'}").seed == 2
    assert parse("--config", tmp_path / "recipe.yaml", "--seed=2").seed == 2


def test_empty_config_is_none(parse_config):
    assert parse_config("") == parse_config("# nothing\n")


def test_the_demo_is_a_recipe_of_flags(repo):
    assert parse("--config", repo / "examples" / "configs" / "demo_creatures.yaml").resolution == 64


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


# ---- flags that are none

MEANT = {  # what somebody writes, and the flag of every script that they mean; "" for none
    "max_steps": "max_train_steps",
    "steps": "max_train_steps",
    "train_steps": "max_train_steps",
    "num_train_steps": "max_train_steps",
    "max_train_step": "max_train_steps",
    "max_stpes": "max_train_steps",
    "maxtrainsteps": "max_train_steps",
    "lr": "learning_rate",
    "unet_lr": "learning_rate",
    "learning-rate": "learning_rate",
    "learnin_rate": "learning_rate",
    "lr_schedule": "lr_scheduler",
    "scheduler": "lr_scheduler",
    "warmup_steps": "lr_warmup_steps",
    "warmup": "lr_warmup_steps",
    "batch_size": "train_batch_size",
    "batchsize": "train_batch_size",
    "per_device_train_batch_size": "train_batch_size",
    "epochs": "num_train_epochs",
    "max_train_epochs": "num_train_epochs",
    "num_epoch": "num_train_epochs",
    "model": "pretrained_model_name_or_path",
    "pretrained_model": "pretrained_model_name_or_path",
    "model_revision": "revision",
    "dataset": "dataset_name",
    "output": "output_dir",
    "out_dir": "output_dir",
    "output_dri": "output_dir",
    "size": "resolution",
    "resolutoin": "resolution",
    "resol": "resolution",
    "save_every": "checkpointing_steps",
    "save_every_n_steps": "checkpointing_steps",
    "save_total_limit": "checkpoints_total_limit",
    "resume": "resume_from_checkpoint",
    "precision": "mixed_precision",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "grad_checkpointing": "gradient_checkpointing",
    "weight_decay": "adam_weight_decay",
    "wd": "adam_weight_decay",
    "grad_clip": "max_grad_norm",
    "min_snr_gamma": "snr_gamma",
    "ema": "use_ema",
    "flip": "random_flip",
    "no_flip": "no-random_flip",
    "no-randomflip": "no-random_flip",
    "no_ema": "no-use_ema",
    "crop": "center_crop",
    "num_workers": "dataloader_num_workers",
    "prompts": "validation_prompts",
    "eval_steps": "validation_steps",
    "sample_every_n_epochs": "validation_epochs",
    "seeds": "seed",
    "random_seed": "seed",
    "token": "hub_token",
    "log_with": "report_to",
    "zero_terminal_snr": "rescale_betas_zero_snr",
    "validation_promts": "validation_prompts",
    "validation_promt": "validation_prompt",
    "num_validation_sample": "num_validation_samples",
    "nun_validation_imags": "num_validation_images",
    "frobnicate": "",
    "optimizer_args": "",
    "clip_skip": "",
    "vae": "",
    "cuda": "",
    "no_cuda": "",
    "x": "",
    "x_y_z": "",
}
MEANT_OF_TORCH = {
    "tf32": "allow_tf32",
    "xformers": "enable_xformers_memory_efficient_attention",
    "use_8bit": "use_8bit_adam",
    "optimizer_type": "optimizer",
    "enable_bucket": "aspect_ratio_buckets",
    "min_bucket_reso": "bucket_min",
    "cache_latents_to_disk": "cache_latents",
    "torch_compile": "compile",
}
MEANT_OF_LORA = {
    "network_dim": "rank",
    "lora_rank": "rank",
    "network_alpha": "lora_alpha",
    "alpha": "lora_alpha",
    "network_dropout": "lora_dropout",
    "te_lr": "text_encoder_lr",
    "text_encoder": "train_text_encoder",
    "dora": "use_dora",
}
MEANT_OF_IMAGES = {"prompt": "validation_prompt", "shuffle": "shuffle_buffer_size"}
MEANT_OF_IMAGES |= dict.fromkeys(["data_dir", "image_dir", "images", "instance_data_dir"], "train_data_dir")
MEANT_OF_SUBJECT = {"prompt": "instance_prompt", "trigger_word": "instance_prompt", "reg_data_dir": "class_data_dir"}
MEANT_OF_SUBJECT |= {"prior_preservation": "with_prior_preservation", "class_images": "num_class_images"}
MEANT_OF_SUBJECT |= dict.fromkeys(["data_dir", "image_dir", "images", "train_data_dir"], "instance_data_dir")


@every_script
def test_a_flag_that_is_none_has_the_nearest_suggested(scripts, path):
    flags = [name for action in scripts[path].make_parser()._actions for name in action.option_strings]
    is_lora = "lora" in path.stem
    meant = MEANT | (MEANT_OF_SUBJECT if "dreambooth" in path.stem else MEANT_OF_IMAGES)
    meant |= {} if "flax" in path.stem else MEANT_OF_TORCH
    meant |= MEANT_OF_LORA if is_lora else dict.fromkeys(["network_dim", "rank", "network_alpha"], "")
    found = {name: (nearest(f"--{name}", flags) or "").removeprefix("--") for name in meant}
    assert found == meant


def test_a_key_and_a_flag_of_a_command_have_the_nearest_suggested(refused, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("lr: 1\ntraining:\n  max_steps: 2\n")
    said = refused(["--config", str(tmp_path / "recipe.yaml")])
    assert "unknown key lr; did you mean learning_rate?" in said
    assert "unknown key max_steps; did you mean max_train_steps?" in said
    meant = {"--steps": "--num_inference_steps", "--prompt": "--prompts", "--cfg": "--guidance_scale"}
    with pytest.raises(SystemExit):
        generate.main([f"{name}=1" for name in meant])
    said = capsys.readouterr().err
    for name, flag in meant.items():
        assert f"{name}: is no flag; did you mean {flag}?" in said


# ---- replaced flags


@every_script
def test_replaced_flags_name_their_replacement(scripts, path, capsys):
    script = scripts[path]
    replaced_flags = script.SUBJECT_REPLACED_FLAGS if "dreambooth" in path.stem else script.REPLACED_FLAGS
    assert bool(replaced_flags) == (path != TRAIN_TEXT_TO_IMAGE_LORA)
    for flag, replacement in replaced_flags.items():
        for words in ([f"{flag}=1"], [flag, "1"]):
            with pytest.raises(SystemExit) as caught:
                script.main(["--seed=1", *words])
            assert caught.value.code == 2
            assert f"{flag} is not taken: {replacement}" in capsys.readouterr().err


def test_switches_have_a_form_that_says_no():
    args = parse("--use_ema", "--no-use_ema", "--random_flip")
    assert args.use_ema is False
    assert args.random_flip is True


FIRST = "pretrained_model_name_or_path {} output_dir resolution train_batch_size learning_rate max_train_steps"
FIRST_IN_HELP = {  # by the script's name
    "train_text_to_image": f"{FIRST} mixed_precision validation_prompts dataset_name".format("train_data_dir"),
    "train_text_to_image_lora": f"{FIRST} mixed_precision rank validation_prompts".format("train_data_dir"),
    "train_text_to_image_flax": f"{FIRST} mixed_precision validation_prompts dataset_name".format("train_data_dir"),
    "train_dreambooth": f"{FIRST} mixed_precision validation_prompts".format("instance_data_dir instance_prompt"),
    "train_dreambooth_lora": f"{FIRST} mixed_precision rank".format("instance_data_dir instance_prompt"),
}


@every_script
def test_help_tells_the_defaults_that_there_are(scripts, path):
    """And not of flags that are nothing unless they are given."""
    parser = scripts[path].make_parser()
    said = " ".join(parser.format_help().split())
    shown = [str(action.default) for action in parser._actions if action.default not in (None, "==SUPPRESS==")]
    assert len(shown) > 25
    assert "512" in shown  # of --resolution
    assert sorted(re.findall(r"\(default: ([^)]*)\)", said)) == sorted(shown)


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_help_begins_with_ten_flags_and_has_all_others_in_groups(scripts, path, capsys):
    with pytest.raises(SystemExit) as caught:
        scripts[path].main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    groups = {title: re.findall(r"^  --(\w+)", text, re.M) for title, text in groups_of(said)}
    assert list(groups)[:2] == ["set by most people", "options"]
    assert groups["set by most people"] == FIRST_IN_HELP[path.stem].split()
    assert len(groups["set by most people"]) == 10
    assert {"model", "data", "objective", "optimization", "output", "validation", "run"} <= groups.keys()
    assert "snr_gamma" in groups["objective"]
    found = [flag for flags in groups.values() for flag in flags]
    assert len(found) == len(set(found))
    assert {*found, "help"} == {flag.dest for flag in scripts[path].make_parser()._actions}


def test_the_schedules_of_the_rate_are_those_of_diffusers():
    assert [kind.value for kind in diffusers.optimization.SchedulerType] == LR_SCHEDULERS


def groups_of(text):
    """The groups of a help text: (title, the lines of its flags)."""
    return re.findall(r"^(\w[\w ,-]*):\n((?:  .*\n|\n)+)", text, re.M)
