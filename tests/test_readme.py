"""Every command of the README files runs, every link leads somewhere, every flag and target that they name exists.

Commands run as they stand, in a folder where small stand-ins lie at the places that they name: a folder called like a
model of the Hub comes before the Hub. Only counts are cut, by words added at the end (CUTS, MINIATURE_CUTS). A command
that no test here knows is a failure.
"""

import configparser
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from conftest import load_script
from diffusers import StableDiffusionPipeline
from flags_page import rows_of
from image_data import snapshot, write_image_folder
from original_layout import save_original
from PIL import Image
from running import REPO, TRAIN_TEXT_TO_IMAGE, environment, run_script
from safetensors.torch import load_file
from shards import write_shards
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.run import get_args_parser as torchrun_parser
from wandb.cli.cli import cli

from sdtune.dataset import read_folder

FOLDERS = ("examples", "miniature", "sdtune", "recipes", "benchmarks")
DOCUMENTS = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "docs" / "flags.md"]
DOCUMENTS += sorted(path for folder in FOLDERS for path in (REPO / folder).rglob("README.md"))

# The most that a training command keeps of each; smaller values stay.
CUTS = {
    "max_train_steps": 3,
    "resolution": 32,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_validation_samples": 2,
    "num_class_images": 2,
    "logging_steps": 1,
}
# What starts a script in a command, with options of a launcher between.
STARTS_A_TRAINING = re.compile(r"\b(?:launch|python|torchrun)(?:[ \\\n]+--\S+)*[ \\\n]+examples/\S+\.py")
# Given to each of the miniature's scripts that has the flag.
MINIATURE_CUTS = {
    "num_images": 16,
    "num_steps": 2,
    "text_steps": 2,
    "batch_size": 4,
    "text_batch_size": 4,
    "num_samples": 4,
    "num_inference_steps": 2,
}
# Given to each command of sdtune that has the flag.
TOOL_CUTS = {"num_images": 4, "max_new_tokens": 4, "resolution": 32, "num_validation_samples": 2}
MODELS = ("miniature/pipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5")
CAPTIONER, CLIP = "Salesforce/blip-image-captioning-large", "openai/clip-vit-large-patch14"
SINGLE_FILE = "v1-5-pruned.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


# --------------------------------------------------------------------------------------------- reading the documents


@dataclass(frozen=True)
class Block:
    """Code in a document: its language, its text, and the line of the document on which the text starts."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.document.relative_to(REPO)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, as words: the kind is which test runs it, None if none does."""

    place: str
    words: tuple

    def __str__(self):
        return self.place

    @property
    def kind(self):
        """train, launch, cluster, sdtune, miniature, benchmark, make, pip, venv or tracker; None without a test."""
        match self.words:
            case ("accelerate", "launch", option, *_) | ("torchrun", option, *_) if option.startswith("--"):
                return "launch"
            case ("sbatch", _) | ("kubectl", "apply", "-f", _) | ("gcloud", "compute", "tpus", "tpu-vm", "ssh", *_):
                return "cluster"
            case ("accelerate", "launch", script, *_) | ("python", script, *_) if script.startswith("examples/"):
                return "train"
            case ("python", script, *_) if script.startswith("miniature/"):
                return "miniature"
            case ("python", script, *_) if script.startswith("benchmarks/"):
                return "benchmark"
            case ("sdtune", name, *_) if (REPO / command_file(name)).exists():
                return "sdtune"
            case ("make", *_):
                return "make"
            case ("pip", "install", "-r", _) | ("pip", "install", "--editable", _):
                return "pip"
            case ("pip", "install", "--editable", _, "-c", "constraints.txt"):
                return "pip"
            case ("python3", "-m", "venv", ".venv") | ("source", ".venv/bin/activate"):
                return "venv"
            case ("tensorboard", "--logdir", _) | ("wandb", "login"):
                return "tracker"
        return None

    @property
    def script(self):
        """The path of the file that the command runs."""
        if self.kind == "sdtune":
            return command_file(self.words[1])
        return next(word for word in self.words if word.endswith(".py"))

    @property
    def flags(self):
        """The words behind the name of what is run."""
        if self.kind == "sdtune":
            return list(self.words[2:])
        return list(self.words[self.words.index(self.script) + 1 :])


def command_file(name):
    """The path of the module of a command of sdtune."""
    return f"sdtune/commands/{name.replace('-', '_')}.py"


def blocks_in(text, document=REPO / "README.md"):
    """Returns the fenced blocks, and the indented ones as blocks of the language "bash"."""
    blocks, lines = [], text.splitlines()
    start, fence = None, None
    for number, line in enumerate(lines):
        match = re.match(r"\s*```(.*)", line)
        if match and start is None:
            start, fence = number + 1, match[1].strip()
        elif match:
            blocks.append(Block(document, start + 1, fence, "\n".join(lines[start:number])))
            start = None
        elif start is None and line.startswith("    "):
            blocks.append(Block(document, number + 1, "bash", line.strip()))
    assert start is None, f"{document}:{start}: the block is not closed"
    return blocks


