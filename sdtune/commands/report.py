"""Write a page about a run, or one that compares several: plots, samples through time, settings, data, interruptions.

    sdtune report my_model
    sdtune report my_model my_other_model --output comparison.html
    sdtune report my_model --watch

The page is one file that needs no network and no other file. It reads what a run left in its folder, also while it
goes on, and the images that it was trained on, if they are still there. --watch serves it on this machine, and loads
it again whenever the run has logged more.

The plots are drawn by Vega-Lite, which vl-convert puts into the page: of the libraries that write self-contained files
it makes the smallest (0.9 MB, where Bokeh takes 1.3 and Plotly 4.8), needs no other package, and its plots are plain
data, which a test can read.
"""

import argparse
import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import threading
from datetime import datetime
from pathlib import Path

import vl_convert
from PIL import Image

from sdtune.arguments import (
    SWITCH,
    add_adapter_arguments,
    add_class_arguments,
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    add_run_arguments,
    add_subject_arguments,
    checked,
    is_hub_id,
    is_place,
    new_parser,
    non_negative_int,
    parse_flags,
    path_name,
)
from sdtune.counts import count_sizes, count_words, statistics
from sdtune.dataset import choose_rows, name_of, read_rows, split_rows
from sdtune.errors import (
    InputError,
    counted,
    fitted,
    gathered,
    in_one_line,
    last_line,
    raise_problems,
    told_in_lines,
    told_to_user,
    without_secrets,
)
from sdtune.files import is_writable, write_text
from sdtune.images import check_images, path_of_findings
from sdtune.pages import CARD_STYLE, as_jpeg, card, data_url, escaped, is_own_page, page_head
from sdtune.plots import COLOURS, make_plots
from sdtune.runs import judge, read_run

