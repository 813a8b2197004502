"""Conversations → tokens (`encoding.py`) → prefix trees (`tree.py`) → rows (`rows.py`) and their masks (`masks.py`) → device
batches (`collator.py`), with images or what the vision tower made of them (`features.py`); the steps they are dealt out in
(`steps.py`), and the index of a data set in which everything but the pixels has been checked (`index.py`, `indexing.py`)."""

from .collator import PackedCollator
from .encoding import Encoded, Encoder

__all__ = ["Encoded", "Encoder", "PackedCollator"]
