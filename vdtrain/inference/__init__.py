"""What sampling shares between the commands, the page and the evaluation.

Start at `sampler.py`, which checks, loads and writes.
"""
