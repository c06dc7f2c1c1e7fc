"""Compares the code that the training scripts share by copy, and copies it from one script to the others.

    python tools/check_shared_blocks.py
    python tools/check_shared_blocks.py --sync examples/text_to_image/train_text_to_image.py

A function, class or UPPERCASE constant of the same name has the same text in all scripts of a family (torch, and Flax:
`*_flax.py`), with its decorators, docstring and comments, also those directly above it. What stands below the section
line `# ---- data`, or in ALL_FAMILIES, is one family over all scripts. A tool that has a name of a script's has its
text as well; for the names in SHARED_BY_TOOLS tools have the same text. The same flag has the same keywords in all
scripts, and the same default unless DEFAULTS says why not.
"""

import argparse
import ast
import dataclasses
import difflib
import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

OWN_NAMES = {"parse_args", "check_args", "load_models", "save_model", "train", "main"}  # of each script and tool

# {(file name, block or --flag): reason}, for what differs under the same name. Files that give the same reason for
# the same name share a variant: they are compared with each other.
EXCEPTIONS = {
    ("train_text_to_image_lora.py", "REPLACED_FLAGS"): "takes the place of other flags of diffusers' script",
    ("train_dreambooth.py", "REPLACED_FLAGS"): "takes the place of the flags of diffusers' DreamBooth scripts",
    ("train_dreambooth_lora.py", "REPLACED_FLAGS"): "takes the place of the flags of diffusers' DreamBooth scripts",
    ("caption_images.py", "REPLACED_FLAGS"): "takes the place of no script of diffusers'",
    ("check_dataset.py", "REPLACED_FLAGS"): "takes the place of no script of diffusers'",
    ("convert_checkpoint.py", "REPLACED_FLAGS"): "takes the place of no script of diffusers'",
    ("push_dataset.py", "REPLACED_FLAGS"): "takes the place of no script of diffusers'",
    ("push_model.py", "REPLACED_FLAGS"): "takes the place of no script of diffusers'",
    ("show_dataset.py", "REPLACED_FLAGS"): "takes the place of no script of diffusers'",
    ("train_dreambooth.py", "--validation_steps"): "its samples are of one prompt",
    ("train_dreambooth_lora.py", "--validation_steps"): "its samples are of one prompt",
    ("train_dreambooth.py", "--train_text_encoder"): "trains it, where LoRA adds adapters",
    ("train_text_to_image_flax.py", "--mixed_precision"): "there is no accelerate config",
    ("train_text_to_image_flax.py", "--dataloader_num_workers"): "threads: JAX cannot be forked",
}

# {(script name, --flag): reason}, for a default that differs from that of the other scripts.
DEFAULTS = {
    ("train_text_to_image_lora.py", "--output_dir"): "a result of another kind",
    ("train_dreambooth.py", "--output_dir"): "a result of another kind",
    ("train_dreambooth_lora.py", "--output_dir"): "a result of another kind",
    ("train_dreambooth.py", "--learning_rate"): "that of diffusers' script: a few photos are learnt by heart soon",
    ("train_dreambooth.py", "--train_batch_size"): "that of diffusers' script: there are few photos",
    ("train_dreambooth_lora.py", "--train_batch_size"): "that of diffusers' script: there are few photos",
    ("train_dreambooth.py", "--tracker_project_name"): "another project",
    ("train_dreambooth_lora.py", "--tracker_project_name"): "another project",
}

# {number of scripts: names that so many share}: else a block could slip out by a new name. `--list` prints it.
EXPECTED = {
    5: [
        "CaptionedImages", "DROPOUT", "HELD_OUT", "HELD_OUT_TIMESTEPS", "IMAGE_SUFFIXES", "InputError", "MIN_SIDE",
        "ORDER", "SAMPLE", "SUBSET", "all_captions", "check_flags", "check_image", "check_images", "check_model",
        "check_output", "check_rows", "create_repo", "draw_samples", "find_checkpoint", "last_line", "leave",
        "list_checkpoints", "load_data", "micro_batches", "note_signal", "on_signals", "open_image", "parse_words",
        "prepare_output", "push", "read_dataset", "read_folder", "write_card", "write_log",
    ],
    4: [
        "DTYPES", "FIXED_ON_RESUME", "FREE_ON_RESUME", "check_settings", "diffusion_losses", "encode", "exchange",
        "held_out_losses", "load_base", "make_accelerator", "make_state", "print_plan", "resume", "save_checkpoint",
        "validate",
    ],
    2: [
        "ATTENTION", "CLASS", "FEED_FORWARD", "LORA_FILE", "LORA_TARGETS", "REPLACED_FLAGS",
        "RESIDUAL", "add_adapters", "check_adapters", "check_subject", "kohya_header", "load_classes", "lora_weights",
        "make_class_images", "read_lora", "to_kohya", "with_classes",
    ],
}

