"""Writes docs/flags.md, all flags of the scripts under examples/: made from their parsers, and from what is known of
diffusers' flags of the same name (tools/diffusers_flags.yaml).

    python tools/write_flags.py            # writes it
    python tools/write_flags.py --check    # status 1 if it is not what would be written
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

import yaml

PAGE, UPSTREAM = "docs/flags.md", "tools/diffusers_flags.yaml"
SCRIPTS = {  # what the page calls them: their paths
    "T": "examples/text_to_image/train_text_to_image.py",
    "TL": "examples/text_to_image/train_text_to_image_lora.py",
    "TJ": "examples/text_to_image/train_text_to_image_flax.py",
    "D": "examples/dreambooth/train_dreambooth.py",
    "DL": "examples/dreambooth/train_dreambooth_lora.py",
}
TAKES = {"path_name": "path or name", "repo_name": "name or owner/name", "secret_token": "token", "NoneType": "text"}
INTERVAL = re.compile(r"[\[(]\S+, [^\s\])]+[\])]")
OURS = "ours alone"
HEAD = """\
# Flags

<!-- Made by `make scripts` from the parsers of the scripts and tools/diffusers_flags.yaml: edit those. -->

All flags of the five scripts, in the groups of `--help`. The READMEs tell what they are for:
[text to image](../examples/text_to_image/README.md), [DreamBooth](../examples/dreambooth/README.md). In a
[file for `--config`](../examples/text_to_image/README.md#settings-in-a-file) they stand without dashes.

| here | script |
|---|---|
"""
GUIDE = """
*Default*: of a flag with `-` the column *what it does* may say what is used if it is not given. *Takes*: `[` and `]`
include the end of an interval, `(` and `)` do not; a switch takes nothing, and `--no-` before its name turns it off.

*In diffusers' script*, that of the same name (August 2026; the JAX one as it was before 0.40): *same* has the same
meaning and default there, and a flag that is *ours alone* is not there. Command lines for these scripts go on; what
would be ignored there is refused here, as are the flags [at the end](#flags-of-diffusers-that-are-refused).
"""
ROW_HEAD = "| flag | in | default | takes | what it does | in diffusers' script |\n|---|---|---|---|---|---|\n"
REFUSED_HEAD = "\n## Flags of diffusers that are refused\n\n| flag | in | what to do |\n|---|---|---|\n"
ALSO_REFUSED = """
Whoever comes from another script may give these; they are refused as well:

| flag | in | what to do then |
|---|---|---|
"""


# ------------------------------------------------------------------------------------------------------ the scripts
def load_script(path):
    """A script as a module, which does not stay where others look for modules."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses ask for it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def replaced_flags(script):
    """The flags that a script refuses, by name, with what it says to do."""
    return vars(script).get("REPLACED_FLAGS", vars(script).get("SUBJECT_REPLACED_FLAGS"))


def flags_by_group(scripts):
    """All flags in the order of the scripts: {group: {flag: {script: argparse's action}}}; a flag is in the group in
    which the first script has it."""
    title_of, actions, orders = {}, {}, {}
    for name, script in scripts.items():
        for group in script.make_parser()._action_groups:
            flags = [(flag, action) for action in group._group_actions for flag in names_of(action)]
            for flag, action in flags:
                title_of.setdefault(flag, group.title)
                actions.setdefault(flag, {})[name] = action
            own = [flag for flag, _ in flags if title_of[flag] == group.title]
            if own:
                orders.setdefault(name, {})[group.title] = own
    groups = {}
    for title in in_one_order(orders.values()):
        flags = in_one_order([order[title] for order in orders.values() if title in order])
        groups[title] = {flag: actions[flag] for flag in flags}
    return groups


def names_of(action):
    """The flags of an action; other spellings of one, and `--no-flag`, are told of once, for all of them."""
    return [flag for flag in action.option_strings if re.fullmatch(r"--\w+", flag) and flag != "--help"]


def in_one_order(orders):
    """What several lists hold, each once: what the lists before did not have follows what stands before it, and what
    they have there alone."""
    merged = []
    for order in orders:
        place = 0
        for item in order:
            if item not in merged:
                while place < len(merged) and merged[place] not in order:
                    place += 1
                merged.insert(place, item)
            place = merged.index(item) + 1
    return merged


# ----------------------------------------------------------------------------------------------------- what is said
def by_scripts(texts):
    """One text for {script: text}: that which all of them have, or else each with its scripts before it."""
    scripts = {}
    for name, text in texts.items():
        scripts.setdefault(text, []).append(name)
    if len(scripts) == 1:
        return next(iter(scripts))
    return "<br>".join(f"{' '.join(names)}: {text}" for text, names in scripts.items())


def in_cell(text):
    """A help text for a cell of a table, with its flags as code."""
    text = re.sub(r"(?<![\w`-])--\w+(?:=[\w.]+)?", r"`\g<0>`", text)
    return text.replace("|", r"\|").replace("<", r"\<")


def default_of(action):
    """The default of a flag."""
    if action.default is None:
        return "-"
    if isinstance(action.default, bool):
        return "on" if action.default else "off"
    return f"{action.default:g}" if isinstance(action.default, float) else f"{action.default}"


def accepted_by(action):
    """What a flag takes."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "switch"
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.type and (interval := INTERVAL.search(action.type.__doc__)):
        kind = "whole number" if "whole number" in action.type.__doc__ else "number"
        return f"{kind} in `{interval[0]}`"
    takes = TAKES[getattr(action.type, "__name__", "NoneType")]
    return f"{takes}, one or more" if action.nargs == "+" else takes


def told_of(action, flag):
    """What a flag does."""
    first = action.option_strings[0]
    if flag != first:
        return f"the same as `{first}`"
    interval = action.type and INTERVAL.search(action.type.__doc__)
    text = action.help.removesuffix(interval[0]).rstrip() if interval else action.help
    return in_cell(text.replace("%(default)s", str(action.default)))


def make_row(flag, actions, upstream):
    """The row of a flag: `actions` of the scripts that take it, and `upstream`, of those whose namesake has it, what
    is to be said of that."""
    compared = {name: upstream.get(name, OURS) for name in actions}
    cells = [
        f"`{flag}`",
        "all" if actions.keys() == SCRIPTS.keys() else " ".join(actions),
        by_scripts({name: default_of(action) for name, action in actions.items()}),
        by_scripts({name: accepted_by(action) for name, action in actions.items()}),
        by_scripts({name: told_of(action, flag) for name, action in actions.items()}),
        by_scripts(compared),
    ]
    return f"| {' | '.join(cells)} |\n"


def refused_rows(replaced, upstream, of_namesake):
    """The rows of flags that are refused, by those scripts whose namesake has the flag, or else by the others."""
    rows = ""
    for flag in sorted({flag for flags in replaced.values() for flag in flags}):
        told = {}
        for name, flags in replaced.items():
            if flag in flags and (name in upstream.get(flag.removeprefix("--"), {})) == of_namesake:
                told[name] = in_cell(flags[flag])
        if told:
            rows += f"| `{flag}` | {' '.join(told)} | {by_scripts(told)} |\n"
    return rows


def make_page(scripts, upstream):
    """The text of the page."""
    text = HEAD + "".join(f"| {name} | [`{Path(path).name}`](../{path}) |\n" for name, path in SCRIPTS.items()) + GUIDE
    replaced = {name: replaced_flags(script) for name, script in scripts.items()}
    groups = flags_by_group(scripts)
    taken = {flag.removeprefix("--"): actions for flags in groups.values() for flag, actions in flags.items()}
    for flag, told in upstream.items():
        for name, said in told.items():
            is_known = f"--{flag}" in replaced[name] if said == "refused" else name in taken.get(flag, {})
            if not is_known:
                raise ValueError(f"{UPSTREAM}: {flag}: {name} neither takes nor refuses that flag; mend the file")
    for title, flags in groups.items():
        text += f"\n## {title[0].upper()}{title[1:]}\n\n{ROW_HEAD}"
        text += "".join(make_row(flag, actions, upstream.get(flag[2:], {})) for flag, actions in flags.items())
    text += REFUSED_HEAD + refused_rows(replaced, upstream, of_namesake=True)
    return text + ALSO_REFUSED + refused_rows(replaced, upstream, of_namesake=False)


def read_upstream(root):
    """What is known of diffusers' flags: {flag: {script: text}}."""
    told = yaml.safe_load((root / UPSTREAM).read_text(encoding="utf-8"))
    found = {}
    for flag, texts in told.items():
        found[flag] = {name: text for names, text in texts.items() for name in names.split()}
    return found


def main(argv=None):
    """Runs the command; the status is 1 if the page differs from what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="say whether it would change, and write nothing")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="repository; default: this one")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    scripts = {name: load_script(root / path) for name, path in SCRIPTS.items()}
    try:
        text = make_page(scripts, read_upstream(root))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    page = root / PAGE
    present = page.read_text(encoding="utf-8") if page.exists() else None
    if text == present:
        print(f"{PAGE} is as the scripts' parsers say.")
        return 0
    if args.check:
        print(f"{PAGE}: is missing or not what the scripts' parsers and {UPSTREAM} say; run `make scripts`")
        return 1
    page.parent.mkdir(exist_ok=True)
    page.write_text(text, encoding="utf-8")
    print(f"Wrote {PAGE}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
