"""Shows in five minutes on one GPU what only a GPU can show, with random weights of Stable Diffusion 1.5's shape.

    python benchmarks/on_gpu.py [--peer PATH/OF/diffusers]

Each finding is a line as soon as it is there, and all are in results/on_gpu.json. A script runs as its users run it,
for 20 steps on a few images that come again and again, and is ended before it saves. Several are launched together,
which takes longest, and wait before their first step; each takes its steps alone. Where scripts are compared all steps
are of one epoch: diffusers' start their loading processes again in each. The loss has to fall, from the mean of the
first quarter of the steps to that of the last. What a script does not have, what is not installed and what
fails is a line too. It needs torch, diffusers, datasets, accelerate and peft; bitsandbytes and xformers, for what is
about them. On a CPU, with --size=toy, it shows that it works.
"""

import argparse
import importlib.util
import json
import re
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measuring import RESULTS, machine, start, versions
from models import REPO, SIZES, make_images, make_pipeline, make_unet
from torch.utils.flop_counter import FlopCounterMode

FULL = REPO / "examples" / "text_to_image" / "train_text_to_image.py"
LORA = REPO / "examples" / "text_to_image" / "train_text_to_image_lora.py"
CACHE = ["--cache_latents", "--cache_text_embeddings"]
BF16 = ["--mixed_precision=bf16"]
SMALL = [*BF16, "--gradient_checkpointing", *CACHE]
RANK = ["--rank=16", "--learning_rate=1e-3"]
NEEDS = {  # flag: package
    "--use_8bit_adam": "bitsandbytes",
    "--enable_xformers_memory_efficient_attention": "xformers",
}
FINDINGS = {  # by name: script, flags and batch
    "README": (
        FULL,
        [
            *BF16,
            "--random_flip",
            "--gradient_accumulation_steps=4",
            "--gradient_checkpointing",
            "--use_ema",
            "--learning_rate=1e-5",
        ],
        1,
    ),
    "bf16": (FULL, BF16, 1),
    "fp16": (FULL, ["--mixed_precision=fp16"], 1),
    "8-bit Adam": (FULL, [*BF16, "--use_8bit_adam"], 1),
    "EMA": (FULL, [*BF16, "--use_ema"], 1),
    "small card, 8-bit Adam": (FULL, [*SMALL, "--use_8bit_adam"], 1),
    "small card, all bf16": (FULL, [*SMALL, "--full_bf16", "--max_grad_norm=inf"], 1),
    "LoRA of rank 16": (LORA, [*BF16, *CACHE, *RANK], 1),
    "LoRA of rank 16, checkpointing": (LORA, [*SMALL, *RANK], 1),
    "plain": (FULL, BF16, 8),
    "cache": (FULL, [*BF16, *CACHE], 8),
    "channels last": (FULL, [*BF16, "--channels_last"], 8),
    "xformers": (FULL, [*BF16, "--enable_xformers_memory_efficient_attention"], 8),
    "compile": (FULL, [*BF16, "--compile"], 8),
    "compile, channels last": (FULL, [*BF16, "--compile", "--channels_last"], 8),
}
# Beside the other scripts, with the flags that both have, and with ours: by name, the script and these flags.
WORKERS = ["--dataloader_num_workers=4"]
SPEED = {
    "whole UNet": (FULL, [*BF16, "--use_ema", *WORKERS], [*CACHE, "--foreach_ema"]),
    "LoRA": (LORA, [*BF16, *RANK, *WORKERS], CACHE),
}
# Dense products in half precision, by a part of the card's name: teraflops of its data sheet.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 125, "RTX 4090": 165, "T4": 65}


def step_flops(size, resolution):
    """Floating-point operations of an image's forward and backward pass through the UNet; a product counts as two."""
    side = resolution // 8
    with torch.device("meta"):
        unet = make_unet(size)
        latents, width = torch.empty(1, 4, side, side), unet.config.cross_attention_dim
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.ones(1), torch.empty(1, 77, width)).sample.sum().backward()
    return counter.get_total_flops()


def peak_of_card():
    """Floating-point operations of this card in a second at best, or None for one that is not in the table."""
    name = machine()
    return next((teraflops * 1e12 for part, teraflops in PEAKS.items() if part in name), None)


def why_not(script, flags):
    """Why flags cannot be tried, or None."""
    text = script.read_text(encoding="utf-8")
    for flag in (word.split("=")[0] for word in flags):
        if f'"{flag}"' not in text:
            return f"{flag} is not there"
        if flag in NEEDS and not importlib.util.find_spec(NEEDS[flag]):
            return f"{NEEDS[flag]} is not installed"
    return None


