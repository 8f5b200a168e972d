"""What surrounds training: processes, signals, hangs, restarts, the lock of a run folder, logs and tracking.

Start at `session.py`, which wraps a run in all of these.
"""
