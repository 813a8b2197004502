"""Training one stage: `stage.py` sets it up, `trainer.py` takes the steps, `checkpoints.py` keeps them."""
