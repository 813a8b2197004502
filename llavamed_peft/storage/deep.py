"""More than 8 bits a channel → 8 bits: one documented window for every kind of deep image.

The window goes from the .5th to the 99.5th percentile of the image's own values, so that neither a hot pixel
nor a burned-in letter decides the brightness of a radiograph; what is outside is clipped. Values that are in
0..255 already are left alone. Colours share one window, which keeps their hue.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from ..errors import DataError

PERCENTILES = (0.5, 99.5)
GREY_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")

# Pillow keeps the high byte of 16-bit colours alone. How it unpacks the other byte order, whose high byte is
# the low one here; in grey with alpha the four bytes are taken for four channels.
_OTHER_BYTE = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBX;16B": "RGBX;16L",
    "RGBX;16L": "RGBX;16B",
}
_GREY_WITH_ALPHA = "LA;16B"


def to_8_bits(
    path: str | os.PathLike[str], values: np.ndarray, shown: np.ndarray | None = None
) -> np.ndarray:
    """Values of any integer or float dtype → uint8 of the same shape, by the window of their percentiles.

    Args:
        path: of the image, for the error.
        values: [height, width] or [height, width, channels].
        shown: [height, width] boolean: the pixels that decide the window; `None`: all.

    Raises:
        DataError: no value is finite.
    """
    finite = np.isfinite(values)
    deciding = values[finite] if shown is None or not shown.any() else values[shown][finite[shown]]
    if not deciding.size:
        raise DataError(f"{path}: no pixel has a finite value; wanted an image.")
    if np.issubdtype(values.dtype, np.integer) and values.min() >= 0 and values.max() <= 255:
        return values.astype(np.uint8)
    low, high = (float(bound) for bound in np.percentile(deciding, PERCENTILES, method="nearest"))
    if low == high:  # little is not ground: a mask, a few bright points
        low, high = float(deciding.min()), float(deciding.max())
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return window(np.where(finite, values, low), low, high)


def window(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values → uint8 of the same shape: `low` and below 0, `high` and above 255, linear between."""
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def grey(path: str | os.PathLike[str], image: Image.Image) -> Image.Image:
    """A deep greyscale image in 8 bits, upright.

    Args:
        image: decoded, of one of `GREY_MODES`.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    transparent = image.info.get("transparency")
    values = np.asarray(ImageOps.exif_transpose(image))
    if (
        tags.get(TiffImagePlugin.BITSPERSAMPLE, (0,))[0] == 32
        and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1
    ):
        values = values.view(np.uint32)  # Pillow's mode is signed
    seen = values != transparent if isinstance(transparent, int) else None
    scaled = to_8_bits(path, values, seen)
    if (
        tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    ):  # white is zero; Pillow inverts 8 bits alone
        scaled = 255 - scaled
    if seen is not None:
        scaled[~seen] = 255  # on white paper, as all that is transparent
    return Image.fromarray(scaled)


def has_deep_colours(image: Image.Image) -> bool:
    """Whether an undecoded image has 16 bits a colour, of which Pillow would keep 8."""
    return _raw_mode(image) in (*_OTHER_BYTE, _GREY_WITH_ALPHA)


def colour(path: str | os.PathLike[str], reopen: Callable[[], Any]) -> Image.Image:
    """An image of 16 bits a colour in 8 bits, upright, on white where it is transparent.

    Args:
        reopen: opens the image, one that `has_deep_colours`, undecoded.
    """
    with reopen() as image:
        raw = str(_raw_mode(image))
        transparent = image.info.get("transparency")
        if raw == _GREY_WITH_ALPHA:
            parts = _decoded(image, "RGBA").astype(np.uint16)  # [height, width, 4 bytes]
            channels = parts[..., 0::2] << 8 | parts[..., 1::2]  # [height, width, grey and alpha]
        else:
            high = _decoded(image, raw).astype(np.uint16)
            with reopen() as again:
                channels = high << 8 | _decoded(again, _OTHER_BYTE[raw])
    values, alpha = channels[..., :3], None
    if channels.shape[-1] in (2, 4):
        values, alpha = channels[..., :-1], channels[..., -1:] / 65535
    elif isinstance(transparent, tuple):
        alpha = (channels != transparent).any(axis=-1, keepdims=True).astype(np.float64)
    seen = None if alpha is None else alpha[..., 0] > 0
    scaled = to_8_bits(path, values, seen)
    if alpha is not None:
        scaled = np.rint(scaled * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return Image.fromarray(scaled if scaled.shape[-1] == 3 else scaled[..., 0])


def _raw_mode(image: Image.Image) -> str | None:
    """How the pixels are stored, as Pillow names it: big- or little-endian."""
    tiles: list[Any] = list(getattr(image, "tile", []))
    if not tiles:
        return None
    arguments = tiles[0].args
    raw = arguments if isinstance(arguments, str) else arguments[0]
    if isinstance(raw, str) and raw.endswith(";16N"):  # what libtiff hands over is in this machine's order
        return raw[:-1] + ("L" if np.little_endian else "B")
    return raw


def _decoded(image: Any, raw: str) -> np.ndarray:
    """[height, width, channels] uint8, upright: the pixels unpacked in another way than Pillow would."""
    image.tile = [
        tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
        for tile in image.tile
    ]
    image.load()
    return np.asarray(ImageOps.exif_transpose(image))
