"""Before a run: what would train (`scopes.py`), on what rows (`rows.py`), in what steps (`packed_step.py`)."""
