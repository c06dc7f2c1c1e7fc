"""HTML pages that need no other file: their head, cards with small pictures, and which of them are a command's own."""

import base64
import html
import io
from pathlib import Path

from sdtune.dataset import name_of
from sdtune.images import read_image, still_readable

THUMBNAIL = 160  # pixels
CARD_STYLE = f"""
.cards {{ display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min({THUMBNAIL + 22}px, 50% - 6px), 1fr)); }}
.card {{ border: 1px solid #8886; border-radius: 6px; padding: 10px; font-size: 13px;
  overflow-wrap: anywhere; }}
.card img {{ max-width: min(100%, {THUMBNAIL}px); max-height: {THUMBNAIL}px; margin: 0 6px 6px 0;
  vertical-align: top; }}
.card b {{ display: block; }} .card .text {{ max-height: 13em; overflow-y: auto; }}
"""


def page_head(program, title, style, policy=""):
    """How a page begins, up to its body; the title is escaped. `policy` says what a browser may load, and run."""
    limit = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n' if policy else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{program}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{limit}'
        f"<title>{escaped(title)}</title>\n<style>{style}</style></head><body>\n"
    )


def is_own_page(path, program):
    """Whether a file is a page that the same command wrote before, which it may replace."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f'<meta name="generator" content="{program}">'.encode() in file.read(500)


def as_one_line(text):
    """A text without line ends, nor what could steer a terminal."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(text.split()))


def escaped(text):
    """A text of somebody else's as HTML that shows it."""
    return html.escape(as_one_line(text))


def open_row(rows, index):
    """Decodes the image of a row. Raises `InputError` if that does not go any more."""
    with still_readable(name_of(rows, index)):
        return read_image(rows[index]["image"])


def data_url(content, kind):
    """Bytes of a kind such as image/png as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def as_jpeg(image, width, height):
    """An image as a JPEG of at most that size, in bytes."""
    encoded = io.BytesIO()
    image = image.copy()
    image.thumbnail((width, height))
    image.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def card(rows, shown, title, text):
    """A box with the images of some rows, a title and a text, which are escaped."""
    urls = [data_url(as_jpeg(open_row(rows, index), THUMBNAIL, THUMBNAIL), "image/jpeg") for index in shown]
    images = "".join(f'<img alt="" src="{url}">' for url in urls)
    return f'<div class="card">{images}<b>{escaped(title)}</b><div class="text">{escaped(text)}</div></div>\n'
