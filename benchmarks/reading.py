"""Reading tiles, against the Hugging Face library, pyarrow and a plain .npy: `python benchmarks/reading.py`.

Shards in the published layout (nested lists of doubles, SNAPPY, row groups of 190, 50 simulations a shard). Every way
runs in its own process and gives a float32 array (n, 4, 128, 128), or tiles that are ready to train with. Before it
starts, its files have been read into the system's memory, and the process has used as much memory as the array takes,
so that disks and virtual machines affect all ways equally. Peak memory is what the process takes beyond its libraries,
including the pages of mapped files, which the system can take back (Linux). `--n-sims 791` is the published size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measure import ROUNDS, Row, in_turns, report
from data.mock.nz import N_BINS
from data.schema import KEY_NAMES, PARAM_NAMES, SIMS_PER_SHARD, TILES_PER_SIM, s8_of, tile_keys

NSIDE, LMAX, LEVEL = 128, 200, "des_y3"
ROWS_PER_GROUP = 190
PRELUDE = """
import sys, time
from pathlib import Path
def of(name): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024
def now(): open("/proc/self/clear_refs", "w").write("5"); return of("VmRSS")  # and the peak starts from here
folder = Path({folder!r})
import numpy as np
np.ones(({n}, 4, 128, 128), np.float32)  # a virtual machine gets memory from its host at the first use
"""
WAYS = {
    "datasets": """
import datasets
datasets.disable_progress_bars()
before, start = now(), time.perf_counter()
rows = datasets.load_dataset("parquet", data_files=[str(p) for p in sorted(folder.glob("*.parquet"))],
    split="train", cache_dir={scratch!r})
kappa = np.array(rows["kappa"], dtype=np.float32)
""",
    "pyarrow": """
import pyarrow.parquet as pq
before, start = now(), time.perf_counter()
parts = []
for path in sorted(folder.glob("*.parquet")):
    file = pq.ParquetFile(path)
    for number in range(file.num_row_groups):
        column = file.read_row_group(number, columns=["kappa"], use_threads=False)["kappa"].combine_chunks()
        for _ in range(3):
            column = column.flatten()
        parts.append(column.to_numpy().astype(np.float32).reshape(-1, 4, 128, 128))
kappa = np.concatenate(parts)
""",
    "npy": """
before, start = now(), time.perf_counter()
kappa = np.load({scratch!r} + "/kappa.npy")
""",
    "ours, array": """
from data.read_shards import read_tiles
before, start = now(), time.perf_counter()
kappa = read_tiles(folder, 200, "des_y3").kappa
""",
    "ours, first start": """
from data.cache import read_tiles_through_cache
before, start = now(), time.perf_counter()
kappa = read_tiles_through_cache(folder, 200, "des_y3")[0].kappa
""",
    "ours, later start": """
from data.cache import read_tiles_through_cache
before, start = now(), time.perf_counter()
kappa = np.array(read_tiles_through_cache(folder, 200, "des_y3")[0].kappa)
""",
    "ours, ready to train": """
