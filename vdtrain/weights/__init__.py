"""Published weights in, trained weights out: each layout's names, files and checks.

Start at `imports.py` for imports, at `exports.py` for exports.
"""
