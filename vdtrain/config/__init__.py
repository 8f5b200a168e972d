"""Settings: their schema, how YAML files and the command line compose them, and their checks.

Start at `schema.py` for what there is to set, at `compose.py` for how a command gets its configuration.
"""
