"""Upload what a training script wrote to the Hub: a pipeline folder or LoRA weights.

    sdtune push-model my_model my_name/my_model --private

In one commit go the pipeline's parts, or the LoRA files, with card, samples and log. All else in the folder stays:
checkpoints, trackers' logs, args.json, files of yours; and a configuration goes without the path of the model that it
was loaded from on this machine. The same command goes on with an upload that was stopped, and sends only what is new.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from safetensors import SafetensorError, safe_open

from sdtune.arguments import is_hub_id, new_parser, parse_flags, path_name
from sdtune.errors import InputError, counted, in_one_line, last_line, raise_problems, told_to_user
from sdtune.files import read_json
from sdtune.lora_layouts import LORA_FILE
from sdtune.model_card import NAMES_MODEL, TAGS, Usage, code_of, in_python
from sdtune.uploads import CARD, add_upload_arguments, check_upload, make_repo, silence_hub, told_if_upload_fails

PROGRAM = "sdtune push-model"
INDEX = "model_index.json"


# ------------------------------------------------------------------------------------------------------- arguments
def make_parser():
    """The flags of the command."""
    parser = new_parser(__doc__, "sdtune push-model FOLDER REPO_ID [flags]")
    parser.add_argument("folder", nargs="?", type=path_name, help="pipeline folder, or folder with LoRA weights")
    parser.add_argument("repo_id", nargs="?", help="model on the Hub to make or replace: your_name/its_name")
    add_upload_arguments(parser, "model")
    return parser


def check_args(args):
    """Lists every argument that is wrong."""
    return check_upload(args, "a pipeline folder, or a folder with LoRA weights")


# --------------------------------------------------------------------------------------------------------- reading
def result_files(folder):
    """The files of a result below the folder, and whether it is a LoRA. Raises `InputError` if it is not whole."""
    is_lora = not (folder / INDEX).is_file()
    names = lora_files(folder) if is_lora else pipeline_files(folder)
    beside = [CARD, "log.jsonl", *[f"samples/{path.name}" for path in folder.glob("samples/[!.]*.png")]]
    names += [name for name in beside if (folder / name).is_file()]
    return sorted(names), is_lora


def lora_files(folder):
    """The LoRA files in the folder. Raises `InputError` if there are none."""
    names = []
    for path in folder.glob("[!.]*.safetensors"):
        if any("lora" in tensor for tensor in tensors_of(path)):
            names.append(path.name)
    if not names:
        raise InputError(
            f"{folder}: holds neither a pipeline with {INDEX} nor LoRA weights in .safetensors files; name another"
        )
    return names


def pipeline_files(folder):
    """The files of a pipeline: those that lie in the folders of its parts. Raises `InputError` if one lacks."""
    index = read_json(folder / INDEX)
    parts = [name for name, kind in index.items() if isinstance(kind, list) and any(kind[:1])]
    if not parts:
        raise InputError(f"{folder / INDEX}: cannot be read as that of a pipeline (it names no parts)")
    files = {part: [path for path in (folder / part).glob("[!.]*") if path.is_file()] for part in parts}
    if empty := [part for part in parts if not files[part]]:
        raise InputError(f"{folder}: has no {', '.join(empty)}, of which its {INDEX} tells; is it a whole pipeline?")
    names = [INDEX]
    for path in [path for found in files.values() for path in found]:
        if path.suffix == ".safetensors":
            tensors_of(path)
        names.append(path.relative_to(folder).as_posix())
    return names


def tensors_of(path):
    """The names of the tensors in a .safetensors file. Raises `InputError` if it is cut or none."""
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is no whole .safetensors file ({last_line(error)})") from None


def content(path, repo_id):
    """What is sent of a file: all of it, but of a configuration not the path of the model that it was loaded from; the
    code in a card of ours names the model as the Hub does."""
    if path.name == CARD:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        here = rf"^model = .*(?={re.escape(NAMES_MODEL)}$)"
        named = re.sub(here, lambda _: f"model = {in_python(repo_id)}", text, flags=re.MULTILINE)
        return path if named == text else named.encode("utf-8", "surrogateescape")
    if path.suffix != ".json":
        return path
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({last_line(error)})") from None
    if not isinstance(settings, dict):
        return path
    origins = settings.keys() & {"_name_or_path", "name_or_path"}
    paths = {key for key in origins if not is_hub_id(settings[key])}
    if not paths:
        return path
    kept = {key: value for key, value in settings.items() if key not in paths}
    return json.dumps(kept, indent=2).encode()


# --------------------------------------------------------------------------------------------------------- writing
def make_card(folder, repo_id, names, is_lora):
    """The text of a model card for a folder that has none, of the files in it by name; the base is that of the run if
    it is one on the Hub."""
    base = None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no args.json, or somebody else's
        base = json.loads((folder / "args.json").read_text(encoding="utf-8")).get("pretrained_model_name_or_path")
    if not is_hub_id(base):
        base = None
    tags, name = TAGS, f"model = {in_python(repo_id)}{NAMES_MODEL}"
    loading, call = [name, "pipe = StableDiffusionPipeline.from_pretrained(model)"], {}
    if is_lora:
        tags, call = [*TAGS, "lora"], {"cross_attention_kwargs": {"scale": 1.0}}
        # That of diffusers' layout, if it is there.
        file = min(
            (file for file in names if file.endswith(".safetensors")), key=lambda file: (file != LORA_FILE, file)
        )
        loading = [
            f"base = {in_python(base or 'BASE')}{'' if base else '  # which the adapters were trained on'}",
            name,
            "pipe = StableDiffusionPipeline.from_pretrained(base)",
            f"pipe.load_lora_weights(model, weight_name={in_python(file)})",
        ]
    usage = Usage(["import torch", "from diffusers import StableDiffusionPipeline"], loading, call, [])
    data = ModelCardData(base_model=base, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    code = code_of(usage, "a picture")
    return f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n{code}\n"


def push_files(args, folder, names, is_lora):
    """Sends the files in one commit, so that nobody gets half a model. Raises `InputError`; ends with status 1 if the
    upload fails."""
    api = HfApi(token=args.hub_token)
    repo_id, present = make_repo(api, args.repo_id, "model", args.private)
    keeps_card = CARD in present and not args.overwrite_card
    contents = {name: content(folder / name, repo_id) for name in names}
    if keeps_card:
        contents.pop(CARD, None)
    elif CARD not in contents:
        contents[CARD] = make_card(folder, repo_id, names, is_lora).encode("utf-8")
    operations = [CommitOperationAdd(name, what) for name, what in contents.items()]
    with told_if_upload_fails(f"The result is whole in {folder}"):
        api.create_commit(repo_id, operations, commit_message=args.commit_message or "Add the trained weights")
    if keeps_card:
        print("The model card on the Hub is kept; --overwrite_card replaces it.")
    print(f"Sent {counted(len(operations), 'file')} to {api.endpoint}/{repo_id}")


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message, Ctrl-C with status 130."""
    args, problems = parse_flags(make_parser(), argv, {})
    silence_hub()
    stopped = f"{PROGRAM}: stopped; the same command goes on from here"
    with told_to_user(PROGRAM, errors=(InputError, OSError), stopped=stopped):
        raise_problems(problems + check_args(args))
        folder = Path(os.path.abspath(args.folder))
        names, is_lora = result_files(folder)
        sent = {name.split("/")[0] for name in names}
        left = sorted(path.name for path in folder.iterdir() if path.name not in sent)
        does, kind = "Would send" if args.dry_run else "Sending", "LoRA weights" if is_lora else "a pipeline"
        sent, left = in_one_line(", ".join(names)), in_one_line(", ".join(left)) or "nothing"
        print(f"{does} {kind}: {sent}\nNot sent: {left}")
        if not args.dry_run:
            push_files(args, folder, names, is_lora)
