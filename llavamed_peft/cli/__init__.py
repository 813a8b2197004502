"""The console script, and how recipes read their options and start."""
