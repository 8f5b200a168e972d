#!/usr/bin/env bash
# A picture of a caption by the model that comes with the package, and its page, by the commands of docs/gallery.md.
#   bash examples/first_hour/play.sh [PORT]        from the root of a fresh clone with its environment
# Everything is written below demo/play. The screenshot takes Chromium.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
port=${1:-7860}
mkdir -p demo/play

PS4='$ '
set -x
vdtrain sample tiny "a red circle" output_dir=demo/play/samples
vdtrain app tiny port="$port" &
{ app=$! && set +x; } 2>/dev/null
trap 'kill $app 2>/dev/null || true' EXIT
until (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; do
    kill -0 $app || exit 1
    sleep 0.5
done

# A person opens http://127.0.0.1:7860 now. Here Chromium does, by the program that the tests click with.
python - "http://127.0.0.1:$port" <<'END'
import sys
import tempfile
import time
from pathlib import Path

from tests.browser import chromium

with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, chromium(Path(folder)) as page:
    page.open(sys.argv[1], height=1200)
    page.until(lambda: page.run("!!document.querySelector('button[role=tab]')"))
    time.sleep(2)
    page.screenshot(Path("demo/play/app.png"))
END
echo demo/play/app.png
