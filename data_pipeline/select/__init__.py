"""Metadata to the rows worth downloading: filters, block lists, duplicates.

Start at `select.py`.
"""
