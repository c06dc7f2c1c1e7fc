"""Shows in seven minutes on one GPU what only a GPU can show, with random weights of Stable Diffusion 1.5's shape.

    python benchmarks/on_gpu.py [--peer PATH/OF/diffusers]

Each finding is a line as soon as it is there, and all are in results/on_gpu.json. A script runs as its users run it,
for 20 steps on a few images that come again and again, and is ended before it saves. The loss has to fall, from the
mean of the first quarter of the steps to that of the last. What a script does not have, what is not installed and what
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
FINDINGS = {  # by name: script and flags, at batch 1
    "bf16": (FULL, BF16),
    "fp16": (FULL, ["--mixed_precision=fp16"]),
    "xformers": (FULL, [*BF16, "--enable_xformers_memory_efficient_attention"]),
    "8-bit Adam": (FULL, [*BF16, "--use_8bit_adam"]),
    "EMA": (FULL, [*BF16, "--use_ema"]),
    "cache": (FULL, [*BF16, *CACHE]),
    "channels last": (FULL, [*BF16, "--channels_last"]),
    "compile": (FULL, [*BF16, *CACHE, "--compile"]),
    "small card, 8-bit Adam": (FULL, [*SMALL, "--use_8bit_adam"]),
    "small card, all bf16": (FULL, [*SMALL, "--full_bf16", "--max_grad_norm=inf"]),
    "LoRA of rank 16": (LORA, [*BF16, *CACHE, *RANK]),
    "LoRA of rank 16, checkpointing": (LORA, [*SMALL, *RANK]),
}
FASTEST = [*BF16, "--use_ema", *CACHE, "--compile"]
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


def try_run(args, script, flags, folder, batch, seconds):
    """Trains for some steps; returns what is found."""
    words = [
        f"--pretrained_model_name_or_path={folder / 'model'}",
        f"--train_data_dir={folder / 'images'}",
        f"--resolution={args.resolution}",
        f"--train_batch_size={batch}",
        "--max_train_steps=1000",
        "--checkpointing_steps=1000",
        "--center_crop",
        "--report_to=tensorboard",
        *flags,
    ]
    run = start(script, words, folder / "run", timeout=seconds)
    try:
        while len(run.messages) <= args.steps + 1 and run.step():
            pass
    finally:
        run.kill()
        run.close()
    if len(run.messages) < args.steps + 1:
        raise RuntimeError(f"ended after {max(0, len(run.messages) - 1)} steps\n{run.told()}")
    seconds_per_step = run.per_step(2)
    return {
        "images_per_second": batch / seconds_per_step,
        "seconds_to_first_step": run.seconds_to_first_step,
        "seconds_of_first_step": run.messages[1][2] - run.messages[0][2],
        "peak_memory": run.messages[args.steps][3],
        **losses_of(folder / "run" / "output" / "log.jsonl", args.steps),
    }


def reason_of(text):
    """The line of a script's last words that tells why it failed, and not what its launcher says of that."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "CalledProcessError" not in line]
    told = [line for line in lines if re.search(r"error|--\w+=|out of memory", line, re.IGNORECASE)]
    return (told or lines or ["it said nothing"])[-1][:300]


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

    def add(self, name, script, flags, batch):
        """Tries one finding and tells it; returns whether it worked."""
        left = self.end - time.monotonic()
        found = {"batch": batch, "flags": flags}
        if reason := why_not(script, flags):
            found["error"] = reason
        elif left < 10:
            found["error"] = "no time left"
        else:
            own = ["--logging_steps=1", *flags] if script in (FULL, LORA) else flags
            try:
                found |= try_run(self.args, script, own, self.folder, batch, min(left, self.args.seconds_each))
                if peak := peak_of_card():
                    found["utilisation"] = self.flops * found["images_per_second"] / peak
            except Exception as error:  # whatever it is: the others are still to be seen
                found["error"] = reason_of(str(error))
        self.found[name] = found
        print(tell(name, found), flush=True)
        self.write()
        return "error" not in found

    def write(self):
        """Writes what was found so far: whoever is in a hurry may end this early."""
        about = {name: getattr(self.args, name) for name in ("size", "resolution", "steps")}
        about |= {"machine": machine(), "gigaflop_per_image": self.flops / 1e9}
        text = json.dumps({**about, "findings": self.found, "versions": versions()}, indent=1) + "\n"
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        self.args.output.write_text(text, encoding="utf-8")


def compare_speed(args, findings):
    """Finds the largest batch that fits the other script, if there is one, and ours, and measures both at it."""
    theirs = args.peer / "examples" / "text_to_image" / FULL.name if args.peer else None
    # Flags that the other script does not have are for what it does not do.
    flags = [flag for flag in FASTEST if why_not(FULL, [flag]) is None]
    for batch in args.batches:
        fits = findings.add("speed, theirs", theirs, [*BF16, "--use_ema"], batch) if theirs else True
        if fits and findings.add("speed, ours", FULL, flags, batch):
            return
    print("speed: no batch fits", flush=True)


def make_parser():
    """The flags of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peer", type=Path, help="folder in which diffusers' scripts lie in examples/; without it ours run alone")
    add("--size", choices=SIZES, default="sd15", help="the model's; sd15")
    add("--resolution", type=int, default=512, help="side of the images; 512")
    add("--steps", type=int, default=20, help="steps of a run; 20")
    add("--batches", type=int, nargs="+", default=[32, 16, 8], help="batches of which the first that fits is compared")
    add("--only", nargs="*", choices=[*FINDINGS, "speed"], default=[*FINDINGS, "speed"], help="what is tried; all")
    add("--seconds", type=float, default=390, help="when to end, at most; 390")
    add("--seconds_each", type=float, default=90, help="what one finding may take; 90")
    add("--output", type=Path, default=RESULTS / "on_gpu.json", help="the file of the findings")
    return parser


def main(argv=None):
    """Finds what the command line asks for."""
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        flops = step_flops(args.size, args.resolution)
        findings = Findings(args, folder, flops)
        print(f"On {machine()}", flush=True)
        print(f"{flops / 1e9:,.4g} GFLOP of the model for an image", flush=True)
        make_pipeline(args.size, folder / "model")
        make_images(folder / "images", max(4, *args.batches), args.resolution, args.resolution)
        if "speed" in args.only:
            compare_speed(args, findings)
        for name, (script, flags) in FINDINGS.items():
            if name in args.only:
                findings.add(name, script, flags, 1)


if __name__ == "__main__":
    main()
