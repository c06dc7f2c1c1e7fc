"""Reads docs/flags.md as its reader does."""

import re
from pathlib import Path

from running import REPO

FLAGS_PAGE = REPO / "docs" / "flags.md"


def cells_of(line):
    """The cells of a row of a table."""
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def rows_of(text, first_cell):
    """The rows of all tables in a text whose heading begins with this cell: {name of the column: cell}."""
    rows, head = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = cells_of(line)
        elif head[0] == first_cell and not set(line) <= set("|-: "):
            cells = cells_of(line)
            assert len(cells) == len(head), line
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def by_script(cell, scripts):
    """What a cell says of each of these scripts."""
    says = {}
    for part in cell.split("<br>"):
        match = re.match(r"((?:[A-Z]+ )*[A-Z]+): ", part)
        for script in match[1].split() if match else scripts:
            assert script not in says, cell
            says[script] = part[match.end() :] if match else part
    assert says.keys() == set(scripts), cell
    return says


def read_flags():
    """What the page says of each script, by the stem of its name: {script: {flag: {column: text}}}."""
    text = FLAGS_PAGE.read_text(encoding="utf-8")
    stems = {}
    for row in rows_of(text, "here"):
        stems[row["here"]] = Path(re.search(r"\((.+)\)", row["script"])[1]).stem
    found = {stem: {} for stem in stems.values()}
    for row in rows_of(text, "flag"):
        flag = re.fullmatch(r"`--(\w+)`", row.pop("flag"))[1]
        scripts = list(stems) if row["in"] == "all" else row["in"].split()
        columns = {column: by_script(cell, scripts) for column, cell in row.items() if column != "in"}
        for script in scripts:
            told = {column: says[script] for column, says in columns.items()}
            assert flag not in found[stems[script]]  # none twice
            found[stems[script]][flag] = told
    return found
