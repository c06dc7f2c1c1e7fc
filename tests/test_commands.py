"""`sdtune` names its commands without importing what they need, and passes words and status on."""

import os
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module

import pytest
from image_data import write_image_folder
from running import REPO, TRAIN_TEXT_TO_IMAGE, run_command, status_of

from sdtune import __main__ as sdtune
from sdtune.errors import told_to_user

every_command = pytest.mark.parametrize("name", sdtune.COMMANDS)
# Runs `sdtune --help`, then says what it has imported.
HELP = """
import sys
from sdtune.__main__ import main
status = main(["--help"])
print(status, sorted({"torch", "numpy", "diffusers", "transformers", "datasets", "yaml"} & sys.modules.keys()))
"""


@pytest.fixture
def main(monkeypatch):
    """The main() of `sdtune`, which puts the command's name into sys.argv."""
    monkeypatch.setattr(sys, "argv", ["sdtune"])
    return sdtune.main


def test_help_lists_the_commands_and_imports_nothing(main, capsys):
    ran = subprocess.run([sys.executable, "-c", HELP], cwd=REPO, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    *shown, last = ran.stdout.splitlines()
    assert last == "0 []"
    assert max(map(len, shown)) <= 100
    for name, does in sdtune.COMMANDS.items():
        (line,) = [line for line in shown if line.split()[:1] == [name]]
        assert line.endswith(f"  {does}")
    for word in ("--help", "-h"):
        assert status_of(main, word) == 0
        assert capsys.readouterr().out.splitlines() == shown


def test_without_a_command_and_with_one_that_is_none(main, capsys):
    assert status_of(main) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == sdtune.overview() + "\n"
    assert status_of(main, "nothing", "--help") == 2
    assert capsys.readouterr().err == f"sdtune: there is no command 'nothing'\n{sdtune.overview()}\n"


@pytest.mark.parametrize("name, missing", [("check", "imagehash"), ("evaluate", "scipy"), ("generate", "torch")])
def test_a_command_without_what_it_needs_names_the_files(main, monkeypatch, capsys, name, missing):
    def import_module(_):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(sdtune.importlib, "import_module", import_module)
    assert status_of(main, name, "folder") == 2
    told = f"sdtune {name}: needs {missing}; run `pip install -r requirements.txt -r requirements_tools.txt`\n"
    assert capsys.readouterr().err == told
    for file in ("requirements.txt", "requirements_tools.txt"):
        assert (REPO / file).is_file()


def test_words_that_are_not_utf_8_are_refused(main, capsys):
    assert status_of(main, "convert", "model", "caf\udce9.safetensors") == 2
    assert capsys.readouterr().err == "sdtune: 'caf\\udce9.safetensors' is not UTF-8; if it is, set PYTHONUTF8=1\n"


@every_command
def test_every_command_has_a_module_and_help(main, capsys, name):
    """In which it is called by its name, as in its mistakes."""
    module = import_module(f"sdtune.commands.{name.replace('-', '_')}")
    assert module.__doc__.split("\n")[0].endswith((".", "?"))
    assert f"sdtune {name} " in module.__doc__
    assert status_of(main, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: sdtune {name} ")
    assert status_of(main, name, "--no_such_flag") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sdtune {name}:")
    assert "  --no_such_flag: is no flag; --help lists all, drop this\n" in said


def test_there_is_no_other_module():
    modules = {path.stem for path in (REPO / "sdtune" / "commands").glob("*.py")} - {"__init__"}
    assert modules == {name.replace("-", "_") for name in sdtune.COMMANDS}


def test_words_and_status_are_passed_on(tmp_path):
    """In a clone, from any folder, as users run it."""
    write_image_folder(tmp_path / "data", 2, 64)
    ran = run_command(["check", "data", "--resolution=65", "--cache_dir=cache"], cwd=tmp_path)
    assert ran.returncode == 1, ran.stderr
    assert "01.png: 64 x 64, enlarged 1.02 times" in ran.stdout
    assert "Traceback" not in ran.stderr


DRY_RUN = [TRAIN_TEXT_TO_IMAGE, "--train_data_dir=data", "--resolution=32", "--dry_run"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["-m", "sdtune", "--help"], ["-m", "sdtune", "check", "data"], DRY_RUN])
def test_a_reader_that_has_gone_ends_it_without_a_word(words, unbuffered, tiny_pipeline, tmp_path):
    """As `head` does; and where Python writes at once, as in containers."""
    write_image_folder(tmp_path / "data", 2, 64)
    command = [sys.executable, *words]
    if "--help" not in words:
        command += [f"--pretrained_model_name_or_path={tiny_pipeline}", "--cache_dir=cache"]
    job = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    job.stdout.close()
    said, status = job.stderr.read(), job.wait()
    job.stderr.close()
    assert (said, status) == ("", 141)


def test_a_pipe_that_broke_elsewhere_is_no_end_of_the_reader(capfd):
    """Such as that to a process of the program's own."""
    with pytest.raises(BrokenPipeError), told_to_user("sdtune check", errors=OSError):
        raise BrokenPipeError
    assert capfd.readouterr() == ("", "")


def test_the_installed_command_is_this_one():
    settings = ConfigParser()
    settings.read(REPO / "setup.cfg")
    assert settings["options.entry_points"]["console_scripts"].split("\n") == ["", "sdtune = sdtune.__main__:main"]
