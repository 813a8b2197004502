"""What a stage leaves: its folder, read, written, described, and listed in a catalogue."""

from .stage_adapter import StageAdapter, load_stage

__all__ = ["StageAdapter", "load_stage"]
