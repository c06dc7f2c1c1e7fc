"""Report what is wrong with a dataset of captioned images before anything is trained on it.

    sdtune check my_images --resolution 512
    sdtune check my_images --pretrained_model_name_or_path MODEL --json report.json --html report.html

Looks for what the training scripts look for, images that cannot be used, captions that are cut and images that are
enlarged, and for exact and near duplicates, mirrored ones too; counts sizes, aspect ratios and words. The dataset is
not changed. The status is 0 if nothing was found, 1 if something was, and 2 if the check could not be made.
"""

import argparse
import json
import os
import re
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import transformers
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from sdtune.arguments import SWITCH, checked, new_parser, parse_flags, positive_int
from sdtune.counts import count_sizes, count_words, statistics
from sdtune.dataset import foreign_pictures, list_files, name_of, tell_foreign_pictures
from sdtune.errors import InputError, counted, raise_problems, told_to_user
from sdtune.files import is_writable, write_text
from sdtune.images import check_images, path_of_findings
from sdtune.models import load_tokenizer, tell_unread
from sdtune.named_dataset import (
    add_named_dataset_arguments,
    check_dataset_is_named,
    check_outside,
    name_below,
    read_named_rows,
    remedy_for_captions,
)
from sdtune.pages import CARD_STYLE, THUMBNAIL, as_one_line, card, escaped, is_own_page, open_row, page_head

PROGRAM = "sdtune check"
# A hash is of grey shapes alone, and drawings on a plain ground have the same: near duplicates need alike small
# versions as well. Measured: a difference of 2.5 leaves 2 of 890,000 pairs of rendered creatures and shapes, and takes
# JPEG of quality 75, which differs by at most 2.4 at 64 pixels, and by 0.6 in photo-like noise.
HASH_BITS = 12  # of 64, by which the hashes of near duplicates differ at most
PAIRS = 2**22  # compared at a time
MAX_LINES = 20  # findings of a kind in the text
MAX_NAMES = 10  # of images without a caption in the text
MAX_SHOWN = 200  # findings of a kind in the page
COLUMNS = 100
TITLES = {  # of the kinds of findings, in the order of the report
    "unusable": "Unusable images",
    "missing_captions": "Missing captions",
    "cut_captions": "Cut captions",
    "exact_duplicates": "Exact duplicates",
    "near_duplicates": "Near duplicates",
    "enlarged": "Small images",
}
WIDE = {"cut_captions", "exact_duplicates", "near_duplicates"}  # in the page: two images or a long text


# ------------------------------------------------------------------------------------------------------- arguments
def largest_difference(text):
    """A number in [-1, inf]."""
    return checked(text, float, lambda number: number >= -1, "in [-1, inf]")


