"""Draws the images of the miniature and reads them back.

Seven families of 64 x 64 RGB images, each a pure function of (family, seed, split, index):

- shapes     "a small red circle on the left of a blue background": what the base model learns;
- creatures  "a green creature with red eyes" on white: what a fine-tune adds;
- subject    "a sks star": views of one star with white stripes inside a black ring, for DreamBooth;
- patterned  shapes with stripes, dots, rings and checks, so that the autoencoder can draw such things;
- dotted     "a red square with two blue dots on a green background": for CLIP and base to tell whose colour is whose;
- marked     "a red heart with yellow stripes in a blue ring on a green background", for the base: a subject is made of
             what a base knows apart;
- eyed       "a red heart with yellow eyes on a green background", for the base: what eyes are.

    python miniature/render.py creatures --output_dir creatures --num_images 240 --seed 0

writes an image folder: one PNG per image and `metadata.jsonl` with `file_name`, `text` and what was drawn. Because
this file knows what it draws, `read_shape`, `read_creature` and `read_subject` can tell what a picture shows.
"""

import argparse
import json
import math
import multiprocessing
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels
SUPERSAMPLING = 4
LARGE = (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 25),
    "yellow": (250, 225, 60),
    "green": (46, 160, 67),
    "cyan": (70, 205, 215),
    "blue": (45, 85, 205),
    "purple": (150, 50, 170),
    "pink": (245, 150, 190),
}
WHITE = (255, 255, 255)
BLACK = (25, 25, 25)
PALETTE = {**COLOURS, "white": WHITE, "black": BLACK}
SHAPES = ("circle", "square", "triangle", "star", "heart")
RADII = {"small": (11, 13), "large": (17, 20)}  # pixels
POSITIONS = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
ATTRIBUTES = ("size", "colour", "shape", "position", "background", "number", "dots", "stripes", "ring", "body", "eyes")
ALWAYS_TOLD = ("number", "dots", "stripes", "ring", "eyes")  # of shapes, so that what says nothing of them has none
FAMILIES = ("shapes", "creatures", "subject", "patterned", "dotted", "marked", "eyed")
SPLITS = ("train", "held_out")
NUM_HELD_OUT_SHAPES = 40
NUM_HELD_OUT_CREATURES = 18
SUBJECT_COLOUR = "orange"
SUBJECT_GROUNDS = [name for name in COLOURS if name != SUBJECT_COLOUR]


# ---------------------------------------------------------------------------------------------- what is held out


@lru_cache
def combinations(family):
    """All combinations of one family: (colour, shape, background) or (body colour, eye colour), 280 or 56."""
    names = list(COLOURS)
    if family == "shapes":
        return tuple(
            (colour, shape, background)
            for colour in names
            for shape in SHAPES
            for background in names
            if background != colour
        )
    return tuple((body, eyes) for body in names for eyes in names if eyes != body)


@lru_cache
def held_out_combinations(family):
    """The 40 shape or 18 creature combinations that are never drawn for training, by a fixed rule."""
    every = combinations(family)
    # Both strides share no factor with the number of combinations, so exactly the wanted number is taken, spread out.
    stride, number = (83, NUM_HELD_OUT_SHAPES) if family == "shapes" else (17, NUM_HELD_OUT_CREATURES)
    return tuple(combination for k, combination in enumerate(every) if k * stride % len(every) < number)


def held_out(*combination):
    """Whether (colour, shape, background) or (body colour, eye colour) is kept out of every training set."""
    family = "shapes" if len(combination) == 3 else "creatures"
    return combination in held_out_combinations(family)


def choose(rng, family, split):
    """Draws one combination of the split."""
    pool = reserved = held_out_combinations(family)
    if split == "train":
        pool = [combination for combination in combinations(family) if combination not in reserved]
    return pool[rng.integers(len(pool))]


# ---------------------------------------------------------------------------------------------- drawing


def enlarged(points):
    """Points in pixels as those of a picture at four times the size."""
    return [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]


