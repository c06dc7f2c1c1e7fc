"""`sdtune report` shows what a run left as it is: numbers, samples, settings, interruptions; in a browser, too."""

import base64
import html
import io
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
from image_data import caption_of, snapshot, write_image_folder
from PIL import Image
from running import status_of
from training import trains_into

from sdtune.commands import report as command
from sdtune.plots import MAX_POINTS, make_plots, thinned
from sdtune.runs import judge, read_run, smoothed

PROMPTS = ["a red star", "a <b>blue</b> & round one"]
SETTINGS = {
    "validation_prompts": PROMPTS,
    "validation_steps": 2,
    "num_validation_samples": 10,
    "checkpointing_steps": 2,
}
in_a_browser = pytest.mark.skipif(not browser.PROGRAM, reason="there is no Chromium (Debian's package chromium)")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "pictures", 16)


@pytest.fixture(scope="module")
def whole(train_script, tiny_pipeline, images, tmp_path_factory):
    """The output of six steps, which ended twice before: by a failure in the result, and by a kill."""
    folder = tmp_path_factory.mktemp("whole") / "my_model"
    fit = trains_into(train_script, tiny_pipeline, images)
    assert fit(folder, max_train_steps=2, **SETTINGS) == 0
    assert fit(folder, max_train_steps=4, **SETTINGS, resume_from_checkpoint="latest") == 0
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # as a kill leaves it
    assert fit(folder, max_train_steps=6, **SETTINGS, resume_from_checkpoint="latest") == 0
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(whole, tmp_path / "my_model")


@pytest.fixture(scope="module")
def other(whole, train_script, tiny_pipeline, images, tmp_path_factory):
    """The output of another run, of three steps, at another rate."""
    folder = tmp_path_factory.mktemp("other") / "my_other"
    fit = trains_into(train_script, tiny_pipeline, images)
    settings = {**SETTINGS, "validation_steps": 3}
    assert fit(folder, max_train_steps=3, **settings, learning_rate=5e-4) == 0
    return folder


def logged(folder):
    """The rows of a run's log."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def write_log(folder, rows):
    """Writes a log, in a folder that is made."""
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def page_of(*folders, flags=(), output=None):
    """The page that the command writes."""
    assert status_of(command.main, *folders, *flags, *([f"--output={output}"] if output else [])) == 0
    return Path(output or Path(folders[0], "report.html")).read_text(encoding="utf-8")


def content_of(page):
    """What the scripts of a page get."""
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', page)[1])


def plotted(page, name):
    """The rows of each layer of a plot."""
    return [layer["data"]["values"] for layer in content_of(page)["plots"][name]["layer"]]


def text_of(page):
    """What is to be read in a page, without its tags."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<wbr>", "", re.sub(r"<(?!wbr)[^>]*>", " ", body))).split())


def errors(capsys, *words):
    """What the command says on the standard error, having ended with status 2."""
    capsys.readouterr()
    assert status_of(command.main, *words) == 2
    return capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("name", ["whole", "other"])
