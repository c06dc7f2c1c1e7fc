"""Scripts keep the shape that DESIGN.md section 3 gives them, and run alone."""

import ast
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import load_script
from image_data import snapshot
from running import (
    REPO,
    TRAIN_DREAMBOOTH,
    TRAIN_DREAMBOOTH_LORA,
    TRAIN_TEXT_TO_IMAGE,
    TRAIN_TEXT_TO_IMAGE_FLAX,
    TRAIN_TEXT_TO_IMAGE_LORA,
    run_script,
)

# By wc -l; the design allows 950 (test_length_of_the_design): these numbers may only fall.
SCRIPT_LINES = {"train_text_to_image": 1011, "train_text_to_image_lora": 1149, "train_dreambooth": 1141,
                "train_dreambooth_lora": 1266, "train_text_to_image_flax": 1362}
LINE_LENGTH = 119
FUNCTION_LINES = 60
TRAIN_LINES = 110  # of train's body
NESTING = 4
TAKE_ARGS = {"parse_args", "check_args", "load_models", "save_model", "train", "main"}
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}  # where they differ from the names of the packages

SCRIPTS = [TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA, TRAIN_TEXT_TO_IMAGE_FLAX, TRAIN_DREAMBOOTH,
           TRAIN_DREAMBOOTH_LORA]
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
TOOLS = sorted((REPO / "tools").glob("*.py"))
every_file = pytest.mark.parametrize("path", SCRIPTS + TOOLS, ids=[path.stem for path in SCRIPTS + TOOLS])


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function):
    """Lines of a function with its decorators and docstring."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return function.end_lineno - first + 1


def body_length(function):
    """Lines of a function after its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1


BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.FunctionDef, ast.AsyncFor, ast.AsyncWith)


def depth(node):
    """How deep blocks stand in blocks below `node`; an elif stands as deep as its if."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.ExceptHandler | ast.match_case):
                deepest = max(deepest, depth(child))
            elif isinstance(child, ast.AST):
                is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
                deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def parameters(function):
    every = function.args
    return [item.arg for item in [*every.posonlyargs, *every.args, *every.kwonlyargs]]


def writes_to_args(function):
    """Lines on which a function changes the object called `args`."""
    lines = []
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node.value
            if isinstance(target, ast.Call) and ast.unparse(target.func) == "vars":
                target = target.args[0]  # vars(args)["seed"] = ...
            if ast.unparse(target) == "args":
                lines.append(node.lineno)
        elif isinstance(node, ast.Name) and node.id == "args" and isinstance(node.ctx, ast.Store | ast.Del):
            if "args" in parameters(function):
                lines.append(node.lineno)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("setattr", "delattr") and ast.unparse(node.args[0]) == "args":
                lines.append(node.lineno)
            if re.fullmatch(r"vars\(args\)\.(update|pop|setdefault|clear|popitem)|args\.__dict__\..*", called):
                lines.append(node.lineno)
    return lines


def imported(path):
    """Top-level packages that a script imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


def required(name="requirements.txt"):
    """What can be imported once the requirements are installed."""
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    packages = [re.match(r"[\w.-]+", line).group().lower() for line in lines if line.strip() and line[0] != "#"]
    return {IMPORT_NAMES.get(package, package.replace("-", "_")) for package in packages}


# ---- The rules are tested on what breaks them, or a mistake in this file would let everything pass.

BROKEN = '''
def train(args):
    args.seed = 1
    vars(args)["seed"] = 2
    setattr(args, "seed", 3)
    args = None
    args.seed += 1
    vars(args).update(seed=1)
    unet = args
    unet.seed = 1
    settings = {**vars(args), "seed": 1}


@decorated
def nested(value):
    """Five deep, and an elif chain that is not."""
    if value:
        for item in value:
            with item:
                try:
                    pass
                except ValueError:
                    while item:
                        pass
    if value == 1:
        pass
    elif value == 2:
        pass
    elif value == 3:
        pass
    elif value == 4:
        pass
    elif value == 5:
        pass
'''


def test_the_rules_see_what_breaks_them():
    train, nested = ast.parse(BROKEN).body
    assert sorted(writes_to_args(train)) == [3, 4, 5, 6, 7, 8]
    assert depth(nested) == 5
    assert depth(train) == 0
    assert length(train) == 10
    assert length(nested) == 21
    assert body_length(nested) == 18
    assert depth(ast.parse("for a in b:\n if a:\n  c()\n else:\n  with a:\n   pass")) == 3


# ---- The rules


