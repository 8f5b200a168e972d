"""`vdtrain VERB ...`: finds the verb's module and hands it the rest of the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Verb -> its module, and what it does.
VERBS = {
    "train": ("vdtrain.commands.train", "train one stage of the curriculum"),
    "plan": ("vdtrain.commands.plan", "say what training one will take of memory, disk and steps"),
    "preflight": ("vdtrain.commands.preflight", "look, before the GPUs are used, whether a stage can be trained"),
    "status": ("vdtrain.commands.status", "say how a run stands, from its files"),
    "sample": ("vdtrain.commands.sample", "make pictures and captions with a trained model"),
    "blend": ("vdtrain.commands.blend", "make them from several captions and pictures at once"),
    "edit": ("vdtrain.commands.edit", "change pictures by words"),
    "evaluate": ("vdtrain.commands.evaluate", "measure a trained model: FID and CLIP scores"),
    "weights": ("vdtrain.commands.weights", "bring published weights in, and trained ones out"),
}

USAGE = """\
Usage: vdtrain VERB [GROUP=OPTION ...] [SETTING=VALUE ...]

Trains Versatile Diffusion: one diffusion model for text and images, in stages, flow by flow.

Verbs:
{verbs}

`vdtrain VERB --help` explains a verb; `vdtrain VERB --cfg job` prints its configuration.
The data that a training run streams is made by `python -m data_pipeline --help`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = USAGE.format(verbs="\n".join(f"  {name:<10} {text}" for name, (_, text) in VERBS.items()))
    if not arguments or arguments[0] in ("--help", "-h"):
        print(usage, end="")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"error: {verb!r} is no verb; choose one of {', '.join(VERBS)} (see vdtrain --help)", file=sys.stderr)
        return 2
    status = importlib.import_module(VERBS[verb][0]).main(rest)
    assert isinstance(status, int)
    return status


if __name__ == "__main__":
    sys.exit(main())