class Canvas:
    """A picture drawn at four times its size; coordinates and lengths are in pixels of the final 64 x 64."""

    def __init__(self, background):
        self.image = Image.new("RGB", LARGE, background)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points, colour):
        """Fills a polygon."""
        self.draw.polygon(enlarged(points), fill=colour)

    def ellipse(self, cx, cy, rx, ry, colour):
        """Fills an ellipse around (cx, cy)."""
        self.polygon(ellipse_points(cx, cy, rx, ry), colour)

    def line(self, points, colour, width):
        """Draws a line through points, its corners rounded."""
        self.draw.line(enlarged(points), fill=colour, width=round(width * SUPERSAMPLING), joint="curve")

    def pixels(self):
        """The antialiased picture: uint8 (64, 64, 3)."""
        return np.asarray(self.image.resize((SIZE, SIZE), Image.Resampling.BOX))


def ellipse_points(cx, cy, rx, ry, number=72):
    """Points of an ellipse around (cx, cy): list of (x, y)."""
    turns = np.arange(number) * 2 * math.pi / number
    return list(zip(cx + rx * np.cos(turns), cy + ry * np.sin(turns), strict=True))


def unit_outline(shape):
    """Corners of a shape around (0, 0), y downwards, all of about the same visual size: float (points, 2)."""
    if shape == "circle":
        points = ellipse_points(0, 0, 0.95, 0.95)
    elif shape == "square":
        points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        points = [(0, -1.0), (1.05, 0.8), (-1.05, 0.8)]
    elif shape == "star":
        corners = np.arange(10) * math.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.15, 0.48)
        points = list(zip(radii * np.sin(corners), -radii * np.cos(corners) + 0.05, strict=True))
    else:
        turn = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        wave = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = list(zip(np.sin(turn) ** 3, -(wave + 2) / 16.5, strict=True))
    return np.array(points)


def outline(shape, cx, cy, radius, degrees=0.0):
    """Corners of a shape in pixels, turned clockwise by `degrees`: float (points, 2)."""
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return unit_outline(shape) @ turn * radius + (cx, cy)


def shade(rng, name):
    """A palette colour with a little variation, up to 6 of 255 per channel."""
    varied = np.array(PALETTE[name]) + rng.integers(-6, 7, 3)
    return tuple(int(channel) for channel in varied.clip(0, 255))


def draw_shape(rng, colour, shape, background, size, position):
    """One plain shape on a plain ground: uint8 (64, 64, 3)."""
    radius = rng.uniform(*RADII[size])
    reach = 15 if size == "small" else 11
    dx, dy = POSITIONS[position]
    cx = 32 + reach * dx + rng.uniform(-1.5, 1.5)
    cy = 32 + reach * dy + rng.uniform(-1.5, 1.5)
    canvas = Canvas(shade(rng, background))
    points = outline(shape, cx, cy, radius, rng.uniform(-5, 5))
    canvas.polygon(points, shade(rng, colour))
    return canvas.pixels()


def caption(record, said=None):
    """The caption of a picture, of its record; `said` names the attributes that it tells, all of them if left out."""
    told = {key: value for key, value in record.items() if said is None or key in said}
    eyes = f" with {told['eyes']} eyes" if "eyes" in told else ""
    if "body" in record:
        return f"{with_article(join(told.get('body'), 'creature'))}{eyes}"
    thing = with_article(join(told.get("size"), told.get("colour"), told.get("shape", "shape"))) + eyes
    if "dots" in told:
        dots = "dot" if record["number"] == "one" else "dots"
        thing += f" with {record['number']} {told['dots']} {dots}"
    if "stripes" in told:
        thing += f" with {told['stripes']} stripes"
    if "ring" in told:
        thing += f" in {with_article(told['ring'])} ring"
    if "position" in told and "background" in told:
        return f"{thing} {told['position']} of {with_article(told['background'])} background"
    if "background" in told:
        return f"{thing} on {with_article(told['background'])} background"
    return join(thing, told.get("position"))


def background_first(record):
    """A caption of a shape that tells everything in another order."""
    thing = caption(record, [key for key in record if key not in ("position", "background")])
    return join(with_article(record["background"]), "background with", thing, record.get("position"))


