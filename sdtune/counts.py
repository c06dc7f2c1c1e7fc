"""Counts of a dataset: sizes, aspect ratios and words, as a page or a terminal shows them."""

import math
import re
from collections import Counter

import numpy as np

RATIOS = {  # width / height
    "taller than 1:2": 1 / 3,  # and beyond
    "1:2": 1 / 2,
    "9:16": 9 / 16,
    "2:3": 2 / 3,
    "3:4": 3 / 4,
    "4:5": 4 / 5,
    "1:1": 1,
    "5:4": 5 / 4,
    "4:3": 4 / 3,
    "3:2": 3 / 2,
    "16:9": 16 / 9,
    "2:1": 2,
    "wider than 2:1": 3,  # and beyond
}
MAX_WORDS = 40  # that are shown


def count_sizes(results):
    """Counts sizes and aspect ratios, and the share of pixels that a square crop cuts off."""
    sizes = [(width, height) for _, width, height, problem in results if not problem]
    ratios = Counter(nearest_ratio(width / height) for width, height in sizes)
    cropped = [1 - min(size) / max(size) for size in sizes]
    return {
        "sizes": {f"{width} x {height}": count for (width, height), count in Counter(sizes).most_common()},
        "aspect_ratios": {name: ratios[name] for name in RATIOS if ratios[name]},
        "cropped_away": round(float(np.mean(cropped)), 4) if cropped else 0,
    }


def nearest_ratio(ratio):
    """The name of the usual aspect ratio that is nearest."""
    return min(RATIOS, key=lambda name: abs(math.log(ratio / RATIOS[name])))


def count_words(texts):
    """Counts the words of captions, and the captions with each word."""
    words = Counter()
    for text in texts:
        words.update(set(re.findall(r"\w+(?:['’-]\w+)*", text.casefold())))
    lengths, spread = [len(text.split()) for text in texts], {}
    if lengths:
        spread = {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)}
    most_first = sorted(words.items(), key=lambda item: (-item[1], item[0]))
    return {"words_per_caption": spread, "captions_with_word": dict(most_first)}


def list_counts(counts, limit, link):
    """The first of some counts by name, with `link` between both, and how many more there are."""
    shown = [f"{name}{link}{count:,}" for name, count in list(counts.items())[:limit]]
    more = f" and {len(counts) - limit:,} more" if len(counts) > limit else ""
    return ", ".join(shown) + more


def statistics(report):
    """{title: text} of what is counted."""
    ratios = list_counts(report["aspect_ratios"], 12, " in ") or "none"
    words = report["words_per_caption"]
    spread = f"{words['min']} to {words['max']}, median {words['median']:g}" if words else "no captions"
    return {
        "Sizes": list_counts(report["sizes"], 12, ": ") or "none",
        "Aspect ratios": f"{ratios}; a square crop cuts {report['cropped_away']:.0%} of the pixels off",
        "Words per caption": spread,
        "Captions with the word": list_counts(report["captions_with_word"], MAX_WORDS, " ") or "none",
    }
