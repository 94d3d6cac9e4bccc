"""How does one picture, whatever its kind, become uint8 [C, H, W]?

Upright (EXIF), the first frame of an animation, transparency on white, 16 bits scaled to 8, cut to the
largest centred square, resized with an anti-aliasing filter. A picture that already has the size is not
resampled, so its pixels pass unchanged.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from potluck.train.recipe import ImageFormat

__all__ = ["SUFFIXES", "ImageFormat", "Unreadable", "decode", "fit_array", "to_array"]

Pixels = npt.NDArray[np.uint8]

_KINDS = "png jpg jpeg jpe jfif webp gif bmp dib tif tiff ppm pgm pbm pnm tga ico avif jp2"
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
MAX_PIXELS = 80_000_000  # of one picture; beyond it Pillow itself begins to warn of decompression bombs
MAX_FILE_BYTES = 256 << 20


class Unreadable(Exception):
    """This file is not a picture that can be read."""


def decode(encoded: bytes, images: ImageFormat, *, box: tuple[int, int, int, int] | None = None) -> Pixels:
    """The picture in `encoded`, cut to `box` first if one is given. Raises `Unreadable`."""
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Unreadable(f"it has {picture.width} x {picture.height} pixels")
            if picture.format == "JPEG" and box is None:
                # libjpeg decodes at 1/2, 1/4 or 1/8 for next to nothing; twice the size is left to the filter
                picture.draft(None, (2 * images.size, 2 * images.size))
            upright = ImageOps.exif_transpose(picture)
            return to_array(upright.crop(box) if box else upright, images)
    except Unreadable:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        raise Unreadable(str(error)) from error


def to_array(picture: Image.Image, images: ImageFormat) -> Pixels:
    """`picture` as uint8 [C, size, size]."""
    flat = _on_white(picture) if picture.has_transparency_data else _eight_bits(picture)
    flat = flat.convert("L" if images.channels == 1 else "RGB")
    size = (images.size, images.size)
    if flat.size != size:
        flat = ImageOps.fit(flat, size, method=Image.Resampling.LANCZOS)
    pixels = np.asarray(flat)
    return np.ascontiguousarray(pixels[None] if images.channels == 1 else pixels.transpose(2, 0, 1))


def fit_array(pixels: npt.NDArray[Any], images: ImageFormat) -> Pixels:
    """uint8 [C, H, W] with 1, 3 or 4 (RGBA) channels in the wanted shape; a copy only where something changes."""
    if pixels.shape == (images.channels, images.size, images.size):
        return np.ascontiguousarray(pixels)
    last = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return to_array(Image.fromarray(last[..., 0] if last.shape[2] == 1 else last), images)


def _on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Modes with more than 8 bits, which Pillow's own `convert` would clip to white."""
    if picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture))
        return Image.fromarray(_bytes(values * 255.0 if values.max(initial=0) <= 1.0 else values))
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.float64)
        deep = picture.mode != "I" or values.max(initial=0) > 255  # "I" is 32 bits wide, whatever is in it
        return Image.fromarray(_bytes(values / 257.0 if deep else values))
    return picture


def _bytes(values: npt.NDArray[Any]) -> Pixels:
    whole: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return whole
