"""What surrounds training: processes, signals, hangs, restarts and the lock of a run folder.

Start at `distributed.py`, which forms the group; `../training/session.py` wraps a run in all of these.
"""