def commands_in(block):
    """Returns the commands of a shell block: continued lines joined, comments dropped."""
    commands, parts = [], []
    for number, line in enumerate(block.text.splitlines(), block.line):
        parts.append(line.removesuffix("\\"))
        if line.endswith("\\"):
            continue
        words = shlex.split(" ".join(parts), comments=True)
        if words:
            commands.append(Command(f"{block.document.relative_to(REPO)}:{number - len(parts) + 1}", tuple(words)))
        parts = []
    assert not parts, f"{block}: the last line is continued"
    return commands


def prose(document):
    """Returns the document's text without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)


def inline_code(document):
    """Returns the spans of code in the prose, with line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


BLOCKS = [block for document in DOCUMENTS for block in blocks_in(document.read_text(encoding="utf-8"), document)]
COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in commands_in(block)]


def each(kind):
    """Parametrizes a test with the commands of a kind, named by document and line."""
    commands = [command for command in COMMANDS if command.kind == kind]
    slow = {command: pytest.mark.slow for command in commands if "--push_to_hub" in command.words}  # a process
    params = [pytest.param(command, id=str(command), marks=slow.get(command, ())) for command in commands]
    return pytest.mark.parametrize("command", params)


def test_commands_are_found_however_they_are_written():
    text = """
```bash
make demo   # it isn't long
# a remark

accelerate launch examples/a.py \\
  --prompt "two words" \\
  --seed=1
```
text

    make test

```python
make = 1
```
"""
    blocks = blocks_in(text)
    assert [(block.language, block.line) for block in blocks] == [("bash", 3), ("bash", 12), ("python", 15)]
    commands = [command for block in blocks[:2] for command in commands_in(block)]
    assert [(command.place, command.kind) for command in commands] == [
        ("README.md:3", "make"),
        ("README.md:6", "train"),
        ("README.md:12", "make"),
    ]
    assert commands[1].script == "examples/a.py"
    assert commands[1].flags == ["--prompt", "two words", "--seed=1"]
    for unknown in (
        "python tools/other.py",
        "sdtune other",
        "pip install torch",
        "rm -rf demo",
        "HF_HOME=x make demo",
    ):
        assert Command("", tuple(unknown.split())).kind is None


def test_every_block_is_run():
    assert not [f"{block} ({block.language})" for block in BLOCKS if block.language not in ("bash", "python", "text")]
    operators = {"&&", "||", ";", "|", "&", ">", ">>", "<"}
    assert not [str(command) for command in COMMANDS if command.kind is None or operators & set(command.words)]
    # Counted another way: what starts a training in the text is a command here.
    for document in DOCUMENTS:
        launched = len(re.findall(STARTS_A_TRAINING, document.read_text(encoding="utf-8")))
        place = f"{document.relative_to(REPO)}:"
        here = [command for command in COMMANDS if command.place.startswith(place)]
        starts = [command for command in here if command.kind in ("train", "launch")]
        starts += [command for command in here if STARTS_A_TRAINING.search(" ".join(command.words[2:]))]
        assert launched == len(starts), document
    assert {"train", "make", "pip"} <= {command.kind for command in COMMANDS}
    given = {flag.partition("=")[0] for command in COMMANDS if command.kind == "train" for flag in command.flags}
    assert {"--config", "--dry_run", "--push_to_hub", "--resume_from_checkpoint", "--single_file_config"} <= given


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, tiny_pipeline, tiny_captioner):
    """What the commands of the documents name, small: models, a single file, folders of images."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name in MODELS:
        shutil.copytree(tiny_pipeline, folder / name)
    save_original(StableDiffusionPipeline.from_pretrained(tiny_pipeline), folder / SINGLE_FILE)
    write_image_folder(folder / "demo" / "creatures", 8)
    write_image_folder(folder / "demo" / "subject", 5)
    write_shards(folder / "my_shards", "tar", [5, 4])
    write_image_folder(folder / "my_dog", 5)
    (folder / "my_dog" / "metadata.jsonl").unlink()
    mine = write_image_folder(folder / "my_images", 8)
    for row in map(json.loads, (mine / "metadata.jsonl").read_text().splitlines()):
        (mine / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    (mine / "metadata.jsonl").unlink()
    (write_image_folder(folder / "my_pictures", 8) / "metadata.jsonl").unlink()  # without captions
    shutil.copytree(tiny_captioner, folder / CAPTIONER)
    shutil.copytree(REPO / "miniature" / "clip", folder / CLIP)
    return folder


@pytest.fixture
def clone(tmp_path, stand_ins, monkeypatch):
    """A working folder like a clone of the repository, with the stand-ins in place."""
    folder = shutil.copytree(stand_ins, tmp_path / "clone")
    for name in ("Makefile", "requirements.txt", "examples", "benchmarks"):
        if (REPO / name).exists():
            (folder / name).symlink_to(REPO / name)
    for path in (REPO / "miniature").glob("*.py"):
        shutil.copy(path, folder / "miniature")  # they look for weights beside themselves, links followed
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def few_steps(monkeypatch):
    """Lets pipelines draw in two steps, whatever they are asked for."""
    draw = StableDiffusionPipeline.__call__

    def draw_quickly(self, *args, **kwargs):
        return draw(self, *args, **{**kwargs, "num_inference_steps": 2})

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", draw_quickly)


@pytest.fixture(scope="module")
def modules(train_script):
    """A function: the module of a script or a command, by its path from the root."""
    loaded = {TRAIN_TEXT_TO_IMAGE: train_script}

    def module(path):
        path = REPO / path
        if path.parent.name == "commands":
            return importlib.import_module(f"sdtune.commands.{path.stem}")
        if path not in loaded:
            loaded[path] = load_script(path)
        return loaded[path]

    return module


def parse(script, flags):
    """The settings that a script's flags stand for, maybe wrong ones."""
    return script.parse_flags(script.make_parser(), flags, {})[0]