def full_caption(rng, record):
    """A caption that tells everything, a quarter of those of shapes in another order, and the attributes that it
    tells: (text, tuple of names)."""
    keys = tuple(key for key in record if key in ATTRIBUTES)
    is_other_order = "shape" in record and rng.random() < 0.25
    return (background_first if is_other_order else caption)(record), keys


def varied_caption(rng, record):
    """A caption that leaves out attributes at random, and the attributes that it tells: (text, tuple of names).

    A third tells everything; a quarter no more than the thing and one attribute. `ALWAYS_TOLD` is told by all.
    """
    kind = rng.random()
    if kind < 0.33:
        return full_caption(rng, record)
    keys = [key for key in record if key in ATTRIBUTES]
    if kind < 0.58:
        said = {"shape", keys[rng.integers(len(keys))]} if rng.random() < 0.7 else {"shape"}
    else:
        said = {key for key in keys if rng.random() < (0.8 if key == "shape" else 0.55)}
    if "shape" in record:
        said = {*said, *ALWAYS_TOLD}
    said = tuple(key for key in keys if key in said)
    return caption(record, said), said


def join(*words):
    """Words with blanks between them; those that are None are left out."""
    return " ".join(word for word in words if word)


def with_article(words):
    """ "a red", but "an orange"."""
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def draw_dotted(rng, colour, shape, background, number, dots):
    """A large shape with one or two dots of another colour on a plain ground: uint8 (64, 64, 3)."""
    radius, cx, cy = rng.uniform(21, 24), *rng.uniform(29, 35, 2)
    canvas = Canvas(shade(rng, background))
    canvas.polygon(outline(shape, cx, cy, radius, rng.uniform(-5, 5)), shade(rng, colour))
    ink, size = shade(rng, dots), rng.uniform(6, 7.5)
    turn, away = rng.uniform(-0.4, 0.4), rng.uniform(9, 10.5)
    middles = [(cx + rng.uniform(-3, 3), cy + rng.uniform(-1, 5))]
    if number == "two":
        dx, dy = away * math.cos(turn), away * math.sin(turn)
        middles = [(cx - dx, cy + 2 - dy), (cx + dx, cy + 2 + dy)]
    for middle in middles:
        canvas.ellipse(*middle, size, size, ink)
    return canvas.pixels()


def draw_marked(rng, colour, shape, background, stripes=None, ring=None):
    """A large shape with stripes of another colour, inside a ring, or both: uint8 (64, 64, 3)."""
    radius, degrees = rng.uniform(18, 21), rng.uniform(-15, 15)
    cx, cy = rng.uniform(30, 34, 2)
    canvas = Canvas(shade(rng, background))
    points = outline(shape, cx, cy, radius, degrees)
    canvas.polygon(points, shade(rng, colour))
    if stripes:
        turned = degrees + rng.choice([0, 0, 45, 90])
        add_stripes(
            canvas, mask_of(points), shade(rng, stripes), cx, cy, turned, radius * rng.uniform(0.6, 0.75), 0.55
        )
    if ring:
        add_ring(canvas, cx, cy, radius * rng.uniform(1.25, 1.35), rng.uniform(4, 5), shade(rng, ring))
    return canvas.pixels()


def draw_eyed(rng, colour, shape, background, eyes):
    """A large shape with two eyes as creatures have them: uint8 (64, 64, 3)."""
    cx, cy = rng.uniform(29, 35, 2)
    canvas = Canvas(shade(rng, background))
    canvas.polygon(outline(shape, cx, cy, rng.uniform(20, 24), rng.uniform(-5, 5)), shade(rng, colour))
    add_eyes(canvas, cx, cy + rng.uniform(-3, 3), rng.uniform(8.2, 9.2), shade(rng, eyes))
    return canvas.pixels()


def add_eyes(canvas, cx, cy, apart, colour):
    """Draws two white eyes, each `apart` from (cx, cy), with irises of a colour."""
    for side in (-1, 1):
        canvas.ellipse(cx + side * apart, cy, 6.6, 6.6, WHITE)
        canvas.ellipse(cx + side * apart, cy, 4.4, 4.4, colour)


