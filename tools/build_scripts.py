"""Builds each script under examples/ out of its recipe and of what that reaches of sdtune/, as one file.

    python tools/build_scripts.py            # writes the scripts
    python tools/build_scripts.py --check    # status 1 if one of them is not what would be written

Definitions are copied line by line. What would mean another thing in the copy is an error (status 2) with file:line.
"""

import argparse
import ast
import dataclasses
import re
import subprocess
import symtable
import sys
import textwrap
from pathlib import Path

# The modules of sdtune in the order of a script; each imports only from those before it.
MODULES = """
    errors randomness files arguments metadata images lora_layouts models entries shards dataset batches streaming
    buckets lora diffusion subject optimization full_bf16 deepspeed sharding digests checkpoints states output
    runs plan progress model_card endings hub validation signals failures script training cache
    flax.networks flax.weights flax.encoding flax.diffusion flax.optimization flax.checkpoints flax.validation
    flax.training
    fonts inference clip measures pictures grids named_dataset counts pages plots uploads pipeline_folder
    single_file
""".split()
# What a reader looks for comes before the other modules, which keep their order.
READ_FIRST = """
    diffusion flax.diffusion flax.optimization training flax.training batches randomness dataset flax.encoding
    checkpoints states flax.checkpoints
""".split()
# Whose versions a script names, if it imports them.
TESTED = ["torch", "jax", "optax", "flax", "diffusers", "transformers", "accelerate", "datasets", "peft"]
SCRIPTS = {  # recipe: folder of its script
    "train_text_to_image": "examples/text_to_image",
    "train_text_to_image_lora": "examples/text_to_image",
    "train_text_to_image_flax": "examples/text_to_image",
    "train_dreambooth": "examples/dreambooth",
    "train_dreambooth_lora": "examples/dreambooth",
}
RECIPE_SUMMARY = "what is its own: its flags, what it loads and trains, the loss of a step, what it saves, main"
WIDTH = 119
NEVER_COPIED = re.compile(r"sdtune/(commands/.*|__main__\.py|(flax/)?__init__\.py)")
SECTION_LINE = re.compile(r"# -{3,}")
COMPREHENSIONS = {"listcomp", "setcomp", "dictcomp", "genexpr"}  # what symtable calls scopes that run where they stand
GUARD = "if __name__ == '__main__':"
OF_THE_FILE = ("__file__", "__doc__", "__name__", "getsource")
IMPORTS = (ast.Import, ast.ImportFrom)
# Around the imports of libraries in a script that imports a package of TESTED, and what these lines need.
BEFORE_IMPORTS = '''\
# Almost all that libraries define on import stays; to look for garbage among it takes a quarter of the time.
gc.disable()


def stop_at_once(number, _):
    """Ends the process by a signal that comes before there is a run, or after it, with a line on it."""
    try:
        if os.environ.get("RANK", "0") == "0":
            told = f"{os.path.basename(__file__)}: stopped by {signal.Signals(number).name}"
            os.write(2, f"{told}\\n".encode())
    finally:
        os._exit(128 + number)


def await_signals():
    """Answers signals while the imports below take their seconds, until the run does. What asks for a checkpoint is
    ignored, as is a SIGHUP that was before (nohup)."""
    for name, number in signal.Signals.__members__.items():
        is_ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
        if name in ("SIGUSR1", "SIGUSR2"):
            signal.signal(number, signal.SIG_IGN)
        elif name in ("SIGINT", "SIGTERM", "SIGHUP") and not is_ignored:
            signal.signal(number, stop_at_once)


class Later:
    """A library that is imported when something of it is used; `--help` and a wrong flag use nothing."""

    def __init__(self, name):
        self.__name__ = name
        self.__spec__ = importlib.util.find_spec(name)  # by which other libraries see that it is there

    def __getattr__(self, attribute):
        if sys.modules.get(self.__name__) is self:  # the first use: the library takes this one's place
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


if __name__ == "__main__":
    await_signals()
    # What `import` finds under these names; together they take as long as all the others.
    sys.modules.update({name: Later(name) for name in ("diffusers", "transformers")})
'''.split("\n")
NEEDED_BEFORE_IMPORTS = {
    "import gc",
    "import importlib.util",
    "import os",
    "import signal",
    "import sys",
}
AFTER_IMPORTS = """
gc.freeze()  # nor is it looked through later
if __name__ != "__main__":  # else when the flags are checked, for which libraries import more of themselves
    gc.enable()""".split("\n")


class BuildError(Exception):
    """Why a script cannot be built, with file and line."""