PROGRAM = "sdtune report"
MAX_RUNS = len(COLOURS)
MAX_SAMPLE_BYTES = 24_000_000  # of grids as they are; what is more becomes smaller JPEGs
GRID_SIDE = 1024  # pixels, of the JPEGs
# A browser loads nothing else, whatever stands in the page; Vega makes functions of its expressions.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'"
READ_AS = {  # where an older run had no such flag
    "caption_column": "text",
    "image_column": "image",
    "dataset_config_name": None,
    "follow_symlinks": False,
    "cache_dir": None,
}
OF_IMAGES = ("train_data_dir", "instance_data_dir", "dataset_name")  # flags that say where they are
ON_HUB = {"pretrained_model_name_or_path", "single_file_config", "tokenizer_name", "dataset_name", "hub_model_id"}
STYLE = f"""
:root {{ color-scheme: light dark; --text: #222; --faint: #666; --ground: #fff; --line: #8884; --good: #2a7d36;
  --bad: #b3362c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #ddd; --faint: #999; --ground: #17191c; --good: #6cc27a;
  --bad: #ef8379; }} }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground); max-width: 1200px;
  margin: 0 auto; padding: 1.5em 1em 4em; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.7em; margin: 0; }} h2 {{ font-size: 1.2em; margin: 2.2em 0 .6em; }}
h3 {{ font-size: 1em; margin: 1em 0 .2em; }} .plots h3 {{ margin: 0; }} p {{ margin: .2em 0; }}
.faint {{ color: var(--faint); font-size: 13px; }}
.verdict {{ font-size: 1.15em; margin: .8em 0; padding-left: .8em; border-left: 4px solid var(--faint); }}
.verdict.good {{ border-color: var(--good); }} .verdict.bad {{ border-color: var(--bad); }}
.chip {{ display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em; }}
.plots {{ display: grid; gap: 28px 32px; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }}
.plots > div {{ min-width: 0; }} .plot {{ width: 100%; min-height: 190px; margin-top: 6px; }}
.plot.none {{ min-height: 0; border: 1px dashed var(--line); padding: 1em; color: var(--faint); }}
#slider {{ width: 100%; margin: .6em 0; }} .grid {{ margin: 0 0 1.4em; }}
.grid > img {{ display: block; max-width: 100%; image-rendering: pixelated; }}
.grids {{ display: flex; flex-wrap: wrap; gap: 0 32px; }}
.grids .grid {{ min-width: min(320px, 100%); max-width: 100%; }}
.grids .strip {{ width: 0; min-width: 100%; }}  /* as wide as the picture, or each run would fill a line */
.strip {{ display: flex; gap: 6px; overflow-x: auto; margin-top: 8px; padding-bottom: 4px; }}
.strip button {{ flex: none; padding: 2px; border: 2px solid transparent; background: none; color: inherit;
  font: 12px system-ui, sans-serif; cursor: pointer; }}
.strip button[aria-pressed=true] {{ border-color: {COLOURS[0]}; }} .strip img {{ height: 64px; display: block; }}
.table {{ overflow-x: auto; margin-bottom: 1em; overflow-wrap: normal; }}
table {{ border-collapse: collapse; font-size: 14px; }}
th {{ text-align: left; vertical-align: top; font-weight: 600; }}
td {{ vertical-align: top; min-width: 5em; overflow-wrap: anywhere; }}
th, td {{ padding: .25em 1.2em .25em 0; border-top: 1px solid var(--line); }}
summary {{ cursor: pointer; margin: .8em 0; }}
{CARD_STYLE}
"""
SCRIPT = """
(async () => {
  const page = JSON.parse(document.getElementById("page").textContent);
  const theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  for (const [name, spec] of Object.entries(page.plots))
    await vegaEmbed("#plot-" + name, spec, {mode: "vega-lite", renderer: "svg", actions: false, tooltip: {theme}});

  // Each run shows its last grid that is not later than where the slider is.
  const slider = document.getElementById("slider"), steps = page.steps;
  function show() {
    const step = steps[slider.value];
    document.getElementById("step").textContent = step.toLocaleString("en");
    for (const grid of document.querySelectorAll(".grid")) {
      const buttons = [...grid.querySelectorAll("button")];
      const shown = buttons.filter(button => Number(button.dataset.step) <= step).at(-1) || buttons[0];
      for (const button of buttons) button.setAttribute("aria-pressed", button === shown);
      const small = shown.querySelector("img"), large = grid.querySelector(":scope > img");
      large.src = small.src;
      large.alt = small.alt;
      large.width = small.naturalWidth * Math.max(1, Math.min(4, Math.floor(1000 / small.naturalWidth)));
      const strip = grid.querySelector(".strip");
      strip.scrollLeft = shown.offsetLeft - strip.offsetLeft - strip.clientWidth / 2;
    }
    const isLast = Number(slider.value) === steps.length - 1;
    if (page.version) isLast ? sessionStorage.removeItem("step") : sessionStorage.setItem("step", step);
  }
  if (slider) {
    await Promise.all([...document.querySelectorAll(".strip img")].map(image => image.decode()));
    const kept = page.version && sessionStorage.getItem("step");
    if (kept) slider.value = Math.max(0, steps.findLastIndex(step => step <= Number(kept)));
    for (const button of document.querySelectorAll(".strip button"))
      button.onclick = () => { slider.value = steps.indexOf(Number(button.dataset.step)); show(); };
    slider.oninput = show;
    show();
  }
  document.documentElement.dataset.ready = true;

  while (page.version) {
    await new Promise(resolve => setTimeout(resolve, 2000));
    const answer = await fetch("version").catch(() => null);  // none, while the command is not running
    if (answer?.ok && await answer.text() !== page.version) return location.reload();
  }
})();
"""


# ------------------------------------------------------------------------------------------------------- arguments
def port_number(text):
    """A number of a port, 0 for any that is free."""
    return checked(text, int, lambda number: 0 <= number < 2**16, "in [0, 65535]")


