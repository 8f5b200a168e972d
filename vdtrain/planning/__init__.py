"""Predictions without a GPU: memory by its parts, steps, disk space.

Start at `memory.py`; `dry_run.py` runs the networks on tensors without values.
"""