def test_plots_have_the_values_of_the_log(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    rows, page = logged(folder), page_of(folder, output=tmp_path / "page.html")
    steps = [row for row in rows if "loss" in row]
    looks = [row for row in rows if "held_out_loss" in row]
    assert len(steps) == len({row["step"] for row in steps}) == (6 if name == "whole" else 3)
    for plot, key in (
        ("lr", "lr"),
        ("grad_norm", "grad_norm"),
        ("images_per_second", "images_per_second"),
        ("memory", "process_gb"),
    ):
        line, points = plotted(page, plot)[-2:]
        assert line == points
        assert line == [{"run": folder.name, "step": row["step"], "value": row[key]} for row in steps]
    *_, line, points, means = plotted(page, "loss")
    assert [(row["step"], row["value"]) for row in line] == [(row["step"], row["loss"]) for row in steps]
    assert points == line
    values = [row["loss"] for row in steps]
    expected = [np.mean(values[max(0, number - 1) : number + 2]) for number in range(len(values))]
    assert [row["value"] for row in means] == pytest.approx(expected, rel=1e-12)
    *_, bars, line, points, before = plotted(page, "held_out_loss")
    assert line == points
    losses, margins = [row["held_out_loss"] for row in looks], [2 * row["gain_error"] for row in looks]
    assert [row["value"] for row in line] == losses
    assert margins[-1] > 0
    assert [row["high"] for row in bars] == pytest.approx(np.add(losses, margins))
    assert [row["low"] for row in bars] == pytest.approx(np.subtract(losses, margins))
    assert "bars: 95 % interval of its difference to the loss before training" in text_of(page)
    assert [row["value"] for row in before] == pytest.approx([looks[0]["held_out_loss"]] * len(looks))
    for spec in content_of(page)["plots"].values():
        assert spec["encoding"]["x"]["scale"]["domain"] == [0, steps[-1]["step"]]


def test_the_page_needs_nothing_else(whole, tmp_path):
    page = page_of(whole, output=tmp_path / "page.html")
    own = page.replace(command.vl_convert.javascript_bundle(), "")
    assert len(page) - len(own) > 500_000
    assert not re.findall(r"(?:src|href)=\"(?!data:)", own)
    assert not re.findall(r"https?://|@import|url\(", own)
    assert "default-src 'none'" in page
    assert "connect-src" not in page


def test_samples_are_the_files(whole, other, tmp_path):
    page = page_of(whole, other, output=tmp_path / "page.html")
    expected = [*sorted(whole.glob("samples/*")), *sorted(other.glob("samples/*"))]
    found = re.findall(r'data-step="(\d+)"><img src="data:image/png;base64,([^"]+)"', page)
    assert [int(step) for step, _ in found] == [0, 2, 4, 6, 0, 3]
    assert [base64.b64decode(content) for _, content in found] == [path.read_bytes() for path in expected]
    assert content_of(page)["steps"] == [0, 2, 3, 4, 6]


def test_many_large_samples_become_smaller(run, monkeypatch):
    monkeypatch.setattr(command, "MAX_SAMPLE_BYTES", 1000)
    monkeypatch.setattr(command, "GRID_SIDE", 24)
    (run / "samples" / "step-000004.png").write_bytes(b"\x89PNG half of one")
    page = page_of(run)
    found = re.findall(r'data-step="(\d+)"><img src="data:image/jpeg;base64,([^"]+)"', page)
    assert [int(step) for step, _ in found] == [0, 2, 6]
    for _, content in found:
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (24, 12)
    assert "They are shown smaller than they are in samples/." in text_of(page)
    assert "step-000004.png cannot be read, and is left out." in text_of(page)


def test_settings_that_were_changed_come_first(whole, images, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a red star")  # somebody's secret is what they also drew
    text = text_of(page_of(whole, output=tmp_path / "page.html"))
    changed, others = re.search(r"differ from the defaults (.*) All others: .*? flags (.*) Images", text).groups()
    for told in ("resolution 32", "train_data_dir pictures", "max_train_steps 6", "learning_rate 0.001"):
        assert f" {told} " in f" {changed} "
        assert f" {told} " not in f" {others} "
    for told in ("adam_beta1 0.9", "use_ema no", "snr_gamma none"):
        assert f" {told} " in f" {others} "
        assert f" {told} " not in f" {changed} "
    assert f"validation_prompts ***; {PROMPTS[1]}" in changed
    assert "hub_token" not in text
    assert str(images.parent) not in text
    assert str(whole.parent) not in text
    assert f"on pictures, at 32 pixels, 6 of 6 steps of 2 images, finished. {judge(read_run(whole, 'x'))[0]}" in text


def test_data_are_counted_and_shown(whole, images, tmp_path):
    page = page_of(whole, output=tmp_path / "page.html")
    text = text_of(page)
    assert "Images 6 to train on, 10 held out, as they are in their place now Sizes 32 x 32: 6 " in text
    shown = re.findall(r'<div class="card"><img alt="" src="data:image/jpeg;base64,([^"]+)"><b>(\d+).png</b>', page)
    assert len(shown) == 6
    for content, number in shown:
        with Image.open(images / f"{number}.png") as image:
            difference = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), float) - np.asarray(image)
        assert np.abs(difference).mean() < 12
        assert caption_of(int(number)) in text
    fewer = page_of(whole, flags=["--num_images=2"], output=tmp_path / "page.html")
    assert [name for _, name in re.findall(r'<div class="card">(.*?)<b>(\d+).png</b>', fewer)] == [
        shown[0][1],
        shown[3][1],
    ]
    none = page_of(whole, flags=["--num_images=0"], output=tmp_path / "page.html")
    assert 'class="card"' not in none
    assert "Captions with the word" in text
    assert "Captions with the word" not in text_of(none)
    assert "Words per caption" in text_of(none)


def test_history_tells_of_stops_and_resumes(whole, tmp_path):
    page = page_of(whole, output=tmp_path / "page.html")
    _, history = text_of(page).split(" History ")
    history = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d ", "", history)
    told = "started at step 0 finished after step 2 resumed from step 2 ended without a word: killed, or the machine "
    assert history.startswith(told + "went down resumed from step 4 finished after step 6 Made by sdtune report")
    assert "Upright dotted lines: where it was resumed." in text_of(page)
    (marks, *_) = plotted(page, "lr")
    assert [(row["step"], row["told"]) for row in marks] == [(2, "resumed from step 2"), (4, "resumed from step 4")]


def test_an_end_that_two_hosts_tell_is_one():
    history = [{"event": event, "step": step} for event, step in (("started", 0), ("finished", 9), ("finished", 9))]
    assert command.history_rows(history, {}) == [("", "started at step 0"), ("", "finished after step 9")]
    rows = [{"event": "stopped", "step": 3, "why": "SIGTERM"}, {"event": "resumed", "step": 3}]
    told = [("", "stopped after step 3 by SIGTERM"), ("", "resumed from step 3")]
    assert command.history_rows([history[0], *rows], {}) == [("", "started at step 0"), *told]


