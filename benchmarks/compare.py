"""Trains by two scripts in turns, this repository's and another one that takes the same flags, and compares them.

    python benchmarks/compare.py --peer PATH/OF/diffusers

PATH is a clone of diffusers, whose scripts have the same names in the same folders. A pair of runs goes so: each is
launched alone, up to its first step; then they take steps in turns, one of each, so that whatever else slows the
machine slows both alike; then each ends alone. The time of a step is the CPU's (a GPU's: the clock's, synchronised).
Before the pairs a run of each fills the caches. Writes results/compare-cpu.json, or compare-gpu.json, and a picture.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from measuring import RESULTS, interval_of_median, machine, merge_records, run_in_turns, spread_of, versions
from models import MINIATURE, REPO, SIZES, make_images, make_pipeline
from pictures import draw_intervals

CACHE = ["--cache_latents", "--cache_text_embeddings"]
FULL = "text_to_image/train_text_to_image.py"
LORA = "text_to_image/train_text_to_image_lora.py"
DREAMBOOTH = "dreambooth/train_dreambooth.py"
RECORDS = {  # by name: the script, and flags of ours alone
    "full": (FULL, []),
    "full-cached": (FULL, CACHE),
    "lora": (LORA, []),
    "lora-cached": (LORA, CACHE),
    "dreambooth": (DREAMBOOTH, []),
    "dreambooth-cached": (DREAMBOOTH, CACHE),
}
MEASURES = ("seconds_per_step", "peak_memory", "time_to_first_step", "cpu_to_first_step")


def flags_of(script, args, model, folder):
    """The flags that both scripts get."""
    flags = {
        "resolution": args.resolution,
        "train_batch_size": args.train_batch_size,
        "max_train_steps": args.steps,
        "learning_rate": 1e-5,
        "seed": 0,
        "dataloader_num_workers": 0,
    }
    words = [f"--pretrained_model_name_or_path={model}", "--center_crop"]
    words += [f"--{name}={value}" for name, value in flags.items()]
    if script == DREAMBOOTH:
        return [*words, f"--instance_data_dir={folder / 'photos'}", "--instance_prompt=a photo of a sks disc"]
    return [*words, f"--train_data_dir={folder / 'images'}"]


def compare(name, args, model, folder):
    """Measures one record."""
    script, own = RECORDS[name]
    flags = [*flags_of(script, args, model, folder), *args.flags]
    ours = (REPO / "examples" / script, [*flags, *own], folder / name / "ours")
    theirs = (args.peer / "examples" / script, flags, folder / name / "theirs")
    pairs = []
    for number in range(args.pairs + 1):
        swapped = number % 2
        pair = run_in_turns([theirs, ours])[::-1] if swapped else run_in_turns([ours, theirs])
        if number > 0:
            pairs.append(pair)
            ratios = ", ".join(f"{what} {pair[0][what] / pair[1][what]:.3f}" for what in MEASURES)
            print(f"{name}, pair {number} of {args.pairs}: {ratios}", flush=True)
    return summary(name, args, pairs, commands_of(script, flags, own, args, model, folder))


def summary(name, args, pairs, commands):
    """The record of pairs of measures (ours, theirs)."""
    record = {"name": name, "size": args.size, "resolution": args.resolution, "batch": args.train_batch_size}
    record |= {"steps": args.steps, "pairs": len(pairs), "machine": machine()}
    intervals = {}
    for what in MEASURES:
        ratios = [ours[what] / theirs[what] for ours, theirs in pairs]
        low, high, confidence = interval_of_median(ratios)
        record[f"{what}_ratio"] = round(statistics.median(ratios), 4)
        intervals[f"{what}_ratio"] = [round(low, 4), round(high, 4)]
    record |= {"intervals": intervals, "confidence": round(confidence, 4)}
    for side, who in enumerate(("ours", "theirs")):
        record[who] = {what: spread_of([pair[side][what] for pair in pairs]) for what in pairs[0][side]}
        per_second = [args.train_batch_size / pair[side]["seconds_per_step"] for pair in pairs]
        record[who]["images_per_second"] = spread_of(per_second)
    return {**record, "versions": versions(), "commands": commands}


def commands_of(script, flags, own, args, model, folder):
    """Both commands, without the places of this machine."""
    words = " ".join(["accelerate launch", f"examples/{script}", *flags])
    for place, told in ((model, args.size), (folder, "benchmark"), (args.peer, "diffusers"), (REPO, ".")):
        words = words.replace(str(place), str(told))
    return {"ours": " ".join([words, *own]), "theirs": words}


def draw(path):
    """The picture of the records in a file."""
    told = {"seconds_per_step": "time of a step", "peak_memory": "peak memory", "time_to_first_step": "first step"}
    rows = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        dots = [(name, record[f"{what}_ratio"], *record["intervals"][f"{what}_ratio"]) for what, name in told.items()]
        rows.append((record["name"], dots))
    return draw_intervals(rows, "ours / theirs, median of pairs with its interval; smaller is better")


def make_parser():
    """The flags of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder in which the other scripts lie in examples/")
    parser.add_argument("--names", nargs="+", choices=RECORDS, default=list(RECORDS), help="what is compared; all")
    parser.add_argument("--size", choices=["miniature", *SIZES], default="35m", help="the model's; 35m")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images; 256")
    parser.add_argument("--train_batch_size", type=int, default=2, help="images of a step; 2")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs; 7")
    parser.add_argument("--steps", type=int, default=14, help="steps of a run, the first two of which warm up; 14")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("flags", nargs="*", default=[], help="more flags, for both scripts, after --")
    return parser


def main(argv=None):
    """Measures the records that the command line names."""
    args = make_parser().parse_args(argv)
    path = args.output / f"compare-{'gpu' if torch.accelerator.is_available() else 'cpu'}.json"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = MINIATURE if args.size == "miniature" else make_pipeline(args.size, folder / "model")
        wide, high = args.resolution * 3 // 2, args.resolution * 5 // 4
        make_images(folder / "images", 64, wide, high)
        make_images(folder / "photos", 16, wide, high, with_captions=False)
        for name in args.names:
            merge_records(path, [compare(name, args, model, folder)])
    draw(path).save(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
