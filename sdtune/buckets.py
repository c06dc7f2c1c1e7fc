"""Aspect-ratio buckets: pictures keep about their shape, in sizes of about the same area."""

import contextlib
import dataclasses
import functools
import math
import os

import numpy as np

from sdtune.dataset import name_of
from sdtune.models import read_latent_layout

LARGEST_STEP = 64  # pixels, if no --bucket_step is given
NUM_SHOWN = 8  # buckets that are told


@dataclasses.dataclass
class BucketRule:
    """Which sizes there are."""

    resolution: int  # its square is the area that no size exceeds
    step: int  # of sides, in pixels
    smallest: int  # side in pixels
    largest: int
    upscale: bool  # whether a picture that is smaller than its bucket is enlarged


def bucket_rule(args):
    """The rule that the flags give."""
    resolution = args.resolution
    return BucketRule(
        resolution=resolution,
        step=args.bucket_step or min(LARGEST_STEP, max(resolution // 64 * 8, 8)),
        smallest=args.bucket_min or math.ceil(resolution / 2),
        largest=args.bucket_max or 2 * resolution,
        upscale=not args.bucket_no_upscale,
    )


def check_buckets(args):
    """Lists what is wrong with the buckets that the flags ask for, or between them and the base's VAE."""
    problems = check_bucket_rule(args)
    if args.aspect_ratio_buckets:
        step, factor = bucket_rule(args).step, 1
        with contextlib.suppress(Exception):  # a base that cannot be read is told by `check_model`
            _, factor = read_latent_layout(args)
        if step % factor:
            usable = step // factor * factor or factor
            problems.append(f"--bucket_step={step}: must be a multiple of {factor} for this VAE; use {usable}")
    return problems


def check_bucket_rule(args):
    """Lists what contradicts itself in the buckets that the flags ask for."""
    if not args.aspect_ratio_buckets:
        return []
    problems, rule, resolution = [], bucket_rule(args), args.resolution
    if rule.step > resolution:
        problems.append(f"--bucket_step={rule.step}: must be at most --resolution={resolution}; use a smaller one")
    if rule.smallest > resolution:
        problems.append(f"--bucket_min={rule.smallest}: must be at most --resolution={resolution}; use a smaller one")
    if rule.largest < resolution:
        problems.append(f"--bucket_max={rule.largest}: must be at least --resolution={resolution}; use a larger one")
    if not problems and not len(list_buckets(rule)):
        problems.append(
            f"--bucket_step={rule.step}: no size of --resolution={resolution} has sides of {rule.smallest} to "
            f"{rule.largest}; use a smaller step, or a smaller --bucket_min"
        )
    return problems


def list_buckets(rule):
    """All buckets (num_buckets, 2), width and height in pixels, in the order of their ratio: for each width the
    largest height whose area is not above the resolution's square, the same turned, and the square."""
    step, sizes = rule.step, set()
    for width in range(math.ceil(rule.smallest / step) * step, rule.largest + 1, step):
        height = min(rule.resolution**2 // width, rule.largest) // step * step
        sizes |= {(width, height), (height, width)}
    square = rule.resolution // step * step
    sizes.add((square, square))
    largest_of = {}  # by ratio
    for width, height in sorted(sizes):
        if min(width, height) >= rule.smallest:
            largest_of[width / height] = (width, height)
    return np.array([largest_of[ratio] for ratio in sorted(largest_of)], int).reshape(-1, 2)


def fit_to_buckets(rule, sizes):
    """The size to which each picture is scaled and cropped (num_images, 2), of their `sizes` (num_images, 2): of the
    bucket whose ratio is nearest by the logarithm, in which 2 : 1 is as far from 1 : 1 as 1 : 2. Without upscaling a
    picture that does not cover its bucket gets a size of its own: its own one, or what of it keeps within area and
    largest side, rounded down to the step."""
    buckets, sizes = list_buckets(rule), np.asarray(sizes)
    log_ratios = np.log(buckets[:, 0] / buckets[:, 1])
    halfway = (log_ratios[1:] + log_ratios[:-1]) / 2
    fitted = buckets[np.searchsorted(halfway, np.log(sizes[:, 0] / sizes[:, 1]))]
    if rule.upscale:
        return fitted
    own = sizes * np.minimum(rule.largest / sizes.max(axis=1), 1)[:, None]
    own = own * np.minimum(rule.resolution / np.sqrt(own.prod(axis=1)), 1)[:, None]
    # A hair more, for what rounding takes from a side that is a multiple of the step.
    own = np.maximum(((own + 1e-6) // rule.step).astype(int), 1) * rule.step
    return np.where((sizes < fitted).any(axis=1)[:, None], own, fitted)


def fit_of(args):
    """The function that gives, for the sizes of pictures (num_images, 2), those to which they are fitted; None without
    buckets."""
    return functools.partial(fit_to_buckets, bucket_rule(args)) if args.aspect_ratio_buckets else None


def cropped_shares(picture_sizes, sizes):
    """The share of each picture (num_images,) that is cropped away where it is scaled so that it covers its size."""
    scales = (sizes / picture_sizes).max(axis=1)
    return 1 - (sizes / picture_sizes).prod(axis=1) / scales**2


def describe_buckets(args, images):
    """Lines on how many images are in which bucket, the fullest first, and on what of the pictures is cropped away;
    none without buckets."""
    if not args.aspect_ratio_buckets:
        return []
    shapes, numbers = np.unique(images.sizes, axis=0, return_counts=True)
    fullest = np.argsort(-numbers, kind="stable")
    lines = []
    for width, height, number in np.column_stack([shapes, numbers])[fullest[:NUM_SHOWN]].tolist():
        lines.append(f"{width} x {height}: {number:,}")
    if len(shapes) > NUM_SHOWN:
        left = int(numbers[fullest[NUM_SHOWN:]].sum())
        lines.append(f"and {len(shapes) - NUM_SHOWN:,} more: {left:,}")
    shares = cropped_shares(images.picture_sizes, images.sizes)
    worst = int(shares.argmax())
    name = os.path.basename(name_of(images.rows, worst))
    at_worst = f", {shares[worst]:.1%} at worst, of {name}" if shares[worst] >= 0.001 else ""
    return [*lines, f"cropped away: {shares.mean():.1%} of a picture on average{at_worst}"]


def warn_of_short_steps(counts):
    """Lists whether there are buckets that do not fill a step."""
    if counts.buckets is None:
        return []
    numbers = np.bincount(counts.buckets)
    num_small = int((numbers < counts.samples_per_step).sum())
    told = f"{num_small} of {len(numbers)} buckets; a larger --bucket_step makes fewer"
    return [f"too few images for a whole step in {told}"] if num_small else []
