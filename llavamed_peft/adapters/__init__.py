"""What a stage leaves: its folder, read (`stage_adapter.py`), written (`writing.py`), described (`card.py`)."""

from .stage_adapter import StageAdapter, load_stage

__all__ = ["StageAdapter", "load_stage"]