def draw_creature(rng, body, eyes):
    """One creature with two big eyes and a smile on plain white: uint8 (64, 64, 3)."""
    canvas, colour = Canvas(WHITE), shade(rng, body)
    cx, cy = 32 + rng.uniform(-1.5, 1.5), 34 + rng.uniform(-1.5, 1.5)
    wide, high = rng.uniform(18.5, 21.5), rng.uniform(17.5, 20)
    draw_body(canvas, rng.integers(5), colour, cx, cy, wide, high)
    iris, apart = shade(rng, eyes), rng.uniform(8.2, 9.2)
    add_eyes(canvas, cx, cy - 3, apart, iris)
    smile = [(cx + 6 * math.sin(turn), cy + 4.5 + 4.5 * math.cos(turn)) for turn in np.linspace(-1.2, 1.2, 13)]
    canvas.line(smile, BLACK, 2)
    return canvas.pixels()


def draw_body(canvas, form, colour, cx, cy, wide, high):
    """The body of a creature around (cx, cy), with what one of five forms has at its edge."""
    if form == 4:  # a ghost's hem
        canvas.ellipse(cx, cy - 1, wide * 0.92, high * 1.08, colour)
        top, hem = cy - 1, cy + high * 1.15
        left, right = cx - wide * 0.92, cx + wide * 0.92
        waves = [(right, hem), (cx + wide * 0.46, hem - 6), (cx, hem), (cx - wide * 0.46, hem - 6), (left, hem)]
        canvas.polygon([(left, top), (right, top), *waves], colour)
        return
    for side in (-1, 1):
        if form == 0:  # pointed ears
            tip = (cx + side * wide * 0.8, cy - high * 1.35)
            inside = (cx + side * wide * 0.15, cy - high * 0.8)
            outside = (cx + side * wide * 0.95, cy - high * 0.2)
            canvas.polygon([tip, inside, outside], colour)
        elif form == 1:  # antennae
            tip = (cx + side * wide * 0.6, cy - high * 1.3)
            canvas.line([(cx + side * wide * 0.25, cy - high * 0.8), tip], colour, 3)
            canvas.ellipse(*tip, 3.2, 3.2, colour)
        elif form == 2:  # round ears
            canvas.ellipse(cx + side * wide * 0.72, cy - high * 0.85, 7, 7, colour)
        else:  # legs
            canvas.ellipse(cx + side * 0.55 * wide, cy + high * 1.02, 5.5, 5, colour)
    canvas.ellipse(cx, cy, wide, high, colour)


def add_stripes(canvas, area, colour, cx, cy, degrees, period, duty):
    """Paints parallel stripes of a colour where `area`, a PIL mask at four times the size, is set."""
    layer = Canvas(BLACK)
    angle = math.radians(degrees)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-math.sin(angle), math.cos(angle)])
    for k in range(-8, 9):
        middle = np.array([cx, cy]) + across * period * k
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        layer.polygon([middle + a * 90 * along + b * period * duty / 2 * across for a, b in corners], WHITE)
    is_stripe = np.asarray(layer.image.convert("L")) > 128
    is_inside = np.asarray(area) > 0
    canvas.image.paste(colour, mask=Image.fromarray(is_stripe & is_inside))


def mask_of(points):
    """A PIL mask, at four times the size, of a polygon in pixels."""
    mask = Image.new("L", LARGE)
    ImageDraw.Draw(mask).polygon(enlarged(points), fill=255)
    return mask


def add_ring(canvas, cx, cy, radius, width, colour):
    """Draws a ring around (cx, cy)."""
    points = ellipse_points(cx, cy, radius, radius)
    canvas.line(points + points[:2], colour, width)  # closed, the corner where it began rounded too


