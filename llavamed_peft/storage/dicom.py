"""DICOM → RGB of 8 bits, as a viewer would show it first: rescale, the window of the header, MONOCHROME1
inverted, one frame. With the extra `dicom` (pydicom and its decoders).

Files are recognised by their content. Of the header only what decides the pixels is read: a patient's name,
or any other of its texts, is never in a message, a log or a file.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError
from .deep import to_8_bits, window

# What pydicom and its decoders raise for damaged files and for what they cannot read
_UNDECODABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_TAGS = [
    "BitsStored",
    "Columns",
    "ModalityLUTSequence",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelPaddingValue",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SamplesPerPixel",
    "SharedFunctionalGroupsSequence",
    "VOILUTFunction",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
]


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """The file says so in its 129th to 132nd byte, whatever its name."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def size_and_frames(path: str | os.PathLike[str], frame: int | None = None) -> tuple[int, int, int]:
    """(height, width, frames), read off the header.

    Args:
        frame: one that must be there, counted from 1.

    Raises:
        DataError: the extra is missing, the header says no size, or there is no such frame.
    """
    header = _header(path)
    frames = int(header.get("NumberOfFrames") or 1)
    if frame is not None and frame > frames:
        raise DataError(f"{path}: has {frames} frame(s); wanted frame {frame}. Frames are counted from 1.")
    return int(header.Rows), int(header.Columns), frames


def load(path: str | os.PathLike[str], frame: int) -> Image.Image:
    """One frame in RGB.

    Greyscale is rescaled (a modality LUT, or slope and intercept), then windowed as the header says: by its
    first VOI LUT or window, or where it has none by that of `deep.py`.

    Args:
        frame: counted from 1, as DICOM does; one that is there.

    Raises:
        DataError: the extra is missing, or the frame's pixels cannot be decoded.
    """
    header = _header(path)
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, pixel_array

    with _quietly(path):
        values = pixel_array(os.fspath(path), index=frame - 1)
        kind = header.PhotometricInterpretation
        if kind == "PALETTE COLOR":
            values = apply_color_lut(values, dcmread(os.fspath(path), stop_before_pixels=True))
    if kind == "PALETTE COLOR" or values.ndim == 3:  # YBR has become RGB
        return Image.fromarray(to_8_bits(path, values))
    shown = None
    if (padding := header.get("PixelPaddingValue")) is not None:
        shown = values != padding
    with _quietly(path):
        grey = _windowed(path, header, frame, values, shown)
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey).convert("RGB")


def _header(path: str | os.PathLike[str]) -> Any:
    """What decides the pixels.

    Raises:
        DataError: pydicom is not installed, or the file cannot be read or holds no image.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise DataError(
            f"{path}: a DICOM file, and pydicom is not installed; wanted the extra: "
            "pip install 'llavamed-peft[dicom]'."
        )
    from pydicom import dcmread

    with _quietly(path):
        header = dcmread(os.fspath(path), stop_before_pixels=True, specific_tags=_TAGS)
    if not header.get("Rows") or not header.get("Columns") or "PhotometricInterpretation" not in header:
        raise DataError(f"{path}: a DICOM file without an image; wanted Rows and Columns in its header.")
    return header


def _windowed(
    path: str | os.PathLike[str], header: Any, frame: int, values: np.ndarray, shown: np.ndarray | None
) -> np.ndarray:
    """Stored values, [height, width] → uint8, before MONOCHROME1 is inverted."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    real = apply_modality_lut(values, _group(header, frame, "PixelValueTransformationSequence"))
    look = _group(header, frame, "FrameVOILUTSequence")
    if look.get("VOILUTSequence"):
        bits = int(look.VOILUTSequence[0].LUTDescriptor[2])
        return window(apply_voi(real.astype(np.int64), look), 0, 2**bits - 1)
    center, width = _first(look.get("WindowCenter")), _first(look.get("WindowWidth"))
    if center is None or width is None or not (np.isfinite(center) and np.isfinite(width)) or width < 1:
        return to_8_bits(path, real, shown)
    function = look.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        return window(1 / (1 + np.exp(-4 * (real - center) / width)), 0, 1)
    if function == "LINEAR":  # C.11.2.1.2.1 of the standard: the window's ends are values of pixels
        center, width = center - 0.5, max(width - 1, 1e-6)
    return window(real, center - width / 2, center + width / 2)


def _group(header: Any, frame: int, name: str) -> Any:
    """The part of the header that holds a frame's attributes: its own functional group, the one that all
    share, or the header itself."""
    for sequence, place in (
        ("PerFrameFunctionalGroupsSequence", frame - 1),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        groups = header.get(sequence)
        if groups and place < len(groups) and groups[place].get(name):
            return groups[place].get(name)[0]
    return header


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value if isinstance(value, (int, float, str)) else value[0])


@contextmanager
def _quietly(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what pydicom raises into a `DataError`, and keep its warnings back: both may quote the header."""
    from pydicom.config import disable_value_validation

    try:
        with warnings.catch_warnings(), disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except _UNDECODABLE as error:  # only its kind is told
        raise DataError(
            f"{path}: a DICOM file that cannot be decoded ({type(error).__name__}); wanted a complete, "
            "undamaged image in a transfer syntax that pydicom and its decoders read (the extra dicom has "
            "them)."
        ) from None
