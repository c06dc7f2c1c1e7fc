"""Plots of runs as Vega-Lite describes them: data, which become pictures in a page."""

from sdtune.runs import INTERVAL, smoothed

MAX_POINTS = 1000  # of a line; more are not told apart
FEW_POINTS = 40  # which are drawn as points too
# One for each run, to be told apart on white and on black.
COLOURS = ["#3b82c4", "#e07b39", "#3a9d5d", "#b05cc0", "#a3892b", "#2fa3a3", "#d0505a", "#8a7f78"]
CONFIG = {  # `currentColor` is the colour of the page's text, in the light and in the dark
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "titleFontWeight": "normal",
        "gridColor": "currentColor",
        "gridOpacity": 0.15,
        "domain": False,
        "ticks": False,
        "labelPadding": 6,
        "labelFontSize": 11,
        "minExtent": 42,  # so that plots above one another begin at the same place
    },
    "axisX": {"minExtent": 0, "grid": False, "domain": True, "domainColor": "currentColor", "domainOpacity": 0.4},
}


def thinned(rows):
    """At most so many of the rows, spread evenly, with the first and the last one."""
    if len(rows) <= MAX_POINTS:
        return rows
    return [rows[number * (len(rows) - 1) // (MAX_POINTS - 1)] for number in range(MAX_POINTS)]


def line(rows, has_zero=False, has_points=True, **look):
    """Layers that join the `value` of rows by a line for each run, and say what a point is where the mouse is; `look`
    is how Vega-Lite calls it."""
    is_flat = len({row["value"] for row in rows}) == 1  # of which alone no axis can be made
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": has_zero or is_flat}}
    mark = {"type": "line", "strokeWidth": 2, **look}
    layers = [{"data": {"values": rows}, "mark": mark, "encoding": {"y": y}}]
    if has_points:
        is_seen = len(rows) <= FEW_POINTS * len({row["run"] for row in rows})
        point = {"type": "point", "filled": True, "size": 36, "opacity": look.get("opacity", 1) if is_seen else 0}
        told = [{"field": "run"}, {"field": "step", "format": ","}, {"field": "value", "format": ".4~g"}]
        layers.append({"data": {"values": rows}, "mark": point, "encoding": {"y": y, "tooltip": told}})
    return layers


def values_of(runs, name):
    """The numbers of that name in the logs of runs, as rows of a plot."""
    rows = []
    for run in runs:
        for row in thinned(run.with_number(name)):
            rows.append({"run": run.name, "step": row["step"], "value": row[name]})
    return rows


def plot_losses(runs):
    """Layers of the loss in training, as it was logged and smoothed."""
    means = []
    for run in runs:
        rows = run.with_number("loss")
        values = smoothed([row["loss"] for row in rows])
        smooth = [{"run": run.name, "step": row["step"], "value": value} for row, value in zip(rows, values)]
        means += thinned(smooth) if len(rows) > 1 else []
    raw = values_of(runs, "loss")
    return line(raw, strokeWidth=1, opacity=0.4) + line(means, has_points=False)


def plot_held_out(runs):
    """Layers of the loss on held-out images with its interval, where there is one, and of what it was before
    training."""
    rows, intervals, before = [], [], []
    for run in runs:
        for row in run.with_number("held_out_loss", "held_out_gain", "gain_error"):
            loss, margin = row["held_out_loss"], INTERVAL * row["gain_error"]
            of_row = {"run": run.name, "step": row["step"]}
            rows.append({**of_row, "value": loss})
            intervals += [{**of_row, "low": loss - margin, "high": loss + margin}] if run.has_interval() else []
            before.append({**of_row, "value": loss + row["held_out_gain"]})
    y = {"field": "low", "type": "quantitative", "title": None}
    bars = {
        "data": {"values": intervals},
        "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.35},
        "encoding": {"y": y, "y2": {"field": "high"}},
    }
    return [bars, *line(rows), *line(before, has_points=False, strokeDash=[5, 4])]


def plot_interruptions(runs):
    """A layer of dashed lines where runs were resumed."""
    rows = []
    for run in runs:
        last_step = run.last_step()  # which may be before one
        resumed = [row for row in run.history if row.get("event") == "resumed" and row["step"] <= last_step]
        rows += [
            {"run": run.name, "step": row["step"], "told": f"resumed from step {row['step']:,}"} for row in resumed
        ]
    told = [{"field": "run"}, {"field": "told", "title": "history"}]
    mark = {"type": "rule", "strokeDash": [2, 3], "opacity": 0.7}
    return [{"data": {"values": rows}, "mark": mark, "encoding": {"tooltip": told}}] if rows else []


def make_plots(runs):
    """Returns (name, title, what is seen, specification or None where there is nothing to see) of each plot, over the
    same steps."""
    memory = "device_gb" if any(run.with_number("device_gb") for run in runs) else "process_gb"
    of_what = "what PyTorch took of the device" if memory == "device_gb" else "the process that trains"
    bars = "bars: 95 % interval of its difference to the loss before training, which is dashed"
    if not any(run.has_interval() for run in runs):
        bars = "dashed: before training; there are too few images for an interval, or nobody knows how many"
    drawn = [
        ("loss", "Loss in training", "faint: as logged; bold: smoothed", plot_losses(runs)),
        ("held_out_loss", "Loss on held-out images", bars, plot_held_out(runs)),
        ("lr", "Learning rate", "of the first group of weights", line(values_of(runs, "lr"), has_zero=True)),
        ("grad_norm", "Norm of the gradient", "before clipping", line(values_of(runs, "grad_norm"))),
        (
            "images_per_second",
            "Images per second",
            "in the steps that were logged",
            line(values_of(runs, "images_per_second"), has_zero=True),
        ),
        ("memory", "Memory in GB", f"the most so far, of {of_what}", line(values_of(runs, memory), has_zero=True)),
    ]
    last_step = max([run.last_step() for run in runs] + [1])
    names = [run.name for run in runs]
    shared = {
        "x": {
            "field": "step",
            "type": "quantitative",
            "title": "step",
            "scale": {"domain": [0, last_step], "nice": False},
            "axis": {"tickCount": min(5, last_step), "format": ",d"},
        },
        "color": {"field": "run", "scale": {"domain": names, "range": COLOURS[: len(names)]}, "legend": None},
    }
    plots, marks = [], plot_interruptions(runs)
    for name, title, note, layers in drawn:
        layers = [layer for layer in layers if layer["data"]["values"]]  # without data Vega finds no end of an axis
        spec = {"width": "container", "height": 190, "encoding": shared, "layer": marks + layers, "config": CONFIG}
        plots.append((name, title, note, spec if layers else None))
    return plots
