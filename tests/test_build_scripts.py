"""tools/build_scripts.py on small repositories, and on this one."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import load_script
from running import REPO

TOOL = REPO / "tools" / "build_scripts.py"
builder = load_script(TOOL)
SCRIPT = "examples/drawing/draw.py"

FILES = {
    "sdtune/__init__.py": '"""The library."""\n',
    "sdtune/__main__.py": '"""The command."""\n\nfrom sdtune.commands.show import main\n\nmain()\n',
    "sdtune/commands/show.py": '"""Shows."""\n\nimport sdtune.images as images\n\n\ndef main():\n    images.size()\n',
    "sdtune/errors.py": '''"""Mistakes of the user's, and how they
are told. There are few.
"""

import functools
import json
import sys

LIMIT = 3  # lines
UNREACHED = json.dumps("x")


class InputError(ValueError):
    """A mistake."""


# Told once.
@functools.lru_cache(maxsize=LIMIT)
def tell(text):
    """Tells."""
    print(text, file=sys.stderr)
    # Nothing follows.


def unreached():
    return UNREACHED
''',
    "sdtune/images.py": '''"""Images: their sides."""

import math
import os.path as osp

from sdtune.errors import InputError, tell, unreached

SIDES = (8, 16)  # pixels
# What is too small.
SMALL = [side for side in SIDES if side < 10]


# ---------------------------------------------------------------- sizes
def size(name, tell_it=False):
    """Returns a size."""

    def nested():
        return SMALL, osp.basename(name)

    if tell_it:
        tell(name)
    unreached = math.inf  # not the function
    return [unreached for scale in nested()]


def scale(name):
    return unreached(), name
''',
    "sdtune/lists.py": '"""Lists."""\n\nORDER = [1]\n\n\ndef ordered(items):\n    return sorted(items)\n',
    "recipes/draw.py": '''"""Draws.

    python draw.py  "quoted"

Nothing else.
"""

import sys
from pathlib import Path

from sdtune.errors import InputError
from sdtune.images import size
from sdtune.lists import ORDER

NAME = Path(__file__).name


def parse_args(argv=None):
    """Reads."""
    return argv or sys.argv[1:]


# ---------------------------------------------------------------- main
def main():
    """Draws."""
    if not parse_args():
        raise InputError(__doc__)
    print(NAME, size(NAME), ORDER)


if __name__ == "__main__":
    main()
''',
    "constraints.txt": "# pins\ntorch==2.13.0\npillow==13.0.0\n",
    "recipes/list.py": '''"""Lists."""

from sdtune.lists import ordered


def main():
    print(ordered([2, 1]))


if __name__ == "__main__":
    main()
''',
}

BUILT = '''#!/usr/bin/env python
# Built by `make scripts` from recipes/draw.py and sdtune/: edit those; a copy is yours to edit.
"""Draws.

    python draw.py  "quoted"

Nothing else.
"""

# Constants and classes come first, then the functions:
#
#   the script   what is its own: its flags, what it loads and trains, the loss of a step, what it saves, main
#   errors       Mistakes of the user's, and how they are told
#   images       Images: their sides

import functools
import math
import os.path as osp
import sys
from pathlib import Path

LIMIT = 3  # lines


class InputError(ValueError):
    """A mistake."""


SIDES = (8, 16)  # pixels
# What is too small.
SMALL = [side for side in SIDES if side < 10]

ORDER = [1]

NAME = Path(__file__).name


# ---------------------------------------------------------------------------------------------------------- the script
def parse_args(argv=None):
    """Reads."""
    return argv or sys.argv[1:]


def main():
    """Draws."""
    if not parse_args():
        raise InputError(__doc__)
    print(NAME, size(NAME), ORDER)


# -------------------------------------------------------------------------------------------------------------- errors


# Told once.
@functools.lru_cache(maxsize=LIMIT)
def tell(text):
    """Tells."""
    print(text, file=sys.stderr)
    # Nothing follows.


# -------------------------------------------------------------------------------------------------------------- images
def size(name, tell_it=False):
    """Returns a size."""

    def nested():
        return SMALL, osp.basename(name)

    if tell_it:
        tell(name)
    unreached = math.inf  # not the function
    return [unreached for scale in nested()]


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of three modules and two recipes, as yet without scripts."""
    monkeypatch.setattr(builder, "MODULES", ["errors", "images", "lists"])
    monkeypatch.setattr(builder, "SCRIPTS", {"draw": "examples/drawing", "list": "examples/listing"})
    shutil.copy(REPO / "ruff.toml", tmp_path)
    for label, text in FILES.items():
        write(tmp_path, label, text)
    return tmp_path