def test_several_runs_are_compared(whole, other, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of(command.main, whole, other) == 0
    told = capsys.readouterr().out.splitlines()
    verdicts = [f"{folder.name}: {judge(read_run(folder, 'x'))[0]}" for folder in (whole, other)]
    assert told == [*verdicts, "Wrote comparison.html; a browser shows it."]
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    names = [whole.name, other.name]
    for spec in content_of(page)["plots"].values():
        assert spec["encoding"]["color"]["scale"]["domain"] == names
        assert len(set(spec["encoding"]["color"]["scale"]["range"])) == 2
        assert spec["encoding"]["x"]["scale"]["domain"] == [0, 6]
    values = [(row["run"], row["value"]) for row in plotted(page, "lr")[-1]]
    assert values == [(whole.name, 0.001)] * 6 + [(other.name, 0.0005)] * 3
    text = text_of(page)
    differing, same = re.search(r"between the runs (.*?) Those .*? same in all runs (.*) All others", text).groups()
    assert differing.startswith("my_model my_other ")
    for told in ("learning_rate 0.001 0.0005", "max_train_steps 6 3", "validation_steps 2 3"):
        assert told in differing
    assert "resolution 32 " in same
    assert "learning_rate" not in same
    assert text.count("6 to train on, 10 held out") == 1
    assert "my_model, my_other Images 6 to train on" in text


def test_what_is_said_of_the_images_of_several_runs_is_said_once(run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = [shutil.copytree(images, tmp_path / name) for name in ("first", "second")]
    settings = json.loads((run / "args.json").read_text())
    runs = []
    for number, folder in enumerate((first, second, first)):
        (folder / "note.docx").write_text("x")
        runs.append(shutil.copytree(run, tmp_path / f"run{number}"))
        (runs[-1] / "args.json").write_text(json.dumps(settings | {"train_data_dir": str(folder)}))
    assert status_of(command.main, *runs) == 0
    aside = [f"Left aside in {folder}: 1 file of other kinds, such as note.docx." for folder in (first, second)]
    assert capsys.readouterr().out.splitlines()[:3] == [*aside, f"run0: {judge(read_run(run, 'x'))[0]}"]


def test_runs_of_one_name_are_told_apart(whole, run, tmp_path):
    page = page_of(whole, run, output=tmp_path / "page.html")
    names = [f"{folder.parent.name}/my_model" for folder in (whole, run)]
    assert content_of(page)["plots"]["lr"]["encoding"]["color"]["scale"]["domain"] == names
    assert str(whole.parent.parent) not in text_of(page)
    folders = ["a/x/one", "b/x/one", "b/y/one", "other", "one"]
    assert command.names_of([tmp_path / folder for folder in folders]) == [
        "a/x/one",
        "b/x/one",
        "y/one",
        "other",
        f"{tmp_path.name}/one",
    ]


PRIVATE_PATHS = [
    "/home/joe/base",
    "clients/acme/photos",
    "../private/base",
    "C:\\Users\\joe\\x",
    "clients/acme/",
    "~/a/b",
]


@pytest.mark.parametrize("path", PRIVATE_PATHS)
def test_of_paths_only_the_last_part_is_shown(run, path):
    settings = json.loads((run / "args.json").read_text())
    places = ["pretrained_model_name_or_path", "train_data_dir", "output_dir", "cache_dir", "init_lora_weights"]
    settings |= dict.fromkeys(places, path) | {"validation_prompts": ["a/b and c\\d"]}
    (run / "args.json").write_text(json.dumps(settings))
    with (run / "history.jsonl").open("a") as file:
        why = f"an OSError ([Errno 2] No such file: '{path}/of mine.png'), {path}/x.png: cannot be read"
        file.write(json.dumps({"event": "stopped", "step": 6, "why": why}) + "\n")
    text, name = text_of(page_of(run)), re.split(r"[/\\]", path.rstrip("/"))[-1]
    assert f"The whole UNet of {name} on {name}, at 32 pixels" in text
    for place in places:
        assert re.search(rf"{place} {name} ", text)
    assert "validation_prompts a/b and c\\d " in text
    assert "by an OSError ([Errno 2] No such file: 'of mine.png'), x.png: cannot be read" in text
    for private in ("joe", "clients", "private/", "Users", "~"):
        assert private not in text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("step 3/8: no space left", "step 3/8: no space left"),
        ("read 1,024/2,048.", "read 1,024/2,048."),
        ("(3/8) of 2026/11/27.png", "(3/8) of 27.png"),
        ("3/8/x.png", "x.png"),
    ],
)
def test_a_number_of_a_total_is_no_path(text, shown):
    assert command.without_paths(text, {}) == shown


def test_names_of_the_hub_are_shown_whole(run):
    settings = json.loads((run / "args.json").read_text())
    settings |= {"pretrained_model_name_or_path": "owner/base-v1.5", "train_data_dir": None, "output_dir": "out/mine"}
    (run / "args.json").write_text(json.dumps(settings | {"dataset_name": "owner/pictures"}))
    text = text_of(page_of(run))
    assert "The whole UNet of owner/base-v1.5 on owner/pictures, at 32 pixels" in text
    assert "output_dir mine " in text


def test_errors_of_reading_images_hide_the_path(run, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "joe smith" / "of acme")
    settings = json.loads((run / "args.json").read_text()) | {"train_data_dir": str(folder)}
    (run / "args.json").write_text(json.dumps(settings))
    for path in folder.glob("*.png"):
        path.unlink()
    text = text_of(page_of(run))
    assert "Images the folder of acme holds no images (" in text
    assert "smith" not in text


def test_settings_whose_last_parts_are_equal_differ(whole, run, tmp_path):
    settings = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(settings | {"train_data_dir": "elsewhere/pictures"}))
    text = text_of(page_of(whole, run, output=tmp_path / "page.html"))
    differing = re.search(r"between the runs (.*?) Those .*? same in all runs", text)[1]
    assert "train_data_dir pictures pictures" in differing