def flags_of(script):
    """The flags that a script or a command knows."""
    return set(script.make_parser()._option_string_actions)


def cut(script, flags):
    """Returns the flags with those of CUTS that ask for less than they do."""
    asked = vars(parse(script, flags))
    used = [flag for flag in CUTS if flag in asked and (flag != "num_class_images" or asked["class_data_dir"])]
    more = {flag: CUTS[flag] for flag in used if asked[flag] is None or asked[flag] > CUTS[flag]}
    return flags + [f"--{flag}={most}" for flag, most in more.items()]


def call_main(script, flags):
    """Calls the script's main(); returns the exit status that its process would have."""
    try:
        script.main(flags)
    except SystemExit as stop:
        return stop.code or 0
    finally:  # accelerate keeps its state in the process, and would refuse another precision
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return 0


def unet_of(folder):
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def check_result(args):
    """Asserts that a run left what the documents promise: trained weights that load, a log, a card, samples."""
    output = Path(args.output_dir)
    if hasattr(args, "rank"):
        pipeline = StableDiffusionPipeline.from_pretrained(MODELS[0])
        pipeline.load_lora_weights(output, weight_name=LORA_WEIGHTS)
        ups = [weight for name, weight in load_file(output / LORA_WEIGHTS).items() if "lora_B" in name]
        assert ups
        assert all(torch.isfinite(weight).all() and weight.abs().max() > 0 for weight in ups)
        kohya = {path.name for path in output.glob("*.safetensors")} - {LORA_WEIGHTS}
        assert kohya == ({f"{output.name}.safetensors"} if args.output_kohya_format else set())
    else:
        StableDiffusionPipeline.from_pretrained(output)
        before, after = unet_of(MODELS[0]), unet_of(output)
        assert before.keys() == after.keys()
        assert all(torch.isfinite(weight).all() for weight in after.values())
        assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2
    prompts = vars(args).get("validation_prompts") or []
    if vars(args).get("validation_prompt"):
        prompts = [args.validation_prompt] * (args.num_validation_images or 4)
    rows = log_of(output)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, args.max_train_steps + 1))
    looks = sorted({0, *range(0, args.max_train_steps, args.validation_steps or 500), args.max_train_steps})
    held_out = [row["step"] for row in rows if "held_out_loss" in row]
    assert held_out == (looks if args.num_validation_samples else [])
    samples = sorted(path.name for path in output.glob("samples/*"))
    assert samples == ([f"step-{step:06d}.png" for step in looks] if prompts else [])
    for name in samples:
        with Image.open(output / "samples" / name) as image:
            assert image.width == args.resolution * min(len(prompts), 4)
    used = json.loads((output / "args.json").read_text())
    asked = {name: value for name, value in vars(args).items() if value is not None}
    assert {name: used[name] for name in asked} == asked
    assert "license:" in (output / "README.md").read_text()


def data_of(args):
    """The folder of images that a training command names; those that the command above it captions have captions."""
    given = vars(args)
    folder = Path(given.get("train_data_dir") or given.get("instance_data_dir") or args.dataset_name)
    for path in folder.glob("*.png") if folder.name == "my_pictures" else []:
        path.with_suffix(".txt").write_text("a picture")
    return folder


