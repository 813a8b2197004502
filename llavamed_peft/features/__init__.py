"""The frozen tower's features on disk: files (`store.py`), whether they pay (`forecast.py`), `filling.py`."""