def launch(args, name, script, flags, folder, batch, images, seconds):
    """A run of a script on a folder of images, which waits before its first step."""
    words = [
        f"--pretrained_model_name_or_path={folder / 'model'}",
        f"--train_data_dir={images}",
        f"--resolution={args.resolution}",
        f"--train_batch_size={batch}",
        "--max_train_steps=1000",
        "--checkpointing_steps=1000",
        "--center_crop",
        "--learning_rate=1e-4",
        "--report_to=tensorboard",
        *flags,
        *(["--logging_steps=1"] if script in (FULL, LORA) else []),
    ]
    return start(script, words, folder_of(folder, name), timeout=seconds)


def folder_of(folder, name):
    """Where a run of this name writes."""
    return folder / re.sub(r"\W+", "_", name)


def take_steps(run, steps, images, folder):
    """Lets a run take its steps, of so many images each, and ends it; returns what is found."""
    try:
        while len(run.messages) <= steps + 1 and run.step():
            pass
    finally:
        run.kill()
        run.close()
    if len(run.messages) < steps + 1:
        raise RuntimeError(f"ended after {max(0, len(run.messages) - 1)} steps\n{run.told()}")
    return {
        "images_per_second": images / run.per_step(2),
        "seconds_to_first_step": run.seconds_to_first_step,
        "seconds_of_first_step": run.messages[1][2] - run.messages[0][2],
        "peak_memory": run.messages[steps][3],
        **losses_of(folder / "output" / "log.jsonl", steps),
    }


def images_of_step(flags, batch):
    """How many images a step trains on."""
    passes = [int(flag.split("=")[1]) for flag in flags if flag.startswith("--gradient_accumulation_steps=")]
    return batch * (passes[-1] if passes else 1)


