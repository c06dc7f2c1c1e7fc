"""What the commands share that send a folder to the Hub: their flags, the repository, and how a failure is told."""

import contextlib
import sys
from pathlib import Path

import huggingface_hub

from sdtune.arguments import SWITCH, nearest_beside, secret_token
from sdtune.errors import InputError, last_line, remedy_for_missing

CARD = "README.md"


def add_upload_arguments(parser, kind):
    """Adds how the upload goes; `kind` is model or dataset."""
    add = parser.add_argument_group("Hub").add_argument
    add("--private", **SWITCH, help="make the repository private")
    add("--hub_token", type=secret_token, help="token for the upload; default: the one that `hf auth login` stored")
    add("--commit_message", help="message of the commit; default: what is sent")
    add("--overwrite_card", **SWITCH, help=f"replace a {kind} card that is on the Hub already")
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `training:`; the command line wins")
    add("--dry_run", **SWITCH, help="check everything, say what would be sent and stop")


def check_upload(args, what):
    """Lists what is wrong with the folder, which should be `what`, the repository's name and the message."""
    problems = []
    if not args.folder:
        problems.append(f"FOLDER is missing: name {what}")
    elif not Path(args.folder).is_dir():
        remedy = remedy_for_missing(args.folder) or f"name {what}"
        problems.append(f"FOLDER={args.folder}: is no folder{nearest_beside(args.folder)}; {remedy}")
    try:
        huggingface_hub.utils.validate_repo_id(args.repo_id or "")
    except ValueError:
        told = f"REPO_ID={args.repo_id}:" if args.repo_id else "REPO_ID is missing:"
        problems.append(f"{told} give your_name/its_name, of letters, digits and -_.")
    if args.commit_message is not None and not args.commit_message.strip():
        problems.append("--commit_message: is empty; say what is sent, or drop this")
    return problems


def silence_hub():
    """Lets the Hub's library print no more than a bar, and that in a terminal alone."""
    huggingface_hub.utils.logging.set_verbosity_error()  # that an unchanged file is not sent again is no warning
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


def make_repo(api, repo_id, repo_type, private):
    """Makes the repository if there is none; returns its full name and the names of the files in it. Raises
    `InputError`."""
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True).repo_id
        info = api.repo_info(repo_id, repo_type=repo_type)
    except Exception as error:  # of the Hub, of the connection or of the name
        raise InputError(
            f"REPO_ID={repo_id}: cannot be made; log in with `hf auth login` or --hub_token, and check "
            f"the name ({last_line(error)})"
        ) from None
    if private and not info.private:
        raise InputError(
            f"--private: {repo_id} exists and is public; make it private in its settings on the Hub, or drop this"
        )
    return repo_id, {file.rfilename for file in info.siblings}


@contextlib.contextmanager
def told_if_upload_fails(what_is_safe):
    """Ends the process with status 1 if the upload fails, and says what is safe and how to go on."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever it is, the files are safe and the user should hear that
        print(
            f"The upload failed ({last_line(error)}). {what_is_safe}, and what has arrived is kept: the same command "
            "goes on from there.",
            file=sys.stderr,
        )
        sys.exit(1)
