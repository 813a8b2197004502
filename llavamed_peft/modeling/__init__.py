"""Checkpoint → model and processor (`load.py`), what trains in it (`scopes.py`), prompts (`templates.py`)."""
