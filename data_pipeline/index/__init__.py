"""Tar shards to the manifest that training streams from: every sample is read and checked.

Start at `index.py`.
"""
