"""Settings: their schema, how YAML files and the command line compose them, and their checks.

Start at `schema.py` and `command_schema.py` for the settings that exist, and at `command.py` for what a command does
with its command line.
"""