def write(root, label, text):
    path = root / label
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def replace(root, label, old, new):
    text = (root / label).read_text(encoding="utf-8")
    assert text.count(old) == 1
    write(root, label, text.replace(old, new))


def build(root, capsys, *flags):
    """Runs the builder; returns its status and what it printed."""
    status = builder.main(["--root", str(root), *flags])
    output = capsys.readouterr()
    return status, output.out + output.err


def test_a_script_has_what_its_recipe_reaches_and_nothing_else(root, capsys):
    status, output = build(root, capsys)
    assert status == 0, output
    assert (root / SCRIPT).read_text(encoding="utf-8") == BUILT
    listing = (root / "examples/listing/list.py").read_text(encoding="utf-8")
    assert "import" not in listing
    assert "ORDER" not in listing
    assert "def ordered(items):" in listing


def test_versions_of_what_is_imported_are_named(root, capsys, monkeypatch):
    monkeypatch.setattr(builder, "TESTED", ["torch", "yaml"])
    write(root, "constraints.txt", "torch==2.13.0\n# yaml==1\n")
    assert builder.tested_versions(root, ["import torch.nn", "import yaml"]) == "# Tested with torch 2.13.0.\n"
    assert builder.tested_versions(root, ["import json"]) == ""


def test_imports_of_libraries_are_not_searched_for_garbage(root, tmp_path):
    """As they run the collection of garbage is off, and after them it is on and leaves out what they made."""
    write(root, "constraints.txt", "torch==2.13.0\n")
    write(root, "sdtune/lists.py", FILES["sdtune/lists.py"].replace("\n\n", "\n\nfrom torch import WAS_ON\n\n", 1))
    write(root, "sdtune/lists.py", (root / "sdtune/lists.py").read_text().replace("[1]", "[WAS_ON]"))
    assert builder.main(["--root", str(root)]) == 0
    (tmp_path / "torch.py").write_text("import gc\n\nWAS_ON = gc.isenabled()\nCYCLE = []\nCYCLE.append(CYCLE)\n")
    code = "import gc, draw; print(draw.ORDER, gc.isenabled(), gc.get_freeze_count() > 1000)"
    paths = f"{tmp_path}:{(root / SCRIPT).parent}"
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, env={"PYTHONPATH": paths}, text=True, capture_output=True, check=True).stdout
    assert told == "[False] True True\n"
    listing = (root / "examples/listing/list.py").read_text(encoding="utf-8")
    assert "gc" not in listing  # which imports nothing


def test_what_comes_first_is_there():
    assert set(builder.READ_FIRST) <= set(builder.MODULES)


def test_what_a_reader_looks_for_comes_first(root, capsys, monkeypatch):
    monkeypatch.setattr(builder, "READ_FIRST", ["images"])
    assert build(root, capsys)[0] == 0
    text = (root / SCRIPT).read_text(encoding="utf-8")
    sections = re.findall(r"^# -+ (.+)$", text, re.MULTILINE)
    assert sections == ["the script", "images", "errors"]
    assert text.index("#   images ") < text.index("#   errors ") < text.index("- images\n") < text.index("- errors\n")


