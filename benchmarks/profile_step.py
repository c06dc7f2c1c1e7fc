"""Shows where the CPU's time of a step goes, in this repository's script and in another one.

    python benchmarks/profile_step.py --peer PATH/OF/diffusers

Both train the whole UNet as `compare.py` has it. Prints a table of milliseconds per step.
"""

import argparse
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import diffusers
import torch
import transformers
from compare import FULL, flags_of
from models import REPO, SIZES, make_images, make_pipeline
from probe import stand_in_for_torchvision
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

PARTS = {  # what is timed, by what it is called in the table; classes by name, since they are loaded when used
    "load images": (torch.utils.data.dataloader, "_BaseDataLoaderIter.__next__"),
    "VAE": (diffusers, "AutoencoderKL.encode"),
    "text encoder": (transformers, "CLIPTextModel.forward"),
    "UNet, forward": (diffusers, "UNet2DConditionModel.forward"),
    "UNet, backward": (torch.Tensor, "backward"),
    "clip gradients": (torch.nn.utils, "clip_grad_norm_"),
}
NAMES = [*PARTS, "optimizer", "the rest", "a step"]


def time_part(seconds, name, place, attribute):
    """Adds to `seconds` what a function of a module or class, or a method `Class.method`, takes from now on."""
    *owners, attribute = attribute.split(".")
    for owner in owners:
        place = getattr(place, owner)
    function = getattr(place, attribute)

    def timed(*args, **kwargs):
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.process_time() - started

    setattr(place, attribute, timed)


def profile(script, steps, output):
    """Runs a script, whose flags are in sys.argv, for some steps; writes the milliseconds of a step's parts."""
    seconds, marks = defaultdict(float), []
    for name, place in PARTS.items():
        time_part(seconds, name, *place)

    def before(*_):
        seconds["optimizer"] -= time.process_time()

    def after(*_):
        seconds["optimizer"] += time.process_time()
        marks.append(time.process_time())
        if len(marks) == 3:  # the first ones warm up
            seconds.clear()
        if len(marks) == 3 + steps:
            seconds["a step"] = marks[-1] - marks[2]
            seconds["the rest"] = 2 * seconds["a step"] - sum(seconds.values())
            lines = [f"{1000 * seconds[name] / steps:.1f}" for name in NAMES]
            Path(output).write_text("\n".join(lines), encoding="utf-8")
            os._exit(0)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
    if "torchvision" in Path(script).read_text(encoding="utf-8") and not importlib.util.find_spec("torchvision"):
        stand_in_for_torchvision()
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def make_parser():
    """The flags of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder in which the other script lies in examples/")
    parser.add_argument("--size", choices=SIZES, default="35m", help="the model's; 35m")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images; 256")
    parser.add_argument("--train_batch_size", type=int, default=2, help="images of a step; 2")
    parser.add_argument("--steps", type=int, default=10, help="steps that count; 10")
    return parser


def main():
    """Profiles both scripts, or in a process of its own one of them."""
    if sys.argv[1] == "--one":
        _, _, script, steps, output, *sys.argv[1:] = sys.argv
        profile(script, int(steps), output)
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make_pipeline(args.size, folder / "model")
        make_images(folder / "images", 64, args.resolution * 3 // 2, args.resolution * 5 // 4)
        columns = []
        for who, repository in (("ours", REPO), ("theirs", args.peer.resolve())):
            steps, script = args.steps, repository / "examples" / FULL
            settings = argparse.Namespace(**{**vars(args), "steps": steps + 4})
            words = [*flags_of(FULL, settings, model, folder), f"--output_dir={folder / who / 'output'}"]
            command = [sys.executable, __file__, "--one", str(script), str(steps), str(folder / "times"), *words]
            variables = {
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
                "HF_DATASETS_CACHE": str(folder / "data"),
            }
            subprocess.run(command, env=os.environ | variables, check=True, capture_output=True)
            columns.append((folder / "times").read_text(encoding="utf-8").split("\n"))
    print("| part | ours | theirs |\n|---|---|---|")
    for name, *times in zip(NAMES, *columns):
        print(" | ".join([f"| {name}", *times]) + " |")


if __name__ == "__main__":
    main()