def make_parser():
    """The flags of the command."""
    parser = new_parser(__doc__, "sdtune report RUN_FOLDER [MORE_FOLDERS ...] [flags]")
    told = f"the --output_dir of a training; of several, {MAX_RUNS} at most, the page is a comparison"
    parser.add_argument("folders", nargs="*", type=path_name, metavar="RUN_FOLDER", help=told)
    add = parser.add_argument_group("page").add_argument
    add(
        "--output",
        type=path_name,
        metavar="FILE.html",
        help="file to write, over an earlier report; default: report.html in the folder, or comparison.html here",
    )
    add("--overwrite", **SWITCH, help="replace whatever else is in its place")
    add(
        "--num_images",
        type=non_negative_int,
        default=12,
        help="training images that are shown, small and with captions, of each run; 0 if others may not see them "
        "[0, inf)",
    )
    add = parser.add_argument_group("while a run goes on").add_argument
    add("--watch", **SWITCH, help="serve the page on this machine and load it again as the run goes on; write no file")
    add("--port", type=port_number, help="port of 127.0.0.1 to serve it on; 8008 if not given; 0: any [0, 65535]")
    return parser


def check_args(args):
    """Lists every argument that is wrong."""
    problems, output = [], output_of(args)
    if not args.folders:
        problems.append("no RUN_FOLDER is given; name the --output_dir of a training")
    places = [Path(folder).resolve() for folder in args.folders]
    for number, folder in enumerate(args.folders):
        if places[number] in places[:number]:
            problems.append(f"{folder}: is given twice; name each folder once")
    if len(args.folders) > MAX_RUNS:
        problems.append(f"{len(args.folders)} RUN_FOLDERs: a page compares {MAX_RUNS} at most; name fewer")
    if args.port is not None and not args.watch:
        problems.append(f"--port={args.port}: does nothing without --watch; add that or drop this")
    if args.watch and (args.output or args.overwrite):
        problems.append("--watch: writes no file; drop --output and --overwrite, or this")
    # Of a folder that is not there another message tells.
    if args.watch or (not args.output and not all(place.is_dir() for place in places)):
        return problems
    if output.is_dir() or not is_writable(output):
        problems.append(f"--output={output}: is a folder, or cannot be written to; name a file elsewhere")
    elif output.exists() and not args.overwrite and not is_own_page(output, PROGRAM):
        problems.append(f"--output={output}: exists, and is no report; name another, or add --overwrite")
    return problems


def output_of(args):
    """The file to write."""
    if args.output:
        return Path(args.output)
    return Path(args.folders[0], "report.html") if len(args.folders) == 1 else Path("comparison.html")


# ------------------------------------------------------------------------------------------------------------ data
def names_of(folders):
    """The last parts of the paths of different folders: as many as tell each from the others."""
    paths, names = [Path(folder).resolve().parts for folder in folders], []
    for path in paths:
        others = [other for other in paths if other != path]
        told_apart = (
            number for number in range(1, len(path)) if all(other[-number:] != path[-number:] for other in others)
        )
        names.append(str(Path(*path[-next(told_apart, len(path)) :])))
    return names


def read_runs(folders):
    """Reads the runs in folders, each under a name that no other has. Raises `InputError`."""
    problems, runs = [], []
    for folder, name in zip(folders, names_of(folders)):
        with gathered(problems):
            runs.append(read_run(folder, name))
    raise_problems(problems)
    return runs


def place_of(settings):
    """The flag that names the folder, or the dataset, that a run was trained on; None if there is none."""
    return next((flag for flag in OF_IMAGES if settings.get(flag)), None)