def test_a_script_is_linted_and_runs_without_sdtune(root, capsys, tmp_path):
    build(root, capsys)
    ruff = [sys.executable, "-m", "ruff"]
    for command in ("check", "--no-cache"), ("format", "--check", "--no-cache"):
        result = subprocess.run([*ruff, *command, "examples"], cwd=root, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "alone"
    write(folder, "sdtune.py", 'raise ImportError("blocked")\n')
    shutil.copy(root / SCRIPT, folder)
    result = subprocess.run([sys.executable, "draw.py", "x"], cwd=folder, capture_output=True, text=True)
    assert result.stdout == "draw.py [inf, inf] [1]\n", result.stderr


def test_a_second_build_changes_nothing(root, capsys):
    assert "Wrote examples/drawing/draw.py." in build(root, capsys)[1]
    assert "Wrote" not in build(root, capsys)[1]
    assert build(root, capsys, "--check")[0] == 0


def test_check_writes_nothing(root, capsys):
    status, output = build(root, capsys, "--check")
    assert status == 1
    assert f"{SCRIPT}: is missing" in output
    assert not (root / "examples").exists()


@pytest.mark.parametrize(
    "label, old, new, messages",
    [
        (SCRIPT, "tell(name)", "tell(SMALL)", ["`size` differs from sdtune/images.py:14"]),
        (SCRIPT, "    # Nothing follows.\n", "", ["`tell` differs from sdtune/errors.py:19"]),
        (SCRIPT, "# Told once.\n", "", ["`tell` differs from sdtune/errors.py:19"]),
        (SCRIPT, "LIMIT = 3  # lines", "LIMIT = 4  # lines", ["`LIMIT` differs from sdtune/errors.py:9"]),
        (
            SCRIPT,
            '__name__ == "__main__":\n',
            '__name__ == "__main__":\n    print()\n',
            ["differs from recipes/draw.py:31"],
        ),
        (SCRIPT, "ORDER = [1]\n", "ORDER = [1]\nMORE = [1]\n", ["`MORE` is not reached from recipes/draw.py"]),
        (SCRIPT, "ORDER = [1]\n\n", "", ["`ORDER` differs from sdtune/lists.py:3"]),
        (
            SCRIPT,
            "ORDER = [1]\n\nNAME = Path(__file__).name",
            "NAME = Path(__file__).name\n\nORDER = [1]",
            ["the order"],
        ),
        (SCRIPT, "#!/usr/bin/env python\n", "", ["the head differs from what recipes/draw.py and sdtune/ give"]),
        (SCRIPT, "#   errors       Mistakes", "#   errors       mistakes", ["the table of sections differs"]),
        (SCRIPT, "import math\n", "import math\nimport re\n", ["the block of imports differs"]),
        (SCRIPT, "---- images\n", "---- pictures\n", ["a section line differs"]),
        (SCRIPT, '"""Draws.\n\n', '"""Draws it.\n\n', ["the docstring differs from recipes/draw.py:1"]),
        (SCRIPT, "import math\n", "import math (\n", ["is missing or not Python"]),
        ("sdtune/images.py", "tell(name)", "tell(SMALL)", ["`size` differs from sdtune/images.py:14"]),
        (
            "sdtune/errors.py",
            "print(text,",
            "unreached()\n    print(text,",
            [
                "`tell` differs from sdtune/errors.py:19",
                "`unreached` differs from sdtune/errors.py:26",
                "`UNREACHED` differs from sdtune/errors.py:10",
                "the block of imports differs",
            ],
        ),
        ("sdtune/errors.py", "Mistakes of", "Errors of", ["the table of sections differs"]),
        ("recipes/draw.py", '"""Draws.\n\n', '"""Draws it.\n\n', ["the docstring differs from recipes/draw.py:1"]),
        (
            "recipes/draw.py",
            "raise InputError(__doc__)",
            "raise ValueError(__doc__)",
            [
                "`main` differs from recipes/draw.py:24",
                "`InputError` is not reached from recipes/draw.py",
            ],
        ),
    ],
)
def test_check_names_what_differs_and_its_source(root, capsys, label, old, new, messages):
    build(root, capsys)
    replace(root, label, old, new)
    status, output = build(root, capsys, "--check")
    assert status == 1
    for message in messages:
        assert f"{SCRIPT}: {message}" in output or f"{SCRIPT}: `if __name__ == '__main__':` {message}" in output
    assert "run `make scripts`" in output
    assert len(output.splitlines()) == len(messages)


# (file, what stands there, what takes its place, line or place that the message names, what it says)
TWO_MEANINGS = [
    (
        "sdtune/lists.py",
        "ORDER = [1]",
        "SIDES = 3\nORDER = [SIDES]",
        "sdtune/images.py:10",
        "but sdtune/lists.py:3 at",
    ),
    (
        "sdtune/lists.py",
        "ORDER = [1]",
        "import re as math\n\nORDER = [math]",
        "sdtune/images.py:14",
        "is math here, but re",
    ),
    (
        "recipes/draw.py",
        "def main():",
        "def print():\n    pass\n\n\ndef main():",
        "sdtune/errors.py:19",
        "Python's own",
    ),
    (
        "sdtune/errors.py",
        "LIMIT = 3  # lines\n",
        "LIMIT = 3\nLIMIT = 4\n",
        10,
        "`LIMIT` is sdtune/errors.py:9 already",
    ),
    ("sdtune/errors.py", "import json\n", "import json as tell\n", 19, "`tell` is json already"),
    ("sdtune/images.py", "import math\n", "import math\nfrom cmath import math\n", 4, "`math` is math already"),
]
HIDDEN_REFERENCES = [
    ("sdtune/errors.py", "import json\n", "from __future__ import annotations\n", 6, "__future__"),
    ("sdtune/errors.py", "import json\n", "from json import *\n", 6, "`*`"),
    ("sdtune/errors.py", "import json\n", "from . import json\n", 6, "relative"),
    ("sdtune/errors.py", "import json\n", "import sdtune.images\n", 6, "write `from sdtune.module import name`"),
    ("sdtune/errors.py", "import json\n", "from sdtune import images\n", 6, "write `from sdtune.module import name`"),
    (
        "sdtune/images.py",
        "InputError, tell,",
        "InputError, tell as tell,",
        6,
        "write `from sdtune.module import name`",
    ),
    ("recipes/list.py", "    print", "    from sdtune.lists import ORDER\n\n    print", 7, "at the top level"),
    ("sdtune/errors.py", "def tell(text)", 'def tell(text: "str")', 19, "quoted annotation"),
    ("sdtune/errors.py", "def tell(text)", 'def tell(text) -> list["str"]', 19, "quoted annotation"),
    ("sdtune/errors.py", '"""A mistake."""', 'text: "str"', 14, "quoted annotation"),
    ("sdtune/errors.py", "print(text,", "print(globals(),", 21, "`globals()`"),
    ("recipes/list.py", "print(ordered(", "print(globals(), ordered(", 7, "`globals()`"),
    ("sdtune/errors.py", "    print(text,", "    global LIMIT\n    print(text,", 21, "`global`"),
]
WRONG_DIRECTIONS = [
    ("sdtune/errors.py", "import json\n", "from sdtune.images import size\n", 6, "does not stand before this file"),
    ("sdtune/errors.py", "import json\n", "from sdtune.errors import tell\n", 6, "does not stand before this file"),
    ("sdtune/errors.py", "import json\n", "from sdtune.gone import tell\n", 6, "does not stand before this file"),
    (
        "recipes/draw.py",
        "sdtune.images import size",
        "sdtune.images import InputError",
        12,
        "not defined in sdtune/images",
    ),
    ("sdtune/errors.py", "import json\n", "from sdtune.commands.show import main\n", 6, "imports a command"),
    ("recipes/draw.py", "import sys\n", "from sdtune.commands.show import main\n", 8, "imports a command"),
    ("recipes/draw.py", "import sys\n", "from sdtune.commands import show\n", 8, "imports a command"),
    ("recipes/draw.py", "import sys\n", "import recipes.list\n", 8, "imports a recipe"),
    ("sdtune/errors.py", "import json\n", "from recipes.draw import main\n", 6, "imports a recipe"),
    ("sdtune/commands/show.py", "    images.size()", "    from recipes import draw", 7, "imports a recipe"),
    ("sdtune/__main__.py", "main()", "import recipes.draw", 5, "imports a recipe"),
]
NOT_ABOVE = [
    ("sdtune/images.py", "SIDES = (8, 16)", "SIDES = size(8)", 8, "`SIDES` uses `size` while it is imported"),
    ("sdtune/images.py", "[side for", "[tell(side) for", 10, "`SMALL` uses `tell`"),
    ("sdtune/images.py", "SIDES = (8, 16)  # pixels", "SIDES = SMALL", 8, "`SIDES` uses `SMALL`"),
    ("sdtune/errors.py", "class InputError(ValueError)", "class InputError(tell)", 13, "`InputError` uses `tell`"),
    ("sdtune/errors.py", '    """A mistake."""', '    TEXT = tell("x")', 13, "`InputError` uses `tell`"),
    ("sdtune/errors.py", '"""A mistake."""', "def f(self, x=tell):\n        pass", 13, "`InputError` uses `tell`"),
    ("sdtune/errors.py", "@functools.lru_cache(maxsize=LIMIT)", "@size_of", 19, "F821"),
    ("recipes/draw.py", "def main():", "@size\ndef main():", 25, "`main` uses `size`"),
    ("recipes/draw.py", "def main():", "def main(default=size):", 24, "`main` uses `size`"),
    ("recipes/draw.py", "def main():", "def main(kind: size = None):", 24, "`main` uses `size`"),
]
OF_THE_FILE = [
    ("sdtune/errors.py", "print(text,", "print(__file__,", 21, "asks for its file"),
    ("sdtune/errors.py", "print(text,", "print(__doc__,", 21, "asks for its file"),
    ("sdtune/errors.py", "print(text,", "print(__name__,", 21, "asks for its file"),
    ("sdtune/errors.py", "print(text,", "print(inspect.getsource(tell),", 21, "asks for its file"),
    ("sdtune/errors.py", "print(text,", "print(getsource(tell),", 21, "asks for its file"),
]
TOP_LEVEL = [
    ("sdtune/errors.py", "LIMIT = 3", "LIMIT: int = 3", 9, "is no import, function, class, constant"),
    ("sdtune/errors.py", "LIMIT = 3", "limit = 3", 9, "is no import"),
    ("sdtune/errors.py", "LIMIT = 3", "LIMIT = OTHER = 3", 9, "is no import"),
    ("sdtune/errors.py", "LIMIT = 3", "LIMIT, OTHER = 3, 4", 9, "is no import"),
    ("sdtune/errors.py", "LIMIT = 3", "LIMIT = 3\nLIMIT += 1", 10, "is no import"),
    ("sdtune/errors.py", "LIMIT = 3", "print(3)", 9, "is no import"),
    ("sdtune/errors.py", "LIMIT = 3", "if sys.argv:\n    LIMIT = 3", 9, "is no import"),
    ("sdtune/lists.py", "ORDER = [1]", 'if __name__ == "__main__":\n    ORDER = [1]', 3, "asks for its file"),
    ("sdtune/lists.py", '"""Lists."""\n\n', "", 1, "has no docstring"),
    ("recipes/list.py", 'if __name__ == "__main__":\n    main()\n', "", 9, "ends in its main guard"),
    ("recipes/list.py", "    main()\n", "    main()\n\nLAST = 1\n", 10, "ends in its main guard"),
    ("recipes/list.py", "    main()\n", "    main()\nelse:\n    print()\n", 10, "is no import"),
]
RUFF = [
    ("sdtune/errors.py", "LIMIT = 3", "LIMIT=3", 9, "is not formatted; run `ruff format sdtune/errors.py`"),
    ("recipes/list.py", "    print(", "     print(", 7, "is not formatted"),
    ("sdtune/lists.py", "ORDER = [1]", "# fmt: off\nA = 1\nORDER = [1,  2]\n# fmt: on", 5, "format `ORDER`"),
    ("sdtune/images.py", "tell(name)", "teel(name)", 14, "F821"),
    ("sdtune/images.py", "SIDES = (8, 16)", "X = (BIG := 99)\nSIDES = (BIG, 16)", 9, "F821"),
    ("sdtune/images.py", "        tell(name)", "        import json", 14, "F401"),
    ("sdtune/images.py", "        tell(name)", "        import json  # noqa: F401", 14, "F401"),
    ("sdtune/errors.py", "import json", "import (", 6, "is not Python"),
    (
        "sdtune/errors.py",
        "are told.",
        "are told" + " or not" * 10 + ".",
        1,
        "too long for the table of sections of examples/drawing/draw.py",
    ),
]


@pytest.mark.parametrize(
    "label, old, new, line, message",
    [*TWO_MEANINGS, *HIDDEN_REFERENCES, *WRONG_DIRECTIONS, *NOT_ABOVE, *OF_THE_FILE, *TOP_LEVEL, *RUFF],
)
def test_what_breaks_a_rule_is_named_by_file_and_line(root, capsys, label, old, new, line, message):
    replace(root, label, old, new)
    status, output = build(root, capsys)
    assert status == 2, output
    assert output.startswith(f"{line}: " if isinstance(line, str) else f"{label}:{line}: ")
    assert message in output
    assert not (root / "examples").exists()


def test_files_and_lists_match(root, capsys, monkeypatch):
    write(root, "sdtune/flax/more.py", '"""More."""\n')
    status, output = build(root, capsys)
    assert (status, output[:50]) == (2, "sdtune/flax/more.py:1: is not listed in MODULES or")
    monkeypatch.setattr(builder, "MODULES", [*builder.MODULES, "flax.more"])
    assert build(root, capsys)[0] == 0
    (root / "sdtune/flax/more.py").unlink()
    status, output = build(root, capsys, "--check")
    assert (status, output[:54]) == (2, "sdtune/flax/more.py:1: is missing, but is listed in MO")


def test_a_recipe_is_listed(root, capsys):
    write(root, "recipes/more.py", FILES["recipes/list.py"])
    status, output = build(root, capsys)
    assert status == 2
    assert output.startswith("recipes/more.py:1: is not listed in MODULES or SCRIPTS of tools/build_scripts.py")


def test_a_name_may_mean_two_things_in_two_scripts(root, capsys, monkeypatch):
    monkeypatch.setattr(builder, "MODULES", [*builder.MODULES, "flax.lists"])
    text = '"""Lists in JAX."""\n\n\ndef size(items):\n    return len(items)\n'
    write(root, "sdtune/flax/lists.py", text)
    replace(root, "recipes/list.py", "from sdtune.lists import ordered\n", "from sdtune.flax.lists import size\n")
    replace(root, "recipes/list.py", "ordered(", "size(")
    assert build(root, capsys)[0] == 0
    listing = (root / "examples/listing/list.py").read_text(encoding="utf-8")
    assert "#   flax.lists   Lists in JAX\n" in listing
    assert "- flax.lists\ndef size(items):\n" in listing
    assert (root / SCRIPT).read_text(encoding="utf-8") == BUILT


# (what stands in sdtune/images.py, what takes its place, what is in the script then, what is not)
REFERENCES = [
    ("SIDES = (8, 16)", "SIDES = (8, lambda: scale(1))", ["def scale(name):", "def unreached():"], []),
    ("SIDES = (8, 16)", "SIDES = [scale for scale in range(2)]", [], ["def scale(", "def unreached("]),
    ("tell(name)", "scale = tell(name)", [], ["def scale("]),
    ("tell(name)", "name.scale(scale=1)", [], ["def scale(", "def tell("]),
    ("tell(name)", "(lambda scale: scale)(tell(name))", [], ["def scale("]),
    ("tell(name)", "(lambda name: scale(name))(tell)", ["def scale("], []),
    ("tell(name)", "[[scale(b) for b in a] for a in name]", ["def scale("], []),
    ("tell(name)", "text: scale = 1", ["def scale("], []),
    ("    def nested():", "    @scale\n    def nested(name=scale):", ["def scale("], []),
    ("    def nested():", "    class Nested(scale):\n        pass\n\n    def nested():", ["def scale("], []),
    ("tell(name)", "import json\n\n        json.dump(name)", ["        import json\n"], ["\nimport json"]),
    ("import os.path as osp", "import os.path as osp\nimport os", [], ["\nimport os\n"]),
    ("def size(", "async def size(", ["async def size("], []),
]


@pytest.mark.parametrize("old, new, present, absent", REFERENCES)
def test_references_are_found_by_scopes(root, capsys, old, new, present, absent):
    replace(root, "sdtune/images.py", old, new)
    status, output = build(root, capsys)
    assert status == 0, output
    text = (root / SCRIPT).read_text(encoding="utf-8")
    assert [part for part in present if part not in text] == []
    assert [part for part in absent if part in text] == []


def test_this_repository_is_built():
    result = subprocess.run([sys.executable, TOOL, "--check"], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
