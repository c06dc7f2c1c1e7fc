#!/usr/bin/env python
"""Upload what a training script wrote to the Hub: a pipeline folder or LoRA weights.

    python push_model.py my_model my_name/my_model --private

In one commit go the pipeline's parts, or the LoRA files, with card, samples and log. All else in the folder stays:
checkpoints, trackers' logs, args.json, files of yours; and a configuration goes without the path of the model that it
was loaded from on this machine. The same command goes on with an upload that was stopped, and sends only what is new.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from safetensors import SafetensorError, safe_open

REPLACED_FLAGS = {}
INDEX = "model_index.json"
CARD = "README.md"


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """Reads the command line and `--config`; a flag that is wrong by itself ends with status 2 and one message."""
    parser = argparse.ArgumentParser(usage="%(prog)s FOLDER REPO_ID [flags]", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    parser.add_argument("folder", nargs="?", help="pipeline folder, or folder with LoRA weights")
    parser.add_argument("repo_id", nargs="?", help="model on the Hub to make or replace: your_name/its_name")
    add = parser.add_argument_group("Hub").add_argument
    add("--private", **switch, help="make the repository private")
    add("--hub_token", help="token for the upload; default: the one that `hf auth login` stored")
    add("--commit_message", default="Add the trained weights", help="message of the commit")
    add("--overwrite_card", **switch, help="replace a model card that is on the Hub already")
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `training:`; the command line wins")
    add("--dry_run", **switch, help="check everything, list what would be sent and stop")
    return parse_words(parser, argv)


def parse_words(parser, argv):
    """Parses `argv` or the command line, after its `--config` as words, so that argparse checks that; expands `~`."""
    argv, words = sys.argv[1:] if argv is None else list(argv), []
    if replaced := [flag for word in argv if (flag := word.split("=")[0]) in REPLACED_FLAGS]:
        parser.error(f"{replaced[0]} is not taken: {REPLACED_FLAGS[replaced[0]]}")
    path, flags = parser.parse_known_args(argv)[0].config, vars(parser.parse_args([]))
    try:
        recipe = (yaml.safe_load(Path(os.path.expanduser(path)).read_text("utf-8")) if path else None) or {}
        recipe |= recipe.pop("training", None) or {}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
        parser.error(f"--config={path}: is no YAML file of flags ({' '.join(str(error).split())})")
    if unknown := sorted(map(str, recipe.keys() - (flags.keys() - {"config"}) - {"evaluation"})):
        parser.error(f"--config={path}: unknown key {', '.join(unknown)}; keys are the flags of --help without dashes")
    for key, value in [(key, value) for key, value in recipe.items() if key in flags and value is not None]:
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool) and isinstance(flags[key], bool):
            words.append(f"--{'' if value else 'no-'}{key}")
        else:  # YAML reads a bare `no` as false, but --mixed_precision means the word
            words.append(f"--{key}={'no' if value is False else value}")
    return argparse.Namespace(**{name: os.path.expanduser(value) if isinstance(value, str) else value
                                 for name, value in vars(parser.parse_args(words + argv)).items()})


def check_args(args):
    """Raises one `InputError` that names every argument that is wrong."""
    problems = []
    if not args.folder or not Path(args.folder).is_dir():
        problems.append(f"FOLDER={args.folder}: name a pipeline folder, or a folder with LoRA weights")
    try:
        huggingface_hub.utils.validate_repo_id(args.repo_id or "")
    except ValueError:
        problems.append(f"REPO_ID={args.repo_id}: give your_name/its_name, of letters, digits and -_.")
    if not args.commit_message.strip():
        problems.append("--commit_message: is empty; say what is sent, or drop this")
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


# --------------------------------------------------------------------------------------------------------- reading
def result_files(folder):
    """The files of a result below the folder, and whether it is a LoRA. Raises `InputError` if it is not whole."""
    is_lora = not (folder / INDEX).is_file()
    names = lora_files(folder) if is_lora else pipeline_files(folder)
    beside = [CARD, "log.jsonl", *(f"samples/{path.name}" for path in folder.glob("samples/[!.]*.png"))]
    return sorted([*names, *(name for name in beside if (folder / name).is_file())]), is_lora


def lora_files(folder):
    """The LoRA files in the folder. Raises `InputError` if there are none."""
    names = [path.name for path in folder.glob("[!.]*.safetensors") if any("lora" in key for key in tensors_of(path))]
    if not names:
        raise InputError(f"{folder}: holds neither a pipeline with {INDEX} nor LoRA weights in .safetensors files")
    return names


def pipeline_files(folder):
    """The files of a pipeline: those that lie in the folders of its parts. Raises `InputError` if one lacks."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = [name for name, kind in index.items() if isinstance(kind, list) and any(kind[:1])]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / INDEX}: cannot be read ({last_line(error)})") from None
    files = {part: [path for path in (folder / part).glob("[!.]*") if path.is_file()] for part in parts}
    if empty := [part for part in parts if not files[part]]:
        raise InputError(f"{folder}: has no {', '.join(empty)}, of which its {INDEX} tells; is it a whole pipeline?")
    for path in [path for found in files.values() for path in found if path.suffix == ".safetensors"]:
        tensors_of(path)
    return [INDEX, *(path.relative_to(folder).as_posix() for found in files.values() for path in found)]