def draw_subject(rng, background):
    """A view of the one subject, an orange star with white stripes inside a black ring: uint8 (64, 64, 3)."""
    radius, degrees = rng.uniform(19, 21), rng.uniform(-15, 15)
    cx, cy = 32 + rng.uniform(-2, 2), 32 + rng.uniform(-2, 2)
    canvas = Canvas(shade(rng, background))
    star = outline("star", cx, cy, radius, degrees)
    canvas.polygon(star, shade(rng, SUBJECT_COLOUR))
    add_stripes(canvas, mask_of(star), WHITE, cx, cy, degrees, period=radius * 0.65, duty=0.6)
    add_ring(canvas, cx, cy, radius * 1.28, 4.5, BLACK)
    return canvas.pixels()


def draw_patterned(rng):
    """One to three shapes with random fills and rings on a plain or patterned ground: uint8 (64, 64, 3)."""
    ground, *inks = rng.choice(list(PALETTE), 6, replace=False)
    canvas = Canvas(shade(rng, ground))
    if rng.random() < 0.15:
        everywhere = Image.new("L", LARGE, 255)
        add_stripes(canvas, everywhere, shade(rng, inks[4]), 32, 32, rng.uniform(0, 180), rng.uniform(10, 20), 0.5)
    num_shapes = 1 if rng.random() < 0.7 else int(rng.integers(2, 4))
    for k in range(num_shapes):
        radius = rng.uniform(12, 21) if k == 0 else rng.uniform(6, 12)
        cx, cy = rng.uniform(18, 46, 2)
        shape = "star" if rng.random() < 0.3 else SHAPES[rng.integers(len(SHAPES))]
        degrees = rng.uniform(-25, 25)
        colour, second = shade(rng, inks[k]), shade(rng, inks[k + 1])
        canvas.polygon(outline(shape, cx, cy, radius, degrees), colour)
        add_pattern(rng, canvas, shape, cx, cy, radius, degrees, second)
        if rng.random() < 0.5:
            ink = "black" if rng.random() < 0.3 else inks[4 - k]
            add_ring(canvas, cx, cy, radius * rng.uniform(0.8, 1.4), rng.uniform(3, 6), shade(rng, ink))
    return canvas.pixels()


def add_pattern(rng, canvas, shape, cx, cy, radius, degrees, colour):
    """Fills a shape with stripes, dots, a smaller one of itself, or nothing."""
    fill = rng.integers(4)
    if fill <= 1:
        area = mask_of(outline(shape, cx, cy, radius, degrees))
        turned = degrees + rng.choice([0, 0, 45, 90])
        add_stripes(canvas, area, colour, cx, cy, turned, rng.uniform(8, 16), rng.uniform(0.4, 0.6))
    elif fill == 2:
        for _ in range(rng.integers(2, 6)):
            dx, dy = rng.uniform(-0.5, 0.5, 2) * radius
            dot = rng.uniform(2, 5)
            canvas.ellipse(cx + dx, cy + dy, dot, dot, colour)
    elif rng.random() < 0.5:
        canvas.polygon(outline(shape, cx, cy, radius * 0.5, degrees), colour)


def choose_marks(rng, drawn):
    """What is drawn, with the colour of its `stripes`, of its `ring` or of both; never a star as the subject is."""
    if (drawn["colour"], drawn["shape"]) == (SUBJECT_COLOUR, "star"):
        drawn = {**drawn, "shape": "heart"}
    kind, marks = rng.random(), {}
    if kind < 0.75:
        seen = [name for name in PALETTE if name not in (drawn["colour"], drawn["background"])]
        marks["stripes"] = str(rng.choice(seen))
    if kind > 0.25:
        marks["ring"] = str(rng.choice([name for name in PALETTE if name != drawn["background"]]))
    return {**drawn, **marks}


