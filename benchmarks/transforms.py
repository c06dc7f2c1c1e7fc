"""What training scripts use of `torchvision.transforms`, by Pillow and numpy, for machines without torchvision.

Each does to a Pillow image what torchvision's of the same name does; flips and crops draw from torch's generator.
"""

import enum

import numpy as np
import torch
from PIL import Image, ImageOps


class InterpolationMode(enum.Enum):
    """Filters for resizing, by their names in Pillow."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Compose:
    """One transform after the other."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    """Any function of an image."""

    def __init__(self, function):
        self.function = function

    def __call__(self, image):
        return self.function(image)


class Resize:
    """Resizes so that the shorter side has so many pixels."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        self.size, self.filter = size, Image.Resampling[interpolation.name]

    def __call__(self, image):
        width, height = image.size
        shorter = min(width, height)
        size = (int(self.size * width / shorter), int(self.size * height / shorter))
        return image if size == image.size else image.resize(size, self.filter)


def crop(image, top, left, height, width):
    """The part of an image that begins at (top, left)."""
    return image.crop((left, top, left + width, top + height))


class CenterCrop:
    """Cuts a square out of the middle."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        width, height = image.size
        return crop(image, round((height - self.size) / 2), round((width - self.size) / 2), self.size, self.size)


class RandomCrop:
    """Cuts a square out of a random place."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        width, height = image.size
        top = int(torch.randint(0, height - self.size + 1, ()))
        left = int(torch.randint(0, width - self.size + 1, ()))
        return crop(image, top, left, self.size, self.size)


class RandomHorizontalFlip:
    """Mirrors half of the images."""

    def __call__(self, image):
        return ImageOps.mirror(image) if torch.rand(()) < 0.5 else image


class ToTensor:
    """An image of 8 bits as float32 (channels, height, width) in [0, 1]."""

    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """(image - mean) / standard deviation."""

    def __init__(self, mean, std):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image):
        return (image - self.mean) / self.std
