"""Labelled grids of drawn pictures: by what varies between them, and beside the images that they come closest to."""

import hashlib
import json
import math

from PIL import Image, ImageDraw

from sdtune.fonts import load_font, wrap
from sdtune.pictures import save_picture, settings_of

TILES = (128, 256)  # smallest and largest long side of a picture in the grid, in pixels
ROWS_PER_GRID = 24  # more go to further grids
COLUMNS_OF_PROMPTS = 8  # more are rows
PAIR_TILE = 192  # side of a picture among the closest pairs, in pixels
PAIR_LABEL_WIDTH = 90
LABEL_WIDTH = 180
MARGIN = 8
FONT_SIZE = 15
LINE_HEIGHT = round(FONT_SIZE * 1.4)


def label(picture, axis):
    """What to write beside pictures that have this one's prompt, seed, steps, scale or model in common."""
    value = getattr(picture, axis)
    if axis == "seed":
        return f"seed {value}"
    if axis == "steps":
        return f"{value} steps"
    if axis == "scale":
        return f"scale {value:.10g}"
    return value or "(empty prompt)"


def layout(pictures):
    """Sorts pictures into {row: {column: picture}}, by labels (tuples of texts) that say what varies. Columns are
    scales, else steps, else seeds, else a few prompts, else models; base stands above or left of result."""
    values = {
        axis: list(dict.fromkeys(getattr(picture, axis) for picture in pictures))
        for axis in ("prompt", "seed", "steps", "scale", "model")
    }
    values["model"].sort()  # base before result
    varying = [axis for axis in ("scale", "steps", "seed", "prompt", "model") if len(values[axis]) > 1]
    fits_across = [axis for axis in varying if axis != "prompt" or len(values["prompt"]) <= COLUMNS_OF_PROMPTS]
    across = fits_across[:1]
    down = [axis for axis in values if axis in varying and axis not in across]

    def place(picture):
        return [values[axis].index(getattr(picture, axis)) for axis in down + across]

    rows = {}
    for picture in sorted(pictures, key=place):
        row = tuple(label(picture, axis) for axis in down)
        column = label(picture, across[0]) if across else ""
        rows.setdefault(row, {})[column] = picture
    return rows


def make_grid(rows, folder, title, font_path):
    """Pastes the pictures of {row: {column: picture}} below a title, with labels above and to the left."""
    font = load_font(font_path, FONT_SIZE)
    columns = list(next(iter(rows.values())))
    width, height = tile_size(folder / next(iter(rows.values()))[columns[0]].name())
    left = LABEL_WIDTH if any(rows) else MARGIN
    total = max(left + len(columns) * (width + MARGIN), 3 * LABEL_WIDTH)

    heading = wrap(title, font, total - 2 * MARGIN, 4)
    above = [wrap(column, font, width - MARGIN, 6) for column in columns]
    top = (len(heading) + max(map(len, above))) * LINE_HEIGHT + 2 * MARGIN
    most_lines = max(1, height // LINE_HEIGHT - 3)
    beside = [[line for text in row for line in wrap(text, font, left - 2 * MARGIN, most_lines)] for row in rows]
    row_height = max(height, max(map(len, beside)) * LINE_HEIGHT) + MARGIN

    grid = Image.new("RGB", (total, top + len(rows) * row_height), "white")
    pen = ImageDraw.Draw(grid)
    write(pen, heading, MARGIN, MARGIN // 2, font)
    for number, lines in enumerate(above):
        write(pen, lines, left + number * (width + MARGIN), MARGIN + len(heading) * LINE_HEIGHT, font)
    for number, (lines, pictures) in enumerate(zip(beside, rows.values())):
        y = top + number * row_height
        write(pen, lines, MARGIN, y, font)
        for place, column in enumerate(columns):
            with Image.open(folder / pictures[column].name()) as image:
                tile = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            grid.paste(tile, (left + place * (width + MARGIN), y))
    return grid


def write(pen, lines, x, y, font):
    """Writes lines of text, of which (x, y) is the upper left corner."""
    pen.multiline_text((x, y), "\n".join(lines), fill="black", font=font)


def tile_size(path):
    """The width and height, in a grid, of pictures like the one at `path`."""
    with Image.open(path) as image:
        size = image.size
    smallest, largest = TILES
    factor = min(max(max(size), smallest), largest) / max(size)
    return [max(1, round(side * factor)) for side in size]


def grid_title(pictures, shared):
    """What all pictures of a grid have in common, in words."""
    parts = []
    for axis in ("prompt", "seed", "steps", "scale"):
        if len({getattr(picture, axis) for picture in pictures}) == 1:
            parts.append(label(pictures[0], axis))
    result = shared["result"]
    parts += [result["sampler"], f"model: {result['model']}"]
    parts += [f"LoRA {lora['name']} at {lora['scale']:g}" for lora in result["lora"]]
    if "base" in shared:
        parts.append(f"base: {shared['base']['model']}")
    return ", ".join(parts)


def save_grids(pictures, shared, folder, font_path):
    """Writes labelled grids of the pictures, named by their settings; returns the files."""
    settings = [settings_of(picture, shared) for picture in pictures]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    title = grid_title(pictures, shared)
    rows = list(layout(pictures).items())
    num_pages = math.ceil(len(rows) / ROWS_PER_GRID)
    paths = []
    for page in range(num_pages):
        path = folder / (f"grid_{name}_{page + 1:03d}.png" if num_pages > 1 else f"grid_{name}.png")
        paths.append(path)
        if path.exists():  # it shows these very pictures
            continue
        part = dict(rows[page * ROWS_PER_GRID :][:ROWS_PER_GRID])
        shown = [
            {"label": row, "pictures": [picture.name() for picture in across.values()]} for row, across in part.items()
        ]
        texts = {"settings": json.dumps({"title": title, "rows": shown})}
        save_picture(make_grid(part, folder, title, font_path), path, texts)
    return paths


def draw_pairs(rows, columns, labels, font_path=None):
    """A picture of the closest pairs: findings on pictures, one of `rows` each (prompt, nearest, similarity, ratio,
    copy), above columns of tiles, which have these labels on the left."""
    font = load_font(font_path, FONT_SIZE)
    above = []
    for row in rows:
        lines = wrap(row["prompt"], font, PAIR_TILE - MARGIN, 4) + wrap(row["nearest"], font, PAIR_TILE - MARGIN, 2)
        verdict = ": a copy" if row["copy"] else ""
        above.append([*lines, f"similarity {row['similarity']:.3f}", f"ratio {row['ratio']:.2f}{verdict}"])
    top = max(map(len, above)) * LINE_HEIGHT + MARGIN
    step = PAIR_TILE + MARGIN
    sheet = Image.new("RGB", (PAIR_LABEL_WIDTH + len(rows) * step, top + len(labels) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(labels):
        write(pen, wrap(text, font, PAIR_LABEL_WIDTH - MARGIN, 4), MARGIN, top + number * step, font)
    for number, (lines, tiles) in enumerate(zip(above, columns)):
        x = PAIR_LABEL_WIDTH + number * step
        write(pen, lines, x, MARGIN // 2, font)
        for place, tile in enumerate(tiles):
            sheet.paste(tile, (x, top + place * step))
    return sheet
