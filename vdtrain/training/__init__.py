"""The training loop, and how a run starts: from a checkpoint, from weights or from nothing.

Start at `trainer.py`; `start.py` decides where a run begins.
"""
