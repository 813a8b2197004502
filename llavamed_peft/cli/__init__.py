"""The console script (`main.py`), and how recipes read options (`arguments.py`) and start (`launching.py`)."""