@dataclasses.dataclass(eq=False)
class Definition:
    """What a name at the top level of a file stands for."""

    name: str
    kind: str  # "function", "class", "constant", "import" (from a library) or "guard" (of a recipe's main)
    meaning: str  # file:line, or the dotted path of what is imported
    text: str
    scope: dict  # {name: Definition} of all names at the top level of its file
    references: set  # the names of that scope, or of Python's own, that it uses
    evaluated: set  # those of them that it uses as soon as the file is imported
    paragraph: int = 0  # counts the empty lines above


@dataclasses.dataclass(eq=False)
class Source:
    """A recipe or a module of sdtune."""

    label: str  # the path below the root
    docstring: str  # with its quotes
    summary: str  # the first sentence of the docstring
    definitions: list  # in their order


# --------------------------------------------------------------------------------------------------------- reading
def read_sources(root):
    """Reads and checks all that scripts are built from; returns the modules and the recipes by name."""
    modules = {name: f"sdtune/{name.replace('.', '/')}.py" for name in MODULES}
    recipes = {name: f"recipes/{name}.py" for name in SCRIPTS}
    labels = [*modules.values(), *recipes.values()]
    paths = [*root.glob("sdtune/**/*.py"), *root.glob("recipes/*.py")]
    for label in sorted({path.relative_to(root).as_posix() for path in paths}.symmetric_difference(labels)):
        if not NEVER_COPIED.fullmatch(label):
            problem = "is missing, but is" if label in labels else "is not"
            raise BuildError(f"{label}:1: {problem} listed in MODULES or SCRIPTS of tools/build_scripts.py")
        check_direction(label, parse(root, label)[1])
    for path in sorted(root.glob("examples/*/train_*.py")):
        if path.relative_to(root).as_posix() not in [f"{folder}/{name}.py" for name, folder in SCRIPTS.items()]:
            raise BuildError(f"{path.relative_to(root)}:1: has no recipe in SCRIPTS of tools/build_scripts.py")
    sources = {}
    for name, label in modules.items():
        sources[name] = read_source(root, label, sources)
    scripts = {name: read_source(root, label, sources) for name, label in recipes.items()}
    changes = run_ruff(root, ["format", "--diff", *labels])
    if change := re.search(r"^--- (.+)\n\+\+\+ .*\n@@ -(\d+).*\n((?: .*\n)*)", changes, re.MULTILINE):
        line = int(change[2]) + change[3].count("\n")
        raise BuildError(f"{change[1]}:{line}: is not formatted; run `ruff format {change[1]}`")
    return sources, scripts


def parse(root, label):
    """Returns the lines of a file and its syntax tree."""
    try:
        text = (root / label).read_bytes().decode("utf-8")
        return text.split("\n"), ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise BuildError(f"{label}:{getattr(error, 'lineno', 1)}: is not Python ({error})") from None


def read_source(root, label, modules):
    """Reads a recipe, or a module that may import from `modules`."""
    lines, tree = parse(root, label)
    check_direction(label, tree)
    check_syntax(label, tree)
    docstring = ast.get_docstring(tree)
    if not docstring:
        raise BuildError(f"{label}:1: has no docstring")
    quoted = "\n".join(lines[tree.body[0].lineno - 1 : tree.body[0].end_lineno])
    summary = re.split(r"\.(?:\s|$)", " ".join(docstring.split("\n\n")[0].split()))[0]
    source, scope, paragraph = Source(label, quoted, summary, []), {}, 0
    for node, start, end in list(statements(lines, tree.body))[1:]:
        paragraph += lines[start - 1] == ""
        place = f"{label}:{node.lineno}"
        if isinstance(node, IMPORTS):
            definitions = read_import(node, place, modules)
        else:
            name, kind = name_and_kind(node)
            if kind is None:
                raise BuildError(f"{place}: is no import, function, class, constant (`NAME = value`) or main guard")
            text = "\n".join(lines[start:end])
            names = symtable.symtable(text, label, "exec")
            new = Definition(name, kind, place, text, scope, used(names), used(names, True), paragraph)
            source.definitions.append(new)
            definitions = [new]
        for new in definitions:
            known = scope.setdefault(new.name, new)
            if known is not new and (known.kind != "import" or known.meaning != new.meaning):
                raise BuildError(f"{place}: `{new.name}` is {known.meaning} already; rename one")
            if known is not new:  # `import torch` and `import torch.nn` give the same name
                known.text += f"\n{new.text}"
    guards = [item for item in source.definitions if item.kind == "guard"]
    if guards != (source.definitions[-1:] if label.startswith("recipes/") else []):
        place = guards[0].meaning if guards else f"{label}:{len(lines) - 1}"
        raise BuildError(f"{place}: a recipe ends in its main guard, and nothing else has one")
    return source


