"""The requirements name what is imported, in ranges that hold the versions that the tests run with."""

import ast
import configparser
import re
import sys
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from running import REPO, SCRIPTS

FILES = sorted(path.name for path in REPO.glob("requirements*.txt"))
EXTRAS = ("deepspeed", "dev", "emoji", "tools", "trackers", "xformers")
MADE = ("", "_deepspeed", "_dev", "_flax", "_tools", "_trackers")  # of the files, those of `make install`
IMPORT_NAMES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "pytest-xdist": "xdist",
    "vl-convert-python": "vl_convert",
}  # where not the package's name
NEVER_IMPORTED = {"pytest-xdist", "ruff", "tensorboard", "wandb"}  # but by libraries, or run
every_file = pytest.mark.parametrize("name", FILES)


def requirements(name):
    """What a file requires or pins, by canonical name; without the file that it names by -r."""
    lines = [line.partition(" #")[0] for line in (REPO / name).read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith(("#", "-r "))]
    by_name = {canonicalize_name(requirement.name): requirement for requirement in found}
    assert len(by_name) == len(found)
    return by_name


def imported(paths):
    """The libraries that files import, anywhere in them, and not only the tests' own helpers."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    own = {path.stem for folder in ("tests", "miniature") for path in (REPO / folder).glob("*.py")}
    return found - set(sys.stdlib_module_names) - own - {"sdtune"}


def importable(*names):
    """The libraries that can be imported by name once these files are installed."""
    packages = {package for name in names for package in requirements(name)} - NEVER_IMPORTED
    return {IMPORT_NAMES.get(package, package.replace("-", "_")) for package in packages}


def python_files(*patterns):
    """Files by patterns from the root."""
    paths = [path for pattern in patterns for path in REPO.glob(pattern)]
    assert len(paths) >= 5
    return paths


def test_training_requires_what_the_scripts_import_and_nothing_else():
    scripts = [path for path in SCRIPTS if not path.stem.endswith("_flax")]
    assert len(scripts) == 4
    # These two are imported where they are asked for, and the file is named where they are missing.
    asked_for = importable("requirements_xformers.txt", "requirements_deepspeed.txt")
    assert asked_for == {"xformers", "deepspeed"}
    assert imported(scripts) - asked_for == importable("requirements.txt")


def test_training_in_jax_requires_jax_too():
    (script,) = [path for path in SCRIPTS if path.stem.endswith("_flax")]
    assert imported([script]) - importable("requirements.txt") == importable("requirements_flax.txt")
    assert "-r requirements.txt" in (REPO / "requirements_flax.txt").read_text(encoding="utf-8").splitlines()


def test_commands_require_what_they_import_beside():
    ours = imported(python_files("sdtune/*.py", "sdtune/commands/*.py"))
    known = importable("requirements.txt", "requirements_xformers.txt", "requirements_deepspeed.txt")
    assert ours - known == importable("requirements_tools.txt")


def test_development_requires_what_tests_and_miniature_import_beside():
    known = importable("requirements.txt", "requirements_flax.txt", "requirements_tools.txt", "requirements_emoji.txt")
    ours = imported(python_files("tests/*.py", "tools/*.py", "miniature/*.py"))
    assert ours - known - {"tensorboard", "wandb"} == importable("requirements_dev.txt")


@every_file
def test_every_range_holds_its_pin_and_ends(name):
    """What runs in the tests is the pin; a range without an end would claim what is not written yet."""
    pins = requirements("constraints.txt")
    for package, requirement in requirements(name).items():
        (pin,) = pins[package].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), package
        assert {part.operator for part in requirement.specifier} == {">=", "<"}, package


def test_every_pin_is_required():
    required = {package for name in FILES for package in requirements(name)}
    assert set(requirements("constraints.txt")) - required == {"jaxlib"}  # which jax requires


def test_extras_are_the_files():
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg", encoding="utf-8")
    assert setup["options"]["install_requires"] == "file: requirements.txt"
    assert dict(setup["options.extras_require"]) == {name: f"file: requirements_{name}.txt" for name in EXTRAS}
    # Setuptools does not follow -r, so the one file with that is none.
    assert {f"requirements_{name}.txt" for name in (*EXTRAS, "flax")} | {"requirements.txt"} == set(FILES)
    pythons = SpecifierSet(setup["options"]["python_requires"])
    assert [version for version in ("3.10", "3.11", "3.13.0", "3.14") if version in pythons] == ["3.11", "3.13.0"]


def test_make_installs_the_pins_of_all_but_xformers():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    installs = [line.split() for line in makefile.splitlines() if " pip install " in line]
    (install,) = [words for words in installs if "--editable" in words]
    assert install[install.index("--constraint") + 1] == "constraints.txt"
    assert install[install.index("--requirement") + 1] == "requirements_flax.txt"
    (extras,) = re.findall(r'"\.\[(.*)\]"', install[install.index("--editable") + 1])
    assert {"", "_flax"} | {f"_{name}" for name in extras.split(",")} == set(MADE)
    (of_emoji,) = [words for words in installs if words != install]
    assert of_emoji[of_emoji.index("--constraint") + 1] == "constraints.txt"
    assert of_emoji[of_emoji.index("--requirement") + 1 :] == ["requirements_emoji.txt"]


def test_nothing_that_make_installs_brings_xformers():
    """diffusers imports it wherever it is installed, and it then complains of a torch that it was not built for."""
    found = {package for suffix in MADE for package in requirements(f"requirements{suffix}.txt")}
    todo = list(found)
    assert "diffusers" in found
    for package in todo:  # which grows
        try:
            needed = [Requirement(line) for line in requires(package) or []]
        except PackageNotFoundError:  # of another platform
            continue
        names = {canonicalize_name(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": ""})}
        todo += names - found
        found |= names
    assert {"tokenizers", "pandas", "jaxlib"} <= found
    assert "xformers" not in found
