"""Files read and written safely: whole or not at all (`whole.py`), by content (`hashing.py`), images."""