def statements(lines, body):
    """Yields each top-level statement and the range of its lines, with comments directly above and indented below."""
    above = 0  # the line after the statement before
    for node in body:
        start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))]) - 1
        while start > above and lines[start - 1].startswith("#") and not SECTION_LINE.match(lines[start - 1]):
            start -= 1
        above = end = node.end_lineno
        for number in range(end, len(lines)):  # comments after its last line, which the tree leaves out
            if re.match(r"\s+#", lines[number]):
                end = number + 1
            elif lines[number].strip():
                break
        yield node, start, end


def name_and_kind(node):
    """Returns what a top-level statement defines, or its first line and None."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return node.name, "function"
    if isinstance(node, ast.ClassDef):
        return node.name, "class"
    target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
    if isinstance(target, ast.Name) and re.fullmatch("_?[A-Z][A-Z0-9_]*", target.id):
        return target.id, "constant"
    line = ast.unparse(node).split("\n")[0]
    return line, "guard" if line == GUARD and not node.orelse else None


def read_import(node, place, modules):
    """Returns what a top-level import gives a name to."""
    module = getattr(node, "module", "")
    if module.startswith("sdtune."):
        source = modules.get(module.removeprefix("sdtune."))
        if source is None:
            raise BuildError(f"{place}: {module} does not stand before this file in MODULES")
        own = {item.name: item for item in source.definitions}
        for alias in node.names:
            if alias.name not in own:
                raise BuildError(f"{place}: `{alias.name}` is not defined in {source.label}")
        return [own[alias.name] for alias in node.names]
    found = []
    for alias in node.names:
        path = f"{module}.{alias.name}" if module else alias.name
        if not module and not alias.asname:
            path = path.split(".")[0]  # `import torch.nn` gives torch its name
        text = ast.unparse(ast.ImportFrom(module, [alias], 0) if module else ast.Import([alias]))
        found.append(Definition(alias.asname or path.split(".")[-1], "import", path, text, {}, set(), set()))
    return found


def used(scope, while_imported=False):
    """Returns the names that a scope and those inside it take from the top level of the file."""
    is_top = scope.get_type() == "module"
    names = {item.get_name() for item in scope.get_symbols() if item.is_referenced() and (is_top or item.is_global())}
    for child in scope.get_children():
        if not while_imported or child.get_type() == "class" or child.get_name() in COMPREHENSIONS:
            names |= used(child, while_imported)
    return names


# ----------------------------------------------------------------------------------------------------------- rules
def check_direction(label, tree):
    """Refuses an import of a recipe, by whatever file."""
    for node in ast.walk(tree):
        if "recipes" in imported_packages(node):
            raise BuildError(f"{label}:{node.lineno}: imports a recipe, which nothing does")


def imported_packages(node):
    """Returns the packages that a statement imports from, if it is an import; "" is that of a relative one."""
    if isinstance(node, ast.ImportFrom):
        return {"" if node.level else node.module.split(".")[0]}
    return {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()


def check_syntax(label, tree):
    """Refuses what means another thing in a copy, or hides what it refers to."""
    is_recipe = label.startswith("recipes/")
    for node in ast.walk(tree):
        place = f"{label}:{getattr(node, 'lineno', 1)}"
        packages = imported_packages(node)
        if packages & {"", "__future__"} or (packages and node.names[0].name == "*"):
            raise BuildError(f"{place}: is an import of `*`, from __future__ or relative, which a copy cannot have")
        if "sdtune" in packages:
            module = getattr(node, "module", "")
            if module.startswith("sdtune.commands"):
                raise BuildError(f"{place}: imports a command, which only commands do")
            is_renamed = any(alias.asname for alias in node.names)
            if not module.startswith("sdtune.") or is_renamed or node not in tree.body:
                raise BuildError(f"{place}: write `from sdtune.module import name`, at the top level and without `as`")
        if "importlib" in packages:
            raise BuildError(f"{place}: imports importlib, by which what a script needs could not be seen")
        name = getattr(node, "id", None)
        if isinstance(node, ast.Global) or name == "globals":
            raise BuildError(f"{place}: uses `global` or `globals()`; pass the value")
        if not is_recipe and (name in OF_THE_FILE or getattr(node, "attr", None) == "getsource"):
            raise BuildError(f"{place}: asks for its file, which in a copy is the script; take it as a parameter")
        for annotation in [getattr(node, "annotation", None), getattr(node, "returns", None)]:
            for part in ast.walk(annotation) if annotation else []:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    raise BuildError(f"{place}: a quoted annotation hides what it refers to; drop the quotes")


def check_order(label, order):
    """Refuses a definition that uses, while the script is imported, one that does not stand above it."""
    above = set()
    for item in order:
        for name in sorted(item.evaluated & item.scope.keys()):
            if item.scope[name].kind != "import" and item.scope[name] not in above:
                raise BuildError(
                    f"{item.meaning}: `{item.name}` uses `{name}` while it is imported, but in {label} that stands "
                    "below: constants and classes come first, then the recipe's functions, then those of sdtune"
                )
        above.add(item)


def check_copies(root, label, text, order):
    """Refuses a built text in which a definition is not as in its source, or a name is not defined or not used."""
    starts, position = [], 0
    for item in order:
        position = text.find(f"\n{item.text}\n", position) + 1
        if position == 0:
            raise BuildError(f"{item.meaning}: ruff would format `{item.name}` in another way in {label}")
        starts.append(text.count("\n", 0, position) + 1)
    options = ["--select=F821,F811,F401", "--ignore-noqa", "--output-format=concise"]
    findings = run_ruff(root, ["check", *options, "--stdin-filename", label, "-"], text)
    if finding := re.search(r"^.+:(\d+):\d+: .*", findings, re.MULTILINE):
        places = [item.meaning for item, start in zip(order, starts) if start <= int(finding[1])]
        raise BuildError(f"{[label + ':1', *places][-1]}: in its copy, {finding[0]}")


# -------------------------------------------------------------------------------------------------------- building
def run_ruff(root, arguments, text=None):
    """Runs ruff with the repository's settings; returns what it prints."""
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--quiet"]
    result = subprocess.run(command, cwd=root, input=text, capture_output=True, encoding="utf-8")
    if result.returncode not in (0, 1) or (result.returncode == 1 and not result.stdout):
        raise BuildError(f"ruff {arguments[0]}: {result.stderr.strip()}")
    return result.stdout


