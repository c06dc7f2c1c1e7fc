"""Scripts run alone, and the repository keeps the rules on which its readers rely."""

import ast
import copy
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from conftest import load_script
from image_data import snapshot
from running import REPO, SCRIPTS, environment, run_script

from sdtune.__main__ import COMMANDS

every_script = pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])


def python_files(*folders):
    """The Python files of these folders of the repository, and of those below them."""
    return [path for folder in folders for path in sorted((REPO / folder).rglob("*.py"))]


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def places(rule, paths):
    """Where nodes of these files break a rule, which is a function of the node: file:line of each."""
    found = []
    for path in paths:
        found += [f"{path.relative_to(REPO)}:{node.lineno}" for node in ast.walk(tree_of(path)) if rule(node)]
    return found


# ------------------------------------------------------------------------------------------------------- the rules
def names_cuda(node):
    """Which device is used is accelerate's business."""
    if isinstance(node, ast.Attribute):
        return node.attr == "cuda"
    return isinstance(node, ast.Constant) and bool(re.search(r"\bcuda\b", str(node.value)))


def swallows_names(node):
    """A parameter such as `**_` takes every name that is misspelt."""
    return isinstance(node, ast.arguments) and node.kwarg is not None and node.kwarg.arg.startswith("_")


def reads_help(node):
    """What a flag accepts stands in its `type`, not in its help."""
    return isinstance(node, ast.Attribute) and node.attr == "help"


def asks_which_script(node):
    """What differs between scripts is a parameter, or stands in the recipe."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "hasattr" and ast.unparse(node.args[0]) == "args"
    if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.In | ast.NotIn):
        return False
    is_name = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
    return is_name and bool(re.search(r"(^|\.)settings$|^vars\(args\)$", ast.unparse(node.comparators[0])))


def changes_args(node):
    """What was parsed stays as it was parsed, in every function that gets it."""
    if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return ast.unparse(node.value) in ("args", "vars(args)")
    if isinstance(node, ast.FunctionDef) and "args" in [parameter.arg for parameter in node.args.args]:
        names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name) and inner.id == "args"]
        return any(isinstance(name.ctx, ast.Store | ast.Del) for name in names)
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    if called in ("setattr", "delattr"):
        return ast.unparse(node.args[0]) == "args"
    return bool(re.fullmatch(r"vars\(args\)\.(update|pop|setdefault|clear|popitem)|args\.__dict__\..*", called))


def keeps_state(node):
    """No function changes what another one finds in its module, which holds constants alone."""
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.col_offset == 0:
        names = [name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
        return not all(re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name) for name in names)
    return isinstance(node, ast.Global | ast.Nonlocal)


def lacks_docstring(node):
    is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
    return is_definition and node.col_offset == 0 and not ast.get_docstring(node)


def guesses_encoding(node):
    """A text file is read or written in the encoding of the user's locale, which on Windows is not UTF-8."""
    if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    modes = [arg.value for arg in node.args[-1:] if isinstance(arg, ast.Constant)]
    is_file = isinstance(node.func, ast.Name) and name == "open" and not (modes and "b" in str(modes[0]))
    return is_file or (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) == 1)


