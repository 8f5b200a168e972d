"""Published weights in, trained weights out: names, files and checks of each layout.

Start at `imports.py` for imports, at `exports.py` for exports.
"""
