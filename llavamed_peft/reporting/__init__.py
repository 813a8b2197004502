"""What a run shows: lines of text (`text.py`), and its progress (`run_log.py`)."""
