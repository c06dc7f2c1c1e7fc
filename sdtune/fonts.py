"""Text in pictures: fonts, and captions broken into lines."""

import contextlib

from PIL import ImageFont

from sdtune.errors import InputError, last_line

FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf")  # of systems; Pillow's own font has few letters beyond a to z


def load_font(path, size):
    """The font of a file, of the system, or Pillow's own. Raises `InputError`."""
    try:
        if path:
            return ImageFont.truetype(path, size)
    except OSError as error:
        raise InputError(f"--font={path}: is no font file that FreeType can read ({last_line(error)})") from None
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def fitting(text, font, width):
    """How many of the first characters of a text are no wider than `width` pixels together."""
    too_wide = (end - 1 for end in range(1, len(text) + 1) if font.getlength(text[:end]) > width)
    return next(too_wide, len(text))


def shorten(text, font, width):
    """The text, or its start and an ellipsis if it is wider than `width` pixels."""
    if fitting(text, font, width) == len(text):
        return text
    return f"{text[: fitting(text, font, width - font.getlength('...'))].rstrip()}..."


def wrap(text, font, width, max_lines):
    """Breaks a text into lines of at most `width` pixels, inside words where it must; "..." stands for the rest."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append(word)
        while len(lines) <= max_lines and len(lines[-1]) > 1 and font.getlength(lines[-1]) > width:
            fits = max(1, fitting(lines[-1], font, width))
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last.rstrip()}..."]
    return lines
