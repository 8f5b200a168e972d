"""The drill: a campaign of kills, faults, odd inputs and long runs, whose results are in docs/reliability.md."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
