"""tools/check_shared_blocks.py on small repositories with scripts that share blocks."""

import re
import subprocess
import sys

import pytest
from conftest import load_script
from running import REPO

TOOL = REPO / "tools" / "check_shared_blocks.py"
EXPECTED = {2: ["SIDE", "SAMPLE", "ORDER", "Images", "encode"], 3: ["read"]}

SCRIPT = '''#!/usr/bin/env python
"""Trains."""

import argparse

SIDE = 16  # pixels
SAMPLE, ORDER = range(2)
FILTERS = ["lanczos"]


# ---------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    filters = sorted(FILTERS)
    add = parser.add_argument_group("data").add_argument
    add("--resolution", type=int, default=512, help="side in pixels")
    add("--filter", choices=filters, default="lanczos", help="filter for resizing")
    add("--flip", **switch, help="mirror half of the images")
    parser.add_argument("--prompts", nargs="+", help="what to draw")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- data
# A folder is read once.
# Nothing of the user's is changed.
@cached
def read(folder):
    """Reads a folder of images."""
    # The order does not depend on the file system.
    return sorted(folder)
    # Nothing follows.


class Images:
    """Images."""

    side: int = SIDE  # of each


# ---------------------------------------------------------------------------------------------------- models
def encode(vae, batch):
    """Encodes images to latents."""
    return vae(batch)


def train(args):
    """Trains."""


if __name__ == "__main__":
    train(parse_args())
'''

READ = SCRIPT[SCRIPT.index("# A folder") : SCRIPT.index("\n\n\nclass")]
FLAX = f'''"""Trains in JAX."""


def parse_args(argv=None):
    """Reads the command line."""
    add("--resolution", type=int, default=512, help="side in pixels")


def encode(params, batch):
    """Encodes in JAX."""
    return params @ batch


# ---------------------------------------------------------------------------------------------------- data
{READ}
'''

CONVERT = f'''"""Converts."""

SIDE = 16  # pixels
BLOCK = 1


{READ}


def main():
    """Converts."""
'''

INSPECT = '"""Inspects."""\n\nBLOCK = 2\n\n\ndef main():\n    """Inspects."""\n'

FULL, LORA = "train_full.py", "train_full_lora.py"
FLAX_LABEL = "examples/images/train_full_flax.py"


class Repository:
    """A small repository, and the tool on it."""

    def __init__(self, root, tool, capsys):
        self.root, self.tool, self.capsys = root, tool, capsys
        lora = SCRIPT.replace('"""Trains."""', '"""Trains adapters."""').replace("FILTERS =", "KINDS =")
        for name, text in (("images/train_full.py", SCRIPT), ("images/train_full_flax.py", FLAX),
                           ("subject/train_full_lora.py", lora)):
            self.write(f"examples/{name}", text)
        self.write("examples/images/helper.py", "SIDE = 17\n")  # neither a script nor a tool
        self.write("tools/convert.py", CONVERT)
        self.write("tools/inspect_images.py", INSPECT)

    def write(self, label, text):
        path = self.root / label
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))

    def path(self, name):
        (path,) = self.root.rglob(name)
        return path

    def replace(self, name, old, new):
        text = self.path(name).read_text(encoding="utf-8")
        assert text.count(old) == 1
        self.path(name).write_text(text.replace(old, new), encoding="utf-8")

    def contents(self):
        return {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}

    def run(self, *words, status=0):
        assert self.tool.main(["--root", str(self.root), *words]) == status
        out, err = self.capsys.readouterr()
        return err if status == 2 else out

    def differs(self, *parts):
        """The check fails and prints all `parts`; returns what it prints."""
        text = self.run(status=1)
        assert [part for part in parts if part not in text] == []
        return text


@pytest.fixture(scope="module")
def loaded_tool():
    return load_script(TOOL)


@pytest.fixture
def tool(loaded_tool, monkeypatch):
    for name, value in (("EXPECTED", EXPECTED), ("EXCEPTIONS", {}), ("DEFAULTS", {})):
        monkeypatch.setattr(loaded_tool, name, value)
    return loaded_tool


@pytest.fixture
def repository(tool, tmp_path, capsys):
    return Repository(tmp_path, tool, capsys)


def test_equal_scripts_pass_in_one_line(repository):
    before = repository.contents()
    assert repository.run() == (
        "6 blocks of 17 lines and 4 flags are shared by 3 scripts: 73% of the helper lines of train_full_flax.py, the "
        "smallest.\n")
    assert repository.contents() == before


