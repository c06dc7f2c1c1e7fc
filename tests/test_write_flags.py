"""docs/flags.md has every flag of every script, as the parsers have it, and `make check` notices what is stale."""

import argparse
import importlib.util
import re
import shutil

import pytest
from conftest import load_script
from flags_page import FLAGS_PAGE, read_flags, rows_of
from running import REPO, SCRIPTS

from sdtune.arguments import positive_int

TOOL = REPO / "tools" / "write_flags.py"
COPIED = ["docs/flags.md", "tools/diffusers_flags.yaml"]
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("write_flags", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, by the stem of their names."""
    return {path.stem: load_script(path) for path in SCRIPTS}


@pytest.fixture(scope="module")
def page():
    return read_flags()


@pytest.fixture
def run(tool, scripts, tmp_path, monkeypatch):
    """Runs the tool on a copy of what it reads and writes, with scripts that are loaded; returns its status."""
    for name in COPIED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    monkeypatch.setattr(tool, "load_script", lambda path: scripts[path.stem])
    return lambda *words: tool.main([f"--root={tmp_path}", *words])


def actions_of(script):
    """The flags of a script with their argparse actions; another spelling is no other flag."""
    found = {}
    for action in script.make_parser()._actions:
        for flag in action.option_strings:
            if re.fullmatch(r"--\w+", flag) and flag != "--help":
                found[flag.removeprefix("--")] = action
    return found


@every_script
def test_the_page_has_every_flag_and_no_other(scripts, page, path):
    told = {flag: says for flag, says in page[path.stem].items() if "default" in says}
    actions = actions_of(scripts[path.stem])
    assert len(actions) > 70
    assert told.keys() == actions.keys()
    for flag, action in actions.items():
        default = action.default
        if isinstance(default, bool):
            assert told[flag]["default"] == ("on" if default else "off")
            assert told[flag]["takes"] == "switch"
        elif default is None:
            assert told[flag]["default"] == "-"
        elif isinstance(default, int | float):
            assert float(told[flag]["default"]) == default
        else:
            assert told[flag]["default"] == default
        if action.choices:
            assert re.findall(r"`([^`]+)`", told[flag]["takes"]) == [str(choice) for choice in action.choices]


@every_script
def test_the_page_says_what_a_flag_accepts(scripts, page, path):
    """The ends of each interval are taken or refused as it says."""
    script, num_intervals = scripts[path.stem], 0
    for flag, says in page[path.stem].items():
        interval = re.fullmatch(r"(whole )?number in `([\[(])([^,]+), ([^\])]+)([\])])`", says.get("takes", ""))
        if not interval:
            continue
        num_intervals += 1
        _, left, low, high, right = interval.groups()
        for end, is_included in ((low, left == "["), (high, right == "]")):
            if end == "inf" and interval[1]:
                continue  # no whole number
            value = str(int(float(end))) if interval[1] else end
            problems = script.parse_flags(script.make_parser(), [f"--{flag}={value}"], {})[1]
            assert (problems == []) == is_included, (flag, value, problems)
        problems = script.parse_flags(script.make_parser(), [f"--{flag}=1.5"], {})[1]
        assert bool(problems) == bool(interval[1] or float(low) > 1.5 or float(high) < 1.5), flag
    assert num_intervals > 20


def test_the_page_is_as_it_is_made(run, capsys):
    assert run("--check") == 0
    assert "docs/flags.md is as the scripts' parsers say." in capsys.readouterr().out


def test_a_stale_page_is_noticed_and_made_anew(run, tmp_path, capsys):
    page = tmp_path / "docs" / "flags.md"
    for stale in (page.read_text().replace("| 512 |", "| 511 |"), None):
        page.write_text(stale) if stale else page.unlink()
        assert run("--check") == 1
        assert "docs/flags.md: is missing or not what " in (said := capsys.readouterr().out)
        assert said.endswith("run `make scripts`\n")
        assert page.exists() == bool(stale)
        assert run() == 0
        assert page.read_text() == FLAGS_PAGE.read_text()


def test_a_flag_that_no_script_has_is_refused(run, tmp_path, capsys):
    upstream = tmp_path / "tools" / "diffusers_flags.yaml"
    text = upstream.read_text()
    for more in ("nonsense:\n  T: same\n", "rank_of:\n  TL: refused\n"):
        upstream.write_text(text + more)
        assert run("--check") == 2
        flag = more.partition(":")[0]
        assert f"tools/diffusers_flags.yaml: {flag}: T" in capsys.readouterr().err


def test_make_runs_it():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    recipes = dict(re.findall(r"^(\w+): .*\n((?:\t.*\n)+)", makefile, flags=re.M))
    assert "$(BIN)/python tools/write_flags.py\n" in recipes["scripts"]
    assert "$(BIN)/python tools/write_flags.py --check\n" in recipes["check"]


def test_cells_say_what_differs(tool):
    assert tool.by_scripts({"T": "a", "D": "a"}) == "a"
    assert tool.by_scripts({"T": "a", "D": "b", "DL": "a"}) == "T DL: a<br>D: b"
    assert tool.in_cell("give --a=1 | <x>, not x--y") == r"give `--a=1` \| \<x>, not x--y"
    assert tool.in_one_order([["a", "b", "c"], ["a", "x", "c", "y"], ["z", "b"]]) == ["a", "z", "b", "x", "c", "y"]


def test_a_row_has_default_range_and_help(tool):
    parser = argparse.ArgumentParser()
    action = parser.add_argument("--size", type=positive_int, default=3, help="how large, as --width=2 [1, inf)")
    row = tool.make_row("--size", {"T": action, "D": action}, {"D": "same"})
    told = rows_of(tool.ROW_HEAD + row, "flag")
    assert told == [
        {
            "flag": "`--size`",
            "in": "T D",
            "default": "3",
            "takes": "whole number in `[1, inf)`",
            "what it does": "how large, as `--width=2`",
            "in diffusers' script": "T: ours alone<br>D: same",
        }
    ]
