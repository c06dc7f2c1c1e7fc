"""Find the largest micro-batch that fits into memory, by trial steps of the training itself.

    sdtune find-batch-size -- python train_text_to_image.py --config my_run.yaml --train_batch_size=16

Behind `--` stands the whole command of a training by one of the scripts for PyTorch. It is run with `--dry_run`, which
takes two real steps and writes nothing, as it is and then with other sizes of a pass: twice as many images until they
do not fit, or fewer, then what lies between. Those sizes are tried that divide the images of a step, so that
accumulation keeps what a step is trained on; the flags for that are printed.
"""

import re
import signal
import subprocess
import sys

from sdtune.arguments import new_parser, parse_flags
from sdtune.errors import InputError, last_line, raise_problems, told_to_user

PROGRAM = "sdtune find-batch-size"
# Of the scripts, of libraries, and of launchers that tell of the kernel's end to a process that took too much.
LACK_OF_MEMORY = re.compile(
    r"lack\s+of\s+memory|out\s+of\s+memory|can('t|not)\s+allocate\s+memory|MemoryError|bad_alloc|SIGKILL",
    re.IGNORECASE,
)
PER_STEP = re.compile(
    r"^ +per step +[\d,]+ images?(?: at most)?: (\d+) a pass x (\d+) pass(?:es)? x (\d+) ", re.MULTILINE
)
COST = re.compile(r"^ +time +(.+? images/s);.*\n +memory +(.+)$", re.MULTILINE)


# ------------------------------------------------------------------------------------------------------- arguments
def make_parser():
    """The flags of the command, which has none: what it is to run stands behind `--`."""
    return new_parser(__doc__, "sdtune find-batch-size -- COMMAND")


def split_words(argv):
    """The command's own words, and those behind the first `--`."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


# ----------------------------------------------------------------------------------------------------------- trials
def try_command(command):
    """Runs a training's command for two steps. Returns whether they fit into memory, and what it said. Raises
    `InputError` with that if it failed for another reason, or is none of a script that can be tried."""
    try:
        done = subprocess.run([*command, "--dry_run"], text=True, errors="replace", capture_output=True, check=False)
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be started ({last_line(error)})") from None
    said = f"{done.stdout}\n{done.stderr}"
    if done.returncode == 0 and COST.search(said) and PER_STEP.search(said):
        return True, said
    if done.returncode == 0:
        told = "it has no step left, or is no script for PyTorch"
        raise InputError(f"the command told no time and memory of its steps: {told}")
    # By the kernel, which ends a process that takes what is not there; a shell says 128 + 9.
    was_killed = done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    if was_killed or LACK_OF_MEMORY.search(done.stderr):
        return False, said
    raise InputError(f"the command failed with status {done.returncode}:\n\n{said.strip()}")


def tell_trial(size, fits, said):
    """Prints what a trial came to."""
    cost = "lack of memory"
    if fits:
        speed, memory = COST.search(said).groups()
        cost = f"{speed}; {memory}"
    print(f"{size:>5} a pass: {cost}", flush=True)


def next_size(sizes, largest_fit, smallest_failure):
    """The size to try next: twice the largest that fits, while none has failed, else the middle of those between; None
    if there are none between."""
    between = [size for size in sizes if largest_fit < size < smallest_failure]
    if not between:
        return None
    if smallest_failure > sizes[-1]:
        return next((size for size in between if size >= 2 * largest_fit), between[-1])
    return between[len(between) // 2]


def find_size(command):
    """Tries sizes of a pass. Returns the largest that fits, 0 for none; the images of a step and process; and whether
    the training can accumulate. Raises `InputError`."""
    fits, said = try_command(command)
    plan = PER_STEP.search(said)
    if not plan:
        raise InputError("the command lacks memory before its plan; use a smaller model, or a larger machine")
    first, num_passes = int(plan[1]), int(plan[2])
    tell_trial(first, fits, said)
    whole = first * num_passes
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    largest_fit, smallest_failure = (first, whole + 1) if fits else (0, first)
    while size := next_size(sizes, largest_fit, smallest_failure):
        fits, text = try_command([*command, f"--train_batch_size={size}", "--gradient_accumulation_steps=1"])
        tell_trial(size, fits, text)
        if fits:
            largest_fit = size
        else:
            smallest_failure = size
    # Trained in bfloat16, weights change with each pass.
    return largest_fit, whole, " parameters in bfloat16, " not in " ".join(said.split())


def main(argv=None):
    """Runs the command; returns 0, or 1 if not even one image a pass fits."""
    own, command = split_words(sys.argv[1:] if argv is None else list(argv))
    _, problems = parse_flags(make_parser(), own, {})
    with told_to_user(PROGRAM, stopped="Stopped."):
        if not command:
            problems.append("a training's command is missing; give it behind --")
        if any(word.startswith("--resume_from_checkpoint") for word in command):
            problems.append(
                "--resume_from_checkpoint: other sizes of a pass cannot resume; leave it out of the command"
            )
        raise_problems(problems)
        size, whole, accumulates = find_size(command)
    if not size:
        print("Not even one image a pass fits; use --gradient_checkpointing, --mixed_precision=bf16 or the like.")
        return 1
    print(f"{size} of the {whole} images that a process has in a step fit at once. Use")
    flags = f"--train_batch_size={size} --gradient_accumulation_steps={whole // size}"
    print(f"  {flags}" if accumulates else f"  --train_batch_size={size}")
    return 0
