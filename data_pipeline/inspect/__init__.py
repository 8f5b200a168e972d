"""Statistics and a contact sheet of a manifest.

Start at `inspection.py`.
"""