class Elements(HTMLParser):
    """The elements of a page by name, and its text."""

    def __init__(self, page):
        super().__init__()
        self.names, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


def test_what_others_wrote_is_shown_as_it_is(whole, tmp_path):
    """Names, captions, prompts and reasons make no elements, and end no script."""
    evil = '</script><script>alert("1")</script><b onclick=a>&amp;'
    folder = shutil.copytree(whole, tmp_path / "<i>run & co")
    images = write_image_folder(tmp_path / "pictures", 4, captions=[evil, "a", "b", "c"])
    settings = json.loads((folder / "args.json").read_text())
    settings |= {"train_data_dir": str(images), "validation_prompts": [evil], "instance_prompt": evil}
    settings |= {"num_validation_samples": 0, evil: evil}
    (folder / "args.json").write_text(json.dumps(settings))
    row = {"time": evil, "event": evil, "step": 5, "why": evil.replace("/", "")}  # else it looks like a path
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n" + json.dumps({**row, "event": "resumed", "step": 6}) + "\n")
    page = page_of(folder)
    own = page.replace(command.vl_convert.javascript_bundle(), "")
    elements = Elements(own)
    assert elements.names.count("script") == 3
    assert not {"i", "iframe"} & set(elements.names)
    assert elements.names.count("b") == len(re.findall('class="card"', own)) == 4
    assert "".join(elements.texts).count(evil) == 8
    assert "".join(elements.texts).count(evil.replace("/", "")) == 2
    assert "<i>run & co" in elements.texts
    assert content_of(page)["plots"]["lr"]["encoding"]["color"]["scale"]["domain"] == ["<i>run & co"]


# ---------------------------------------------------------------------------------------------------- what may lack


def test_a_log_that_breaks_off(run):
    path = run / "log.jsonl"
    before = logged(run)
    path.write_text(path.read_text()[:-20] + '\n{"step": "7"}\n[1]\n{"step": 7, "los')
    page = page_of(run)
    assert "4 lines of log.jsonl cannot be read, and left out." in text_of(page)
    assert len(plotted(page, "lr")[-1]) == 6
    looks = [row["step"] for row in before if "held_out_loss" in row]
    assert [row["step"] for row in plotted(page, "held_out_loss")[-1]] == looks[:-1]


def test_a_log_alone_as_the_hub_has_it_or_an_older_run(whole, tmp_path):
    rows = [{key: value for key, value in row.items() if key != "process_gb"} for row in logged(whole)]
    folder = write_log(tmp_path / "older", rows)
    page = page_of(folder)
    text = text_of(page)
    assert "older 6 steps. The loss on images that were not trained on" in text
    assert "Memory in GB the most so far, of the process that trains Nothing of this is in the log." in text
    assert "Settings Not known: args.json is not there." in text
    assert "Samples None were drawn; --validation_prompts says what to draw." in text
    assert "Images What it was trained on is not known: args.json is not there." in text
    assert "History None was noted by this version of the scripts." in text
    assert "memory" not in content_of(page)["plots"]
    shutil.copy(whole / "args.json", folder)
    text = text_of(page_of(folder))
    assert "Which of them differ from the defaults was not noted by this version of the scripts." in text
    assert "All settings pretrained_model_name_or_path" in text
    (folder / "args.json").write_text('{"seed": ')
    assert "args.json cannot be read, so that the settings are not known." in text_of(page_of(folder))


def test_images_out_of_reach(run, tmp_path, monkeypatch):
    settings = json.loads((run / "args.json").read_text())
    for changed, told in (
        ({"train_data_dir": str(tmp_path / "gone")}, "gone is not in reach of this folder."),
        ({"train_data_dir": None, "dataset_name": "somebody/pictures"}, "pictures is not in reach of this folder."),
        ({"streaming": True}, "pictures is not in reach of this folder."),
        ({"num_validation_samples": 16}, "--num_validation_samples=16: must leave some of 16 images; use fewer"),
    ):
        (run / "args.json").write_text(json.dumps(settings | changed))
        assert f" Images {'' if 'samples' in told else 'The images are not shown: '}{told}" in text_of(page_of(run))


def test_one_step_and_nothing_logged_yet(tmp_path):
    row = {"step": 1, "loss": 0.25, "lr": 0.0, "grad_norm": None, "images_per_second": 2.5}
    one = write_log(tmp_path / "one", [row])
    page = page_of(one)
    assert plotted(page, "loss") == [[{"run": "one", "step": 1, "value": 0.25}]] * 2
    assert content_of(page)["plots"].keys() == {"loss", "lr", "images_per_second"}
    assert content_of(page)["plots"]["lr"]["encoding"]["x"]["scale"]["domain"] == [0, 1]
    nothing = write_log(tmp_path / "nothing", [])
    text = text_of(page_of(nothing))
    assert "nothing 0 steps. Nothing was logged yet." in text
    assert text.count("Nothing of this is in the log.") == 6
    (nothing / "history.jsonl").write_text(
        json.dumps({"time": "2026-01-01T00:00:00+00:00", "event": "stopped", "step": 0})
    )
    assert "Nothing was logged. " in text_of(page_of(nothing))


def test_losses_that_are_no_numbers(tmp_path):
    """A run whose loss is not finite logs NaN, which JSON has not."""
    rows = [{"step": step, "loss": loss} for step, loss in ((1, 0.5), (2, float("nan")), (3, float("inf")), (4, 0.25))]
    page = page_of(write_log(tmp_path / "broken", rows))
    assert [(row["step"], row["value"]) for row in plotted(page, "loss")[0]] == [(1, 0.5), (4, 0.25)]


