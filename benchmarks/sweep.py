"""Shows how the cost of training grows with the number of images, their resolution, the batch and the processes.

    python benchmarks/sweep.py

Trains the whole UNet of the miniature, or of another size. Runs take steps in turns, as in `compare.py`, so that their
times can be compared on a busy machine; those of several processes run alone. Writes results/sweep.json and a picture.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import datasets
from measuring import RESULTS, machine, measures_of, run_in_turns, start, versions
from models import MINIATURE, REPO, SIZES, caption_of, draw_image, encoded, make_images, make_pipeline
from pictures import draw_lines, stack

SCRIPT = REPO / "examples" / "text_to_image" / "train_text_to_image.py"
MEGABYTE = 1e6


def make_rows(folder, num_images, side):
    """Writes a dataset of so many images into a folder, as parquet; returns the folder."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    size = 10_000
    for first in range(0, num_images, size):
        numbers = range(first, min(first + size, num_images))
        images = [{"bytes": encoded(draw_image(number, side, side)), "path": None} for number in numbers]
        rows = {"image": images, "text": [caption_of(number) for number in numbers]}
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"train-{first:07d}.parquet")
    return folder


def flags_of(args, model, data, **changes):
    """The flags of a run; `data` is the flag that names the images."""
    flags = {
        "pretrained_model_name_or_path": model,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": args.steps,
        "dataloader_num_workers": 0,
        "report_to": "none",
        **changes,
    }
    return [data, "--center_crop", *[f"--{name}={value}" for name, value in flags.items()]]


def sweep_images(args, model, folder):
    """Measures by number of images: how long the start takes at first and when the check is remembered, too."""
    starts, records = [], []
    for number in args.images:
        data = make_rows(folder / f"{number}-rows", number, 64)
        starts.append((SCRIPT, flags_of(args, model, f"--dataset_name={data}"), folder / str(number)))
        run = start(*starts[-1])
        run.finish()
        measures = measures_of(run)
        records.append({"images": number, **{f"first_{what}": value for what, value in measures.items()}})
        print(f"{number:,} images, checked: {run.seconds_to_first_step:.1f} s to the first step", flush=True)
    return in_turns(args, starts, records)


def sweep_flag(args, model, folder, flag, values):
    """Measures by value of a flag."""
    starts = []
    for value in values:
        flags = flags_of(args, model, f"--train_data_dir={folder / 'images'}", **{flag: value})
        starts.append((SCRIPT, flags, folder / f"{flag}-{value}"))
    return in_turns(args, starts, [{flag: value} for value in values])


def sweep_processes(args, model, folder):
    """Measures by number of processes, which run alone; what they do in a second depends on the machine's cores."""
    records = []
    for number in args.processes:
        flags = flags_of(args, model, f"--train_data_dir={folder / 'images'}")
        run = start(SCRIPT, flags, folder / f"processes-{number}", number)
        run.finish()
        seconds = run.per_step(2)
        records.append({"processes": number, "seconds_per_step": seconds, "images_per_second": 2 * number / seconds})
        records[-1]["peak_memory"] = measures_of(run)["peak_memory"]
        print(records[-1], flush=True)
    return records


def in_turns(args, starts, records):
    """Adds to records, one for each run, the medians of its measures over several rounds."""
    rounds = [run_in_turns(starts) for _ in range(args.rounds)]
    for number, record in enumerate(records):
        for what in rounds[0][number]:
            record[what] = statistics.median(measures[number][what] for measures in rounds)
        print(record, flush=True)
    return records


def draw(results):
    """The picture of all that was measured."""
    pictures = []

    def plot(name, title, up, lines, scale=1):
        records = results.get(name)
        if records:
            points = {}
            for told, what in lines.items():
                points[told] = [(record[name], record[what] / scale) for record in records]
            pictures.append(draw_lines(points, title, name, up, [record[name] for record in records]))

    starts = {"images are checked": "first_cpu_to_first_step", "the check is remembered": "cpu_to_first_step"}
    memory = {"images are checked": "first_peak_memory", "the check is remembered": "peak_memory"}
    step = {"a step": "seconds_per_step"}
    plot("images", "A step does not cost more with more images", "CPU-seconds", step)
    plot("images", "Start to first step, by images", "CPU-seconds", starts)
    plot("images", "Peak memory, by images", "megabytes", memory, MEGABYTE)
    plot("resolution", "A step, by resolution", "CPU-seconds", step)
    plot("train_batch_size", "A step, by images in it", "CPU-seconds", step)
    plot("processes", "Images per second, by processes", "images per second", {"all processes": "images_per_second"})
    return stack(pictures)


def make_parser():
    """The flags of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=["miniature", *SIZES], default="miniature", help="the model's")
    add("--images", type=int, nargs="*", default=[1_000, 10_000, 100_000], help="numbers of images")
    add("--resolutions", type=int, nargs="*", default=[64, 128, 256], help="sides of images")
    add("--batches", type=int, nargs="*", default=[1, 2, 4, 8], help="images of a step")
    add("--processes", type=int, nargs="*", default=[1, 2], help="numbers of processes")
    add("--steps", type=int, default=60, help="steps of a run, the first two of which warm up; 60")
    add("--rounds", type=int, default=3, help="how often everything is measured; 3")
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser


def main(argv=None):
    """Measures what the command line asks for."""
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = MINIATURE if args.size == "miniature" else make_pipeline(args.size, folder / "model")
        make_images(folder / "images", 64, 256, 256)
        results = {"images": sweep_images(args, model, folder)} if args.images else {}
        for flag, values in (("resolution", args.resolutions), ("train_batch_size", args.batches)):
            results[flag] = sweep_flag(args, model, folder, flag, values) if values else []
        results["processes"] = sweep_processes(args, model, folder)
    about = {"size": args.size, "steps": args.steps, "rounds": args.rounds, "machine": machine()}
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, **results, "versions": versions()}, indent=1) + "\n"
    (args.output / "sweep.json").write_text(text, encoding="utf-8")
    draw(results).save(args.output / "sweep.png")


if __name__ == "__main__":
    main()
