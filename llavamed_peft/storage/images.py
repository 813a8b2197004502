"""Read an image file safely: its size, its pixels as RGB, what its content is known by. Pillow and numpy
only.

What comes out of an archive, or from a stranger's data set, is opened here and nowhere else: formats are
those of `FORMATS` (Pillow's EPS reader would start Ghostscript), sizes are checked on the header before a
pixel is decoded, a damaged file is an error and never a grey rest, and whatever goes wrong is a `DataError`
that names the file.

Sizes are (height, width) in pixels, as arrays have them; orientation in EXIF is always applied, by
`image_size` as by `load_image`, so the two agree.

Left out: resizing, padding and normalising (the checkpoint's own processor does them), colour profiles,
DICOM, the frames of an
animation after the first, and windowing by the display settings of a scanner: deep greyscale is scaled by
its own range. An orientation that a PNG states after its pixels is not applied, since the header alone must
tell the size.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ..errors import DataError

# What figures and radiographs come in. No format that needs an outside program (EPS) or the network.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Above this Pillow, as it is delivered, refuses to open a file (twice its warning level of 89,478,485). Ours
# to keep, since `Image.MAX_IMAGE_PIXELS` is a global that other code in the process may have switched off.
MAX_PIXELS = 178_956_970
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_TURNED_BY_A_QUARTER = (5, 6, 7, 8)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image as it is meant to be seen, read off the header.

    Args:
        path: an image file of one of `FORMATS`.

    Returns:
        (height, width) in pixels, EXIF orientation applied. No pixel is decoded, so a damaged body goes
        unnoticed.

    Raises:
        DataError: no such file, not an image, a damaged header, more than `MAX_PIXELS` pixels.
    """
    with errors_of(path), Image.open(path, formats=FORMATS) as image:
        _refuse_bomb(path, image)
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Some versions of Pillow turn a TIFF's `size` at opening, some do not; the tags are always as
            # stored.
            width, height = (
                image.tag_v2[TiffImagePlugin.IMAGEWIDTH],
                image.tag_v2[TiffImagePlugin.IMAGELENGTH],
            )
        return (width, height) if _orientation(image) in _TURNED_BY_A_QUARTER else (height, width)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image to RGB, 8 bits a channel, turned as EXIF says.

    Greyscale deeper than 8 bits is scaled linearly from the image's own least and greatest value to 0..255
    (Pillow would clip at 255 and show a 16-bit radiograph as white); integers that already are in 0..255 are
    left alone. Floating point values are always scaled, and those that are not finite become black. An image
    of one single deep value becomes black.

    What is transparent is put on white: figures are drawn for white paper, and black lettering on a
        transparent ground
    would vanish on black.

    Args:
        path: an image file of one of `FORMATS`. Of an animation the first frame is taken.

    Returns:
        An RGB image, decoded in full, with the file closed.

    Raises:
        DataError: no such file, not an image, truncated or damaged, more than `MAX_PIXELS` pixels, no
            conversion to RGB.
    """
    with errors_of(path), Image.open(path, formats=FORMATS) as image:
        _refuse_bomb(path, image)
        turned = _orientation(image) != 1
        image.load()
        picture = ImageOps.exif_transpose(image) if turned else image
        if picture.mode in _DEEP_MODES:
            return Image.fromarray(_scaled_to_8_bit(path, np.asarray(picture))).convert("RGB")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            paper = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(paper, picture).convert("RGB")
        return picture.convert("RGB")


def _refuse_bomb(path: str | os.PathLike[str], image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: {width} x {height} is {width * height:,} pixels, too many to decode safely; wanted at "
            f"most {MAX_PIXELS:,}."
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, without decoding; EXIF that is damaged counts as none, as in every
    viewer."""
    try:
        # Not `image.getexif()`: a PNG's own decodes all pixels to look for EXIF after them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, struct.error):
        return 1
    return orientation if orientation in range(2, 9) else 1


def _scaled_to_8_bit(path: str | os.PathLike[str], values: np.ndarray) -> np.ndarray:
    """values: [height, width] of any integer or float dtype -> uint8 of the same shape."""
    finite = np.isfinite(values)
    if not finite.any():
        raise DataError(f"{path}: no pixel has a finite value; wanted an image.")
    least, greatest = float(values[finite].min()), float(values[finite].max())
    if np.issubdtype(values.dtype, np.integer) and least >= 0 and greatest <= 255:
        return values.astype(np.uint8)
    if least == greatest:
        return np.zeros(values.shape, np.uint8)
    scaled = (np.where(finite, values, least).astype(np.float64) - least) * (255 / (greatest - least))
    return np.rint(scaled).astype(np.uint8)


@contextmanager
def errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what Pillow raises for a file into one `DataError` that names it."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise DataError(f"{path}: a pipe or a device; wanted an image file.")
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; wanted an image.") from error
    except PermissionError as error:
        raise DataError(
            f"{path}: may not be read ({error.strerror}); wanted an image that this user can open."
        ) from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: a folder; wanted an image.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: not an image that can be read; wanted one of {', '.join(FORMATS)}."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit came first, and its sentence has the size.
        raise DataError(
            f"{path}: too large to decode safely: {error} Wanted at most {MAX_PIXELS:,} pixels."
        ) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        # What Pillow's decoders raise for damaged files.
        raise DataError(
            f"{path}: cannot be decoded ({error}); wanted a complete, undamaged image."
        ) from error
