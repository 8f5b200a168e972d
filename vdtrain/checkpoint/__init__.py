"""Checkpoints: their format on disk, the store of a run, saving in the background.

Start at `format.py`, whose first lines describe every file.
"""