RULES = [  # rule, code that breaks it, code that does not, folders in which it holds
    (names_cuda, ["x.cuda()", "x.to('cuda:0')"], ["x.cudas()", "x.to('barracuda')"], "sdtune recipes examples tools"),
    (
        swallows_names,
        ["def f(a, **_): pass", "lambda **_rest: 1"],
        ["def f(*_, **rest): pass"],
        "sdtune recipes examples",
    ),
    (
        guesses_encoding,
        ["path.read_text()", "path.write_text(text)", "open(path)", "open(path, 'w')"],
        ["path.read_text('utf-8')", "path.write_text(text, encoding='utf-8')", "open(path, 'rb')", "Image.open(path)"],
        "sdtune recipes examples tools miniature",
    ),
    (reads_help, ["action.help", "re.search('a', action.help)"], ["f(help=1)", "'help'"], "sdtune recipes examples"),
    (
        asks_which_script,
        ["'rank' in settings", "if 'a' not in run.settings: pass", "'rank' in vars(args)", "hasattr(args, 'rank')"],
        ["name in settings", "'a' in free", "for name in settings: pass", "settings['rank']"],
        "sdtune recipes examples",
    ),
    (
        changes_args,
        [
            "args.seed = 1",
            "vars(args)['seed'] = 2",
            "setattr(args, 'seed', 3)",
            "args.seed += 1",
            "del args.seed",
            "vars(args).update(seed=1)",
            "def f(args):\n    args = None",
        ],
        [
            "unet.seed = 1",
            "{**vars(args), 'seed': 1}",
            "args, problems = parse_flags(parser)",
            "def f(args): return args",
        ],
        "sdtune recipes examples tools",
    ),
    (
        keeps_state,
        ["def f():\n    global a", "cache = {}", "A, b = 1, 2"],
        ["A_1 = {}", "A[b] = 1", "def f():\n    a = 1"],
        "sdtune recipes examples tools",
    ),
    (lacks_docstring, ["def f(): pass", "class A: a = 1"], ["def f(): 'Does.'"], "sdtune recipes examples tools"),
]
every_rule = pytest.mark.parametrize("rule, broken, kept, folders", RULES, ids=[rule.__name__ for rule, *_ in RULES])


@every_rule
def test_rules_see_what_breaks_them(rule, broken, kept, folders):
    """A mistake in a rule would let everything pass."""
    for code in broken:
        assert any(rule(node) for node in ast.walk(ast.parse(code))), code
    for code in kept:
        assert not any(rule(node) for node in ast.walk(ast.parse(code))), code


@every_rule
def test_rules_are_kept(rule, broken, kept, folders):
    paths = python_files(*folders.split())
    assert len(paths) > 40
    assert places(rule, paths) == []


def test_there_is_no_class_hierarchy_of_ours():
    """A run is read from its start to its end, not pieced together from base classes."""
    paths = python_files("sdtune", "recipes", "tools")
    classes = [node for path in paths for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]
    own = {node.name for node in classes}
    assert "InputError" in own
    assert [node.name for node in classes if own & {ast.unparse(base) for base in node.bases}] == []
    assert [name for name in own if "Trainer" in name] == []


# ------------------------------------------------------------------------------------------------- said only once
def what_it_does(function):
    """A function as text, without its name, docstring and decorators, and with numbers for the names that it gives."""
    function = copy.deepcopy(function)
    function.name, function.decorator_list = "", []
    if ast.get_docstring(function):
        del function.body[0]
    numbers = {}
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            numbers.setdefault(node.arg, f"name{len(numbers)}")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            numbers.setdefault(node.id, f"name{len(numbers)}")
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.arg = numbers[node.arg]
        elif isinstance(node, ast.Name):
            node.id = numbers.get(node.id, node.id)
    return ast.dump(function)


ONE = 'def total(rows, start=0):\n    """Adds up."""\n    for row in rows:\n        start += row\n    return start'
COPY = "@cached\ndef count(lines, result=0):\n    for line in lines:\n        result += line\n    return result"


def test_a_copy_is_seen_under_other_names():
    (one,) = ast.parse(ONE).body
    (other,) = ast.parse(COPY).body
    assert what_it_does(one) == what_it_does(other)
    for old, new in (("+=", "-="), ("=0", "=1"), ("return result", "return line"), ("in lines", "in sorted(lines)")):
        (changed,) = ast.parse(COPY.replace(old, new)).body
        assert what_it_does(one) != what_it_does(changed)


def test_no_function_stands_twice():
    """But in the built scripts: there the copies are made."""
    found = defaultdict(list)
    for path in python_files("sdtune", "recipes", "tools", "miniature", "benchmarks", "tests"):
        for function in functions_of(tree_of(path)):
            if function.end_lineno - function.lineno + 1 >= 6:
                place = f"{path.relative_to(REPO)}:{function.lineno} {function.name}"
                found[what_it_does(function)].append(place)
    assert len(found) > 500
    assert [copies for copies in found.values() if len(copies) > 1] == []


