"""The image a row names, as a path inside the image folder: a data file decides no further than that folder.

The rule is one of names: a row's path is relative, with forward slashes, and after `..` is worked out it
is still in the folder. Symbolic links inside the folder are followed wherever they lead: they were put
there by the folder's owner, not by the data file, and the Hugging Face cache consists of such links. Whether
the file is an image at all is seen when it is opened (`images.py`).
"""

from __future__ import annotations

import os
import re

from ..errors import DataError
from ..storage.images import split_frame
from .rejects import BadRow

_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:")


class ImageFolder:
    """The folder against which the image names of a data file are read.

    Args:
        folder: an existing folder.

    Raises:
        DataError: it does not exist or is not a folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        if not os.path.isdir(self.folder):
            kind = "not a folder" if os.path.exists(self.folder) else "no such folder"
            raise DataError(
                f"image folder {self.folder}: {kind}; wanted the folder the rows' image paths start from."
            )

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> ImageFolder:
        """The folder that the data file is in."""
        return cls(os.path.dirname(os.fspath(path)) or os.curdir)

    def path(self, name: str) -> str:
        """The path of an image, ready to open: the folder, joined with the name in its shortest form.

        Args:
            name: what the row says, such as `"PMC2988167/LI-27-196-g003.jpg"`, or `"ct/1.dcm#3"` for a frame.

        Raises:
            BadRow: backslash or NUL in the name, an absolute name, one that leaves the folder, no such file.
        """
        if "\0" in name:
            raise BadRow("malformed image path", f"image path {name!r} holds a NUL byte; wanted a file name.")
        if "\\" in name:
            raise BadRow(
                "malformed image path", f"image path {name!r} holds a backslash; wanted forward slashes."
            )
        if name.startswith("/") or _WINDOWS_DRIVE.match(name):
            raise BadRow(
                "absolute image path",
                f"image path {name!r} is absolute; wanted one relative to {self.folder}.",
            )
        inside = os.path.normpath(name)
        if inside == os.pardir or inside.startswith(os.pardir + os.sep):
            raise BadRow(
                "image outside image folder",
                f"image path {name!r} leads out of {self.folder}; wanted one inside.",
            )
        found = os.path.join(self.folder, inside)
        if not os.path.isfile(split_frame(found)[0]):
            raise BadRow(
                "missing image", f"image {name!r} is not a file in {self.folder}; wanted an image there."
            )
        return found
