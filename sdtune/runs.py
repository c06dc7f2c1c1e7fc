"""What a run left in its folder, read again: log, settings, samples, and whether it learnt."""

import dataclasses
import json
import math
import re
from pathlib import Path

from sdtune.arguments import nearest_beside
from sdtune.errors import InputError, counted, remedy_for_missing
from sdtune.output import HISTORY_FILE

INTERVAL = 2  # standard errors on either side of a mean that are an interval of about 95 %
MIN_FOR_INTERVAL = 10  # held-out images: of fewer they are none
# What has to be of a kind to be read, in the log, the history or the settings.
NUMBERS = set(
    "loss lr grad_norm images_per_second device_gb process_gb held_out_loss held_out_gain gain_error".split()
)
WHOLE_NUMBERS = set("last_step max_train_steps samples_per_step num_validation_samples max_train_samples seed".split())
TEXTS = set(
    """
    train_data_dir instance_data_dir dataset_name dataset_config_name image_column caption_column cache_dir
    instance_prompt validation_prompt
    """.split()
)
LISTS = {"changed", "validation_prompts"}  # of texts


@dataclasses.dataclass
class RunRecord:
    """What is there of a run; of an older one, or of one from the Hub, there may be the log alone."""

    name: str
    folder: Path
    rows: list  # of log.jsonl: dictionaries with a step, in which no number is infinite or not a number
    settings: dict  # of args.json
    history: list  # of history.jsonl: dictionaries with time, event and step
    samples: dict  # {step: path of the grid of samples}
    notes: list  # sentences on what cannot be read

    def with_number(self, *names):
        """The rows in which there are all of these numbers."""
        return [row for row in self.rows if all(row.get(name) is not None for name in names)]

    def last_step(self):
        """The last step that is told of; one that was done before the run went back counts no more."""
        starts = [number for number, row in enumerate(self.history) if row.get("event") in ("started", "resumed")]
        newest = starts[-1] if starts else 0
        told = self.rows + self.history[newest:]
        return max([row["step"] for row in told], default=0)

    def planned_step(self):
        """The last step that was planned, or None where nobody knows."""
        planned = [row["last_step"] for row in self.history if row.get("last_step")]
        return planned[-1] if planned else self.settings.get("max_train_steps")

    def changed(self):
        """The flags that were changed from their defaults at the last start, or None where that was not noted."""
        noted = [row["changed"] for row in self.history if row.get("changed") is not None]
        return noted[-1] if noted else None

    def has_interval(self):
        """Whether so many images were held out that standard errors are an interval."""
        return (self.settings.get("num_validation_samples") or 0) >= MIN_FOR_INTERVAL


def read_run(folder, name):
    """Reads what a run left in its folder. Raises `InputError` if that holds no run."""
    folder = Path(folder)
    log, settings = folder / "log.jsonl", folder / "args.json"
    if not log.is_file() and (folder / "progress.json").is_file():
        raise InputError(f"{folder}: is a checkpoint of a run; name {folder.absolute().parent}")
    if not log.is_file() and not settings.is_file():
        told = "is no folder" if folder.exists() else f"there is no such folder{nearest_beside(folder)}"
        told = "holds no log.jsonl of a training" if folder.is_dir() else told
        remedy = remedy_for_missing(folder) or "name the --output_dir of a run"
        raise InputError(f"{folder}: {told}; {remedy}")
    notes = []
    rows, history = read_rows_of(log, notes), read_rows_of(folder / HISTORY_FILE, notes)
    try:
        known = {**json.loads(settings.read_text(encoding="utf-8"))} if settings.is_file() else {}
    except (OSError, ValueError, TypeError):
        known = {}
        notes.append("args.json cannot be read, so that the settings are not known.")
    (known,) = without_odd([known], settings, notes)
    samples = {}
    for path in sorted(folder.glob("samples/step-*.png")):
        if number := re.fullmatch(r"step-(\d+)", path.stem):
            samples[int(number[1])] = path
    return RunRecord(name, folder, rows, known, history, samples, notes)


