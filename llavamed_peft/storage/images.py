"""Read an image file safely: its size, its pixels as RGB, what its content is known by.

What comes out of an archive, or from a stranger's data set, is opened here and nowhere else: formats are
those of `FORMATS` (Pillow's EPS reader would start Ghostscript) and DICOM (`dicom.py`), sizes are checked on
the header before a pixel is decoded, a damaged file is an error and never a grey rest, and whatever goes
wrong is a `DataError` that names the file.

Sizes are (height, width) in pixels, as arrays have them; orientation in EXIF is always applied, by
`image_size` as by `load_image`, so the two agree. More than 8 bits a channel are windowed (`deep.py`).

Left out: resizing, padding and normalising (the checkpoint's own processor does them), colour profiles, and
the frames of a file after the first, unless `file.dcm#3` names one of a DICOM file. An orientation that a PNG
states after its pixels is not applied, since the header alone must tell the size.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ..errors import DataError
from . import deep, dicom

# What figures and radiographs come in. No format that needs an outside program (EPS) or the network.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Above this Pillow, as it is delivered, refuses to open a file (twice its warning level of 89,478,485). Ours
# to keep, since `Image.MAX_IMAGE_PIXELS` is a global that other code in the process may have switched off.
MAX_PIXELS = 178_956_970
_TURNED_BY_A_QUARTER = (5, 6, 7, 8)


class Header(NamedTuple):
    """What a file says of its image before a pixel is decoded.

    size: (height, width) in pixels, EXIF orientation applied.
    frames: how many it holds; the first is the image. 1 where the path names one.
    """

    size: tuple[int, int]
    frames: int


def split_frame(path: str | os.PathLike[str]) -> tuple[str, int | None]:
    """`"scan.dcm#3"` → the file and the frame that is meant, counted from 1; a file of that very name comes
    first. `None`: the path names no frame."""
    name = os.fspath(path)
    file, mark, frame = name.rpartition("#")
    if mark and frame.isdecimal() and int(frame) > 0 and not os.path.exists(name):
        return file, int(frame)
    return name, None


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image as it is meant to be seen, read off the header; see `image_header`."""
    return image_header(path).size


def image_header(path: str | os.PathLike[str]) -> Header:
    """What the header of an image file says.

    Args:
        path: an image file of one of `FORMATS`, or DICOM, perhaps with a frame (`"scan.dcm#3"`).

    Returns:
        No pixel is decoded for it, so a damaged body goes unnoticed.

    Raises:
        DataError: no such file, not an image, a damaged header, more than `MAX_PIXELS` pixels, or a frame of
            a file that is not DICOM.
    """
    file, frame = split_frame(path)
    with errors_of(path, file):
        if dicom.is_dicom(file):
            height, width, frames = dicom.size_and_frames(file, frame)
            _refuse_bomb(path, height, width)
            return Header((height, width), 1 if frame else frames)
        _refuse_frame(path, frame)
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            _refuse_bomb(path, height, width)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                # Some versions of Pillow turn a TIFF's `size` at opening, some do not; the tags are always as
                # stored.
                width, height = (
                    image.tag_v2[TiffImagePlugin.IMAGEWIDTH],
                    image.tag_v2[TiffImagePlugin.IMAGELENGTH],
                )
            turned = _orientation(image) in _TURNED_BY_A_QUARTER
            return Header((width, height) if turned else (height, width), _frames(image))


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image to RGB, 8 bits a channel, turned as EXIF says.

    More than 8 bits a channel are windowed by percentiles of the image's own values (`deep.py`), DICOM as its
    header says (`dicom.py`). A TIFF in which white is zero is inverted, however deep it is.

    What is transparent is put on white: figures are drawn for white paper, and black lettering on a
    transparent ground would vanish on black.

    Args:
        path: as `image_header` takes it. Of several frames the first is taken.

    Returns:
        An RGB image, decoded in full, with the file closed.

    Raises:
        DataError: no such file, not an image, truncated or damaged, more than `MAX_PIXELS` pixels, no
            conversion to RGB, no such frame.
    """
    file, frame = split_frame(path)
    with errors_of(path, file):
        if dicom.is_dicom(file):
            _refuse_bomb(path, *dicom.size_and_frames(file, frame)[:2])
            return dicom.load(file, frame or 1)
        _refuse_frame(path, frame)
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            _refuse_bomb(path, height, width)
            turned = _orientation(image) != 1
            if deep.has_deep_colours(image):
                return deep.colour(path, lambda: Image.open(file, formats=FORMATS)).convert("RGB")
            image.load()
            if image.mode in deep.GREY_MODES:
                return deep.grey(path, image).convert("RGB")
            picture = ImageOps.exif_transpose(image) if turned else image
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                paper = Image.new("RGBA", picture.size, "white")
                return Image.alpha_composite(paper, picture).convert("RGB")
            return picture.convert("RGB")


def _refuse_bomb(path: str | os.PathLike[str], height: int, width: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: {width} x {height} is {width * height:,} pixels, too many to decode safely; wanted at "
            f"most {MAX_PIXELS:,}."
        )


def _refuse_frame(path: str | os.PathLike[str], frame: int | None) -> None:
    if frame is not None:
        raise DataError(f"{path}: names frame {frame}, and only of DICOM files frames can be named.")


def _frames(image: Image.Image) -> int:
    """How many frames a file holds; a camera's JPEG with a preview beside the picture is one."""
    if image.format == "MPO":
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):  # those after the first are damaged
        return 1


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, without decoding; EXIF that is damaged counts as none, as in every
    viewer."""
    try:
        # Not `image.getexif()`: a PNG's own decodes all pixels to look for EXIF after them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, struct.error):
        return 1
    return orientation if orientation in range(2, 9) else 1


@contextmanager
def errors_of(path: str | os.PathLike[str], file: str | None = None) -> Iterator[None]:
    """Turn what Pillow raises for a file into one `DataError` that names it.

    Args:
        path: as the error should name it.
        file: what is opened, where the path names a frame of it.
    """
    try:
        mode = os.stat(path if file is None else file).st_mode
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
            f"{path}: not an image that can be read; wanted one of {', '.join(FORMATS)}, or DICOM."
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