@pytest.mark.parametrize(
    "odd, of_log, names",
    [
        ({"max_train_steps": "1000", "samples_per_step": [2]}, {"loss": "a"}, "max_train_steps, samples_per_step"),
        (
            {"train_data_dir": 5, "validation_prompts": [5]},
            {"loss": [float("nan")]},
            "train_data_dir, validation_prompts",
        ),
        ({"num_validation_samples": "12", "seed": {}}, {"loss": True}, "num_validation_samples, seed"),
    ],
)
def test_what_should_be_a_number_and_is_none(whole, tmp_path, odd, of_log, names):
    folder = write_log(tmp_path / "odd", [{"step": 1, "loss": 0.5}, {"step": 2, **of_log}])
    settings = json.loads((whole / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(settings | odd))
    history = {"event": "started", "step": 0, "changed": 5, "last_step": "9"}
    (folder / "history.jsonl").write_text(json.dumps(history) + "\n")
    page = page_of(folder)
    told = "has no number or text where there should be one, left out:"
    for name, what in (("args.json", names), ("log.jsonl", "loss"), ("history.jsonl", "changed, last_step")):
        assert f"{name} {told} {what}." in text_of(page)
    assert plotted(page, "loss") == [[{"run": "odd", "step": 1, "value": 0.5}]] * 2
    (folder / "args.json").write_text("[[1, 2]]")
    assert "args.json cannot be read, so that the settings are not known." in text_of(page_of(folder))


def test_a_run_that_went_back_counts_from_there(run):
    events = [("started", 0), ("stopped", 900), ("resumed", 900), ("resumed", 500)]
    rows = [{"event": event, "step": step, "last_step": 1000} for event, step in events]
    (run / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_log(run, [{"step": step, "loss": 0.5} for step in range(50, 551, 50)])
    page = page_of(run)
    assert "550 of 1,000 steps of 2 images, no end is noted" in text_of(page)
    spec = content_of(page)["plots"]["loss"]
    assert spec["encoding"]["x"]["scale"]["domain"] == [0, 550]
    assert [row["step"] for row in spec["layer"][0]["data"]["values"]] == [500]
    write_log(run, [])
    assert "500 of 1,000 steps of 2 images, no end is noted" in text_of(page_of(run))


@pytest.mark.parametrize("number, is_enough", [(9, False), (10, True)])
def test_few_images_have_no_bars(run, number, is_enough):
    settings = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(settings | {"num_validation_samples": number}))
    page = page_of(run)
    layers = content_of(page)["plots"]["held_out_loss"]["layer"]
    assert len([layer for layer in layers if "y2" in layer["encoding"]]) == is_enough
    assert ("bars: 95 %" in text_of(page)) == is_enough
    assert ("these are too few to say how sure that is" in text_of(page)) == (not is_enough)
    assert ("dashed: before training; there are too few images" in text_of(page)) == (not is_enough)


# --------------------------------------------------------------------------------------------------------- mistakes


def test_a_folder_that_is_no_run(whole, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    message = errors(capsys, whole, tmp_path / "empty", tmp_path / "gone", "--output", tmp_path / "page.html")
    message = " ".join(message.split())
    assert f"{tmp_path}/empty: holds no log.jsonl of a training; name the --output_dir of a run" in message
    assert f"{tmp_path}/gone: there is no such folder; name the --output_dir of a run" in message
    assert not (tmp_path / "page.html").exists()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for name in ("args.json", "progress.json"):
        (checkpoint / name).write_text("{}")
    assert f"{checkpoint}: is a checkpoint of a run; name {tmp_path}/run" in " ".join(
        errors(capsys, checkpoint).split()
    )
    assert not (checkpoint / "report.html").exists()
    message = " ".join(errors(capsys, whole / "log.jsonl").split())
    assert message == f"sdtune report: {whole}/log.jsonl: is no folder; name the --output_dir of a run"
    message = " ".join(errors(capsys, whole, f"{whole}/../{whole.name}").split())
    assert message.endswith(f"{whole}/../{whole.name}: is given twice; name each folder once")
    message = " ".join(errors(capsys, *[whole] * 9).split())
    assert "9 RUN_FOLDERs: a page compares 8 at most; name fewer" in message
    assert "no RUN_FOLDER is given; name the --output_dir of a training" in errors(capsys)


def test_only_an_earlier_report_is_replaced(run, tmp_path, capsys):
    before = snapshot(run)
    page_of(run)
    assert {name: content for name, content in snapshot(run).items() if name != "report.html"} == before
    first = (run / "report.html").read_bytes()
    (run / "log.jsonl").write_text("")
    page_of(run)
    assert (run / "report.html").read_bytes() != first
    for mine in ("mine", '<!DOCTYPE html>\n<meta name="generator" content="sdtune check">'):
        (run / "report.html").write_text(mine)
        told = f"--output={run}/report.html: exists, and is no report; name another, or add --overwrite"
        assert told in " ".join(errors(capsys, run).split())
        assert (run / "report.html").read_text() == mine
    page_of(run, flags=["--overwrite"])
    assert "sdtune report" in (run / "report.html").read_text()
    assert f"--output={run}: is a folder, or cannot be written to" in " ".join(
        errors(capsys, run, f"--output={run}").split()
    )


def test_flags_that_do_nothing_together(run, capsys):
    assert "--port=80: does nothing without --watch; add that or drop this" in errors(capsys, run, "--port=80")
    told = "--watch: writes no file; drop --output and --overwrite, or this"
    assert told in errors(capsys, run, "--watch", "--output=a.html")
    assert told in errors(capsys, run, "--watch", "--overwrite")
    assert "--port: must be in [0, 65535], not '65536'" in errors(capsys, run, "--watch", "--port=65536")


# ------------------------------------------------------------------------------------------------------------ parts


def test_means_of_neighbours():
    assert smoothed([]) == []
    assert smoothed([3.0]) == [3.0]
    assert smoothed([1.0, 2.0, 6.0, 4.0]) == [1.5, 3.0, 4.0, 5.0]
    values = np.random.default_rng(0).random(90).tolist()  # three on either side
    assert smoothed(values)[40] == pytest.approx(np.mean(values[37:44]))
    assert smoothed(values)[1] == pytest.approx(np.mean(values[:5]))


def test_long_lines_are_thinned():
    rows = list(range(MAX_POINTS * 3 + 7))
    few = thinned(rows)
    assert (len(few), few[0], few[-1]) == (MAX_POINTS, rows[0], rows[-1])
    assert set(np.diff(few)) == {3, 4}
    assert thinned(rows[:MAX_POINTS]) == rows[:MAX_POINTS]


def look(step, loss, gain, error):
    return {"step": step, "held_out_loss": loss, "held_out_gain": gain, "gain_error": error}


@pytest.mark.parametrize(
    "rows, settings, kind, told",
    [
        (
            [look(0, 0.6, 0, 0), look(9, 0.35, 0.25, 0.02)],
            {"num_validation_samples": 20},
            "good",
            "The loss on 20 images that were not trained on fell from 0.600 to 0.350 after step 9, by 0.250 ± 0.040 "
            "(95 %): it learnt.",
        ),
        (
            [look(0, 0.6, 0, 0), look(5, 0.3, 0.3, 0.02), look(9, 0.35, 0.25, 0.02)],
            {"num_validation_samples": 10},
            "good",
            "The loss on 10 images that were not trained on fell from 0.600 to 0.350 after step 9, by 0.250 ± 0.040 "
            "(95 %): it learnt, but that loss was lower after step 5, 0.300.",
        ),
        (
            [look(2000, 0.5, 0.01, 0.01)],
            {"num_validation_samples": 20},
            "open",
            "The loss on 20 images that were not trained on fell from 0.510 to 0.500 after step 2,000, by 0.010 ± "
            "0.020 (95 %): too little to say that it learnt anything, or that it did harm.",
        ),
        (
            [look(3, 0.5, -0.0004, 0.0001)],
            {"num_validation_samples": 20},
            "bad",
            "The loss on 20 images that were not trained on rose from 0.49960 to 0.50000 after step 3, by 0.00040 ± "
            "0.00020 (95 %): what it draws of images like these got worse.",
        ),
        (
            [look(3, 0.4, 0.1, 0.0)],
            {"num_validation_samples": 1},
            "open",
            "The loss on 1 image that was not trained on fell from 0.500 to 0.400 after step 3, by 0.100; these "
            "are too few to say how sure that is.",
        ),
        (
            [look(3, 0.4, -0.1, 0.001)],
            {"num_validation_samples": 9},
            "open",
            "The loss on 9 images that were not trained on rose from 0.300 to 0.400 after step 3, by 0.100; these "
            "are too few to say how sure that is.",
        ),
        (
            [look(3, 0.4, 0.1, 0.001)],
            {},
            "open",
            "The loss on images that were not trained on fell from 0.500 to 0.400 after step 3, by 0.100; how many "
            "is not known, nor how sure that is.",
        ),
        (
            [look(0, 0.4, 0, 0)],
            {},
            "open",
            "The loss on images that are held out was 0.400 before training, and not measured since.",
        ),
        (
            [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0}],
            {},
            "open",
            "No images were held out, so that nothing can be said about learning; the loss in training, smoothed, "
            "went from 2.000 to 1.500. --num_validation_samples holds some out.",
        ),
        (
            [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}],
            {},
            "open",
            "No images were held out, so that nothing can be said about learning. --num_validation_samples holds some "
            "out.",
        ),
        (
            [look(1, 0.87432, 0.00031, 0.0)],
            {"num_validation_samples": 1},
            "open",
            "The loss on 1 image that was not trained on fell from 0.87463 to 0.87432 after step 1, by 0.00031; these "
            "are too few to say how sure that is.",
        ),
    ],
)
def test_the_verdict(tmp_path, rows, settings, kind, told):
    folder = write_log(tmp_path / "run", rows)
    (folder / "args.json").write_text(json.dumps(settings))
    assert judge(read_run(folder, "run")) == (told, kind)


