"""Runs the code of a model card as its reader does."""

import re

import numpy as np
import torch
from PIL import Image


def code_in(text):
    """The one block of Python in a card."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    return code


def run_code(code, place, monkeypatch):
    """Runs the code of a card as somebody in `place` does, from noise of seed 0; returns its picture (height, width,
    3), and its pipeline."""
    monkeypatch.chdir(place)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, "card", "exec"), names)
    with Image.open("picture.png") as image:
        return np.asarray(image, dtype=int), names["pipe"]
