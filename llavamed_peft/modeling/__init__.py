"""Checkpoint → model and processor (`load.py`), what trains in it (`parts.py`), how it is spoken to
(`templates.py`)."""
