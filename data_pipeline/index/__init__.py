"""Tar shards to the manifest that training reads: every sample is checked.

Start at `index.py`.
"""