# What stands elsewhere than in a section `data` and is one family over all scripts nevertheless.
ALL_FAMILIES = set("""DROPOUT HELD_OUT HELD_OUT_TIMESTEPS IMAGE_SUFFIXES InputError MIN_SIDE ORDER SAMPLE SUBSET
    check_flags check_model check_output create_repo draw_samples find_checkpoint last_line leave list_checkpoints
    note_signal on_signals parse_words prepare_output push write_card write_log""".split())

# What no script has but several tools, to be equal in them.
SHARED_BY_TOOLS = set("FONTS beside find_loras load_font load_pipeline parse_recipe read_prompts wrap".split())

DIFF_LINES = 30  # of each difference; the first ones tell enough
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)


@dataclasses.dataclass(eq=False)
class Block:
    """What is compared under its name: the text of a top-level definition, of a flag or of its default."""
    file: "File"
    name: str
    text: str
    start: int  # its first line, from 0
    end: int = 0  # the line after its last one; 0 for flags, which are compared but not copied
    everywhere: bool = True  # compared over all families
    helper: bool = False  # a function or class


@dataclasses.dataclass(eq=False)
class File:
    """A script or a tool, with its blocks by name."""
    path: Path
    label: str  # the path below the root
    is_script: bool
    lines: list
    blocks: dict

    @property
    def family(self):
        """Which files it is compared with."""
        return "flax" if self.path.stem.endswith("_flax") else "torch"


# --------------------------------------------------------------------------------------------------------- reading
def read_files(root):
    """Reads the scripts, then the tools. Raises `ValueError` for one that cannot be compared."""
    paths = [(path, True) for path in sorted(root.glob("examples/*/train_*.py"))]
    paths += [(path, False) for path in sorted(root.glob("tools/*.py"))]
    names = [path.name for path, _ in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]}: two files have this name, by which exceptions are listed; rename one")
    return [read_file(path, path.relative_to(root).as_posix(), script, path.read_bytes()) for path, script in paths]


def read_file(path, label, is_script, content):
    """Reads a file that has this content. Raises `ValueError` if it is not Python or not in the shape of a script."""
    try:
        text = content.decode("utf-8")
        tree = ast.parse(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{label}: cannot be read as Python ({error})") from None
    if "\r" in text:
        raise ValueError(f"{label}: has carriage returns; end its lines by a line feed alone")
    file = File(path, label, is_script, text.split("\n"), {})
    sections = add_definitions(file, tree)
    if is_script and "data" not in sections:
        raise ValueError(f"{label}: has no section line `# ---- data`")
    parse_args = [node for node in tree.body if isinstance(node, DEFINITIONS) and node.name == "parse_args"]
    if is_script and not (parse_args and add_flags(file, list(ast.walk(parse_args[0])))):
        raise ValueError(f"{label}: has no parse_args with flags to compare")
    return file


def add_definitions(file, tree):
    """Adds the top-level definitions; returns the titles of the sections. Raises `ValueError` if one comes twice."""
    sections, above = [""], 0  # above: the line after the statement above
    for node, following in zip(tree.body, [*tree.body[1:], None]):
        start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))]) - 1
        titles = [re.match(r"# -{3,} *(.*\S)", line) for line in file.lines[above:start]]
        sections += [title[1] for title in titles if title]
        while start > above and file.lines[start - 1].startswith("#") and not titles[start - 1 - above]:
            start -= 1
        above = end = node.end_lineno
        limit = following.lineno - 1 if following else len(file.lines)
        for number in range(end, limit):  # indented comments after the last statement, which the tree leaves out
            if re.match(r"\s+#", file.lines[number]):
                end = number + 1
            elif file.lines[number].strip():
                break
        for name in defined_names(node):
            if name in file.blocks:
                raise ValueError(f"{file.label}: defines {name} again in line {node.lineno}; define it once")
            everywhere, text = file.is_script and sections[-1] == "data", "\n".join(file.lines[start:end])
            file.blocks[name] = Block(file, name, text, start, end, everywhere, isinstance(node, DEFINITIONS))
    return sections


