"""Before a run: what would train, on which rows, in which steps."""