def test_this_repository_passes():
    done = subprocess.run([sys.executable, TOOL], cwd=REPO, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1


# ---- What differs

EDITS = {
    "code": ("return vae(batch)", "return vae(batch)[0]"),
    "docstring": ("Encodes images to latents", "Encodes images as latents"),
    "comment beside": ("16  # pixels", "16  # pixel"),
    "comment within": ("# The order does", "# The sequence does"),
    "comment at the end": ("    # Nothing follows.", "    # Nothing comes."),
    "comment at the end, gone": ("\n    # Nothing follows.", ""),
    "comment above": ("# A folder is read once.", "# A folder is read one time."),
    "comment above, gone": ("# A folder is read once.\n", ""),
    "decorator": ("@cached\n", ""),
    "blank line": ('"""Images."""\n\n', '"""Images."""\n'),
    "field": ("side: int", "side: float"),
    "tuple": ("range(2)", "(0, 1)"),
}


@pytest.mark.parametrize("old, new", EDITS.values(), ids=EDITS)
def test_an_edit_is_found(repository, old, new):
    repository.replace(LORA, old, new)
    text = repository.differs("--- examples/images/train_full.py:", "+++ examples/subject/train_full_lora.py:", "@@")
    assert text.count("+++ ") == 1
    changed = [line for line in text.splitlines() if re.match(r"[-+](?!-- |\+\+ )", line)]
    assert changed
    assert len(changed) <= 2


def test_most_scripts_are_right(repository):
    repository.replace(FULL, "sorted(folder)", "list(folder)")
    text = repository.differs("-    return sorted(folder)", "+    return list(folder)")
    assert re.findall(r"\+\+\+ (.*):\d+", text) == ["examples/images/train_full.py"]


def test_a_long_difference_is_cut(repository):
    more = "\n".join(f"    batch = vae({number})" for number in range(50))
    repository.replace(LORA, "    return vae(batch)", f"{more}\n    return vae(batch)")
    assert repository.differs("... and 25 more lines").count("\n") < 40


def test_data_blocks_are_one_family_and_others_two(repository):
    repository.replace("train_full_flax.py", "sorted(folder)", "list(folder)")
    assert repository.differs(f"+++ {FLAX_LABEL}").count("+++ ") == 1  # encode is another function in JAX
    repository.replace("train_full_flax.py", "def encode", "def read_more")
    repository.replace("train_full_flax.py", "def read(", "def encode(")  # now it stands in a data section
    repository.differs(f"+++ {FLAX_LABEL}", '+    """Reads a folder of images."""')


def test_a_tool_has_the_text_of_the_scripts(repository):
    repository.replace("convert.py", "16  # pixels", "17  # pixels")
    repository.differs("+++ tools/convert.py:3")


def test_a_renamed_block_is_found(repository):
    repository.replace(LORA, "def encode", "def encode_images")
    repository.differs("encode (by 0 scripts, expected 2)")


def test_a_block_renamed_in_one_of_three_is_found(repository):
    repository.replace(FULL, "def read(", "def read_folder(")
    repository.differs("read (by 2 scripts, expected 3)")


def test_a_block_that_is_not_expected_is_found(repository):
    for name in (FULL, LORA):
        repository.replace(name, "def train(", "def more():\n    pass\n\n\ndef train(")
    repository.differs("more (by 2 scripts, expected 0)")


def test_list_prints_what_to_expect(repository, tool, monkeypatch):
    monkeypatch.setattr(tool, "EXPECTED", {})
    repository.differs("read (by 3 scripts, expected 0)")
    text = repository.run("--list")
    found = {}
    exec(text, found)
    assert {number: set(names) for number, names in found["EXPECTED"].items()} == {
        number: set(names) for number, names in EXPECTED.items()}
    assert max(map(len, text.splitlines())) <= 119
    monkeypatch.setattr(tool, "EXPECTED", found["EXPECTED"])
    repository.run()


@pytest.mark.parametrize("gone", [[LORA, "train_full_flax.py"], [FULL, LORA, "train_full_flax.py"]])
def test_nothing_to_compare_is_a_failure(repository, tool, monkeypatch, gone):
    monkeypatch.setattr(tool, "EXPECTED", {})
    for name in gone:
        repository.path(name).unlink()
    repository.differs(f"Nothing to compare: {3 - len(gone)} scripts share 0 blocks and 0 flags.")


def test_scripts_without_a_common_name_are_a_failure(repository, tool, monkeypatch):
    monkeypatch.setattr(tool, "EXPECTED", {})
    repository.path("train_full_flax.py").unlink()
    text = repository.path(LORA).read_text(encoding="utf-8")
    text = re.sub(r"^(def|class) (read|Images|encode)", r"\1 other_\2", text, flags=re.M)
    repository.path(LORA).write_text(re.sub("^(SIDE|SAMPLE, ORDER) = .*\n", "", text, flags=re.M), encoding="utf-8")
    repository.differs("Nothing to compare: 2 scripts share 0 blocks and 4 flags.")


# ---- Flags


@pytest.mark.parametrize("old, new, shown", [
    ('help="side in pixels"', 'help="side"', "+help='side'"),
    ("type=int", "type=float", "+type=float"),
    ('"--flip", **switch', '"--flip", action="store_true", default=False', "+action='store_true'"),
    ("argparse.BooleanOptionalAction", '"store_true"', "+action='store_true'"),
    ("choices=filters", 'choices=["lanczos"]', "+choices=['lanczos']"),
    ("sorted(FILTERS)", "list(FILTERS)", "+choices=list(FILTERS)"),
    ('nargs="+"', 'nargs="*"', "+nargs='*'"),
    ("default=512", "default=256", "+default=256"),
    ('"default": False', '"default": True', "+default=True"),
    ('add_argument("--prompts"', 'add_argument("-p", "--prompts"', "+-p, --prompts"),
])
def test_a_drifted_flag_is_found(repository, old, new, shown):
    repository.replace(LORA, old, new)
    text = repository.differs("--- examples/images/train_full.py:", "+++ examples/subject/train_full_lora.py:", shown)
    assert text.count("+++ ") == 1


def test_the_order_of_keywords_and_a_default_of_none_are_no_difference(repository):
    repository.replace(LORA, 'nargs="+", help="what to draw"', 'help="what to draw", default=None, nargs="+"')
    repository.run()


def test_flags_are_one_family(repository):
    repository.replace("train_full_flax.py", "side in pixels", "side")
    repository.differs(f"+++ {FLAX_LABEL}:6", " --resolution\n", "+help='side'")


# ---- Exceptions


def test_listed_differences_pass(repository, tool, monkeypatch):
    repository.replace(LORA, "return vae(batch)", "return vae(batch)[0]")
    repository.replace(LORA, "default=512", "default=256")
    repository.replace(LORA, "what to draw", "what to draw with adapters")
    repository.run(status=1)
    monkeypatch.setattr(tool, "EXCEPTIONS", {(LORA, "encode"): "why", (LORA, "--prompts"): "why"})
    monkeypatch.setattr(tool, "DEFAULTS", {(LORA, "--resolution"): "why"})
    monkeypatch.setattr(tool, "EXPECTED", {**EXPECTED, 2: [name for name in EXPECTED[2] if name != "encode"]})
    repository.run()


@pytest.mark.parametrize("title, key", [
    ("EXCEPTIONS", (LORA, "encode")), ("EXCEPTIONS", (LORA, "--prompts")), ("EXCEPTIONS", (LORA, "gone")),
    ("EXCEPTIONS", (LORA, "train")), ("EXCEPTIONS", (LORA, "KINDS")), ("EXCEPTIONS", ("gone.py", "encode")),
    ("EXCEPTIONS", ("convert.py", "read")), ("DEFAULTS", (LORA, "--resolution")), ("DEFAULTS", (LORA, "--gone")),
    ("DEFAULTS", ("gone.py", "--resolution")),
])
def test_a_stale_exception_is_found(repository, tool, monkeypatch, title, key):
    monkeypatch.setattr(tool, title, {key: "why"})
    name = key[1] if title == "EXCEPTIONS" else f"{key[1]} default"
    repository.differs(f"lists {name} of {key[0]}, which is gone or differs no more")


def test_the_same_reason_is_the_same_variant(repository, tool, monkeypatch):
    """Two scripts with one reason are compared with each other, under two reasons they are not."""
    repository.write("examples/subject/train_other.py", SCRIPT.replace("vae(batch)", "vae(batch)[0]"))
    repository.replace(LORA, "vae(batch)", "vae(batch)[1]")
    same = {(LORA, "encode"): "one", ("train_other.py", "encode"): "one"}
    for reasons, differ in ((same, True), ({**same, (LORA, "encode"): "two"}, False)):
        monkeypatch.setattr(tool, "EXCEPTIONS", reasons)
        assert ("vae(batch)[1]" in repository.run(status=1)) == differ  # EXPECTED counts another script
    monkeypatch.setattr(tool, "EXCEPTIONS", same)
    repository.run("--sync", LORA)
    assert "vae(batch)[1]" in repository.path("train_other.py").read_text(encoding="utf-8")
    assert "vae(batch)\n" in repository.path(FULL).read_text(encoding="utf-8")


def test_defaults_stand_for_themselves(repository, tool, monkeypatch):
    repository.replace(LORA, "default=512", "default=256")
    repository.replace("train_full_flax.py", "default=512", "default=128")
    listed = {(LORA, "--resolution"): "why", ("train_full_flax.py", "--resolution"): "why"}
    monkeypatch.setattr(tool, "DEFAULTS", listed)
    repository.run()


def test_what_several_tools_share_and_no_script_has(repository):
    """Only names that are listed: other tools' helpers may have one name by chance."""
    for name, number in (("convert", 1), ("inspect_images", 2)):
        path = repository.path(f"{name}.py")
        path.write_text(f"{path.read_text()}\n\ndef draw():\n    return {number}\n\n\ndef beside():\n    return 0\n")
    repository.run()
    repository.replace("inspect_images.py", "    return 0\n", "    return 3\n")
    repository.differs("+    return 3")


# ---- Sync


@pytest.mark.parametrize("old, new", EDITS.values(), ids=EDITS)
def test_sync_repairs_an_edit_and_nothing_else(repository, old, new):
    before = repository.contents()
    repository.replace(LORA, old, new)
    assert repository.run("--sync", FULL).splitlines()[-1] == (
        "Rewrote 1 blocks in 1 files from examples/images/train_full.py.")
    assert repository.contents() == before
    repository.run()


def test_sync_reaches_the_family_the_data_blocks_and_the_tools(repository):
    before = {name: repository.path(name).read_text() for name in (LORA, "train_full_flax.py", "convert.py")}
    pairs = [("SIDE = 16  # pixels", "SIDE = 8\n# a stream each"), ("sorted(folder)", "list(folder)  # \u00e9"),
             ("vae(batch)", "vae(batch, 1)")]
    for pair in pairs:
        repository.replace(FULL, *pair)
    for name in (LORA, "train_full_flax.py"):
        repository.replace(name, "side in pixels", "side")  # flags are each script's own to mend
    script = repository.path(FULL).read_bytes()
    lines = repository.run("--sync", "examples/images/train_full.py").splitlines()
    assert lines == [
        "examples/subject/train_full_lora.py: SIDE, SAMPLE, read, encode",
        "tools/convert.py: SIDE, read",
        f"{FLAX_LABEL}: read",
        "Rewrote 7 blocks in 3 files from examples/images/train_full.py.",
    ]
    assert repository.path(FULL).read_bytes() == script
    for name, text in before.items():
        text = text.replace("side in pixels", "side")
        for pair in [*pairs[1:], ("16  # pixels", "8"), ("SAMPLE,", "# a stream each\nSAMPLE,")]:
            text = text.replace(*pair)
        assert repository.path(name).read_text(encoding="utf-8") == text
    repository.differs("+help='side in pixels'")
    assert repository.run("--sync", FULL).startswith("Rewrote 0 blocks in 0 files")


def test_sync_leaves_exceptions_and_missing_blocks(repository, tool, monkeypatch):
    repository.replace(LORA, "vae(batch)", "vae(batch)[0]")
    repository.replace(LORA, SCRIPT[SCRIPT.index("class Images") : SCRIPT.index("# ---", SCRIPT.index("class"))], "")
    monkeypatch.setattr(tool, "EXCEPTIONS", {(LORA, "encode"): "why"})
    before = repository.contents()
    for name in (FULL, LORA):
        assert repository.run("--sync", name).startswith("Rewrote 0 blocks")
    assert repository.contents() == before


def test_sync_writes_nothing_that_would_define_a_name_twice(repository):
    repository.replace(LORA, "SAMPLE, ORDER = range(2)", "SAMPLE = 0\nORDER = 1")
    repository.replace(LORA, "sorted(folder)", "list(folder)")
    before = repository.contents()
    assert "defines SAMPLE again" in repository.run("--sync", FULL, status=2)
    assert repository.contents() == before


# ---- Mistakes


@pytest.mark.parametrize("wanted", ["", "gone.py", "tools/convert.py", "convert.py", "examples/images/helper.py"])
def test_sync_from_what_is_no_script(repository, wanted):
    text = repository.run("--sync", wanted, status=2)
    assert f"--sync={wanted}: is no script; name one of examples/images/train_full.py, " in text


@pytest.mark.parametrize("old, new, message", [
    ("def encode(", "def (", "cannot be read as Python"),
    ("SIDE = 16", "SIDE = 16\r", "carriage returns"),
    ("def train(args)", "SIDE += 1\n\n\ndef train(args)", "defines SIDE again in line"),
    (" data\n", " reading\n", "has no section line `# ---- data`"),
    ("def parse_args", "def parse", "has no parse_args with flags"),
    ('add("--resolution"', 'add(f"--{name}"', "line 18: write the flag out"),
])
def test_a_script_in_another_shape_is_refused(repository, old, new, message):
    text = SCRIPT.replace(old, new, 1)
    assert text != SCRIPT
    repository.write("examples/images/train_full.py", text)
    assert repository.run(status=2).startswith("check_shared_blocks.py: examples/images/train_full.py")
    assert message in repository.run(status=2)


def test_one_file_name_twice_is_refused(repository):
    repository.write("examples/subject/train_full.py", SCRIPT)
    assert "train_full.py: two files have this name" in repository.run(status=2)