def test_what_a_gpu_took_comes_before_the_process(tmp_path):
    rows = [{"step": 1, "loss": 1.0, "device_gb": 5.5, "process_gb": 2.5}]
    folder = write_log(tmp_path / "run", rows)
    (memory,) = [plot for plot in make_plots([read_run(folder, "run")]) if plot[0] == "memory"]
    assert memory[2] == "the most so far, of what PyTorch took of the device"
    assert memory[3]["layer"][0]["data"]["values"] == [{"run": "run", "step": 1, "value": 5.5}]


# ------------------------------------------------------------------------------------------------------------ watch


@pytest.fixture
def served(run):
    """The address of the page of a run that is served."""
    server = command.make_server(0, [str(run)], {"my_model": "<p>data</p>"})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(address, **headers):
    """Status and text of what a server answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8")


def test_a_run_is_watched_while_it_goes_on(run, served):
    status, page = fetch(served)
    version = content_of(page)["version"]
    assert status == 200
    assert fetch(served + "version") == (200, version)
    assert "connect-src 'self'" in page
    assert "<p>data</p>" in page
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.125}\n')
    _, later = fetch(served)
    assert content_of(later)["version"] == fetch(served + "version")[1] != version
    assert plotted(later, "loss")[-2][-1] == {"run": "my_model", "step": 7, "value": 0.125}
    assert not (run / "report.html").exists()
    shutil.rmtree(run)
    status, text = fetch(served)
    assert (status, text) == (503, f"{run}: there is no such folder; name the --output_dir of a run")


def test_only_this_machine_reads_what_is_served(served, run, capsys):
    """Not a page of somebody else's, whose name leads here, nor other files."""
    port = served.split(":")[-1].strip("/")
    assert fetch(served, Host=f"evil.example:{port}")[0] == 404
    for host in (f"localhost:{port}", "localhost:9000", "127.0.0.1"):
        assert fetch(served, Host=host)[0] == 200
    for host in ("localhost.evil.example", "evil.example", ""):
        assert fetch(served, Host=host)[0] == 404
    assert content_of(fetch(served + "?x=1")[1])["version"] == fetch(served + "version?y=/")[1]
    for path in ("args.json", "../args.json", "samples/step-000000.png"):
        assert fetch(served + path)[0] == 404
    message = errors(capsys, run, "--watch", f"--port={port}", "--num_images=0")
    assert re.search(rf"--port={port}: cannot be had \(.*\); give another, or 0 for any", " ".join(message.split()))