@each("train")
def test_training_command(command, clone, modules, few_steps, fake_hub, monkeypatch, capsys):
    assert (clone / command.script).is_file()
    script = modules(command.script)
    flags = cut(script, command.flags)
    args = parse(script, flags)
    if args.dry_run:
        check_dry_run(script, flags, clone, capsys)
    elif args.push_to_hub:
        flags += ["--validation_prompts", "a creature"]  # drawn in all 25 steps, for few_steps ends at this process
        check_push(command, flags, parse(script, flags), fake_hub)
    elif args.resume_from_checkpoint:
        check_resume(script, flags, monkeypatch, capsys)
    else:
        folder = data_of(args)
        images = snapshot(folder)
        assert call_main(script, flags) == 0, capsys.readouterr().err
        check_result(args)
        assert snapshot(folder) == images


def options_of(command):
    """What a launcher makes of the words before the script: its settings, by name, and those of its file."""
    at = command.words.index(command.script) + 1
    if command.words[0] == "torchrun":
        return vars(torchrun_parser().parse_args(command.words[1:at])), {}
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command.words[2:at]))
    return vars(args), yaml.safe_load(Path(args.config_file).read_text(encoding="utf-8"))


@each("launch")
def test_command_of_several_processes(command, clone, modules, capsys):
    """The launcher takes its options, and one process trains as the script's flags say. test_distributed.py starts the
    launchers with several processes, and as several machines."""
    options, settings = options_of(command)
    given = {word.partition("=")[0].lstrip("-") for word in command.words}
    if command.words[0] == "torchrun":
        assert options["nproc_per_node"] == "gpu"
        assert options["nnodes"] == ("2" if "rdzv_endpoint" in given else "1:1")
    else:
        assert settings["num_processes"] > 1 or settings["distributed_type"] == "NO"
        for name in ("num_processes", "num_machines", "rdzv_backend", "main_process_port", "gpu_ids"):
            assert name in given or options[name] == settings.get(name, options[name]), name
        assert options["use_fsdp"] == (settings["distributed_type"] == "FSDP")
        assert options["multi_gpu"] == (settings["distributed_type"] == "MULTI_GPU")
    script = modules(command.script)
    flags = cut(script, command.flags)
    data_of(parse(script, flags))
    assert call_main(script, flags) == 0, capsys.readouterr().err
    check_result(parse(script, flags))


@each("cluster")
def test_command_of_a_cluster(command, clone, modules):
    """What it hands over is there, or is a command whose flags the script takes; test_launch_files.py reads the files
    of Slurm and Kubernetes."""
    if command.words[0] != "gcloud":
        assert (REPO / command.words[-1]).is_file()
        return
    (inner,) = (word.removeprefix("--command=") for word in command.words if word.startswith("--command="))
    assert "--worker=all" in command.words
    words = shlex.split(inner)
    assert words[:3] == ["cd", "sd", "&&"]
    for name in [word for word in words if word.startswith("requirements")]:
        assert (REPO / name).is_file()
    if words[3] == "python":
        script = modules(words[4])
        assert script.parse_flags(script.make_parser(), words[5:], {})[1] == []


def check_dry_run(script, flags, clone, capsys):
    """The plan is printed, and nothing is written."""
    before = snapshot(clone)
    assert call_main(script, flags) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    for part in ("Plan", "images", "steps", "epochs", "per step", "trained", "output"):
        assert part in printed
    assert snapshot(clone) == before
    assert not Path(parse(script, flags).output_dir).exists()


def check_push(command, flags, args, fake_hub):
    """The whole command, launcher included, uploads the result that it leaves here."""
    done = run_script(flags, script=REPO / command.script, launcher=command.words[0], env=fake_hub.env)
    assert done.returncode == 0, done.stdout + done.stderr
    check_result(args)
    repo = fake_hub.repos[args.hub_model_id]
    assert repo.private == args.hub_private_repo
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert repo.files[str(weights)] == (Path(args.output_dir) / weights).read_bytes()
    assert {"model_index.json", "README.md"} <= repo.files.keys()
    assert not [name for name in repo.files if name.startswith("checkpoint-")]


def check_resume(script, flags, monkeypatch, capsys):
    """The command goes on after the step in which the same one without --resume_from_checkpoint was stopped, to the
    same bits as one that was never stopped."""
    args = parse(script, flags)
    output = Path(args.output_dir)
    resumed = [flag for flag in flags if flag.startswith("--resume_from_checkpoint")]
    assert resumed == ["--resume_from_checkpoint=latest"]
    first = [flag for flag in flags if flag not in resumed]
    assert call_main(script, [*first, "--output_dir=straight"]) == 0, capsys.readouterr().err

    write_log = script.write_log

    def stop_after_the_first_step(accelerator, output_dir, step, numbers):
        write_log(accelerator, output_dir, step, numbers)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_log", stop_after_the_first_step)
        assert call_main(script, first) == 128 + signal.SIGTERM
    assert (output / "checkpoint-2").is_dir()
    assert not (output / "model_index.json").exists()

    capsys.readouterr()
    assert call_main(script, flags) == 0, capsys.readouterr().err
    assert re.search(rf"steps +2 to {args.max_train_steps},", capsys.readouterr().out)
    check_result(args)
    straight, result = unet_of("straight"), unet_of(output)
    assert all(torch.equal(straight[name], result[name]) for name in straight)


