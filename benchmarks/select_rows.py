"""What selecting takes: rows a second and memory, beside reading the same columns, and beside pandas.

python benchmarks/select_rows.py [--rows 10000000] [--processes 2]     # writes benchmarks/results/select_rows.json

The rows are drawn in the schemas of LAION-2B-en (joined) and COYO-700M, three to one, with URLs, captions, duplicates
and nulls as these sets have them, and are selected with the settings of conf/data/laion2b_en_coyo700m.yaml. Beside it,
on the same files: reading the columns once with pyarrow and nothing else, the limit of what a selection can reach, and
a plain pandas script (all rows in memory; size, scores, http, duplicates; no URL policy, no cleaning). Each is a
process of its own. Its memory is that of its family's resident sets added up, so that what processes share counts
several times. Seconds are of CPU, over all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from watched import Watched

from data_pipeline.select.selection import read_selection
from vdtrain.tracking.surroundings import processor, versions

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
LAION_SHARE = 0.75
ROWS_PER_FILE = 1_250_000
FULL_SIZE = 2_700_000_000
TEXT = (
    "a the of in on and with for red blue old new house garden beach sunset portrait vintage wooden table summer "
    "dress black white city street mountain river dog cat horse flower wedding invitation poster print canvas abstract "
    "modern kitchen design chair lamp leather handmade silver gold ring necklace card birthday happy christmas tree "
    "winter snow"
)
WORDS = TEXT.split()
ENDINGS = (" &amp; more", " [HD]", " | Shop \u2122", " caf\u00e9 no. 5", "  two  spaces", ' "quoted"', ".jpg", "")

READ = """
import sys, time
import pyarrow.parquet as pq
wanted = {"url", "text", "width", "height", "similarity", "hash", "punsafe", "pwatermark", "id", "image_phash",
          "clip_similarity_vitb32", "clip_similarity_vitl14", "nsfw_score_opennsfw2", "nsfw_score_gantman",
          "watermark_score", "aesthetic_score_laion_v2"}
rows = 0
for file in sys.argv[1:]:
    with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
        names = [name for name in parquet.schema_arrow.names if name.lower() in wanted]
        for batch in parquet.iter_batches(65536, columns=names, use_threads=False):
            rows += len(batch)
print(rows)
"""
PANDAS = """
import sys
import pandas as pd
tables = []
for file in sys.argv[2:]:
    table = pd.read_parquet(file)
    table.columns = [name.lower() for name in table.columns]
    table = table.rename(columns={"clip_similarity_vitb32": "similarity", "watermark_score": "pwatermark",
                                  "nsfw_score_opennsfw2": "punsafe", "image_phash": "phash"})
    tables.append(table)
table = pd.concat(tables)
side = table[["width", "height"]].min(axis=1)
ratio = table["width"] / table["height"]
kept = table["url"].notna() & table["text"].notna() & table["url"].str.match("https?://", na=False)
kept &= ~(side < 256) & ~(table["width"] * table["height"] < 49152) & ~(ratio < 0.6) & ~(ratio > 1.6667)
kept &= ~(table["similarity"] < 0.3) & ~(table["punsafe"] > 0.3) & ~(table["pwatermark"] > 0.3)
kept &= ~(table["nsfw_score_gantman"] > 0.3) & (table["text"].str.len() >= 5)
table = table[kept].drop_duplicates("url")
table = table[table["phash"].isna() | ~table.duplicated("phash")]
table.to_parquet(sys.argv[1])
print(len(table))
"""


def write_metadata(folder: Path, rows: int) -> list[Path]:
    """Draw both sets' files."""
    generator = np.random.default_rng(0)
    phrases = pa.array([" ".join(generator.choice(WORDS, 3)) for _ in range(50_000)])
    names = generator.choice(WORDS, (20_000, 2))
    hosts = pa.array([f"{'www.' * (n % 2)}{first}-{second}{n}.com" for n, (first, second) in enumerate(names)])
    odd = pa.array(ENDINGS)
    files = []
    for source, share in (("laion2b_en", LAION_SHARE), ("coyo700m", 1 - LAION_SHARE)):
        left, number = round(rows * share), 0
        while left > 0:
            count = min(left, ROWS_PER_FILE)
            file = folder / source / f"part-{number:05d}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(_table(source, count, rows, generator, phrases, hosts, odd), file)
            files.append(file)
            left -= count
            number += 1
    return files