def read_rows_of(path, notes):
    """The lines of a JSON file with a step, without what is infinite or odd in it; a line that is none of these, such
    as one that breaks off, is left out, and told in `notes`."""
    rows, num_broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise ValueError
            rows.append({name: None if is_not_finite(value) else value for name, value in row.items()})
        except (ValueError, TypeError, KeyError):
            num_broken += 1
    if num_broken:
        notes.append(f"{counted(num_broken, 'line')} of {path.name} cannot be read, and left out.")
    return without_odd(rows, path, notes)


def without_odd(rows, path, notes):
    """The rows of a file with None for what is not of its kind, which is told in `notes`."""
    odd = {name for row in rows for name, value in row.items() if value is not None and not is_of_kind(name, value)}
    if odd:
        notes.append(
            f"{path.name} has no number or text where there should be one, left out: {', '.join(sorted(odd))}."
        )
    return [{name: value if is_of_kind(name, value) else None for name, value in row.items()} for row in rows]


def is_of_kind(name, value):
    """Whether a value is of the kind that one of that name has to be."""
    if name in NUMBERS:
        return type(value) in (int, float)
    if name in WHOLE_NUMBERS:
        return type(value) is int
    if name in TEXTS:
        return isinstance(value, str)
    return name not in LISTS or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def is_not_finite(value):
    """Whether a value is a number that JSON, and a plot, have no place for."""
    return isinstance(value, float) and not math.isfinite(value)


def smoothed(values):
    """The means of values and their neighbours, of some fifteenth of all: of less at both ends."""
    reach = max(1, len(values) // 30)
    windows = [values[max(0, number - reach) : number + reach + 1] for number in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def judge(run):
    """Whether the run learnt, as a sentence, and how that is: "good", "bad" or "open"."""
    looks, losses = run.with_number("held_out_loss", "held_out_gain", "gain_error"), run.with_number("loss")
    if not run.rows:
        is_over = run.history and run.history[-1].get("event") in ("finished", "stopped")
        return f"Nothing was logged{'' if is_over else ' yet'}.", "open"
    if not looks:
        told = "No images were held out, so that nothing can be said about learning"
        if len(losses) > 2:  # the means of two are the same
            means = smoothed([row["loss"] for row in losses])
            told += f"; the loss in training, smoothed, went from {means[0]:.3f} to {means[-1]:.3f}"
        return f"{told}. --num_validation_samples holds some out.", "open"
    last, number = looks[-1], run.settings.get("num_validation_samples")
    of_images = f"The loss on {counted(number, 'image')}" if number else "The loss on images"
    verb = "was" if number == 1 else "were"
    loss, gain, margin = last["held_out_loss"], last["held_out_gain"], INTERVAL * last["gain_error"]
    if last["step"] == 0:
        is_held = "is held out" if number == 1 else "are held out"
        return f"{of_images} that {is_held} was {loss:.3f} before training, and not measured since.", "open"
    smallest = abs(gain) if margin == 0 else margin  # of what is told
    digits = 5 if 0 < smallest < 0.002 else 3
    went = f"{'rose' if gain < 0 else 'fell'} from {loss + gain:.{digits}f} to {loss:.{digits}f}"
    told = f"{of_images} that {verb} not trained on {went} after step {last['step']:,}, by {abs(gain):.{digits}f}"
    if not run.has_interval():
        few = "these are too few to say how sure that is" if number else "how many is not known, nor how sure that is"
        return f"{told}; {few}.", "open"
    told += f" \N{PLUS-MINUS SIGN} {margin:.{digits}f} (95 %)"
    best = min(looks, key=lambda row: row["held_out_loss"])
    if abs(gain) <= margin:
        return f"{told}: too little to say that it learnt anything, or that it did harm.", "open"
    if gain < 0:
        return f"{told}: what it draws of images like these got worse.", "bad"
    told += ": it learnt"
    if best["held_out_loss"] < loss - margin:
        told += f", but that loss was lower after step {best['step']:,}, {best['held_out_loss']:.{digits}f}"
    return f"{told}.", "good"