def outputs_of(command):
    """The folder that a command names as --output_dir, as a set; an empty one if it does not."""
    return {word.partition("=")[2] for word in command.words if word.startswith("--output_dir=")}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_block(block, clone, modules, few_steps, capsys):
    """What a document does with a result works on the result of the command above it, and leaves a picture."""
    above = [c for c in COMMANDS if c.kind == "train" and c.place.startswith(f"{block.document.relative_to(REPO)}:")]
    above = [command for command in above if int(command.place.rpartition(":")[2]) < block.line]
    # The last one whose result the code names, or else the last one.
    named = [c for c in above if set(re.findall(r'"([\w-]+)"', block.text)) & outputs_of(c)] or above
    if named:
        script = modules(named[-1].script)
        data_of(parse(script, named[-1].flags))
        assert call_main(script, cut(script, named[-1].flags)) == 0, capsys.readouterr().err
    before = set(clone.rglob("*"))
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    pictures = sorted(set(clone.rglob("*")) - before)
    assert pictures
    for path in pictures:
        with Image.open(path) as image:
            image.load()


# ------------------------------------------------------------------------------------------------------------- trees


def entries_of(block):
    """The files and folders that a tree shows below its first line, as {path: what is said of it}; a folder's path
    ends with a slash."""
    entries, parents = {}, {}
    for line in block.text.splitlines()[1:]:
        if match := re.fullmatch(r"((?:│   |    )*)[├└]── (\S.*?)(?:  +(\S.*))?", line):
            depth, name = len(match[1]) // 4, match[2]
            parents[depth] = parents.get(depth - 1, "") + name
            path = parents[depth]
            entries[path] = match[3] or ""
        else:
            entries[path] += "\n" + line.strip("│ ")
    return entries


TREES = [block for block in BLOCKS if block.language == "text"]


def is_of_run(block):
    """Whether a tree shows what a run leaves, and not what it is given."""
    return any(name.startswith("checkpoint-") for name in entries_of(block))


@pytest.mark.parametrize("block", [block for block in TREES if not is_of_run(block)], ids=str)
def test_tree_of_data(block, tmp_path):
    """A folder with these files is one that can be trained on: each picture in it has a caption, or for DreamBooth may
    lack it."""
    pictures = []
    for name, told in entries_of(block).items():
        path = tmp_path / name
        path.mkdir() if name.endswith("/") else path.touch()
        if path.suffix == ".txt":
            path.write_text("a caption")
        elif path.name == "metadata.jsonl":
            path.write_text(told + "\n")
        elif not name.endswith("/"):
            pictures.append(path)
            Image.new("RGB", (32, 32)).save(path)
    rows = read_folder(tmp_path, "text")
    assert [row["image"]["path"] for row in rows] == sorted(map(str, pictures))
    if "dreambooth" not in str(block):
        assert all(row["captions"] for row in rows)


@pytest.mark.parametrize("block", [block for block in TREES if is_of_run(block)], ids=str)
def test_tree_of_a_run(block, clone, modules, few_steps, capsys):
    """The command of the same document that writes into a folder of that name leaves these files, and no others."""
    folder = block.text.splitlines()[0].rstrip("/")
    place = f"{block.document.relative_to(REPO)}:"
    here = [command for command in COMMANDS if command.kind == "train" and command.place.startswith(place)]
    command = next(command for command in here if outputs_of(command) == {folder})
    script = modules(command.script)
    data_of(parse(script, command.flags))
    assert call_main(script, cut(script, command.flags)) == 0, capsys.readouterr().err
    steps = CUTS["max_train_steps"]
    expected = {re.sub(r"(checkpoint-|step-000)[1-9]\d*", rf"\g<1>{steps}", name) for name in entries_of(block)}
    expected = {re.sub(rf"step-000{steps}\b", f"step-{steps:06d}", name) for name in expected}
    left = {path.name + "/" * path.is_dir() for path in (clone / folder).iterdir()}
    deeper = {name for name in expected if "/" in name.rstrip("/")}
    assert expected - deeper == left
    assert all((clone / folder / name).exists() for name in deeper)


# ---------------------------------------------------------------------------------------------------------- commands


