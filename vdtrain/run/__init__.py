"""What surrounds training: processes, signals, hangs, restarts and the lock of a run folder.

Start at `ranks.py`, where a command learns its rank, and at `distributed.py`, which forms the group.
`../training/session.py` wraps a run in all of these.
"""