# ---------------------------------------------------------------------------------------------------------- scripts
@every_script
def test_docstring_names_a_command_and_papers(path):
    text = ast.get_docstring(tree_of(path))
    assert f"    python {path.name} --" in text  # for one device, which needs no launcher
    assert re.search(r"\b\d{4}\.\d{5}\b", text)  # an arXiv number


def undocumented(parser):
    """The flags of which `--help` does not tell what they do."""
    text = parser.format_help()
    names = [(action.option_strings or [action.metavar or action.dest])[0] for action in parser._actions]
    assert names[0] == "-h"
    return [name for name in names if not re.search(rf"^  (-h, )?{name}\b.*\n?\s+\w", text, re.MULTILINE)]


@every_script
def test_every_flag_of_a_script_is_documented(path, monkeypatch):
    monkeypatch.setitem(sys.modules, path.stem, None)  # gives the name back to the fixture's module afterwards
    assert undocumented(load_script(path).make_parser()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_documented(name):
    """Or belongs to an argument in front: --dataset, by which a --config names what is."""
    command = importlib.import_module(f"sdtune.commands.{name.replace('-', '_')}")
    hidden = set(undocumented(command.make_parser()))
    assert hidden - {"--dataset"} == set()


@pytest.fixture(scope="module")
def without_sdtune(tmp_path_factory):
    """Variables of a process in which nobody can import what the scripts are built from, installed or not."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in ("sdtune", "recipes"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    env = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "import sdtune.dataset"]
    result = subprocess.run(command, env=environment(env), cwd=folder, text=True, capture_output=True, check=False)
    assert result.stderr.endswith("ImportError: sdtune was imported\n")
    return env


@pytest.mark.slow
@every_script
def test_a_copy_alone_in_an_empty_folder_trains(path, tiny_pipeline, image_folder, tmp_path, without_sdtune):
    folder = tmp_path / "alone"
    folder.mkdir()
    script = Path(shutil.copy(path, folder))
    shutil.copytree(tiny_pipeline, folder / "model")
    image_folder(3).rename(folder / "images")
    before = snapshot(folder)
    words = ["--pretrained_model_name_or_path=model", "--output_dir=out", "--cache_dir=cache", "--report_to=none"]
    words += ["--resolution=32", "--train_batch_size=1", "--max_train_steps=2", "--logging_steps=1"]
    words += ["--checkpointing_steps=1"]
    if "dreambooth" in path.stem:
        words += ["--instance_data_dir=images", "--with_prior_preservation", "--class_data_dir=classes"]
        words += ["--class_prompt=a star", "--num_class_images=1"]
    else:
        words += ["--train_data_dir=images"]
    if not path.stem.endswith("_flax"):  # there every function more takes ten seconds to compile
        words += ["--num_validation_samples=1", "--use_ema"]
    env = {**without_sdtune, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    result = run_script(words, script=script.name, cwd=folder, env=env)
    assert result.returncode == 0, result.stderr
    assert "Plan\n" in result.stdout
    rows = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    if not path.stem.endswith("_flax"):
        assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 2]
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    made = "pytorch_lora_weights.safetensors" if path.stem.endswith("_lora") else "model_index.json"
    assert (folder / "out" / made).is_file()
    after = snapshot(folder)
    assert {name.split("/")[0] for name in after.keys() - before.keys()} <= {"out", "cache", "classes"}
    assert all(after[name] == before[name] for name in before)


# ------------------------------------------------------------------------------------------------------------ texts
@pytest.mark.skipif(not (REPO / ".git").exists(), reason="git knows which files are the repository's")
def test_no_text_names_what_is_not_in_the_repository():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=True).stdout.split("\0")
    paths = [REPO / name for name in listed if name and (REPO / name).is_file()]
    assert Path(__file__) in paths
    elsewhere = re.compile("|".join(["DESIGN[.]md", "FACTS[.]md", r"\bshared/"]))
    found = []
    for path in paths:
        text = path.read_bytes().decode("utf-8", "ignore")
        found += [f"{path.relative_to(REPO)}: {match[0]}" for match in elsewhere.finditer(text)]
    assert found == []
