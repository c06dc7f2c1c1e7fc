"""How far a run has come: a bar in a terminal, a plain line every so many steps elsewhere."""

import collections
import datetime
import math

from tqdm.auto import tqdm

from sdtune.plan import peak_memory

NUM_RECENT = 100  # steps over which loss and speed are averaged: the loss of a single one says nothing
BAR = "{percentage:3.0f}%|{bar}| {n:,}/{total:,}, {remaining} left{postfix}"


def start_bar(run, is_shown):
    """A bar over the steps that are left, which shows in a terminal alone, and a place for the recent steps: of each
    its loss, samples and seconds."""
    first_step, last_step = run.progress["global_step"], run.counts.last_step
    bar = tqdm(
        range(first_step, last_step),
        initial=first_step,
        total=last_step,
        unit="step",
        bar_format=BAR,
        disable=None if is_shown else True,  # None: unless it goes to a terminal
        leave=False,  # of a run that ends early it would be drawn once more, below what says why
    )
    return bar, collections.deque(maxlen=NUM_RECENT)


def tell_step(args, bar, run, device, recent):
    """Tells what the `recent` steps come to: on the bar, or without one in a line every --logging_steps."""
    done, last_step = run.progress["global_step"], run.counts.last_step
    loss, rate, seconds = means_of(recent)
    told = [] if loss is None else [f"mean loss {loss:.4f}"]
    told += [] if rate is None else [f"{rate:.3g} images/s"]
    memory = peak_memory(device)[0]
    if not bar.disable:
        bar.set_postfix_str(", ".join([*told, memory.partition(" of ")[0]]), refresh=False)
        bar.leave = done == last_step
    elif done % args.logging_steps == 0 or done == last_step:
        left = []
        if seconds is not None and done < last_step:
            left = [f"{datetime.timedelta(seconds=round(seconds * (last_step - done)))} left"]
        print(f"Step {done:,} of {last_step:,}: {', '.join([*told, memory, *left])}", flush=True)


def means_of(recent):
    """Of steps, each a tuple of loss, samples and seconds: the mean of those losses that are finite, the samples per
    second and the seconds of a step; None for what is not known. The seconds of a first step, which compiles and warms
    up, are None."""
    losses = [loss for loss, _, _ in recent if math.isfinite(loss)]
    timed = [(num_samples, seconds) for _, num_samples, seconds in recent if seconds is not None]
    total = sum(seconds for _, seconds in timed)
    return (
        sum(losses) / len(losses) if losses else None,
        sum(num_samples for num_samples, _ in timed) / total if total else None,
        total / len(timed) if timed else None,
    )