def tensors_of(path):
    """The names of the tensors in a .safetensors file. Raises `InputError` if it is cut or none."""
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is no whole .safetensors file ({last_line(error)})") from None


def is_hub_id(name):
    """Whether the name is one of the Hub, no path."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not os.path.exists(name)


def content(path):
    """What is sent of a file: all of it, but of a configuration not the path of the model that it was loaded from."""
    if path.suffix == ".json":
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: is no JSON ({last_line(error)})") from None
        own = settings if isinstance(settings, dict) else {}
        paths = [key for key in own.keys() & {"_name_or_path", "name_or_path"} if not is_hub_id(own[key])]
        if paths:
            return json.dumps({key: value for key, value in own.items() if key not in paths}, indent=2).encode()
    return path


# --------------------------------------------------------------------------------------------------------- writing
def make_card(folder, repo_id, is_lora):
    """The text of a model card, for a folder that has none; the base is that of the run if it is one on the Hub."""
    base = None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no args.json, or somebody else's
        base = json.loads((folder / "args.json").read_text(encoding="utf-8")).get("pretrained_model_name_or_path")
    base = base if is_hub_id(base) else None
    tags = ["stable-diffusion", "stable-diffusion-diffusers", *(["lora"] if is_lora else [])]
    data = ModelCardData(base_model=base, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    loaded = base or "MODEL" if is_lora else repo_id
    lora = f'pipe.load_lora_weights("{repo_id}")\n' if is_lora else ""
    return (f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n```python\nfrom diffusers import "
            f'StableDiffusionPipeline\n\npipe = StableDiffusionPipeline.from_pretrained("{loaded}")\n{lora}```\n')


def make_repo(api, repo_id, private):
    """Makes the repository if there is none; returns its full name and what is in it. Raises `InputError`."""
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        info = api.model_info(repo_id)
    except Exception as error:  # of the Hub, of the connection or of the name
        raise InputError(f"REPO_ID={repo_id}: cannot be made; log in with `hf auth login` or --hub_token, and check "
                         f"the name ({last_line(error)})") from None
    if private and not info.private:
        raise InputError(f"--private: {repo_id} exists and is public; make it private in its settings on the Hub, or "
                         "drop this")
    return repo_id, {file.rfilename for file in info.siblings}


def push_files(names, is_lora, folder, repo_id, private, hub_token, commit_message, overwrite_card, **_):
    """Sends the files in one commit, so that nobody gets half a model. Raises `InputError`; ends with status 1 if the
    upload fails."""
    api = HfApi(token=hub_token)
    repo_id, present = make_repo(api, repo_id, private)
    keep = CARD in present and not overwrite_card
    operations = [CommitOperationAdd(name, content(folder / name)) for name in names if not (keep and name == CARD)]
    if not keep and CARD not in names:
        operations.append(CommitOperationAdd(CARD, make_card(folder, repo_id, is_lora).encode("utf-8")))
    try:
        api.create_commit(repo_id, operations, commit_message=commit_message)
    except Exception as error:  # whatever it is, the result is safe and the user should hear that
        print(f"The upload failed ({last_line(error)}). The result is whole in {folder}, and what has arrived is "
              "kept: the same command goes on from there.", file=sys.stderr)
        sys.exit(1)
    if keep:
        print("The model card on the Hub is kept; --overwrite_card replaces it.")
    print(f"Sent {len(operations)} files to {api.endpoint}/{repo_id}")


def main(argv=None):
    """Runs the tool; a mistake of the user's ends with status 2 and its message, Ctrl-C with status 130."""
    args = parse_args(argv)
    huggingface_hub.utils.logging.set_verbosity_error()  # that an unchanged file is not sent again is no warning
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        check_args(args)
        folder = Path(os.path.abspath(args.folder))
        names, is_lora = result_files(folder)
        left = sorted({path.name for path in folder.iterdir()} - {name.split("/")[0] for name in names})
        print(f"{'Would send' if args.dry_run else 'Sending'} {'LoRA weights' if is_lora else 'a pipeline'}: "
              f"{', '.join(names)}\nNot sent: {', '.join(left) or 'nothing'}")
        if not args.dry_run:
            push_files(names, is_lora, **{**vars(args), "folder": folder})
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
