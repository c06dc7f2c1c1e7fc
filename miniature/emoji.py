"""Real pictures for the miniature: Noto emoji (Google, Apache-2.0) as an image folder, and how to read them.

    python miniature/emoji.py fetch --package_dir demo/noto
    python miniature/emoji.py render --package_dir demo/noto --output_dir demo/emoji

`fetch` gets the npm package @iconify-json/noto. `render` draws the emoji that are chosen here at 64 x 64 pixels over
white: those to train on, each in a few sizes and places, into OUTPUT_DIR/train, and those held out into
OUTPUT_DIR/held_out. Captions are their names: "an emoji of a blue heart". Rendering needs `requirements_emoji.txt`.
`read_colour`, `read_thing` and `has_white_ground` tell what a picture shows; `measure_emoji.py` uses them.
"""

import argparse
import hashlib
import http.client
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))  # found by whoever imports this file by its path
import render

PACKAGE, VERSION = "@iconify-json/noto", "1.2.9"
# Of the package's file, so that everybody trains on the same pictures.
SHA256 = "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
REGISTRY = "https://registry.npmjs.org"  # npm's default; where npm is installed its own settings are used
PATIENCE = 120  # seconds for a download

# What comes in colours: the name of the icon, by thing and colour. The package has brown, grey and white ones too, but
# the miniature's autoencoder turns them to red, green and pink.
COLOURED = {
    "heart": {
        "red": "red-heart",
        "orange": "orange-heart",
        "yellow": "yellow-heart",
        "green": "green-heart",
        "light blue": "light-blue-heart",
        "blue": "blue-heart",
        "purple": "purple-heart",
        "pink": "pink-heart",
        "black": "black-heart",
    },
    "circle": {
        "red": "red-circle",
        "orange": "orange-circle",
        "yellow": "yellow-circle",
        "green": "green-circle",
        "blue": "blue-circle",
        "purple": "purple-circle",
        "black": "black-circle",
    },
    "square": {
        "red": "red-square",
        "orange": "orange-square",
        "yellow": "yellow-square",
        "green": "green-square",
        "blue": "blue-square",
        "purple": "purple-square",
        "black": "black-large-square",
    },
    "book": {"red": "closed-book", "orange": "orange-book", "green": "green-book", "blue": "blue-book"},
    "diamond": {"orange": "large-orange-diamond", "blue": "large-blue-diamond"},
    "apple": {"red": "red-apple", "green": "green-apple"},
}
# Things of one look, which this autoencoder keeps apart.
THINGS = """
star sun crescent-moon droplet fire high-voltage rainbow umbrella mountain
lemon pear cherries strawberry watermelon pineapple eggplant carrot hot-pepper
doughnut cupcake pizza cheese-wedge teapot balloon trophy bell key locked crown ring
light-bulb magnet hammer scissors pencil pushpin
sunflower maple-leaf evergreen-tree mushroom
cat-face frog panda butterfly fish lady-beetle crab dolphin
smiling-face cold-face robot alien jack-o-lantern
t-shirt jeans dress top-hat high-heeled-shoe sunglasses
automobile rocket airplane sailboat anchor
spade-suit cross-mark check-mark no-entry warning drop-of-blood
""".split()
# Never trained on, though their colours and their things are.
HELD_OUT = (
    ("green", "heart"),
    ("purple", "heart"),
    ("orange", "circle"),
    ("blue", "circle"),
    ("yellow", "square"),
    ("purple", "square"),
    ("green", "book"),
)
# Never seen by anybody: there is no such emoji.
NOT_THERE = (
    ("purple", "book"),
    ("yellow", "book"),
    ("black", "book"),
    ("pink", "circle"),
    ("pink", "square"),
    ("light blue", "circle"),
    ("yellow", "diamond"),
    ("green", "diamond"),
    ("purple", "diamond"),
    ("blue", "apple"),
    ("yellow", "apple"),
    ("purple", "apple"),
)
# The colours that Noto paints these with, to read a picture by; a book has grey pages.
INKS = (
    ("red", (244, 67, 54)),
    ("orange", (255, 152, 0)),
    ("yellow", (255, 204, 50)),
    ("green", (124, 179, 66)),
    ("green", (156, 204, 101)),
    ("light blue", (100, 208, 255)),
    ("blue", (25, 118, 210)),
    ("blue", (33, 150, 243)),
    ("purple", (171, 71, 188)),
    ("pink", (255, 148, 189)),
    ("black", (66, 66, 66)),
    ("grey", (189, 189, 189)),
)
NUM_VIEWS = 6  # of each emoji
SIDES = (44, 54)  # pixels, the least and the most of a view
SHIFT = 2  # pixels, the most


