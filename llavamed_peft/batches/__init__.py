"""A checked data set (`index.py`) and its exact optimizer steps (`steps.py`), decoded ahead (`workers.py`)."""
