"""The `sdtune` command: what comes before and after a training."""

import difflib
import importlib
import logging
import sys

from sdtune.errors import end_unread, is_utf8, print_any_character, told_to_user

COMMANDS = {
    "caption": "write a caption for every image of a folder",
    "check": "report what is wrong with a dataset of captioned images",
    "show": "draw a contact sheet of images and captions as training sees them",
    "find-batch-size": "find the largest micro-batch that fits into memory, by trial steps",
    "generate": "draw pictures and labelled grids, base beside result",
    "report": "write a page about a run, or a comparison: plots, samples, settings, data",
    "evaluate": "measure a result: CLIP score, KID, held-out loss, memorisation",
    "export": "make a model of a checkpoint: a pipeline folder or LoRA weights",
    "convert": "turn a pipeline folder into one file for A1111, Forge and ComfyUI, and back",
    "convert-lora": "turn adapters from diffusers' layout into kohya's and back, or merge them",
    "push-dataset": "upload a folder of captioned images to the Hub",
    "push-model": "upload a pipeline folder or LoRA weights to the Hub",
}


def overview():
    """The list of the commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(["usage: sdtune COMMAND ...", "", *lines, "", "sdtune COMMAND --help lists the flags of one."])


def main(argv=None):
    """Runs the command that the first word names, with the others as its own; returns its status. Where nobody reads
    its output any more, as of `head`, it ends without a word."""
    print_any_character()
    try:
        try:
            return run(sys.argv[1:] if argv is None else list(argv))
        finally:
            if sys.stdout:  # None where it is closed
                sys.stdout.flush()
    except BrokenPipeError:
        end_unread()
        raise


def run(argv):
    """Runs the command that the first of the words names, with the others as its own; returns its status."""
    name = argv[0] if argv else ""
    if odd := [word for word in argv if not is_utf8(word)]:
        print(f"sdtune: {odd[0]!a} is not UTF-8; if it is, set PYTHONUTF8=1", file=sys.stderr)
        return 2
    if name in COMMANDS:
        # diffusers imports bitsandbytes, which warns on a CPU that it lacks a kernel for models in 4 bits.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        sys.argv[0] = f"sdtune {name}"  # which argparse names in its own messages
        try:
            with told_to_user(f"sdtune {name}", stopped="Stopped."):
                module = importlib.import_module(f"sdtune.commands.{name.replace('-', '_')}")
        except ModuleNotFoundError as error:
            files = "-r requirements.txt -r requirements_tools.txt"
            print(f"sdtune {name}: needs {error.name}; run `pip install {files}`", file=sys.stderr)
            return 2
        return module.main(argv[1:])
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name:
        meant = difflib.get_close_matches(name, COMMANDS, 1)
        remedy = f"; did you mean {meant[0]}?" if meant else ""
        print(f"sdtune: there is no command {name!r}{remedy}", file=sys.stderr)
    print(overview(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
