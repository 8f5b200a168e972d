#!/usr/bin/env bash
# Makes the model that the package brings, checkpoint=tiny, from the run of `make demo DEMO_LENGTH=long`, and what is
# made with it: the images that it is given, the images of docs/gallery.md, the outputs of examples/quickstart.ipynb.
#   bash examples/ship_miniature.sh [RUN]
set -euo pipefail
run=${1:-demo/runs-long/stage3_four_flow}

vdtrain weights export safetensors vdtrain/assets/tiny/trained "$run" precision=fp16 overwrite=true

python - vdtrain/assets/images <<'EOF'
import sys
from pathlib import Path

from PIL import Image

from miniature.shapes import Scene, draw

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
scenes = [Scene("circle", "red"), Scene("star", "blue", background="black"), Scene("square", "green")]
for scene in scenes:
    Image.fromarray(draw(scene, 64)).save(folder / f"{scene.shape}.png")
Image.linear_gradient("L").resize((64, 64)).point(lambda value: 255 * (value > 127)).save(folder / "lower-half.png")
EOF

bash examples/gallery.sh tiny demo/gallery
python examples/gallery.py demo/gallery docs/images/gallery
# Of warnings, some name folders of this machine.
PYTHONWARNINGS=ignore jupyter execute --inplace examples/quickstart.ipynb