@every_script
def test_length(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= SCRIPT_LINES[path.stem]
    assert max(map(len, lines)) <= LINE_LENGTH


# Strict, so it ends by itself: a script that comes down to 950 lines fails here until the mark is taken from it.
@pytest.mark.xfail(strict=True, reason="above 950 lines: flags, checks of flags and images, messages")
@every_script
def test_length_of_the_design(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (1100 if path.stem.endswith("_flax") else 950)


@every_file
def test_no_function_is_long(path):
    free = {"parse_args", "train"}
    lengths = {function.name: length(function) for function in functions(path) if function.name not in free}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}
    trains = [function for function in functions(path) if function.name == "train"]
    assert len(trains) == (path in SCRIPTS)
    assert all(body_length(train) <= TRAIN_LINES for train in trains)


@every_file
def test_nothing_is_nested_deeply(path):
    depths = {function.name: depth(function) for function in functions(path)}
    assert {name: deep for name, deep in depths.items() if deep > NESTING} == {}


@every_script
def test_sections_stand_in_their_order(path):
    """What every script has, in the order in which every script has it."""
    names = [node.name for node in tree_of(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    order = ["parse_args", "check_args", "load_data", "load_models", "encode", "save_checkpoint", "draw_samples"]
    order += ["train", "save_model", "main"]
    assert [name for name in names if name in order] == order
    assert names[-1] == "main"


@every_file
def test_devices_are_accelerates_business(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"\bcuda\b", node.value), node.lineno
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda", node.lineno


@every_file
def test_args_are_never_changed(path):
    assert {function.name: writes_to_args(function) for function in functions(path) if writes_to_args(function)} == {}


@every_script
def test_helpers_take_what_they_need_by_name(path):
    assert {function.name for function in functions(path) if "args" in parameters(function)} <= TAKE_ARGS


@every_file
def test_no_module_state_and_no_class_hierarchy(path):
    for node in ast.walk(tree_of(path)):
        assert not isinstance(node, ast.Global | ast.Nonlocal), node.lineno
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign):
            names = [name for target in node.targets for name in ast.walk(target) if is_stored(name)]
            assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", name.id) for name in names), node.lineno
        if isinstance(node, ast.ClassDef):
            own = {other.name for other in tree_of(path).body if isinstance(other, ast.ClassDef)}
            assert not own & {ast.unparse(base) for base in node.bases}
            assert "Trainer" not in node.name


def is_stored(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


@every_file
def test_imports_are_the_standard_library_and_the_requirements(path):
    more = required("requirements_flax.txt") if path.stem.endswith("_flax") else set()
    assert imported(path) <= set(sys.stdlib_module_names) | required() | more
    siblings = {other.stem for other in path.parent.glob("*.py")}
    assert not imported(path) & siblings


@every_script
def test_every_flag_function_and_class_says_what_it_is(path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, path.stem, None)  # gives the name back to the fixture's module afterwards
    script = load_script(path)
    for function in tree_of(path).body:
        if isinstance(function, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(function), function.name
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    for name in vars(script.parse_args([])):
        assert re.search(rf"^  --{name}\b.*\n?\s+\w", text, re.M), name
    (parse_args,) = [function for function in functions(path) if function.name == "parse_args"]
    adds = [node for node in ast.walk(parse_args) if isinstance(node, ast.Call) and ast.unparse(node.func) == "add"]
    assert len(adds) == len(vars(script.parse_args([])))
    assert [ast.unparse(node.args[0]) for node in adds if "help" not in [key.arg for key in node.keywords]] == []


@every_script
def test_docstring_names_a_command_and_papers(path):
    text = ast.get_docstring(tree_of(path))
    assert f"{'python' if path.stem.endswith('_flax') else 'accelerate launch'} {path.name}" in text
    assert re.search(r"\b\d{4}\.\d{5}\b", text)  # an arXiv number


# ---- Alone in an empty folder


@pytest.mark.slow
@every_script
def test_a_copy_alone_in_an_empty_folder_runs(path, tiny_pipeline, image_folder, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    script = Path(shutil.copy(path, folder))
    shutil.copytree(tiny_pipeline, folder / "model")
    image_folder(3).rename(folder / "images")
    before = snapshot(folder)
    env = {"PYTHONPATH": None, "PYTHONDONTWRITEBYTECODE": "1"}
    result = run_script(["--help"], script=script.name, cwd=folder, env=env)
    assert result.returncode == 0, result.stderr
    assert "--pretrained_model_name_or_path" in result.stdout
    data = "instance_data_dir" if "dreambooth" in path.stem else "train_data_dir"
    words = ["--pretrained_model_name_or_path=model", f"--{data}=images", "--output_dir=out", "--resolution=32"]
    words += ["--train_batch_size=1", "--max_train_steps=2", "--report_to=none", "--cache_dir=cache"]
    result = run_script([*words, "--dry_run"], script=script.name, cwd=folder, env=env)
    assert result.returncode == 0, result.stderr
    assert "Plan\n" in result.stdout
    assert not (folder / "out").exists()
    after = snapshot(folder)
    assert {name for name in after if name not in before and not name.startswith("cache/")} == set()
    assert all(after[name] == before[name] for name in before)
