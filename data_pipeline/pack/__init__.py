"""A user's own images and captions to tar shards.

Start at `pack.py`.
"""
