"""`python -m vdtrain COMMAND ...`: the same as `vdtrain COMMAND ...`; torchrun and srun start it by this name."""

import sys

from vdtrain.cli import main

sys.exit(main())