# ---------------------------------------------------------------------------------------------- what is chosen


def caption(name):
    """The caption of an emoji, by its name in words."""
    article = "an" if name[0] in "aeiou" else "a"
    return f"an emoji of {article} {name}"


def record_of(icon, thing, colour=None):
    """What is known of an emoji: `icon` is its name in the package, None where there is no such emoji."""
    words = thing.replace("-", " ")
    name = words if colour is None else f"{colour} {words}"
    return {"text": caption(name), "icon": icon, "thing": thing, "colour": colour}


@lru_cache
def records(split):
    """The emoji of a split, train, held_out or not_there, those with colours first: tuple of records."""
    if split == "held_out":
        return tuple(record_of(COLOURED[thing][colour], thing, colour) for colour, thing in HELD_OUT)
    if split == "not_there":
        return tuple(record_of(None, thing, colour) for colour, thing in NOT_THERE)
    coloured = []
    for thing, icons in COLOURED.items():
        for colour, icon in icons.items():
            if (colour, thing) not in HELD_OUT:
                coloured.append(record_of(icon, thing, colour))
    return (*coloured, *[record_of(thing, thing) for thing in THINGS])


# ---------------------------------------------------------------------------------------------- fetching


def download(folder):
    """Downloads the package into a folder. Raises `OSError` or `RuntimeError` with what was wrong, in a few words."""
    npm = shutil.which("npm")
    if npm is None:
        name = f"noto-{VERSION}.tgz"
        with urllib.request.urlopen(f"{REGISTRY}/{PACKAGE}/-/{name}", timeout=PATIENCE) as answer:
            (folder / name).write_bytes(answer.read())
        return
    words = [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", str(folder), "--fetch-retries=1"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"npm did not answer in {PATIENCE} s") from None
    if done.returncode:
        codes = [line.split()[-1] for line in done.stderr.splitlines() if line.startswith("npm error code ")]
        raise RuntimeError(f"npm pack: {' '.join(codes) or 'failed'}")


def find_package(folder):
    """The package's file in a folder, as npm or the registry names it, or None."""
    return next(iter(sorted(folder.glob(f"*noto-{VERSION}.tgz"))), None)


def fetch(package_dir):
    """Leaves icons.json of the package in a folder, downloaded or from the package's file there. Exits with a line of
    what to do where that is not possible."""
    folder = Path(package_dir)
    folder.mkdir(parents=True, exist_ok=True)
    remedy = f"connect, or put noto-{VERSION}.tgz into {folder}"
    try:
        if find_package(folder) is None:
            download(folder)
        content = find_package(folder).read_bytes()
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        sys.exit(f"Cannot fetch Noto emoji ({getattr(error, 'reason', error)}): {remedy}")
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{find_package(folder)} is not version {VERSION} of {PACKAGE}: delete it; {remedy}")
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        icons = package.extractfile("package/icons.json").read()
    part = folder / "icons.json.part"
    part.write_bytes(icons)
    os.replace(part, folder / "icons.json")
    print(f"{PACKAGE} {VERSION} in {folder}: Noto emoji, Google, Apache-2.0")


# ---------------------------------------------------------------------------------------------- rendering


def rasterise(svg, side):
    """An SVG as a PIL image with transparency, `side` pixels wide and high. Exits where the library is missing."""
    try:
        import resvg_py
    except ImportError:
        sys.exit("Rendering emoji needs a library: pip install -r requirements_emoji.txt")
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)))


def svg_of(package, icon):
    """The SVG of an icon of an icons.json, https://iconify.design/docs/types/iconify-json.html."""
    found = package["icons"][icon]
    left, top = found.get("left", 0), found.get("top", 0)
    width, height = (found.get(key, package.get(key, 16)) for key in ("width", "height"))
    box = f'viewBox="{left} {top} {width} {height}"'
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {names} {box}>{found['body']}</svg>"


