"""One run: checked first (`preflight.py`), its folder (`folder.py`), its stages in turn (`run.py`)."""
