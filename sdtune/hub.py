"""The upload of a result to the Hub."""

import sys
from pathlib import Path

from huggingface_hub import HfApi

from sdtune.errors import InputError, last_line


def create_repo(args):
    """Makes the repository on the Hub; returns its full name. Raises `InputError`."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        api = HfApi(token=args.hub_token)
        return api.create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
    except Exception as error:  # of the Hub, of the connection or of the name
        raise InputError(
            f"--push_to_hub: the repository {name} cannot be made; log in with `hf auth login` or --hub_token, and "
            f"check --hub_model_id ({last_line(error)})"
        ) from None


def push(args, repo_id, files, step):
    """Uploads `files` of the result, card, log and samples, nothing else; if that fails, says how to and ends with
    status 1."""
    folder = args.output_dir
    files = ["README.md", "log.jsonl", "samples/*", *files]
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Train {step} steps", allow_patterns=files
        )
    except Exception as error:  # whatever it is, the result is safe and the user should hear that
        include = " ".join(map(repr, files))
        print(
            f"The upload failed ({last_line(error)}). The result is whole in {folder}; to send it again:\n"
            f"  hf upload {repo_id} {folder} . --include {include}",
            file=sys.stderr,
        )
        sys.exit(1)