def draw_view(package, icon, view, seed=0):
    """View number `view` of an icon over white, a function of its name, the number and the seed: uint8 (64, 64, 3).
    View 0 is in the middle; none is mirrored, since a check mark or a book would not be what it was."""
    rng = np.random.default_rng([seed, view, *icon.encode()])
    side, shift = sum(SIDES) // 2, (0, 0)
    if view:
        side, shift = int(rng.integers(SIDES[0], SIDES[1] + 1)), rng.integers(-SHIFT, SHIFT + 1, 2)
    emoji = rasterise(svg_of(package, icon), side).convert("RGBA")
    picture = Image.new("RGBA", (render.SIZE, render.SIZE), "white")
    corner = (render.SIZE - side) // 2
    picture.alpha_composite(emoji, (corner + int(shift[0]), corner + int(shift[1])))
    return np.asarray(picture.convert("RGB"))


def write_folder(package, split, output_dir, num_views, seed=0):
    """Writes an image folder of a split: PNG files and metadata.jsonl. Returns how many images."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for record in records(split):
        for view in range(num_views):
            name = f"{record['icon']}_{view}.png"
            Image.fromarray(draw_view(package, record["icon"], view, seed)).save(output_dir / name)
            lines.append(json.dumps({"file_name": name, **record}) + "\n")
    (output_dir / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def render_folders(package_dir, output_dir, seed=0):
    """Writes the folders of what is trained on and of what is held out."""
    path = Path(package_dir) / "icons.json"
    if not path.exists():
        sys.exit(f"{path} is missing: python miniature/emoji.py fetch --package_dir {package_dir}")
    package = json.loads(path.read_text(encoding="utf-8"))
    for split, num_views in (("held_out", 1), ("train", NUM_VIEWS)):  # whose metadata make looks for
        number = write_folder(package, split, Path(output_dir) / split, num_views, seed)
        print(f"{number} images of {len(records(split))} emoji in {Path(output_dir) / split}")


# ---------------------------------------------------------------------------------------------- reading back


def weights_of(image):
    """How far each pixel is from the white ground, in [0, 1], a tint of it being 0: (64, 64)."""
    return np.clip((render.distance(image, render.WHITE) - 30) / 90, 0, 1)


def outline_of(image):
    """What covers the ground, moved to its middle and scaled to equal area: (24, 24) in [0, 1], or None if it is less
    than 40 pixels."""
    weight = weights_of(image)
    return render.normalised(weight) if weight.sum() >= 40 else None


def has_white_ground(image):
    """Whether the ground is white."""
    return bool((render.distance(render.frame(image), render.WHITE) < 50).mean() >= 0.95)


def read_colour(image):
    """The name of the ink nearest to most pixels that are not ground, or None if these are fewer than 40 or the ground
    is not white: a model may paint it in the colour that the thing should have."""
    pixels = image[render.distance(image, render.WHITE) > 60].astype(float)
    if len(pixels) < 40 or not has_white_ground(image):
        return None
    table = np.array([rgb for _, rgb in INKS], dtype=float)
    nearest = np.square(pixels[:, None] - table).sum(-1).argmin(1)
    counts = {}
    for (name, _), count in zip(INKS, np.bincount(nearest, minlength=len(INKS)), strict=True):
        counts[name] = counts.get(name, 0) + count
    return max(counts, key=counts.get)


def read_thing(image, outlines):
    """The thing whose outline overlaps most (intersection over union) with that of a picture, or None if there is
    nothing; `outlines` is a list of (thing, outline)."""
    found = outline_of(image)
    if found is None:
        return None
    overlaps = [(np.minimum(found, known).sum() / np.maximum(found, known).sum(), thing) for thing, known in outlines]
    return max(overlaps)[1]


# ---------------------------------------------------------------------------------------------- command


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fetch", "render"))
    parser.add_argument("--package_dir", default="demo/noto", help="folder of the package's icons.json")
    parser.add_argument("--output_dir", default="demo/emoji", help="folder for the folders of images")
    parser.add_argument("--seed", type=int, default=0, help="of sizes and places")
    return parser.parse_args(argv)


def main(argv=None):
    """Fetches or renders, as the command line asks for."""
    args = parse_args(argv)
    if args.what == "fetch":
        fetch(args.package_dir)
    else:
        render_folders(args.package_dir, args.output_dir, args.seed)


if __name__ == "__main__":
    main()