def make_parser():
    """The flags of the command."""
    parser = new_parser(__doc__, "sdtune check DATASET [flags]")
    add_named_dataset_arguments(parser)
    add = parser.add_argument_group("what is wrong").add_argument
    add(
        "--resolution",
        type=positive_int,
        default=512,
        help="side of the square training images in pixels [1, inf)",
    )
    add("--pretrained_model_name_or_path", help="pipeline folder or Hub id, whose tokenizer cuts the captions")
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add(
        "--near_duplicate_difference",
        type=largest_difference,
        default=2.5,
        help="root mean square difference, of 255, of small versions of near duplicates at most; -1: look for none",
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write everything as JSON")
    add("--html", metavar="FILE", help="write a page with thumbnails that needs no other file, over its earlier one")
    add("--overwrite", **SWITCH, help="replace whatever else is in the place of these files")
    add("--config", metavar="FILE.yaml", help="flags of this command by name; the command line wins")
    return parser


def check_args(args):
    """Lists every flag that is wrong, its value and the remedy."""
    problems = check_dataset_is_named(args)
    source = args.pretrained_model_name_or_path or ""
    if args.revision and not source:
        problems.append("--revision: does nothing without --pretrained_model_name_or_path; add that or drop this")
    if source.endswith((".ckpt", ".safetensors")):
        problems.append(
            f"--pretrained_model_name_or_path={source}: a single file holds no tokenizer; give a pipeline "
            "folder or Hub id of the same kind of model"
        )
    for flag, path in (("json", args.json), ("html", args.html)):
        if path:
            problems += check_output(flag, path, args)
    if args.json and args.html and Path(args.json).resolve() == Path(args.html).resolve():
        problems.append(f"--json and --html both name {args.json}; name two files")
    return problems


def check_output(flag, path, args):
    """Lists what is wrong with a file to write."""
    problems = []
    if Path(path).is_dir() or not is_writable(path):
        problems.append(f"--{flag}={path}: is a folder, or cannot be written to; name a file elsewhere")
    elif Path(path).exists() and not (args.overwrite or (flag == "html" and is_own_page(path, PROGRAM))):
        problems.append(f"--{flag}={path}: exists; name another, or add --overwrite")
    return problems + check_outside(flag, path, args.dataset)


# ------------------------------------------------------------------------------------------------------------ data
def load_clip_tokenizer(args):
    """The model's tokenizer with the length at which the scripts cut, or None without a model. Raises `InputError`."""
    source = args.pretrained_model_name_or_path
    if not source:
        return None
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = load_tokenizer(
            argparse.Namespace(**vars(args), single_file_config=None, tokenizer_name=None, tokenizer_max_length=None)
        )
        if len(tokenizer) < 256:  # transformers makes one of two tokens where there is none
            raise OSError("there is no tokenizer")
    except (OSError, ValueError) as error:
        told = tell_unread("pipeline with a tokenizer and a text encoder", source, error)
        raise InputError(f"--pretrained_model_name_or_path={source}: {told}") from None
    return tokenizer


def short_names(rows, dataset):
    """The names of the images, below the folder where the dataset is one."""
    return [name_below(name_of(rows, index), dataset) for index in range(len(rows))]


# -------------------------------------------------------------------------------------------------------- findings
def lost_words(tokenizer, caption):
    """Returns (number of tokens, the part of the caption that is cut off, from the start of a word that is cut in two;
    "" if none is)."""
    encoded = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    limit, length = tokenizer.model_max_length, len(encoded.input_ids)
    if length <= limit:
        return length, ""
    start = encoded["offset_mapping"][limit - 1][0]  # its place is taken by the token that ends the text
    start = re.search(r"\S*$", caption[:start]).start()
    return length, caption[start:]


def fingerprint(image):
    """What near duplicates have in common: hash bool (64,) of the image, hash (64,) of its mirror image, and small
    versions, of brightness uint8 (16, 16) and of colour uint8 (8, 8, 2), since JPEG blurs colours most."""
    image = image.resize((64, 64), Image.Resampling.LANCZOS)  # once; unlike `reduce` the same from both sides
    own_hash = imagehash.dhash(image).hash.ravel()
    mirrored_hash = imagehash.dhash(ImageOps.mirror(image)).hash.ravel()
    image = image.convert("YCbCr")
    brightness = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS))[..., 0]
    colour = np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS))[..., 1:]
    return own_hash, mirrored_hash, brightness, colour


def difference(first, second):
    """Root mean square difference of small versions (pairs, 16, 16) and (pairs, 8, 8, 2), the larger of brightness's
    and colour's: (pairs,) in [0, 255]."""
    squares = []
    for one, other in zip(first, second):
        square = np.square(one.astype(np.float32) - other)
        squares.append(square.reshape(len(one), -1).mean(axis=1))
    return np.sqrt(np.maximum(*squares))


def packed(hashes):
    """Hashes bool (images, 64) as one number each: uint64 (images,)."""
    return np.packbits(np.stack(hashes), axis=1).view(np.uint64)[:, 0]


