"""The upload of a result to the Hub."""

import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from sdtune.errors import InputError, counted, last_line


def name_repo(args):
    """The full name of the repository to upload to, which is made when there is something to upload. Raises
    `InputError` where nobody is logged in."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        user = HfApi(token=args.hub_token).whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PermissionError("the token can only read")
        repo_id = name if "/" in name else f"{user['name']}/{name}"
        validate_repo_id(repo_id)
        return repo_id
    except Exception as error:  # of the Hub, of the connection or of the name
        raise InputError(
            f"--push_to_hub: cannot upload to {name}; log in with `hf auth login` or --hub_token, and check "
            f"--hub_model_id ({last_line(error)})"
        ) from None


def push(args, repo_id, files, step):
    """Makes the repository and uploads `files` of the result, card, log and samples, nothing else; if that fails, says
    how to and ends with status 1."""
    folder = args.output_dir
    files = ["README.md", "log.jsonl", "samples/*", *files]
    try:
        api = HfApi(token=args.hub_token)
        api.create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Train {counted(step, 'step')}", allow_patterns=files
        )
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the result is safe, which the user should hear
        include = " ".join(map(repr, files))
        print(
            f"The upload failed ({last_line(error)}). The result is whole in {folder}; to send it again:\n"
            f"  hf upload {repo_id} {folder} . --include {include}",
            file=sys.stderr,
        )
        sys.exit(1)