# ---------------------------------------------------------------------------------------------------------- browser

# Texts, pictures and boxes that are drawn over one another: pairs, none of which is inside of the other.
OVERLAPS = """
(() => {
  const names = "h1, h2, h3, p, summary, tr, .card, .card b, .card .text, .plot, svg text, .grid > img, .strip, input";
  const things = [...document.querySelectorAll(names)].map(thing => [thing, thing.getBoundingClientRect()]);
  const is_seen = ([thing, box]) => box.width && box.height && thing.checkVisibility({opacityProperty: true});
  const seen = things.filter(is_seen), start_of = thing => thing.outerHTML.slice(0, 80);
  const found = [];
  for (const [one, a] of seen) for (const [other, b] of seen) {
    if (one === other || one.contains(other) || other.contains(one)) continue;
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (width > 1 && height > 1) found.push(start_of(one) + " and " + start_of(other));
  }
  for (const [thing, box] of seen) if (box.left < -1 || box.right > innerWidth + 1) found.push(start_of(thing));
  return [seen.length, found];
})()
"""
POINTS = """
[...document.querySelectorAll("#plot-NAME [aria-roledescription=point]")].map(point =>
  [point.getAttribute("aria-label"), ...point.getAttribute("transform").match(/-?[\\d.]+/g).map(Number)])
"""
IS_READY = "document.documentElement?.dataset.ready"


@pytest.fixture(scope="module")
def page_in_browser(tmp_path_factory):
    """A function that opens an address in a browser and waits until its scripts have run."""
    with browser.browser(tmp_path_factory.mktemp("profile")) as tab:

        def open_page(address, width=1400, scheme="light"):
            tab.said.clear()
            tab.open(address, width, scheme)
            tab.wait_for(IS_READY)
            return tab

        yield open_page


@pytest.fixture(params=["whole", "both", "one", "log"])
def written(request, whole, other, tmp_path):
    """A page of each kind: of a run that was resumed twice, of two, of one step, of a log alone."""
    one = write_log(tmp_path / "one", [{"step": 1, "loss": 0.25, "lr": 0.0, "grad_norm": 2.0}])
    log = write_log(tmp_path / ("log" * 30), logged(other))
    folders = {"whole": [whole], "both": [whole, other], "one": [one], "log": [log]}[request.param]
    page_of(*folders, output=tmp_path / "page.html")
    return tmp_path / "page.html"


@in_a_browser
@pytest.mark.parametrize("width, scheme", [(1400, "light"), (400, "dark")])
def test_nothing_overlaps_and_nothing_complains(page_in_browser, written, width, scheme):
    tab = page_in_browser(written, width, scheme)
    tab.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    number, found = tab.run(OVERLAPS)
    assert number > 20
    assert found == []
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.said == []
    ink, ground = [
        tab.run(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)")
        for name in ("color", "backgroundColor")
    ]
    assert (np.mean(ground) > np.mean(ink)) == (scheme == "light")
    assert abs(np.mean(ground) - np.mean(ink)) > 120


