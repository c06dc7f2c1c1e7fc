"""Writes the table of results between two comments of a README, from the JSON that `compare.py` wrote.

python benchmarks/table.py
"""

import argparse
import json
from pathlib import Path

from measuring import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- made by benchmarks/table.py -->\n", "<!-- end -->"
NAMES = {
    "full": "whole UNet",
    "full-cached": "whole UNet, cached",
    "lora": "LoRA",
    "lora-cached": "LoRA, cached",
    "dreambooth": "DreamBooth",
    "dreambooth-cached": "DreamBooth, cached",
}
MISSING = "not measured"


def cell(record, what):
    """A ratio and its interval."""
    low, high = record["intervals"][f"{what}_ratio"]
    return f"{record[f'{what}_ratio']:.2f} ({low:.2f} to {high:.2f})"


def make_table(results):
    """The table in Markdown: ours over theirs, smaller is better."""
    found = {}
    for device in ("cpu", "gpu"):
        path = results / f"compare-{device}.json"
        for record in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
            found[record["name"], device] = record
    head = ["training", "time of a step", "peak memory", "launch to first step"]
    has_gpu = any(device == "gpu" for _, device in found)
    if has_gpu:
        head.append("time of a step on a GPU")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, told in NAMES.items():
        record, on_gpu = found.get((name, "cpu")), found.get((name, "gpu"))
        cells = [MISSING] * 3
        if record:
            cells = [cell(record, what) for what in ("seconds_per_step", "peak_memory", "time_to_first_step")]
        if has_gpu:
            cells.append(cell(on_gpu, "seconds_per_step") if on_gpu else MISSING)
        lines.append(" | ".join([f"| {told}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def with_table(text, table):
    """The text of a README with the table between the two comments."""
    start, end = text.index(START) + len(START), text.index(END)
    return text[:start] + table + text[end:]


def make_parser():
    """The flags of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=README, help="the file that holds the two comments")
    return parser


def main(argv=None):
    """Writes the table into the README."""
    args = make_parser().parse_args(argv)
    text = args.readme.read_text(encoding="utf-8")
    args.readme.write_text(with_table(text, make_table(args.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