def reason_of(text):
    """The line of a script's last words that tells why it failed, and not what its launcher says of that."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "CalledProcessError" not in line]
    told = [line for line in lines if re.search(r"error|--\w+=|out of memory", line, re.IGNORECASE)]
    ended = [line for line in lines[:1] if line.startswith("ended after")]  # all that it said else is its progress
    return (told or ended or lines or ["it said nothing"])[-1][:300]


def losses_of(log, steps):
    """The mean loss of the first and of the last steps, a quarter of them each; nothing without a log."""
    if not log.exists():
        return {}
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if row.get("loss") is not None][:steps]
    part = max(1, len(losses) // 4)
    first, last = statistics.mean(losses[:part]), statistics.mean(losses[-part:])
    return {"first_loss": first, "last_loss": last, "falls": last < first}


def tell(name, found):
    """The line of a finding."""
    if "error" in found:
        return f"{name}: {found['error']}"
    told = f"{name}: batch {found['batch']}, {found['images_per_second']:.2f} images/s"
    if found["peak_memory"]:
        told += f", {found['peak_memory'] / 2**30:.2f} GiB"
    if "utilisation" in found:
        told += f", {found['utilisation']:.1%} of the card's peak"
    if "falls" in found:
        told += f", loss {found['first_loss']:.3f} to {found['last_loss']:.3f}"
        told += "" if found["falls"] else ", WHICH DOES NOT FALL"
    return told


class Findings:
    """What was found, by name, with the time that is left."""

    def __init__(self, args, folder, flops):
        self.args, self.folder, self.flops, self.found = args, folder, flops, {}
        self.end = time.monotonic() + args.seconds

    def add_all(self, wanted, together, steps, num_images):
        """Tries findings, (name, script, flags, batch) each, `together` of which are launched at a time, for some
        steps on so many images, and tells them; returns whether all of them worked."""
        works, side = True, self.args.resolution
        images = make_images(self.folder / f"images_{num_images}", num_images, side, side)
        for first in range(0, len(wanted), together):
            group = wanted[first : first + together]
            with ThreadPoolExecutor(len(group)) as pool:
                runs = [pool.submit(self.launch_one, *one, images, len(group)) for one in group]
            for run, (name, script, flags, batch) in zip(runs, group):
                works &= self.add(run, name, script, flags, batch, steps)
        return works

    def launch_one(self, name, script, flags, batch, images, together):
        """The run of a finding, before its first step. Raises `RuntimeError`, with a line that says why there is
        none."""
        left = self.end - time.monotonic()
        if reason := why_not(script, flags):
            raise RuntimeError(reason)
        if left < 10:
            raise RuntimeError("no time left")
        seconds = min(left, together * self.args.seconds_each)
        return launch(self.args, name, script, flags, self.folder, batch, images, seconds)

    def add(self, future, name, script, flags, batch, steps):
        """Tells one finding, of what will be a run; returns whether it worked."""
        found = {"batch": batch, "flags": flags, "steps": steps}
        try:
            images, folder = images_of_step(flags, batch), folder_of(self.folder, name)
            found |= take_steps(future.result(), steps, images, folder)
            peak = peak_of_card()
            if peak and script.name == FULL.name:  # LoRA makes no gradients of most weights: the count is too high
                found["utilisation"] = self.flops * found["images_per_second"] / peak
        except Exception as error:  # whatever it is: the others are still to be seen
            found |= {"error": reason_of(str(error)), "told": str(error)}
        self.found[name] = found
        print(tell(name, found), flush=True)
        self.write()
        return "error" not in found

    def write(self):
        """Writes what was found so far: whoever is in a hurry may end this early."""
        about = {name: getattr(self.args, name) for name in ("size", "resolution")}
        about |= {"machine": machine(), "gigaflop_per_image": self.flops / 1e9}
        text = json.dumps({**about, "findings": self.found, "versions": versions()}, indent=1) + "\n"
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        self.args.output.write_text(text, encoding="utf-8")


def compare_speed(args, findings, name):
    """Finds the largest batch that fits the other script, if there is one, and ours, and measures both at it."""
    script, flags, own = SPEED[name]
    own = [*flags, *(flag for flag in own if why_not(script, [flag]) is None)]
    for batch in args.batches:
        num_images = batch * (args.steps_to_compare + 2)  # one epoch
        wanted = [(f"{name}, ours", script, flags, batch), (f"{name}, ours, fastest", script, own, batch)]
        if args.peer:
            theirs = args.peer / "examples" / "text_to_image" / script.name
            wanted = [(f"{name}, theirs", theirs, flags, batch), *wanted]
        together = runs_together(args.gigabytes_to_compare)
        if findings.add_all(wanted, together, args.steps_to_compare, num_images):
            return
    print(f"{name}: no batch fits", flush=True)


def runs_together(gigabytes):
    """How many runs may wait on the card beside each other, of which each takes as much."""
    if not torch.accelerator.is_available():
        return 1
    return max(1, int(torch.cuda.mem_get_info()[1] / 1e9 / gigabytes))


def make_parser():
    """The flags of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peer", type=Path, help="folder in which diffusers' scripts lie in examples/; without it ours run alone")
    add("--size", choices=SIZES, default="sd15", help="the model's; sd15")
    add("--resolution", type=int, default=512, help="side of the images; 512")
    add("--steps", type=int, default=20, help="steps of a run; 20")
    add("--steps_to_compare", type=int, default=12, help="steps of a run that is compared; 12")
    add("--batches", type=int, nargs="+", default=[32, 16, 8], help="batches of which the first that fits is compared")
    add("--only", nargs="*", choices=[*SPEED, *FINDINGS], default=[*SPEED, *FINDINGS], help="what is tried; all")
    add("--seconds", type=float, default=390, help="when to end, at most; 390")
    add("--seconds_each", type=float, default=90, help="what one finding may take; 90")
    add("--gigabytes_each", type=float, default=17, help="card's memory for each run that is launched together; 17")
    add("--gigabytes_to_compare", type=float, default=45, help="the same where scripts are compared; 45")
    add("--folder", type=Path, help="where model and images are made, or are already; else a temporary folder")
    add("--output", type=Path, default=RESULTS / "on_gpu.json", help="the file of the findings")
    return parser


def main(argv=None):
    """Finds what the command line asks for."""
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or Path(place)
        flops = step_flops(args.size, args.resolution)
        findings = Findings(args, folder, flops)
        print(f"On {machine()}", flush=True)
        print(f"{flops / 1e9:,.4g} GFLOP of the model for an image", flush=True)
        make_pipeline(args.size, folder / "model")
        for name in SPEED:
            if name in args.only:
                compare_speed(args, findings, name)
        wanted = [(name, *FINDINGS[name]) for name in FINDINGS if name in args.only]
        findings.add_all(wanted, runs_together(args.gigabytes_each), args.steps, 32)


if __name__ == "__main__":
    main()
