"""Selected rows to tar shards by img2dataset, with checked addresses.

Start at `download.py`; `part.py` is the work of one process.
"""