@in_a_browser
def test_overlaps_and_complaints_are_seen(page_in_browser, whole, tmp_path):
    """A mistake in these tests would let everything pass."""
    broken = "<h2 style='margin-top: -30px; width: 2000px'>over</h2><script>console.error('oh'); nowhere;</script>"
    broken += "<img src='http://elsewhere.example/a.png'>"
    page = page_of(whole, output=tmp_path / "page.html").replace("<h2>Settings", f"{broken}<h2>Settings")
    (tmp_path / "broken.html").write_text(page)
    tab = page_in_browser(tmp_path / "broken.html")
    _, found = tab.run(OVERLAPS)
    assert any("over</h2>" in each for each in found)
    assert tab.run("document.documentElement.scrollWidth") > 1400
    said = "\n".join(tab.said)
    assert "oh" in said
    assert "nowhere is not defined" in said
    assert "elsewhere.example" in said


@in_a_browser
@pytest.mark.parametrize(
    "name, key", [("loss", "loss"), ("held_out_loss", "held_out_loss"), ("grad_norm", "grad_norm")]
)
def test_points_are_drawn_at_the_values_of_the_log(page_in_browser, whole, tmp_path, name, key):
    page_of(whole, output=tmp_path / "page.html")
    found = page_in_browser(tmp_path / "page.html").run(POINTS.replace("NAME", name))
    labels = [re.match(r"step: (\d+); value: (\S+); run: my_model", label).groups() for label, _, _ in found]
    rows = [row for row in logged(whole) if key in row]
    assert [int(step) for step, _ in labels] == [row["step"] for row in rows]
    assert [float(value) for _, value in labels] == pytest.approx([row[key] for row in rows], rel=1e-10)
    across, down = np.array([place for _, *place in found]).T
    for places, numbers in ((across, [row["step"] for row in rows]), (down, [row[key] for row in rows])):
        slope, start = np.polyfit(numbers, places, 1)
        assert np.abs(np.polyval([slope, start], numbers) - places).max() < 0.1
        assert (slope > 0) == (places is across)


@in_a_browser
def test_intervals_and_resumes_are_drawn(page_in_browser, whole, tmp_path):
    page_of(whole, output=tmp_path / "page.html")
    rules = POINTS.replace("NAME", "held_out_loss").replace("=point", "='rule mark'").split(".map")[0]
    found = page_in_browser(tmp_path / "page.html").run(rules + ".map(rule => rule.getAttribute('aria-label'))")
    resumed = "step: {0}; run: my_model; history: resumed from step {0}"
    assert found[:2] == [resumed.format(2), resumed.format(4)]
    bars = [re.match(r"step: (\d+); low: (\S+); high: (\S+); run", label).groups() for label in found[2:]]
    looks = [row for row in logged(whole) if "held_out_loss" in row]
    assert [int(step) for step, _, _ in bars] == [row["step"] for row in looks]
    for side, sign in ((1, -1), (2, 1)):
        expected = [row["held_out_loss"] + sign * 2 * row["gain_error"] for row in looks]
        assert [float(bar[side]) for bar in bars] == pytest.approx(expected, rel=1e-9)


@in_a_browser
def test_the_slider_shows_the_picture_of_its_step(page_in_browser, whole, other, tmp_path):
    page_of(whole, other, output=tmp_path / "page.html")
    tab = page_in_browser(tmp_path / "page.html")
    steps = [0, 2, 3, 4, 6]

    def shown():
        urls = tab.run("[...document.querySelectorAll('.grid > img')].map(image => image.src)")
        return [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]

    def files(step):
        pairs = (whole, max(s for s in (0, 2, 4, 6) if s <= step)), (other, max(s for s in (0, 3) if s <= step))
        return [(folder / "samples" / f"step-{number:06d}.png").read_bytes() for folder, number in pairs]

    assert shown() == files(6)
    assert len({*map(tuple, map(files, steps))}) == 5
    for place, step in enumerate(steps):
        tab.run(f"slider.value = {place}; slider.dispatchEvent(new Event('input'))")
        assert tab.run("document.getElementById('step').textContent") == str(step)
        assert shown() == files(step)
        assert tab.run("document.querySelectorAll('[aria-pressed=true]').length") == 2
    tab.run("document.querySelectorAll('.strip button')[1].click()")
    assert shown() == files(2)
    assert tab.run("slider.value") == "1"
    assert tab.said == []


@in_a_browser
@pytest.mark.parametrize("width, are_beside", [(1400, True), (400, False)])
def test_small_samples_of_several_runs_are_side_by_side(page_in_browser, whole, other, tmp_path, width, are_beside):
    """Enlarged four times at most; one below the other where there is no room."""
    page_of(whole, other, output=tmp_path / "page.html")
    tab = page_in_browser(tmp_path / "page.html", width, "light")
    places = tab.run(
        "[...document.querySelectorAll('.grid')].map(grid => { const image = grid.querySelector(':scope > img');"
        "return [image.width, image.naturalWidth, grid.getBoundingClientRect().top] })"
    )
    assert [shown / own for shown, own, _ in places] == [4, 4]
    assert (places[0][2] == places[1][2]) == are_beside
    assert tab.said == []


@in_a_browser
def test_a_page_that_is_watched_loads_again(page_in_browser, served, run):
    tab = page_in_browser(served)
    tab.run("slider.value = 1; slider.dispatchEvent(new Event('input'))")
    assert len(tab.run(POINTS.replace("NAME", "loss"))) == 6
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.125}\n')
    tab.wait_for(f"{IS_READY} && document.querySelectorAll('#plot-loss [aria-roledescription=point]').length === 7")
    assert tab.run("document.getElementById('step').textContent") == "2"
    assert tab.said == []