import torch
from data.cache import read_tiles_through_cache
from data.dataset import whole_dataset
from data.norm_stats import NormStats
from data.schema import FOM_PARAMS
stats = NormStats((0.0,) * 4, (0.01,) * 4, (0.3, 0.8), (0.1, 0.1))
before, start = now(), time.perf_counter()
tiles = read_tiles_through_cache(folder, 200, "des_y3")[0]
kappa = whole_dataset(tiles, FOM_PARAMS, stats, torch.device("cpu"), tiles_on="device").source
""",
}
FROM_CACHE = ("ours, later start", "ours, ready to train")
END = """
seconds = time.perf_counter() - start
assert tuple(kappa.shape) == ({n}, 4, 128, 128)
import json
print(json.dumps([seconds, (of('VmHWM') - before) / 1e9, float(kappa.sum())]))
"""


def write_published_layout(folder: Path, n_sims: int) -> None:
    """Shards of white noise, and the same array as kappa.npy beside the folder."""
    rng = np.random.default_rng(0)
    kept = np.lib.format.open_memmap(
        folder.parent / "kappa.npy", "w+", np.float32, (n_sims * TILES_PER_SIM, N_BINS, NSIDE, NSIDE)
    )
    for number, first in enumerate(range(0, n_sims, SIMS_PER_SHARD)):
        sims = np.arange(first, min(first + SIMS_PER_SHARD, n_sims))
        n = len(sims) * TILES_PER_SIM
        kappa = 0.01 * rng.standard_normal((n, N_BINS, NSIDE, NSIDE), dtype=np.float32)
        kept[first * TILES_PER_SIM : first * TILES_PER_SIM + n] = kappa
        column, lists = pa.array(kappa.astype(np.float64).reshape(-1)), kappa.size
        for size in kappa.shape[:0:-1]:
            lists //= size
            column = pa.ListArray.from_arrays(pa.array(np.arange(lists + 1, dtype=np.int32) * size), column)
        keys = np.concatenate([tile_keys(int(sim) + 1) for sim in sims])  # (n, 3)
        params = np.random.default_rng(sims).uniform(0.3, 0.9, (len(sims), len(PARAM_NAMES)))
        params = np.repeat(params, TILES_PER_SIM, axis=0)  # (n, 8)
        columns = {"kappa": column} | dict(zip(KEY_NAMES, keys.T, strict=True)) | {"noise_level": [LEVEL] * n}
        columns |= dict(zip(PARAM_NAMES, params.T, strict=True))
        columns["S8"] = s8_of(columns["sigma_8"], columns["Omega_m"])
        path = folder / f"shard_{number:04d}.parquet"
        pq.write_table(pa.table(columns), path, compression="snappy", row_group_size=ROWS_PER_GROUP)


def read_once(path: Path) -> None:
    """Read a file, or the files of a folder, into the system's memory."""
    for file in [path] if path.is_file() else path.glob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                while stream.read(1 << 24):
                    pass


def table_rows(found: dict[str, list[float]], memory: dict[str, list[float]], n: int) -> list[Row]:
    """The table, from seconds and GB of each way, round by round, for n tiles."""
    size = n * N_BINS * NSIDE**2 * 4 / 1e9
    what = f"published layout to array, {n} tiles of {NSIDE} x {NSIDE}, {size:.2f} GB as float32"
    array, peak = found["ours, array"], memory["ours, array"]
    return [
        Row(what, "s", array, (), found["datasets"], "usual / ours >= 5"),
        Row("... against pyarrow, one thread", "s", array, (), found["pyarrow"]),
        Row("... peak memory, against the array", "GB", peak, [size] * len(peak), memory["datasets"], "<= 1.15"),
        Row("first start: read, check, write the cache", "s", found["ours, first start"], (), found["datasets"]),
        Row("later start, against np.load", "s", found["ours, later start"], found["npy"], (), "<= 1.5"),
        Row("... normalised, ready to train", "s", found["ours, ready to train"], found["npy"], (), "<= 1.5"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-sims", type=int, default=50)
    parser.add_argument("--without-datasets", action="store_true", help="which takes 17 times the array's memory")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    scratch = (options.results_dir / "reading").resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    folder = scratch / "shards"
    folder.mkdir(parents=True)
    write_published_layout(folder, options.n_sims)
    n = options.n_sims * TILES_PER_SIM
    memory: dict[str, list[float]] = {name: [] for name in WAYS}
    sums = set()

    def run(name: str) -> float:
        shutil.rmtree(scratch / "parquet", ignore_errors=True)  # the cache of datasets
        if name == "ours, first start":
            shutil.rmtree(folder / "cache", ignore_errors=True)
        read_once(scratch / "kappa.npy" if name == "npy" else folder / "cache" if name in FROM_CACHE else folder)
        code = (PRELUDE + WAYS[name] + END).format(folder=str(folder), scratch=str(scratch), n=n)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        elapsed, took, total = json.loads(done.stdout.splitlines()[-1])
        memory[name].append(took)
        if name != "ours, ready to train":  # which is normalised
            sums.add(round(total, 2))
        return float(elapsed)

    names = [name for name in WAYS if name != "datasets" or not options.without_datasets]
    found = in_turns({name: lambda name=name: run(name) for name in names}, "reading", options.rounds)  # type: ignore[misc]
    found.setdefault("datasets", [])
    assert len(sums) == 1, f"the pixels differ: {sums}"
    memory = {name: values[1:] for name, values in memory.items()}
    report(table_rows(found, memory, n), torch.device("cpu"), options.results_dir / "reading.json")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
