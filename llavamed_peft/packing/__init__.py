"""Conversations as device batches in which what several have in common is there once.

Conversations → tokens (`encoding.py`) → prefix trees (`tree.py`) → rows (`rows.py`) and their masks
(`masks.py`) → device batches (`collator.py`), with images or what the vision tower made of them
(`pictures.py`).
"""

from .collator import PackedCollator
from .encoding import Encoded, Encoder

__all__ = ["Encoded", "Encoder", "PackedCollator"]
