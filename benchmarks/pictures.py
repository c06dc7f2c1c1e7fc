"""Plots of measurements, by Pillow, which the scripts need anyway."""

import math

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 900, 420
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 50, 60  # margins of a plot's area
INK, GREY, OURS, THEIRS = "#202020", "#c8c8c8", "#1f6fb4", "#d1802a"
COLOURS = [OURS, THEIRS, "#3a9147", "#8a4fa3"]


def font(size=15):
    """Pillow's own font."""
    return ImageFont.load_default(size)


def write(canvas, place, text, anchor="mm", size=15, fill=INK):
    """Writes a text with its `anchor` (Pillow's) at a place."""
    canvas.text(place, text, fill, font(size), anchor)


def draw_intervals(rows, title, limits=None):
    """A picture of ratios: for each of `rows`, (label, [(name of a colour's row, ratio, low, high)]), a dot for the
    median and a line for its interval, beside a line at 1."""
    names = list(dict.fromkeys(name for _, dots in rows for name, *_ in dots))
    numbers = [number for _, dots in rows for _, *found in dots for number in found]
    low, high = limits or (min([0.6, *numbers]) - 0.02, max([1.05, *numbers]) + 0.02)
    step = 24
    height = TOP + BOTTOM + sum(len(dots) * step + 14 for _, dots in rows)
    picture = Image.new("RGB", (WIDTH, height), "white")
    canvas = ImageDraw.Draw(picture)
    left = 190

    def across(number):
        return left + (number - low) / (high - low) * (WIDTH - RIGHT - left)

    write(canvas, (WIDTH / 2, 18), title, size=17)
    for tick in range(int(low * 10) + 1, int(high * 10) + 1):
        x = across(tick / 10)
        canvas.line([x, TOP, x, height - BOTTOM], GREY if tick != 10 else INK, 1 if tick != 10 else 2)
        write(canvas, (x, height - BOTTOM + 14), f"{tick / 10:.1f}", size=13)
    y = TOP + 14
    for label, dots in rows:
        write(canvas, (left - 12, y + (len(dots) - 1) * step / 2), label, "rm")
        for name, ratio, start, end in dots:
            colour = COLOURS[names.index(name)]
            canvas.line([across(start), y, across(end), y], colour, 3)
            canvas.ellipse([across(ratio) - 5, y - 5, across(ratio) + 5, y + 5], colour)
            y += step
        y += 14
    draw_legend(canvas, names, left, height - 18)
    return picture


def draw_legend(canvas, names, x, y):
    """Writes each name beside a dot of its colour."""
    for colour, name in zip(COLOURS, names):
        canvas.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
        write(canvas, (x + 12, y), name, "lm", 14)
        x += 40 + font(14).getlength(name)


def draw_lines(lines, title, across, up, x_ticks):
    """A plot of `lines`, {name: [(x, y)]}, from y = 0 on, with the names of its axes; one place for each x tick."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas = ImageDraw.Draw(picture)
    tick = round_tick(max(y for points in lines.values() for _, y in points) / 4)
    top = 4.4 * tick
    places = {x: LEFT + (number + 0.5) * (WIDTH - LEFT - RIGHT) / len(x_ticks) for number, x in enumerate(x_ticks)}

    def upward(number):
        return HEIGHT - BOTTOM - number / top * (HEIGHT - BOTTOM - TOP)

    write(canvas, (WIDTH / 2, 16), title, size=17)
    write(canvas, (10, 36), up, "lm", 13)
    write(canvas, (WIDTH - RIGHT, HEIGHT - 18), across, "rm", 13)
    for number in range(5):
        y = upward(tick * number)
        canvas.line([LEFT, y, WIDTH - RIGHT, y], GREY)
        write(canvas, (LEFT - 8, y), f"{tick * number:,.5g}", "rm", 13)
    for x, place in places.items():
        write(canvas, (place, HEIGHT - BOTTOM + 14), f"{x:,}" if isinstance(x, int) else str(x), size=13)
    for colour, points in zip(COLOURS, lines.values()):
        dots = [(places[x], upward(y)) for x, y in points]
        canvas.line(dots, colour, 3)
        for x, y in dots:
            canvas.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
    draw_legend(canvas, list(lines), LEFT, HEIGHT - 18)
    return picture


def round_tick(least):
    """The smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is no less than a number above 0."""
    power = 10 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least)


def stack(pictures):
    """One picture above the other."""
    whole = Image.new("RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures)))
    y = 0
    for picture in pictures:
        whole.paste(picture, (0, y))
        y += picture.height
    return whole