def sdtune_commands(document):
    """The commands of sdtune in a document in order, with the trainings whose results they use, those of other
    documents first."""
    here = [command for command in COMMANDS if command.place.startswith(f"{document.relative_to(REPO)}:")]
    ours = [command for command in here if command.kind == "sdtune"]
    used = {re.sub(r"^--\w+=|[:/].*", "", word) for command in ours for word in command.words}
    trainings = {}
    for command in [*here, *COMMANDS]:
        outputs = outputs_of(command)
        if command.kind == "train" and "--push_to_hub" not in command.words and outputs & (used - trainings.keys()):
            trainings |= dict.fromkeys(outputs, command)
    others = [command for command in trainings.values() if command not in here]
    return [*others, *[command for command in here if command in [*ours, *trainings.values()]]] if ours else []


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [document for document in DOCUMENTS if sdtune_commands(document)],
    ids=lambda path: str(path.relative_to(REPO)),
)
def test_commands_of_sdtune_one_after_another(document, clone, modules, few_steps, fake_hub, monkeypatch, capsys):
    """They work on the results of the commands before them; each leaves what it is told to write, or sends it."""
    pushing = environment({**fake_hub.env, "PYTHONPATH": str(REPO)})
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # of what a command starts
    for command in sdtune_commands(document):
        before = set(clone.rglob("*"))
        if command.kind == "train":
            script = modules(command.script)
            shutil.rmtree(clone / parse(script, command.flags).output_dir, ignore_errors=True)
            assert call_main(script, cut(script, command.flags)) == 0, capsys.readouterr().err
        elif Path(command.script).stem.startswith("push_"):
            words = [sys.executable, "-m", "sdtune", *command.words[1:]]
            done = subprocess.run(words, env=pushing, text=True, capture_output=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            name = next(word for word in command.flags if re.fullmatch(r"[\w-]+/[\w-]+", word))
            assert "README.md" in fake_hub.repos[name].files
            kind = ".png" if "dataset" in command.script else ".safetensors"
            sent = {Path(path).name: data for path, data in fake_hub.repos[name].files.items() if path.endswith(kind)}
            folder = Path(command.flags[0])
            assert sent == {path.name: path.read_bytes() for path in folder.glob(f"*{kind}")}
        else:
            script = modules(command.script)
            known = flags_of(script)
            # Trainings are cut to three steps, whatever checkpoint the document names.
            given = [re.sub(r"/checkpoint-\d+$", "/checkpoint-3", flag) for flag in command.flags]
            flags = given + [f"--{flag}={most}" for flag, most in TOOL_CUTS.items() if f"--{flag}" in known]
            assert call_main(script, flags) == 0, (command, capsys.readouterr())
            if not command.script.endswith("find_batch_size.py"):  # which only prints
                check_files(command, set(clone.rglob("*")) - before)


def check_files(command, new):
    """What a command leaves is whole, as many as asked for, and readable."""
    assert new, command
    for path in new:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".safetensors":
            assert all(torch.isfinite(weight).all() for weight in load_file(path).values())
        elif path.suffix in (".json", ".jsonl") and path.parent.name != "checked_images":
            rows = path.read_text(encoding="utf-8")
            assert [json.loads(row) for row in ([rows] if path.suffix == ".json" else rows.splitlines())], path
    names = {path.name for path in new}
    if "caption" in command.script:
        rows = [json.loads(row) for row in Path(command.flags[0], "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == 8
        assert all(row["text"].startswith("sks, ") for row in rows)
    if "evaluate" in command.script:
        assert {"evaluation.json", "closest_pairs.png"} <= names
    if "generate" in command.script:
        assert any(name.startswith("grid_") for name in names)
        assert sum(name.endswith(".png") for name in names) >= 3


# ------------------------------------------------------------------------------------------- miniature, make and pip


@pytest.mark.slow
def test_commands_of_the_miniature_one_after_another(clone, few_steps, monkeypatch):
    """They make the miniature from nothing, so they are run in their order, in one folder."""
    commands = [command for command in COMMANDS if command.kind == "miniature"]
    assert commands
    shutil.rmtree(clone / "miniature" / "pipeline")
    monkeypatch.syspath_prepend(clone / "miniature")
    for path in (clone / "miniature").glob("*.py"):  # the copies are forgotten at the end
        monkeypatch.setitem(sys.modules, path.stem, None)
        del sys.modules[path.stem]
    for command in commands:
        known = re.findall(r'"--(\w+)"', (REPO / command.script).read_text(encoding="utf-8"))
        flags = command.flags + [f"--{flag}={most}" for flag, most in MINIATURE_CUTS.items() if flag in known]
        script = load_script(clone / command.script)
        before = snapshot(clone)
        script.main(flags) if hasattr(script, "main") else script.train(script.parse_args(flags))
        assert snapshot(clone) != before or "measure" in command.script, command


def run_make(*words):
    """Runs make in the repository, as from a shell even where the tests themselves were started by make."""
    env = environment(dict.fromkeys(("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTEST_ARGS")))
    return subprocess.run(["make", *words], cwd=REPO, env=env, text=True, capture_output=True, check=False)


@pytest.fixture(scope="module")
def targets():
    """The targets that `make help` lists, with their descriptions."""
    done = run_make("help")
    assert done.returncode == 0, done.stderr
    assert run_make().stdout == done.stdout
    return dict(re.fullmatch(r"make ([\w-]+) +(\S.*)", line).groups() for line in done.stdout.splitlines())


def test_help_lists_the_targets(targets):
    assert {"demo", "test", "check", "clean"} <= targets.keys()
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)[1].split()
    assert set(phony) == {*targets}


@each("make")
def test_make_command(command, targets):
    check_make(command.words[1:], targets)


def check_make(words, targets):
    """The targets are listed, make knows what to do for them, and variables arrive in what it does."""
    variables = [word for word in words if "=" in word]
    named = [word for word in words if word not in variables]
    assert named
    assert set(named) <= targets.keys()
    done = run_make("-n", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    for variable in variables:
        assert variable.partition("=")[2] in done.stdout, variable


def test_benchmark_commands():
    """Their flags are the tools'; test_benchmarks.py runs each of these, which take minutes, at toy size."""
    commands = [command for command in COMMANDS if command.kind == "benchmark"]
    tested = (REPO / "tests" / "test_benchmarks.py").read_text(encoding="utf-8")
    lines = ["import sys", "sys.path.insert(0, 'benchmarks')"]
    for command in commands:
        name = Path(command.script).stem
        lines.append(f"import {name}; {name}.make_parser().parse_args({command.flags})")
        assert f'run_tool("{name}"' in tested or f"{name}.make_{name}(" in tested
    code = "\n".join([*lines, "print('taken')"])
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, check=False)
    assert result.stdout == "taken\n", result.stderr
    assert len(commands) > 4


@each("pip")
def test_pip_command(command):
    """What is installed is there, and what it names too: test_requirements.py looks into it."""
    named, constraints = command.words[3], command.words[5:]
    assert all((REPO / name).is_file() for name in constraints)
    if "--editable" in command.words:
        setup = configparser.ConfigParser()
        setup.read(REPO / "setup.cfg")
        assert setup["options.entry_points"]["console_scripts"].strip() == "sdtune = sdtune.__main__:main"
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", named)[1] or ""
        assert set(extras.split(",")) - {""} <= set(setup["options.extras_require"])
    else:
        assert re.fullmatch(r"requirements\w*\.txt", named)
        assert (REPO / named).is_file()


@each("venv")
def test_environment_command(command, tmp_path, monkeypatch):
    """It makes an environment in which `python` is that of the folder."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], check=True)
    if command.words[0] == "source":
        line = f"{shlex.join(command.words)}; command -v python"
        done = subprocess.run(["bash", "-c", line], text=True, capture_output=True, check=True)
        assert done.stdout == f"{tmp_path}/.venv/bin/python\n"
    assert Path(".venv/bin/python").exists()


@each("tracker")
def test_tracker_command(command, clone, modules, few_steps, capsys):
    """wandb has such a command; tensorboard finds what a command above it has left in that folder."""
    if command.words[0] == "wandb":
        assert command.words[1] in cli.commands
        return
    folder = Path(command.words[-1])
    training = next(c for c in COMMANDS if c.kind == "train" and outputs_of(c) == {str(folder.parent)})
    script = modules(training.script)
    data_of(parse(script, training.flags))
    assert call_main(script, cut(script, training.flags)) == 0, capsys.readouterr().err
    events = EventAccumulator(str(next(folder.glob("*"))))
    events.Reload()
    assert {"loss", "lr"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name == "README.md"], ids=str)
def test_first_command_works_in_a_fresh_clone(document):
    """What the first command after the installation reads is in the repository, or was drawn by one above it."""
    place, drawn = f"{document.relative_to(REPO)}:", set()
    for command in [command for command in COMMANDS if command.place.startswith(place)]:
        line = re.sub(r"--output_dir[ =]\S+", "", " ".join(command.words))
        read = set(re.findall(r"(?<=[ =])(?:\.\.|demo|my_\w+|[\w-]+)(?:/[\w./-]+)|(?<=[ =])my_\w+", line))
        assert not [path for path in read - drawn if not (REPO / path).exists()], command
        if command.words[1:2] == ("miniature/render.py",):
            drawn |= set(re.findall(r"--output_dir[ =](\S+)", " ".join(command.words)))
        elif command.kind not in ("pip", "venv"):
            return


def test_continuous_integration_calls_the_commands_of_the_readme():
    path = REPO / ".ci" / "run"
    assert os.access(path, os.X_OK)
    for text in (path.read_text(encoding="utf-8"), (REPO / ".github/workflows/ci.yml").read_text(encoding="utf-8")):
        assert re.search(r"^[\s-]*(?:run: )?make test$", text, flags=re.M)
        assert re.search(r"^[\s-]*(?:run: )?make check$", text, flags=re.M)


# ---------------------------------------------------------------------------------------------------- links and names

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))


def anchors(document):
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ +(.*)$", prose(document), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(document):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert not missing


@every_document
def test_targets_named_in_the_text_exist(document, targets):
    for span in inline_code(document):
        if span.startswith("make "):
            check_make(shlex.split(span)[1:], targets)


@every_document
def test_paths_named_in_the_text_exist(document):
    spans = [span for span in inline_code(document) if re.fullmatch(r"[\w./-]+", span)]
    top = (*FOLDERS, "docs", "tools", "tests", ".ci", ".github")
    paths = [span for span in spans if span.startswith(tuple(f"{folder}/" for folder in top))]
    assert not [path for path in paths if not (REPO / path).exists()]


@every_document
def test_flags_named_in_the_text_exist(document, modules):
    """A flag in the text is one of the script that it is given to, or else of one in the same folder (of any, from the
    root), and takes the value shown."""
    of_scripts = document.parent.name not in ("miniature", "commands")
    folders = [REPO / "examples"] if document.parent in (REPO, REPO / "docs") else [document.parent]
    folders += [REPO / "examples"] if document.parent.name in ("commands", "accelerate") else []
    of_launchers = {"--signal"}  # scancel's
    if document.parent.name == "accelerate":
        of_launchers |= {*launch_command_parser()._option_string_actions, *torchrun_parser()._option_string_actions}
    for span in inline_code(document):
        if span.startswith(("pip ", "hf ")):
            continue
        script, command = re.match(r"python (\S+\.py)", span), re.match(r"sdtune ([\w-]+) ", span)
        if script or command:
            scripts = [REPO / (script[1] if script else command_file(command[1]))]
        else:
            scripts = sorted(path for at in folders for path in at.rglob("*.py") if path.stem != "__init__")
        known = {"--help", "--no-", "--flag", *of_launchers}
        for path in scripts:
            known |= set(re.findall(r'"(--\w+)"', path.read_text(encoding="utf-8")))
            if "commands" in path.parts:
                known |= flags_of(modules(path))
        known |= {flag.replace("--", "--no-", 1) for flag in known}
        flags = re.findall(r"(?<!\S)--[a-z][\w-]*", span)
        assert not [flag for flag in flags if flag not in known], span
        for word in span.split():
            is_flag = re.fullmatch(r"--\w+=[\w.]+", word) and word.partition("=")[0] not in of_launchers
            if of_scripts and is_flag and "config" not in word:
                assert any(takes(modules(path), word) for path in scripts), word


@pytest.mark.parametrize("folder", ["text_to_image", "dreambooth"])
def test_tables_of_flags_are_true(folder, modules):
    """A table of flags in a README names flags of the scripts in its head, with their defaults, and links to all."""
    text = (REPO / "examples" / folder / "README.md").read_text(encoding="utf-8")
    assert "(../../docs/flags.md)" in text
    rows = rows_of(text, "flag")
    assert 10 <= len(rows) <= 16
    scripts = {path.name: modules(path) for path in (REPO / "examples" / folder).glob("*.py")}
    named = {name for column in rows[0] for name in re.findall(r"`(\w+\.py)`", column)}
    assert named == scripts.keys()
    for row in rows:
        flag = re.fullmatch(r"`(--\w+)`", row["flag"])[1]
        assert row["what it is for"]
        for column, cell in row.items():
            for name in re.findall(r"`(\w+\.py)`", column):
                parser = scripts[name].make_parser()
                action = parser._option_string_actions.get(flag)
                assert (action is None) == (cell == "not there"), (name, flag)
                if action:
                    shown = {"None": "-", "True": "on", "False": "off"}.get(str(action.default), action.default)
                    is_same = float(cell) == shown if isinstance(shown, float) else cell == str(shown)
                    assert is_same, (name, flag, cell)


def takes(script, word):
    """Whether the script's command line takes the flag with its value."""
    try:
        return not script.parse_flags(script.make_parser(), [word], {})[1]
    except SystemExit:
        return False


def test_fixtures_named_in_the_guide_exist(request):
    text = prose(REPO / "CONTRIBUTING.md")
    paragraph = next(part for part in text.split("\n\n") if "has the fixtures" in part)
    names = re.findall(r"`(\w+)`", paragraph)
    assert "tiny_pipeline" in names
    for name in names:
        assert request._fixturemanager.getfixturedefs(name, request.node), name