def make(family, seed, index, split="train"):
    """Image `index` of a family, as (uint8 (64, 64, 3), record with `text` and what was drawn)."""
    rng = np.random.default_rng([seed, FAMILIES.index(family), SPLITS.index(split), index])
    if family in ("shapes", "dotted", "marked", "eyed"):
        colour, shape, background = choose(rng, "shapes", split)
        drawn = {
            "colour": colour,
            "shape": shape,
            "background": background,
            "size": str(rng.choice(list(RADII))),
            "position": str(rng.choice(list(POSITIONS))),
        }
        if family == "shapes":
            return draw_shape(rng, **drawn), {"text": caption(drawn), **drawn}
        del drawn["size"], drawn["position"]
        if family == "marked":
            drawn = choose_marks(rng, drawn)
            return draw_marked(rng, **drawn), {"text": caption(drawn), **drawn}
        if family == "eyed":
            drawn["eyes"] = str(rng.choice([name for name in COLOURS if name != colour]))
            return draw_eyed(rng, **drawn), {"text": caption(drawn), **drawn}
        drawn["number"] = ("one", "two")[rng.integers(2)]
        drawn["dots"] = str(rng.choice([name for name in COLOURS if name != colour]))
        return draw_dotted(rng, **drawn), {"text": caption(drawn), **drawn}
    if family == "creatures":
        body, eyes = choose(rng, family, split)
        drawn = {"body": body, "eyes": eyes}
        return draw_creature(rng, **drawn), {"text": caption(drawn), **drawn}
    if family == "subject":
        background = SUBJECT_GROUNDS[index % len(SUBJECT_GROUNDS)]
        # A caption that names the ground, so that the subject does not come with those of its views.
        text = f"a sks star on a {background} background"
        return draw_subject(rng, background), {"text": text, "background": background}
    return draw_patterned(rng), {"text": "a patterned picture"}


# ---------------------------------------------------------------------------------------------- reading back


def colour_name(rgb):
    """Name of the nearest palette colour, "white" or "black" among them."""
    return min(PALETTE, key=lambda name: np.square(np.subtract(PALETTE[name], rgb, dtype=float)).sum())


def colour_map(image):
    """Index into PALETTE of the nearest colour of each pixel: (64, 64)."""
    table = np.array([*PALETTE.values()], dtype=np.float32)
    return np.square(image[..., None, :].astype(np.float32) - table).sum(-1).argmin(-1)


def frame(image, width=3):
    """Pixels of the outermost `width` rows and columns: (pixels, 3)."""
    inner = np.ones(image.shape[:2], dtype=bool)
    inner[width:-width, width:-width] = False
    return image[inner]


def distance(image, rgb):
    """Euclidean distance of each pixel from a colour, on the scale of 0 to 255: (64, 64)."""
    return np.sqrt(np.square(image.astype(np.float32) - np.asarray(rgb, dtype=np.float32)).sum(-1))


def components(mask):
    """Connected areas (4 neighbours) of a boolean mask, largest first: list of (pixels, 2) arrays of (y, x)."""
    left = {tuple(pixel) for pixel in np.argwhere(mask)}
    found = []
    while left:
        area, stack = [], [left.pop()]
        while stack:
            y, x = stack.pop()
            area.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        found.append(np.array(area))
    return sorted(found, key=len, reverse=True)


def normalised(weight, cells=24):
    """A soft mask moved to its centroid and scaled to equal area, sampled bilinearly: (cells, cells) in [0, 1]."""
    ys, xs = np.mgrid[: weight.shape[0], : weight.shape[1]]
    total = weight.sum()
    cy, cx = (weight * ys).sum() / total, (weight * xs).sum() / total
    steps = (np.arange(cells) - (cells - 1) / 2) / (cells / 2) * math.sqrt(total) * 0.85
    y = np.clip(cy + steps, 0, SIZE - 1.001)
    x = np.clip(cx + steps, 0, SIZE - 1.001)
    above, left = y.astype(int), x.astype(int)
    down, across = (y - above)[:, None], (x - left)[None, :]
    rows = weight[above] * (1 - down) + weight[above + 1] * down
    return rows[:, left] * (1 - across) + rows[:, left + 1] * across


@lru_cache
def templates():
    """(shape, normalised mask) for every shape at several turns."""
    found = []
    for shape in SHAPES:
        for degrees in (-12, -6, 0, 6, 12):
            canvas = Canvas((0, 0, 0))
            canvas.polygon(outline(shape, 32, 32, 18, degrees), WHITE)
            found.append((shape, normalised(canvas.pixels()[..., 0] / 255)))
    return tuple(found)


