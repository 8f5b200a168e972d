"""`python -m vdtrain.train ...`: the name that `python -m vdtrain train ...` had in 0.1, for scripts that use it."""

import sys

from vdtrain.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
