"""The commands of `vdtrain`: each file parses its settings, calls the code that does the work, and prints.

Start at `train.py`; `../cli.py` lists the commands.
"""