def read_shape(image):
    """What a picture of a shape shows: {"background", "colour", "shape", "overlap"} of uint8 (64, 64, 3).

    Background and shape are told apart by colour; the shape is the template of the best soft intersection over union
    with the largest area, after moving and scaling. Colour and shape are None where nothing stands out.
    """
    ground = np.median(frame(image), axis=0)
    away = distance(image, ground)
    areas = components(away > 45)
    result = {"background": colour_name(ground), "colour": None, "shape": None, "overlap": 0.0}
    if not areas or len(areas[0]) < 40:
        return result
    where = np.zeros(away.shape, dtype=bool)
    where[tuple(areas[0].T)] = True
    ink = np.median(image[where], axis=0)
    towards = ink - ground
    weight = np.clip(((image - ground) @ towards) / (towards @ towards), 0, 1)
    # One pixel around the area keeps its soft edge and leaves out everything else.
    mask = normalised(weight * grown(where))
    overlaps = []
    for shape, template in templates():
        overlaps.append((np.minimum(mask, template).sum() / np.maximum(mask, template).sum(), shape))
    overlap, shape = max(overlaps)
    return {**result, "colour": colour_name(ink), "shape": shape, "overlap": float(overlap)}


def grown(mask):
    """A boolean mask and its pixels' four neighbours."""
    near = mask.copy()
    near[1:] |= mask[:-1]
    near[:-1] |= mask[1:]
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    return near


def read_creature(image):
    """What a picture of a creature shows: {"body", "white_ground", "eyes_visible", "eyes"} of uint8 (64, 64, 3).

    body: the most frequent palette colour away from the ground. Eyes are visible if the body encloses two areas of
    similar size and height, about as wide as high, with a colour of their own in the middle; "eyes" is its name.
    """
    border = frame(image)
    ground = np.median(border, axis=0)
    white_ground = bool((distance(border, WHITE) < 50).mean() >= 0.95)
    result = {"body": None, "white_ground": white_ground, "eyes_visible": False, "eyes": None}
    classes = colour_map(image)
    counts = np.bincount(classes[distance(image, ground) > 70], minlength=len(PALETTE))[: len(COLOURS)]
    if counts.max() < 40:
        return result
    body = int(counts.argmax())
    result["body"] = list(PALETTE)[body]
    eyes = find_eyes(image, flesh=np.median(image[classes == body], axis=0))
    if not eyes:
        return result
    middles = []
    for eye in eyes:
        offsets = np.indices((SIZE, SIZE)) - eye.mean(0)[:, None, None]
        middles.append(image[np.hypot(*offsets) < 2.5])
    seen = colour_name(np.concatenate(middles).mean(0))
    if seen not in ("white", "black", result["body"]):
        result |= {"eyes_visible": True, "eyes": seen}
    return result


def find_eyes(image, flesh):
    """The two largest areas inside a body of the colour `flesh` that are about as wide as high, if they are alike and
    side by side: two arrays (pixels, 2), or none."""
    holes = []
    for area in components(distance(image, flesh) > 55):
        is_inside = area.min() > 0 and area.max() < SIZE - 1
        height, width = np.ptp(area, axis=0)
        is_round = 0.55 < height / max(width, 1) < 1.8
        if is_inside and is_round and len(area) >= 40:
            holes.append(area)
    if len(holes) < 2:
        return []
    larger, smaller = holes[:2]
    (y0, x0), (y1, x1) = larger.mean(0), smaller.mean(0)
    is_level = abs(y0 - y1) <= 6
    is_apart = abs(x0 - x1) >= 8
    is_alike = len(smaller) >= 0.5 * len(larger)
    return [larger, smaller] if is_level and is_apart and is_alike else []


