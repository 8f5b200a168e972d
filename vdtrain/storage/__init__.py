"""Where bytes come from: object stores and web servers, tars at addresses, and reads that are repeated.

Start at `stores.py`, which reads a range of one file; `addresses.py` reads whole tars.
"""
