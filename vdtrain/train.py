"""`python -m vdtrain.train ...`: the name that `python -m vdtrain train ...` had in 0.1, for scripts that use it."""

import sys

from vdtrain.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