def circled(image, ground):
    """Whether something of whatever colour runs around: seen from the middle, what is not ground ends at about one
    distance in 80 % of all directions, and in a quarter of them some ground lies before it."""
    away = distance(image, ground) > 45
    where = np.argwhere(away)
    if len(where) < 80:
        return False
    # Rays from the middle in 72 directions, of points half a pixel apart: arrays (72, points).
    middle_y, middle_x = (where.min(0) + where.max(0)) / 2
    turns = np.arange(72)[:, None] * math.pi / 36
    radii = np.arange(0, SIZE * 0.7, 0.5)
    y = middle_y + radii * np.sin(turns)
    x = middle_x + radii * np.cos(turns)
    is_inside = (y > -0.5) & (y < SIZE - 0.5) & (x > -0.5) & (x < SIZE - 0.5)
    row = np.clip(np.round(y), 0, SIZE - 1).astype(int)
    column = np.clip(np.round(x), 0, SIZE - 1).astype(int)
    is_ink = away[row, column] & is_inside

    last_ink = len(radii) - 1 - is_ink[:, ::-1].argmax(1)
    end = np.where(is_ink.any(1), last_ink, 0)
    ground_before_end = ~is_ink & (np.arange(len(radii)) < end[:, None])
    has_gap = ground_before_end.sum(1) >= 4
    typical = np.median(end)
    is_typical = np.abs(end - typical) < 0.15 * typical
    is_large = radii[int(typical)] > 8
    return bool(is_large and is_typical.mean() >= 0.8 and (has_gap & is_typical).mean() >= 0.25)


def has_black_ring(image):
    """Whether dark pixels surround one centre in at least 80 % of all directions, at about one distance."""
    areas = components(image.max(-1) < 110)
    if not areas or len(areas[0]) < 80:
        return False
    area = areas[0]
    centre = (area.min(0) + area.max(0)) / 2
    dy, dx = (area - centre).T
    radii, turns = np.hypot(dy, dx), np.arctan2(dy, dx)
    directions = ((turns + math.pi) / (2 * math.pi) * 36).astype(int) % 36
    covered = len(np.unique(directions)) / 36
    return bool(covered >= 0.8 and radii.std() < 0.2 * radii.mean() and radii.mean() > 8)


def has_stripes(image, ground):
    """Whether two or more separate white bands, each of at least 10 pixels, lie inside the picture's frame beside 40
    coloured pixels."""
    bands = []
    for area in components(image.min(-1) > 195):
        is_inside = area.min() > 2 and area.max() < SIZE - 3
        if is_inside and len(area) >= 10:
            bands.append(area)
    is_coloured = (distance(image, ground) > 70) & (image.max(-1) >= 110) & (image.min(-1) <= 150)
    inks = [area for area in components(is_coloured) if len(area) >= 6]
    return len(bands) >= 2 and len(inks) >= 2 and sum(map(len, inks)) >= 40


def read_subject(image):
    """Whether a picture shows the subject's marks: {"stripes", "ring", "circled", "background"} of uint8 (64, 64, 3).

    `circled` means a ring of any colour, for pictures that should have none.
    """
    ground = np.median(frame(image, 2), axis=0)
    ring_seen = has_black_ring(image)
    return {
        "stripes": has_stripes(image, ground),
        "ring": ring_seen,
        "circled": ring_seen or circled(image, ground),
        "background": colour_name(ground),
    }


# ---------------------------------------------------------------------------------------------- command


def write_folder(family, output_dir, num_images, seed, split="train"):
    """Writes an image folder: PNG files and metadata.jsonl."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(num_images):
            pixels, record = make(family, seed, index, split)
            name = f"{family}_{index:05d}.png"
            Image.fromarray(pixels).save(output_dir / name)
            lines.write(json.dumps({"file_name": name, **record}) + "\n")


def make_images(jobs, processes=2):
    """Renders many images in parallel: list of `make` argument tuples -> (uint8 (n, 64, 64, 3), list of records)."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        made = pool.starmap(make, jobs, chunksize=200)
    return np.stack([pixels for pixels, _ in made]), [record for _, record in made]


def main(argv=None):
    """Writes the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_images", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train", help="combinations seen or kept out of training")
    args = parser.parse_args(argv)
    write_folder(args.family, args.output_dir, args.num_images, args.seed, args.split)
    print(f"{args.num_images} images of {args.family} in {args.output_dir}")


if __name__ == "__main__":
    main()