def reach(recipe):
    """Returns all that a recipe leads to, its own definitions included; refuses a name with two meanings."""
    reached, meanings = list(recipe.definitions), {}
    for user in reached:  # which grows
        for name in [user.name, *sorted(user.references)]:
            found = user if name == user.name else user.scope.get(name)
            meaning = found.meaning if found else "Python's own"
            known, place = meanings.setdefault(name, (meaning, user.meaning))
            if meaning != known:
                raise BuildError(
                    f"{user.meaning}: `{name}` is {meaning} here, but {known} at {place}; rename one, since "
                    f"{recipe.label} reaches both"
                )
            if found and found not in reached:
                reached.append(found)
    return reached


def tested_versions(root, imports):
    """Returns a comment on the packages of TESTED that these lines import: the versions of constraints.txt."""
    constraints = (root / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", constraints, re.MULTILINE))
    packages = {re.split(r"[ .]", line)[1] for line in imports}
    found = ", ".join(f"{name} {pins[name]}" for name in TESTED if name in pins and name in packages)
    lines = textwrap.wrap(f"Tested with {found}.", WIDTH - 2) if found else []
    return "".join(f"# {line}\n" for line in lines)


def build_script(root, label, recipe, modules):
    """Returns the text of a script and the definitions in it, the main guard among them, in their order."""
    reached = set(reach(recipe))
    sections = []
    in_order = sorted(modules, key=lambda name: READ_FIRST.index(name) if name in READ_FIRST else len(READ_FIRST))
    for title, source in {"the script": recipe, **{name: modules[name] for name in in_order}}.items():
        functions = [item for item in source.definitions if item in reached and item.kind == "function"]
        if functions:
            sections.append((title, RECIPE_SUMMARY if source is recipe else source.summary, functions))
    copied = [item for source in [*modules.values(), recipe] for item in source.definitions if item in reached]
    values = [item for item in copied if item.kind in ("constant", "class")]
    order = [*values, *[item for _, _, functions in sections for item in functions], recipe.definitions[-1]]
    check_order(label, order)

    width = max([len(title) for title, _, _ in sections], default=0)
    table = [f"#   {title:<{width}}   {summary}" for title, summary, _ in sections]
    for line, (title, _, _) in zip(table, sections):
        if len(line) > WIDTH:
            excess = f"{len(line) - WIDTH} characters too long for the table of sections of {label}"
            raise BuildError(f"{modules[title].label}:1: the first sentence of the docstring is {excess}")
    imports = {line for item in reached if item.kind == "import" for line in item.text.split("\n")}
    inside = [line for item in reached for line in re.findall(r"^ +((?:import|from) .+)", item.text, re.MULTILINE)]
    versions = tested_versions(root, [*imports, *inside])
    is_heavy = bool(versions)
    imports |= NEEDED_BEFORE_IMPORTS if is_heavy else set()
    text = f"""#!/usr/bin/env python
# Built by `make scripts` from {recipe.label} and sdtune/: edit those; a copy is yours to edit.
{recipe.docstring}

{versions}# Constants and classes come first, then the functions:
#
"""
    text += "\n".join([*table, "", *sorted(imports), ""])
    for above, item in zip([None, *values], values):
        is_next = above and above.scope is item.scope and above.paragraph == item.paragraph
        text += ("" if is_next else "\n") + item.text + "\n"
    for title, _, functions in sections:
        text += "\n\n# " + f" {title}".rjust(WIDTH - 2, "-") + "\n"
        # A comment above the first function is kept off the section line; ruff does the other empty lines.
        text += "\n" if functions[0].text.startswith("#") else ""
        text += "\n\n".join(item.text for item in functions) + "\n"
    text += "\n\n" + order[-1].text + "\n"
    text = run_ruff(root, ["check", "--select=I", "--fix", "--stdin-filename", label, "-"], text)
    text = run_ruff(root, ["format", "--stdin-filename", label, "-"], text)
    if is_heavy:
        text = with_quick_imports(text)
    check_copies(root, label, text, order)
    return text, order


def with_quick_imports(text):
    """Returns the text of a script, in which, while imports of libraries run, signals are answered and no garbage is
    collected."""
    lines = text.split("\n")
    imports = [node for node in ast.parse(text).body if isinstance(node, IMPORTS)]
    of_libraries = [node for node in imports if not imported_packages(node) <= sys.stdlib_module_names]
    start, end = of_libraries[0].lineno - 1, imports[-1].end_lineno
    return "\n".join([*lines[:start], *BEFORE_IMPORTS, *lines[start:end], *AFTER_IMPORTS, *lines[end:]])


# -------------------------------------------------------------------------------------------------------- checking
def parts(text):
    """Returns what a script consists of, {what it is called: its lines}; nothing for what is not Python."""
    try:
        lines, body = text.split("\n"), ast.parse(text).body
    except (SyntaxError, ValueError):
        body = []
    if not body:
        return {}
    imports = [node for node in body if isinstance(node, IMPORTS)] or body
    found = {
        "the head": lines[: body[0].lineno - 1],
        "the docstring": lines[body[0].lineno - 1 : body[0].end_lineno],
        "the table of sections": lines[body[0].end_lineno : imports[0].lineno - 1],
        "the block of imports": lines[imports[0].lineno - 1 : imports[-1].end_lineno],
        "a section line": [line for line in lines if SECTION_LINE.match(line)],
    }
    for node, start, end in list(statements(lines, body))[1:]:
        if not isinstance(node, IMPORTS):
            found[f"`{name_and_kind(node)[0]}`"] = lines[start:end]
    return found


def differences(label, text, built, order, recipe):
    """Lists in what the text of a script is not what is built, and where that comes from."""
    places = {f"`{item.name}`": item.meaning for item in order} | {"the docstring": f"{recipe.label}:1"}
    present, wanted, problems = parts(text), parts(built), []
    if not present:
        return [f"{label}: is missing or not Python; run `make scripts`"]
    for name in present | wanted:
        place = places.get(name, f"what {recipe.label} and sdtune/ give")
        if name not in wanted:
            problems.append(f"{label}: {name} is not reached from {recipe.label}; run `make scripts`")
        elif present.get(name) != wanted[name]:
            problems.append(f"{label}: {name} differs from {place}; edit that and run `make scripts`")
    return problems or [f"{label}: the order of its definitions or the space between them differs; run `make scripts`"]


def main(argv=None):
    """Runs the command; the status is 1 if a script differs and 2 if one cannot be built."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="name what would change, and write nothing")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="repository; default: this one")
    args = parser.parse_args(argv)
    root, built, problems = args.root.resolve(), {}, []
    try:
        modules, recipes = read_sources(root)
        for name, recipe in recipes.items():
            label = f"{SCRIPTS[name]}/{name}.py"
            built[label] = (*build_script(root, label, recipe, modules), recipe)
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for label, (text, order, recipe) in built.items():
        path = root / label
        present = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        if present != text and args.check:
            problems += differences(label, present, text, order, recipe)
        elif present != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("utf-8"))
            print(f"Wrote {label}.")
    print("\n".join(problems) or f"{len(built)} scripts are as their recipes say.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
