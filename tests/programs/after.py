"""A command that something befalls: `python -m tests.programs.after MODULE:FUNCTION JSON PACKAGE ARGUMENT ...`.

Calls FUNCTION with the value that JSON describes, and then what `python -m PACKAGE ARGUMENT ...` would.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys

if __name__ == "__main__":
    place, value, package, *arguments = sys.argv[1:]
    module, _, function = place.partition(":")
    getattr(importlib.import_module(module), function)(json.loads(value))
    sys.argv = [package, *arguments]
    sys.modules.pop(f"{package}.__main__", None)
    runpy.run_module(package, run_name="__main__", alter_sys=True)
