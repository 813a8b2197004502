"""What a trained model answers (`answer.py`) and how often that is right (`exact_match.py`)."""