def alike_pairs(hashes, others):
    """Yields arrays (late, early), early < late, of the pairs of `hashes` and `others`, uint64, that differ little."""
    num_rows = max(1, PAIRS // len(hashes))
    for start in range(0, len(hashes), num_rows):
        different_bits = np.bitwise_count(hashes[start : start + num_rows, None] ^ others[None])
        late, early = np.nonzero(np.tril(different_bits <= HASH_BITS, start - 1))
        for part in range(0, len(late), 2**16):
            yield late[part : part + 2**16] + start, early[part : part + 2**16]


def near_duplicates(prints, limit):
    """Finds images that are like an earlier one, given what `fingerprint` returned for each.

    Returns {index: (difference, whether mirrored, index of the earlier one that is most alike)}.
    """
    own_hashes, mirrored_hashes, brightness, colour = zip(*prints)
    brightness, colour = np.stack(brightness), np.stack(colour)
    own_hashes, mirrored_hashes = packed(own_hashes), packed(mirrored_hashes)
    found = {}
    for mirrored in (False, True):
        step = -1 if mirrored else 1  # along the columns of the earlier image
        for late, early in alike_pairs(own_hashes, mirrored_hashes if mirrored else own_hashes):
            of_late = brightness[late], colour[late]
            of_early = brightness[early, :, ::step], colour[early, :, ::step]
            gaps = difference(of_late, of_early)
            for index in np.flatnonzero(gaps <= limit):
                match = float(gaps[index]), mirrored, int(early[index])
                image = int(late[index])
                found[image] = min(match, found.get(image, match))
    return found


def find_exact_duplicates(names, results):
    """Returns the findings, and the indices of the images that differ."""
    first, exact = {}, []  # first: the index of the first image of a content
    for index, (digest, _, _, problem) in enumerate(results):
        if problem:
            continue
        same = first.setdefault(digest, index)
        if same != index:
            exact.append({"image": names[index], "same_as": names[same], "rows": [index, same]})
    return exact, sorted(first.values())


def find_near_duplicates(rows, names, indices, limit):
    """Lists the near duplicates among the images of some indices."""
    if len(indices) < 2:
        return []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        prints = pool.map(lambda index: fingerprint(open_row(rows, index)), indices)
        prints = list(tqdm(prints, "Comparing images", len(indices), unit="image", disable=None, leave=False))
    near = []
    for late, (gap, mirrored, early) in sorted(near_duplicates(prints, limit).items()):
        late, early = indices[late], indices[early]
        near.append(
            {
                "image": names[late],
                "like": names[early],
                "mirrored": mirrored,
                "difference": round(gap, 2),
                "rows": [late, early],
            }
        )
    return near


def find_cuts(rows, names, usable, tokenizer):
    """Lists the captions of usable images that the tokenizer cuts."""
    cut = []
    for index in usable:
        for caption in rows[index]["captions"]:
            length, lost = lost_words(tokenizer, caption)
            if lost:
                finding = {"image": names[index], "tokens": length, "lost": lost, "caption": caption, "rows": [index]}
                cut.append(finding)
    return cut


def find_unusable(captions, names, results):
    """Returns the images that cannot be used, those with the rarest problems first, so that many of one kind hide no
    other; those that lack a caption alone; and the indices of the images that can be trained on."""
    unusable, without, usable = [], [], []
    for index, (_, _, _, problem) in enumerate(results):
        if problem:
            unusable.append({"image": names[index], "problem": problem, "rows": [index]})
        elif not captions[index]:
            without.append({"image": names[index], "rows": [index]})
        else:
            usable.append(index)
    rank = list(count_problems(unusable))
    unusable.sort(key=lambda finding: rank.index(kind_of_problem(finding["problem"])))
    return unusable, without, usable


def kind_of_problem(problem):
    """What is wrong with an image, without what differs from one to another: its sizes, and what a decoder said."""
    return re.split("[:;]", re.sub(r"^[\d,]+( x \d+)? \w+[,;] ", "", problem))[0]


def count_problems(unusable):
    """How many images have a problem of each kind, the rarest first."""
    counts = Counter(kind_of_problem(finding["problem"]) for finding in unusable)
    return dict(reversed(counts.most_common()))


def find_enlarged(names, results, resolution):
    """Lists the images that training enlarges, or would with a caption."""
    enlarged = []
    for index, (_, width, height, problem) in enumerate(results):
        if not problem and min(width, height) < resolution:
            factor = round(resolution / min(width, height), 2)
            finding = {"image": names[index], "width": width, "height": height, "factor": factor, "rows": [index]}
            enlarged.append(finding)
    return enlarged


def find_left_aside(dataset):
    """The pictures in a folder of a kind that is not read, which no row is of."""
    return foreign_pictures(list_files(dataset), dataset) if os.path.isdir(dataset) else []


def make_report(args, rows, names, results, tokenizer):
    """Gathers findings and counts into what --json writes; `rows` of a finding are numbers in the dataset. What is not
    looked for is None."""
    captions = list(rows["captions"])
    texts = [caption for found in captions for caption in found]
    unusable, without, usable = find_unusable(captions, names, results)
    exact, different = find_exact_duplicates(names, results)
    cut, near = None, None
    if tokenizer:
        cut = find_cuts(rows, names, usable, tokenizer)
    if args.near_duplicate_difference >= 0:
        near = find_near_duplicates(rows, names, different, args.near_duplicate_difference)
    return {
        "dataset": args.dataset,
        "num_images": len(rows),
        "num_usable": len(usable),
        "num_captions": len(texts),
        "resolution": args.resolution,
        "near_duplicate_difference": args.near_duplicate_difference,
        "max_tokens": tokenizer.model_max_length if tokenizer else None,
        "unusable": unusable,
        "missing_captions": without,
        "cut_captions": cut,
        "exact_duplicates": exact,
        "near_duplicates": near,
        "enlarged": find_enlarged(names, results, args.resolution),
        "left_aside": [name_below(os.path.abspath(path), args.dataset) for path in find_left_aside(args.dataset)],
        **count_sizes(results),
        **count_words(texts),
    }


# --------------------------------------------------------------------------------------------------------- writing
def describe(kind, finding):
    """One line about a finding, after the name of its image."""
    if kind == "unusable":
        return finding["problem"]
    if kind == "missing_captions":
        return "no caption"
    if kind == "cut_captions":
        return f"{finding['tokens']} tokens; lost: “{finding['lost']}”"
    if kind == "enlarged":
        return f"{finding['width']} x {finding['height']}, enlarged {finding['factor']:.2f} times"
    if kind == "exact_duplicates":
        return f"same as {finding['same_as']}"
    mirrored = ", mirrored" if finding["mirrored"] else ""
    return f"like {finding['like']}{mirrored}, differs by {finding['difference']:.2f}"


def consequence(kind, report):
    """What follows from the findings of a kind."""
    stops = "training stops at these, or goes on without them by --skip_bad_images"
    if kind == "unusable":
        kinds = [f"{number} {problem}" for problem, number in count_problems(report[kind]).items()]
        return f"{', '.join(kinds)}; {stops}" if len(kinds) > 1 else stops
    if kind == "missing_captions":
        return f"{remedy_for_captions(report['dataset'])}; {stops}"
    if kind == "cut_captions":
        return f"longer than {report['max_tokens']} tokens; what is quoted is never seen"
    if kind == "enlarged":
        return f"below --resolution={report['resolution']}; enlarging blurs them"
    if kind == "exact_duplicates":
        return "the same file again; it weighs double"
    return (
        "alike but for size, format, compression or mirroring; they differ by so many of 255 shades in the mean (root "
        "of squares): 0 is the same picture, JPEG of quality 75 makes up to 2.4, and what differs by more than "
        f"{report['near_duplicate_difference']:g} is not named"
    )


def headline(kind, report):
    """Returns the title of a kind of findings with their number, and what follows from them or how to look for
    them."""
    findings = report[kind]
    if findings is None:
        flag = "--near_duplicate_difference" if kind == "near_duplicates" else "--pretrained_model_name_or_path"
        return f"{TITLES[kind]}: not checked", f"give {flag} to look for them"
    return f"{TITLES[kind]}: {len(findings)}", consequence(kind, report) if findings else ""


def filled(line):
    """A line, which may be indented, as lines of at most 100 columns."""
    margin = line[: len(line) - len(line.lstrip())]
    margins = {"initial_indent": margin, "subsequent_indent": margin + " " * 4}
    return textwrap.fill(as_one_line(line), COLUMNS, **margins, break_on_hyphens=False)  # in paths and flags


def list_names(findings):
    """The first names of images that have nothing else to tell, in a line, and how many more there are."""
    names = ", ".join(finding["image"] for finding in findings[:MAX_NAMES])
    num_more = len(findings) - MAX_NAMES
    return f"{names} and {num_more:,} more, which --json lists" if num_more > 0 else names


def as_text(report):
    """The report in lines of at most 100 columns."""
    images, captions = counted(report["num_images"], "image"), counted(report["num_captions"], "caption")
    lines = [f"{report['dataset']}: {images}, {report['num_usable']:,} usable, {captions}", ""]
    for kind in TITLES:
        title, note = headline(kind, report)
        lines.append(f"{title} ({note})" if note else title)
        findings = report[kind] or []
        if kind == "missing_captions" and findings:
            lines.append(f"  {list_names(findings)}")
            continue
        for finding in findings[:MAX_LINES]:
            if kind == "cut_captions":
                finding = {**finding, "lost": textwrap.shorten(finding["lost"], 200)}
            lines.append(f"  {finding['image']}: {describe(kind, finding)}")
        if len(findings) > MAX_LINES:
            lines.append(f"  and {len(findings) - MAX_LINES:,} more, which --json lists")
    lines.append("")
    lines += [f"{title}: {text}" for title, text in statistics(report).items()]
    return "\n".join(map(filled, lines))


STYLE = f"""
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 2em auto;
  padding: 0 1em; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.15em; margin: 2em 0 .2em; }} p {{ margin: .2em 0 .8em; color: #555; }}
table {{ border-collapse: collapse; }} th {{ text-align: left; vertical-align: top; font-weight: 600; width: 13em; }}
th, td {{ padding: .3em 1em .3em 0; border-top: 1px solid #ddd; }} .none {{ color: #2a7d36; }}
{CARD_STYLE}
.cards.wide {{ grid-template-columns: repeat(auto-fill, minmax({2 * THUMBNAIL + 32}px, 1fr)); }}
"""


def findings_section(kind, report, rows, results):
    """The part of the page with the findings of a kind."""
    findings = report[kind] or []
    title, note = headline(kind, report)
    good = "" if findings else " class=none"
    wide = " wide" if kind in WIDE else ""
    parts = [f'<h2{good}>{title}</h2>\n<p>{escaped(note)}</p>\n<div class="cards{wide}">\n']
    for finding in tqdm(findings[:MAX_SHOWN], title, unit="image", disable=None, leave=False):
        shown = [index for index in finding["rows"] if not results[index][3]]  # those that can be opened
        parts.append(card(rows, shown, finding["image"], describe(kind, finding)))
    parts.append("</div>\n")
    if len(findings) > MAX_SHOWN:
        parts.append(f"<p>and {len(findings) - MAX_SHOWN:,} more, which --json lists</p>")
    return "".join([*parts, "\n"])


def gallery(rows, names, results):
    """The part of the page with images from all over the dataset."""
    good = [index for index, (_, _, _, problem) in enumerate(results) if not problem]
    if len(good) > MAX_SHOWN:
        good = [good[place * len(good) // MAX_SHOWN] for place in range(MAX_SHOWN)]
    parts = [f'<h2>{len(good)} of the images</h2>\n<p>With their captions.</p>\n<div class="cards">\n']
    for index in tqdm(good, "Thumbnails", unit="image", disable=None, leave=False):
        _, width, height, _ = results[index]
        captions = " | ".join(rows[index]["captions"]) or "no caption"
        parts.append(card(rows, [index], names[index], f"{width} x {height}: {captions}"))
    return "".join([*parts, "</div>\n"])


def as_page(report, rows, names, results):
    """The report as one HTML page: all of the text, thumbnails of findings and of images from all over the dataset."""
    title = f"{report['dataset']}: {counted(report['num_images'], 'image')}"
    parts = [
        page_head(PROGRAM, title, STYLE),
        f"<h1>{escaped(title)}</h1>\n",
        f"<p>{report['num_usable']:,} usable, {counted(report['num_captions'], 'caption')}</p>\n<table>\n",
    ]
    for name, text in statistics(report).items():
        parts.append(f"<tr><th>{name}</th><td>{escaped(text)}</td></tr>")
    if report["left_aside"]:
        told = tell_foreign_pictures([Path(name) for name in report["left_aside"]])
        parts.append(f"<tr><th>Left aside</th><td>{escaped(told)}</td></tr>")
    parts.append("\n</table>\n")
    for kind in TITLES:
        parts.append(findings_section(kind, report, rows, results))
    parts.append(gallery(rows, names, results))
    return "".join([*parts, "</body></html>\n"])


def main(argv=None):
    """Runs the command; returns 1 if something was found, else 0. A mistake of the user's ends with status 2."""
    args, problems = parse_flags(make_parser(), argv, {})
    with told_to_user(PROGRAM, errors=(InputError, OSError), stopped="Stopped."):
        raise_problems(problems + check_args(args))
        tokenizer = load_clip_tokenizer(args)
        rows = read_named_rows(args)
        names = short_names(rows, args.dataset)
        results = check_images(rows, path_of_findings(args.dataset, args.cache_dir))  # which training reads too
        report = make_report(args, rows, names, results, tokenizer)
        page = as_page(report, rows, names, results) if args.html else None
        if args.json:
            write_text(args.json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        if page:
            write_text(args.html, page)
    print(as_text(report))
    return 1 if any(report[kind] for kind in TITLES) else 0
