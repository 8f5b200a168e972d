"""From published metadata to indexed tar shards: select, download, index, inspect, encode latents.

Start at `__main__.py`, which lists the commands.
"""