def defined_names(node):
    """The names that a top-level statement defines, less those that are each script's own."""
    names = [node.name] if isinstance(node, DEFINITIONS) else []
    for target in (getattr(node, "targets", None) or [node.target]) if isinstance(node, ASSIGNMENTS) else []:
        found = [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
        names += [name for name in found if re.fullmatch("_?[A-Z][A-Z0-9_]*", name)]
    return [name for name in names if name not in OWN_NAMES]


def add_flags(file, nodes):
    """Adds the flags of calls of `add` and `add_argument` and their defaults, a variable standing for what it was
    assigned; returns how many. Raises `ValueError` for a flag that is not written out."""
    local = {node.targets[0].id: node.value for node in nodes
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and (
        getattr(node.func, "id", "") == "add" or getattr(node.func, "attr", "") == "add_argument")]
    for call in calls:
        names = [getattr(word, "value", None) for word in call.args]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{file.label}, line {call.lineno}: write the flag out, or it cannot be compared")
        keywords = []
        for key, value in [(keyword.arg or "**", keyword.value) for keyword in call.keywords]:
            value = local.get(getattr(value, "id", None), value)
            is_literal = key == "**" and isinstance(value, ast.Dict) and None not in value.keys
            keywords += zip(map(ast.literal_eval, value.keys), value.values) if is_literal else [(key, value)]
        texts = {key: ast.unparse(local.get(getattr(value, "id", None), value)) for key, value in keywords}
        default, name = f"default={texts.pop('default', None)}", names[-1]
        text = "\n".join([", ".join(names), *sorted(f"{key}={value}" for key, value in texts.items())])
        file.blocks[name] = Block(file, name, text, call.lineno - 1)
        file.blocks[f"{name} default"] = Block(file, f"{name} default", f"{name}\n{default}", call.lineno - 1)
    return len(calls)


# ------------------------------------------------------------------------------------------------------- comparing
def group_blocks(files):
    """{(name, family): {variant: blocks}}: the blocks of a variant have to be equal, None is the one of those that no
    exception lists. A name that no script has is left out, but for SHARED_BY_TOOLS."""
    named, groups = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for block in [block for file in files for block in file.blocks.values()]:
        named[block.name].append(block)
    listed = listed_exceptions()
    for name, blocks in named.items():
        everywhere = name in ALL_FAMILIES or any(block.everywhere for block in blocks)
        for block in blocks:
            variant = listed.get((block.file.path.name, name))
            groups[name, "all" if everywhere else block.file.family][variant].append(block)
    return {key: variants for key, variants in groups.items() if key[0] in SHARED_BY_TOOLS
            or any(block.file.is_script for blocks in variants.values() for block in blocks)}


def listed_exceptions():
    """{(file name, block name): variant} of EXCEPTIONS and DEFAULTS; of the latter, each is a variant by itself."""
    return EXCEPTIONS | {(script, f"{flag} default"): (script, flag) for script, flag in DEFAULTS}


def differences(groups):
    """Lists a unified diff for each block that is not like most of those that have to be equal to it."""
    found = {}  # a statement that defines several names differs once
    for blocks in [blocks for variants in groups.values() for blocks in variants.values()]:
        texts = [block.text for block in blocks]
        usual = max(blocks, key=lambda block: texts.count(block.text))
        for other in [block for block in blocks if block.text != usual.text]:
            sides = [f"{block.file.label}:{block.start + 1}" for block in (usual, other)]
            both, context = (usual.text.split("\n"), other.text.split("\n")), 1 if other.end else 9  # a flag whole
            lines = list(difflib.unified_diff(*both, *sides, n=context, lineterm=""))
            more = [f"... and {len(lines) - DIFF_LINES} more lines"] if len(lines) > DIFF_LINES else []
            found["\n".join(lines[:DIFF_LINES] + more)] = True
    return list(found)


def stale_exceptions(groups):
    """Lists the exceptions whose file or name is gone, or which are like those that no exception lists."""
    live = set()
    for (name, _), variants in groups.items():
        plain = {block.text for block in variants.get(None, [])}
        every = {block.text for blocks in variants.values() for block in blocks}
        live |= {(block.file.path.name, name) for blocks in variants.values() for block in blocks
                 if (block.text not in plain if plain else len(every) > 1)}
    return [f"EXCEPTIONS or DEFAULTS lists {name} of {file}, which is gone or differs no more; remove that entry"
            for file, name in listed_exceptions() if (file, name) not in live]


def shared_by_scripts(groups):
    """{name: its equal blocks in scripts, two or more}, of definitions and flags."""
    shared = defaultdict(list)
    for (name, _), variants in groups.items():
        for blocks in variants.values():
            blocks = [block for block in blocks if block.file.is_script]
            shared[name] += blocks if len(blocks) > 1 else []
    return {name: blocks for name, blocks in shared.items() if blocks}


def check(files):
    """Returns (problems, the line to print if there are none)."""
    groups, scripts = group_blocks(files), [file for file in files if file.is_script]
    shared = shared_by_scripts(groups)
    counts = {name: len(blocks) for name, blocks in shared.items() if blocks[0].end}
    num_flags = sum(name.startswith("-") and not name.endswith(" default") for name in shared)
    if not counts or not num_flags:
        return [f"Nothing to compare: {len(scripts)} scripts share {len(counts)} blocks and {num_flags} flags."], ""
    problems = differences(groups) + stale_exceptions(groups)
    pinned = {name: number for number, names in EXPECTED.items() for name in names}
    wrong = [f"{name} (by {counts.get(name, 0)} scripts, expected {pinned.get(name, 0)})"
             for name in sorted(counts | pinned) if counts.get(name) != pinned.get(name)]
    if wrong and sum(file.family == "torch" for file in scripts) > 1:
        problems.append("Not shared as EXPECTED says; mend the names in the scripts, or put what --list prints into "
                        f"EXPECTED: {', '.join(wrong)}")
    num_lines = sum(text.count("\n") + 1 for text in {shared[name][0].text for name in counts})
    smallest = min(scripts, key=lambda file: len(file.lines))
    helpers = [block for block in smallest.blocks.values() if block.helper]
    kept = sum(block.end - block.start for block in helpers if block in shared.get(block.name, []))
    share = kept / max(1, sum(block.end - block.start for block in helpers))
    return problems, (f"{len(counts)} blocks of {num_lines} lines and {num_flags} flags are shared by {len(scripts)} "
                      f"scripts: {share:.0%} of the helper lines of {smallest.path.name}, the smallest.")


# --------------------------------------------------------------------------------------------------------- command
def sync(files, wanted, paths):
    """Writes the blocks of the script that has the file name `wanted`, or one of `paths`, over those that have to be
    equal to them; prints their names. Raises `ValueError` before it writes anything."""
    scripts = [file for file in files if file.is_script]
    source = next((file for file in scripts if file.path.name == wanted or file.path in paths), None)
    if not source:
        raise ValueError(f"--sync={wanted}: is no script; name one of {', '.join(file.label for file in scripts)}")
    changes = defaultdict(dict)  # {file: {first line: (block, its new text)}}
    for blocks in [blocks for variants in group_blocks(files).values() for blocks in variants.values()]:
        for text in [block.text for block in blocks if block.file is source and block.end]:
            for block in [block for block in blocks if block.text != text]:
                changes[block.file].setdefault(block.start, (block, text))  # one statement may define several names
    results = {}
    for file, replaced in changes.items():
        lines = list(file.lines)
        for start, (block, text) in sorted(replaced.items(), reverse=True):
            lines[start : block.end] = text.split("\n")
        results[file] = "\n".join(lines).encode("utf-8")
        read_file(file.path, file.label, file.is_script, results[file])  # raises if a name is defined twice now
    for file, content in results.items():
        file.path.write_bytes(content)
        print(f"{file.label}: {', '.join(block.name for _, (block, _) in sorted(changes[file].items()))}")
    print(f"Rewrote {sum(map(len, changes.values()))} blocks in {len(changes)} files from {source.label}.")


def print_expected(files):
    """Prints the names that scripts share, to be put in the place of EXPECTED."""
    names = defaultdict(list)
    for name, blocks in sorted(shared_by_scripts(group_blocks(files)).items()):
        if blocks[0].end:
            names[len(blocks)].append(f'"{name}"')
    indent = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}
    rows = [f"    {number}: [\n{textwrap.fill(', '.join(names[number]), 118, **indent)},\n    ],\n"
            for number in sorted(names, reverse=True)]
    print(f"EXPECTED = {{\n{''.join(rows)}}}")


def parse_args(argv=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="repository; default: this one")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--sync", metavar="SCRIPT", help="write its shared blocks over those of scripts and tools")
    either.add_argument("--list", action="store_true", help="print the names that scripts share, for EXPECTED")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command; the status is 1 if something differs and 2 if it could not be compared."""
    args = parse_args(argv)
    try:
        root, problems = args.root.resolve(), []
        files = read_files(root)
        if args.list:
            print_expected(files)
        elif args.sync is not None:
            sync(files, args.sync, {Path(args.sync).resolve(), root / args.sync})
        else:
            problems, summary = check(files)
            print("\n\n".join(problems) or summary)
    except (OSError, ValueError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