def read_images(settings):
    """Reads the images of a run as it did; returns (rows, what is found of each, indices of those that are trained on,
    number held out). Raises `InputError`, with what to say instead."""
    flag = place_of(settings)
    if not flag:
        raise InputError("What it was trained on is not known: args.json is not there.")
    place = settings[flag]
    if settings.get("streaming") or not Path(place).exists():
        raise InputError(f"The images are not shown: {in_one_line(last_part(place))} is not in reach of this folder.")
    known = {name: value for name, value in settings.items() if value is not None}
    args = argparse.Namespace(**{**READ_AS, **known, "hub_token": None})
    rows = read_rows(args, None if flag == "dataset_name" else place, settings.get("instance_prompt"))
    rows = choose_rows(rows, settings.get("max_train_samples"), settings.get("seed") or 0)
    findings = check_images(rows, path_of_findings(place, args.cache_dir))
    captions = list(rows["captions"])
    good = [index for index, (_, _, _, problem) in enumerate(findings) if captions[index] and not problem]
    training, held_out = split_rows(len(good), settings.get("num_validation_samples") or 0)
    return rows, findings, [good[index] for index in training], len(held_out)


def data_section(run, num_images):
    """The part of the page on the images of a run: counts, and some of them."""
    try:
        rows, findings, training, num_held_out = read_images(run.settings)
        shown = training
        if len(training) > num_images:
            shown = [training[number * len(training) // num_images] for number in range(num_images)]
        cards = [
            card(rows, [index], Path(name_of(rows, index)).name, " | ".join(rows[index]["captions"]))
            for index in shown
        ]
    except (ValueError, OSError) as error:  # an `InputError`, or of settings that nobody can train with
        return f"<p>{escaped(without_secrets(without_paths(str(error), run.settings)))}</p>\n"
    texts = [caption for index in training for caption in rows[index]["captions"]]
    counts = {"Images": f"{len(training):,} to train on, {num_held_out:,} held out, as they are in their place now"}
    counts |= statistics({**count_sizes([findings[index] for index in training]), **count_words(texts)})
    if num_images == 0:
        del counts["Captions with the word"]  # which others may not see either
    return table(counts.items()) + '<div class="cards">\n' + "".join(cards) + "</div>\n"


def data_sections(runs, num_images):
    """The parts of the page on the images, by the name of the run. What is to be said of the images is printed once
    for all runs that have the same."""
    parts, told = {}, []
    for run in runs:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            parts[run.name] = data_section(run, num_images)
        told.append(said.getvalue())
    with told_in_lines():
        print("".join(dict.fromkeys(told)), end="")
    return parts


# ------------------------------------------------------------------------------------------------------------ page
def table(rows):
    """A table of rows, whose first cell is a heading."""
    lines = []
    for first, *cells in rows:
        texts = "".join(f"<td>{escaped(without_secrets(str(cell)))}</td>" for cell in cells)
        head = escaped(first).replace("_", "_<wbr>")
        lines.append(f"<tr><th>{head}</th>{texts}</tr>\n")
    return f'<div class="table"><table>\n{"".join(lines)}</table></div>\n'


def list_places():
    """The names of the flags of all trainings whose values say where something is."""
    parser = argparse.ArgumentParser(conflict_handler="resolve")  # as both kinds of data have the same ones
    for add_arguments in (
        add_model_arguments,
        add_data_arguments,
        add_subject_arguments,
        add_class_arguments,
        add_output_arguments,
        add_run_arguments,
    ):
        add_arguments(parser)
    add_adapter_arguments(parser, [])
    return {flag.dest for flag in parser._actions if is_place(flag)}


PLACES = list_places()


def last_part(path):
    """The last part of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def without_paths(text, settings):
    """A text with the last part of whatever looks like a path, as no number of a total does (3/8), and of the places
    that settings name."""
    for name in PLACES:
        place = settings.get(name)
        if isinstance(place, str) and last_part(place):
            text = text.replace(os.path.abspath(place), last_part(place)).replace(place, last_part(place))
    quoted = r"(?<!\w)(['\"])([^'\"\n]*[/\\][^'\"\n]*)\1"
    text = re.sub(quoted, lambda found: found[1] + last_part(found[2]) + found[1], text)

    def shortened(found):
        return found[0] if re.match(r"[\d.,]+/[\d.,]+\W*$", found[0]) else last_part(found[0])

    return re.sub(r"[^\s'\"=(]*[/\\][^\s'\"]*", shortened, text)


def shown_value(name, value):
    """The value of a setting as people read it; of a path its last part."""
    if isinstance(value, list):
        return "; ".join(shown_value(name, item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and (name in PLACES or re.match(r"(\w:)?[/\\]", value)):
        return value if name in ON_HUB and is_hub_id(value) else last_part(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(run):
    """What was trained, on what, and how far, in a line."""
    settings, parts = run.settings, []
    if settings:
        trained = f"LoRA adapters of rank {settings['rank']}" if settings.get("rank") else "The whole UNet"
        trained += " and text encoder" if settings.get("train_text_encoder") else ""
        prompt = settings.get("instance_prompt")
        called = f" (\N{LEFT DOUBLE QUOTATION MARK}{prompt}\N{RIGHT DOUBLE QUOTATION MARK})" if prompt else ""
        base, place = [
            shown_value(flag, settings.get(flag)) for flag in ("pretrained_model_name_or_path", place_of(settings))
        ]
        parts.append(f"{trained} of {base} on {place}{called}, at {settings.get('resolution')} pixels")
    step, planned = run.last_step(), run.planned_step()
    of_images = f" of {counted(settings['samples_per_step'], 'image')}" if settings.get("samples_per_step") else ""
    parts.append((f"{step:,} of {counted(planned, 'step')}" if planned else counted(step, "step")) + of_images)
    if run.history:
        event = run.history[-1].get("event")
        parts.append(event if event in ("finished", "stopped") else "no end is noted")
    return ", ".join(parts)


def header(runs):
    """The title, and of each run what was trained and whether it learnt."""
    parts = [f"<h1>{escaped(title_of(runs))}</h1>\n"]
    for run, colour in zip(runs, COLOURS):
        verdict, kind = judge(run)
        name = f'<h3><span class="chip" style="background: {colour}"></span>{escaped(run.name)}</h3>\n'
        parts.append(name if len(runs) > 1 else "")
        parts.append(f'<p>{escaped(describe(run))}.</p>\n<p class="verdict {kind}">{escaped(verdict)}</p>\n')
        parts += [f'<p class="faint">{escaped(note)}</p>\n' for note in run.notes]
    return "".join(parts)


def title_of(runs):
    """The title of the page."""
    return runs[0].name if len(runs) == 1 else f"Comparison of {len(runs)} runs"


def plots_section(runs, plots):
    """The places of the plots, with their titles."""
    is_resumed = any(row.get("event") == "resumed" for run in runs for row in run.history)
    told = '<p class="faint">Upright dotted lines: where it was resumed.</p>\n' if is_resumed else ""
    parts = [f'<h2>Numbers</h2>\n{told}<div class="plots">\n']
    for name, title, note, spec in plots:
        inside = f'<div class="plot" id="plot-{name}"></div>'
        if spec is None:
            inside = '<div class="plot none">Nothing of this is in the log.</div>'
        parts.append(f'<div><h3>{title}</h3><p class="faint">{note}</p>{inside}</div>\n')
    return "".join([*parts, "</div>\n"])


def grids_of(run, is_small):
    """{step: address that holds its grid}: the file as it is, or a smaller JPEG of it."""
    grids = {}
    for step, path in run.samples.items():
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                small = as_jpeg(image.convert("RGB"), GRID_SIDE, GRID_SIDE) if is_small else None
            grids[step] = data_url(small or content, "image/jpeg" if small else "image/png")
        except (OSError, SyntaxError):  # which is what Pillow calls half of a file
            run.notes.append(f"{path.name} cannot be read, and is left out.")
    return grids


def samples_section(runs):
    """The grids of samples as a strip for each run, under one slider, and the steps that there are."""
    is_small = sum(path.stat().st_size for run in runs for path in run.samples.values()) > MAX_SAMPLE_BYTES
    grids = {run.name: grids_of(run, is_small) for run in runs}
    steps = sorted({step for of_run in grids.values() for step in of_run})
    if not steps:
        return "<h2>Samples</h2>\n<p>None were drawn; --validation_prompts says what to draw.</p>\n", steps
    told = " They are shown smaller than they are in samples/." if is_small else ""
    parts = [
        f'<h2>Samples after step <span id="step">{steps[-1]:,}</span></h2>\n',
        f'<input type="range" id="slider" max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="step">\n',
    ]
    parts.append('<div class="grids">\n' if len(runs) > 1 else "")
    for run in runs:
        buttons = []
        for step, url in grids[run.name].items():
            picture = f'<img src="{url}" alt="samples after step {step}">'
            buttons.append(f'<button type="button" data-step="{step}">{picture}{step:,}</button>')
        if not buttons:
            parts.append(f"<p>{escaped(run.name)} has drawn none.</p>\n")
            continue
        name = f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'<div class="grid">{name}<img alt=""><div class="strip">{"".join(buttons)}</div></div>\n')
    parts.append("</div>\n" if len(runs) > 1 else "")
    prompts = dict.fromkeys(prompt for run in runs for prompt in prompts_in(run.settings))
    listed = "; ".join(prompts)
    parts.append(f'<p class="faint">Left to right: {escaped(listed)}.{told}</p>\n' if listed else f"<p>{told}</p>\n")
    return "".join(parts), steps


def prompts_in(settings):
    """The prompts of the samples."""
    single = settings.get("validation_prompt")
    return [*(settings.get("validation_prompts") or []), *([single] if single else [])]


def settings_section(runs):
    """The settings: those that differ between the runs and from their defaults, and the others."""
    known = [run for run in runs if run.settings]
    if not known:
        return "<h2>Settings</h2>\n<p>Not known: args.json is not there.</p>\n"
    names = dict.fromkeys(name for run in known for name in run.settings if not name.endswith("token"))
    nothing = "\N{EN DASH}"  # of a script without that flag
    values = {name: [run.settings.get(name, nothing) for run in known] for name in names}
    texts = {name: [shown_value(name, value) for value in values[name]] for name in names}
    differing = {name for name in names if any(value != values[name][0] for value in values[name])}
    noted = [run.changed() for run in known]
    changed = {name for found in noted if found for name in found}
    parts = ["<h2>Settings</h2>\n"]
    if differing:
        heads = [("", *[run.name for run in known])]
        parts.append('<p class="faint">Those that differ between the runs</p>\n')
        parts.append(table(heads + [(name, *texts[name]) for name in names if name in differing]))
    summary = "All others: defaults, and what was made of the flags"
    if None in noted:
        summary = "All settings" + (" that are the same" if differing else "")
        parts.append("<p>Which of them differ from the defaults was not noted by this version of the scripts.</p>\n")
    else:
        told = " that are the same in all runs" if len(runs) > 1 else ""
        parts.append(f'<p class="faint">Those that differ from the defaults{told}</p>\n')
        parts.append(table([(name, texts[name][0]) for name in names if name in changed - differing]))
    others = table([(name, texts[name][0]) for name in names if name not in changed | differing])
    return "".join([*parts, f"<details><summary>{summary}</summary>\n{others}</details>\n"])


def history_section(runs):
    """When the runs were started, stopped and resumed."""
    parts = ["<h2>History</h2>\n"]
    for run in runs:
        parts.append(f"<h3>{escaped(run.name)}</h3>\n" if len(runs) > 1 else "")
        rows = history_rows(run.history, run.settings)
        parts.append(table(rows) if rows else "<p>None was noted by this version of the scripts.</p>\n")
    return "".join(parts)


def history_rows(history, settings):
    """Pairs of a time and what happened then."""
    rows, before = [], None
    for row in history:
        event, step = row.get("event"), row["step"]
        if event == before and event in ("finished", "stopped"):  # as another host tells it
            continue
        if event in ("started", "resumed") and before in ("started", "resumed"):
            rows.append(("", "ended without a word: killed, or the machine went down"))
        before = event
        where = "at" if event == "started" else "from" if event == "resumed" else "after"
        why = f" by {without_paths(str(row['why']), settings)}" if row.get("why") else ""
        rows.append((told_time(row.get("time")), f"{event} {where} step {step:,}{why}"))
    return rows


def told_time(time):
    """A time of the history as a clock here shows it."""
    try:
        return f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d %H:%M}"
    except (TypeError, ValueError, OverflowError):
        return ""


def as_page(runs, data, version=""):
    """The page; `data` are its parts on images by the name of the run, `version` is of what is watched."""
    plots = make_plots(runs)
    samples, steps = samples_section(runs)
    content = {"plots": {name: spec for name, _, _, spec in plots if spec}, "steps": steps, "version": version}
    written = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    policy = POLICY + ("; connect-src 'self'" if version else "")
    parts = [
        page_head(PROGRAM, f"{title_of(runs)}: report", STYLE, policy),
        header(runs),
        plots_section(runs, plots),
        samples,
    ]
    parts += [settings_section(runs), "<h2>Images</h2>\n"]
    for text in dict.fromkeys(data.values()):  # runs may have the same
        names = ", ".join(name for name, other in data.items() if other == text)
        parts.append((f"<h3>{escaped(names)}</h3>\n" if len(runs) > 1 else "") + text)
    parts += [history_section(runs), f'<p class="faint">Made by {PROGRAM}, {datetime.now():%Y-%m-%d %H:%M}.</p>\n']
    parts += [f'<script type="application/json" id="page">{written}</script>\n']
    parts += [f"<script>{vl_convert.javascript_bundle()}</script>\n<script>{SCRIPT}</script>\n</body></html>\n"]
    return "".join(parts)


# ----------------------------------------------------------------------------------------------------------- watch
def version_of(folders):
    """A text that changes whenever a run has logged or drawn more."""
    paths = [Path(folder, name) for folder in folders for name in ("log.jsonl", "history.jsonl")]
    paths += [path for folder in folders for path in sorted(Path(folder, "samples").glob("*"))]
    marks = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()]
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def make_server(port, folders, data):
    """A server of the page on this machine alone, which makes it anew whenever the runs have gone on. Raises
    `InputError`."""
    pages, lock = {}, threading.Lock()

    def page_now():
        """The page as the runs are now."""
        version = version_of(folders)
        with lock:
            if version not in pages:
                pages.clear()
                pages[version] = as_page(read_runs(folders), data, version)
            return pages[version]

    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers with the page, and with its version."""

        def do_GET(self):
            # Pages of others, whose name they let lead to this machine, are not to read it.
            # The port is another one where it is forwarded.
            is_called_here = re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", self.headers.get("Host", ""))
            path, makers = self.path.split("?")[0], {"/": page_now, "/version": lambda: version_of(folders)}
            status, kind, text = 404, "text/plain", "There is no such page."
            if is_called_here and path in makers:
                try:
                    status, kind, text = 200, "text/html" if path == "/" else kind, makers[path]()
                except (InputError, OSError) as error:
                    status, text = 503, str(error)
            content = text.encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a page that was closed meanwhile
                self.wfile.write(content)

        def log_message(self, *words):
            """Says nothing of requests."""

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(f"--port={port}: cannot be had ({last_line(error)}); give another, or 0 for any") from None


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message, Ctrl-C with status 130."""
    args, problems = parse_flags(make_parser(), argv, {})
    with told_to_user(PROGRAM, errors=(InputError, OSError), stopped="Stopped."):
        raise_problems(problems + check_args(args))
        runs = read_runs(args.folders)
        data = data_sections(runs, args.num_images)
        if args.watch:
            with make_server(8008 if args.port is None else args.port, args.folders, data) as server:
                print(f"The report is at http://127.0.0.1:{server.server_port}/ until Ctrl-C.", flush=True)
                server.serve_forever()
        write_text(output_of(args), as_page(runs, data))
    for run in runs:
        print(fitted(f"{in_one_line(run.name)}: {judge(run)[0]}"))
    print(fitted(f"Wrote {in_one_line(output_of(args))}; a browser shows it."))
