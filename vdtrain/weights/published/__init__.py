"""The layouts in which weights are published: names of tensors, and the checks of what is read.

Start at `layouts.py`, which recognises a file.
"""
