"""What a run says when it ends: what it made, whether it learnt, and what can be done with that."""

import datetime
import shlex
from pathlib import Path

from sdtune.checkpoints import list_checkpoints
from sdtune.errors import counted, in_one_line
from sdtune.lora_layouts import LORA_FILE
from sdtune.model_card import call_of
from sdtune.plan import as_row, tell_size
from sdtune.runs import judge, read_run

NOTHING_TRAINED = "Nothing was trained; the settings are fine."
MAX_COLUMNS = 85  # of a command, beside the name of its row and what joins its lines


def tell_end(args, run, files, command):
    """Says what a run has left in its folder, how long that took, whether it learnt, the words of the `command` that
    draws with it, or None where only the code on the card does, and how the run is extended. `files` are patterns of
    the result's files. For one process alone."""
    folder = run.output_dir
    record, checkpoints = read_run(folder, folder.name), list_checkpoints(folder)
    result = [path for pattern in files for path in folder.glob(pattern)]
    kind = "LoRA adapters" if (folder / LORA_FILE).is_file() else "a pipeline"
    number = counted(len(checkpoints), "checkpoint")
    in_all = f"{tell_size(size_on_disk([folder]))} in all, of them {tell_size(size_on_disk(checkpoints))} in {number}"
    code = f"the code in {in_one_line(folder / 'README.md')}"
    rows = {
        "made": f"{kind} in {in_one_line(folder)}: {tell_size(size_on_disk(result))} ({in_all})",
        "took": tell_duration(record.history, run.progress["global_step"], datetime.datetime.now(datetime.UTC)),
        "learnt": judge(record)[0],
        "draw": f"{in_lines(command)}\nor by {code}" if command else f"by {code}",
        "extend": f"the same command with {' '.join(words_to_extend(args, run))}",
        "look": in_lines(["sdtune", "report", f"{folder}"]),
    }
    print("\n".join(["Done", *[as_row(name, text) for name, text in rows.items() if text]]), flush=True)


def size_on_disk(paths):
    """How many bytes files, and those in folders, have."""
    total = 0
    for path in paths:
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def tell_duration(history, last_step, now):
    """How long it took from the newest start or resume in a history to `last_step`; None if there is none."""
    starts = [row for row in history if row.get("event") in ("started", "resumed")]
    if not starts:
        return None
    seconds = (now - datetime.datetime.fromisoformat(starts[-1]["time"])).total_seconds()
    return f"{datetime.timedelta(seconds=round(seconds))}, from step {starts[-1]['step']:,} to {last_step:,}"


def command_to_draw(args, pipeline, noise_scheduler, prompt):
    """The words of the `sdtune generate` that draws a prompt with the result, as samples were drawn; None where only
    code does: a text encoder, or another schedule of noise, has to be fetched from somewhere."""
    folder, base = Path(args.output_dir), args.pretrained_model_name_or_path
    words = ["sdtune", "generate", f"{folder}"]
    if (folder / LORA_FILE).is_file():
        before, trained = pipeline.scheduler.config, noise_scheduler.config
        is_same = trained.prediction_type == before.get("prediction_type", "epsilon")
        is_same &= bool(trained.rescale_betas_zero_snr) == bool(before.get("rescale_betas_zero_snr"))
        if not is_same or args.revision or args.variant or args.single_file_config:
            return None
        words = ["sdtune", "generate", base, f"--lora={folder}"]
    elif not (folder / "text_encoder").is_dir():
        return None
    given = [f"--{name}={value}" for name, value in call_of(args, pipeline).items()]
    return [*words, "--prompts", prompt, *given]


def words_to_extend(args, run):
    """What is added to the command of a run to go on to twice as many steps."""
    words = ["--resume_from_checkpoint=latest", f"--max_train_steps={2 * run.counts.last_step}"]
    if run.settings["schedule_steps"] is not None:  # the schedule is one over all steps
        words.append("--allow_changed_resume")
    return words + (["and without --overwrite_output_dir"] if args.overwrite_output_dir else [])


def in_lines(words):
    """A command as a shell takes it, in lines that fit a terminal."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > MAX_COLUMNS:
            lines.append("  ")
        lines[-1] += word if not lines[-1].strip() else f" {word}"
    return " \\\n".join(lines)