def _table(source: str, count: int, rows: int, generator: np.random.Generator, *pools: pa.Array) -> pa.Table:
    phrases, hosts, odd = pools
    # A twentieth of LAION's and an eighth of COYO's URLs have come before.
    repeated = 0.05 if source == "laion2b_en" else 0.12
    earlier = generator.integers(rows // 100, size=count)
    image = np.where(generator.random(count) < repeated, earlier, generator.integers(1 << 62, size=count))
    number = pa.array(image).cast(pa.string())
    scheme = pa.array(["https://", "http://", "ftp://", "http://10.0.0.7/"]).take(
        pa.array(np.searchsorted([0.7, 0.9998, 0.9999], generator.random(count)))
    )
    slug = pc.replace_substring(phrases.take(pa.array(image % len(phrases))), " ", "-")
    url = pc.binary_join_element_wise(
        scheme,
        hosts.take(pa.array(image % len(hosts))),
        pa.scalar("/wp-content/uploads/"),
        number,
        pa.scalar("-"),
        slug,
        pa.scalar(".jpg"),
        "",
    )

    def draw() -> pa.Array:
        return phrases.take(pa.array(generator.integers(len(phrases), size=count)))

    endings = np.where(generator.random(count) < 0.15, generator.integers(len(odd), size=count), len(odd) - 1)
    caption = pc.binary_join_element_wise(draw(), draw(), draw(), draw(), " ")
    caption = pc.binary_join_element_wise(caption, odd.take(pa.array(endings)), "")
    width = generator.lognormal(6.3, 0.5, count).astype(np.int32)
    height = (width * generator.lognormal(-0.1, 0.35, count)).astype(np.int32)

    def floats(values: np.ndarray, type: pa.DataType) -> pa.Array:
        return pa.array(values, type, mask=generator.random(count) < 0.005)

    similarity = 0.28 + generator.exponential(0.035, count)
    columns = {"URL" if source == "laion2b_en" else "url": _holes(url, generator, 0.001)}
    columns["TEXT" if source == "laion2b_en" else "text"] = _holes(caption, generator, 0.005)
    if source == "laion2b_en":
        columns |= {
            "WIDTH": floats(width, pa.int32()),
            "HEIGHT": floats(height, pa.int32()),
            "similarity": floats(similarity, pa.float64()),
            "hash": pa.array(generator.integers(-(1 << 62), 1 << 62, size=count)),
            "punsafe": floats(generator.beta(0.4, 4, count), pa.float32()),
            "pwatermark": floats(generator.beta(0.6, 1.4, count), pa.float32()),
        }
    else:
        # A tenth more of the images stand under several URLs.
        shown = np.where(generator.random(count) < 0.1, earlier, image).astype(np.uint64)
        phash = pa.array([f"{value:016x}" for value in (shown * np.uint64(0x9E3779B97F4A7C15)).tolist()])
        columns |= {
            "id": pa.array(generator.integers(1 << 62, size=count)),
            "width": pa.array(width.astype(np.int64)),
            "height": pa.array(height.astype(np.int64)),
            "image_phash": phash,
            "text_length": pc.utf8_length(caption),
            "word_count": pa.array(generator.integers(3, 30, size=count)),
            "clip_similarity_vitb32": floats(similarity, pa.float64()),
            "clip_similarity_vitl14": floats(similarity - 0.05, pa.float64()),
            "nsfw_score_opennsfw2": floats(generator.beta(0.4, 4, count), pa.float64()),
            "nsfw_score_gantman": floats(generator.beta(0.4, 4, count), pa.float64()),
            "watermark_score": floats(generator.beta(0.6, 2.7, count), pa.float64()),
            "aesthetic_score_laion_v2": floats(generator.normal(4.77, 0.8, count), pa.float64()),
        }
    return pa.table(columns)


def _holes(values: pa.Array, generator: np.random.Generator, share: float) -> pa.Array:
    return pc.if_else(pa.array(generator.random(len(values)) < share), pa.scalar(None, values.type), values)


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command: its seconds, of CPU and of the clock, and the most memory of it and its children together."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Watched() as watched:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[:4]} ended with status {done.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu, "wall_s": watched.seconds, "peak_bytes": watched.resident, "printed": done.stdout}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", help="where the rows are drawn, some 300 bytes each (default: a temporary one)")
    parser.add_argument("--no-pandas", action="store_true", help="leave out the peer, which takes some 1.5 KB a row")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="select_rows_", dir=arguments.folder))
    try:
        files = write_metadata(folder / "metadata", arguments.rows)
        settings = [f"data.root={folder}", f"data.select.processes={arguments.processes}"]
        own = measured([sys.executable, "-m", "data_pipeline", "select", *settings])
        print(own.pop("printed"))
        reading = measured([sys.executable, "-c", READ, *map(str, files)])
        assert int(reading.pop("printed")) == arguments.rows
        peer = None
        if not arguments.no_pandas:
            peer = measured([sys.executable, "-c", PANDAS, str(folder / "pandas.parquet"), *map(str, files)])
            peer["rows_kept"] = int(peer.pop("printed"))
        selections = [read_selection(folder / "selected" / name) for name in ("laion2b_en", "coyo700m")]
        made = [selection for selection in selections if selection is not None]
        parts = sum(file.stat().st_size for file in (folder / "selected").rglob("*.parquet"))
        metadata = sum(file.stat().st_size for file in files)
    finally:
        shutil.rmtree(folder)
    kept = sum(selection.rows for selection in made)
    result = {
        "claim": "metadata is selected in memory that does not grow with its rows",
        "rows": arguments.rows,
        "processes": arguments.processes,
        "rows_kept": kept,
        "counts": {name: made[place].counts for place, name in enumerate(("laion2b_en", "coyo700m"))},
        "metadata_bytes_per_row": round(metadata / arguments.rows, 1),
        "selected_bytes_per_row_kept": round(parts / kept, 1),
        "select": _figures(own, arguments.rows),
        "reading_alone": _figures(reading, arguments.rows),
        "pandas": None if peer is None else {**_figures(peer, arguments.rows), "rows_kept": peer["rows_kept"]},
        "select_over_reading_alone_cpu": round(own["cpu_s"] / reading["cpu_s"], 2),
        "pandas_over_select_cpu": None if peer is None else round(peer["cpu_s"] / own["cpu_s"], 2),
        "pandas_over_select_memory": None if peer is None else round(peer["peak_bytes"] / own["peak_bytes"], 1),
        "cpu_hours_for_2.7e9_rows": round(own["cpu_s"] * FULL_SIZE / arguments.rows / 3600, 2),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions("pyarrow", "numpy", "duckdb"),
    }
    print(json.dumps(result, indent=2))
    (RESULTS / "select_rows.json").write_text(json.dumps(result, indent=2) + "\n")


def _figures(run: dict[str, Any], rows: int) -> dict[str, float]:
    return {
        "rows_per_cpu_second": round(rows / run["cpu_s"]),
        "rows_per_second": round(rows / run["wall_s"]),
        "cpu_seconds": round(run["cpu_s"], 1),
        "peak_megabytes": round(run["peak_bytes"] / 1e6),
    }


if __name__ == "__main__":
    main()
