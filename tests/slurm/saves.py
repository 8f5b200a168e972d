"""Stands for a training process, in a second: waits for SIGUSR1, and ends as one that was stopped and has saved."""

import os
import signal
import sys
from pathlib import Path

# As training does: srun sends it to those that end after the first one.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
Path(sys.argv[1], f"waits-{os.environ['SLURM_PROCID']}").touch()
signal.sigwait({signal.SIGUSR1})
print(f"rank {os.environ['SLURM_PROCID']} has saved", flush=True)
print("error: of every rank", file=sys.stderr, flush=True)
sys.exit(os.EX_TEMPFAIL)
