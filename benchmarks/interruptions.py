"""Stop the mock suite a hundred times at random moments: `python benchmarks/interruptions.py`.

Large tiles (lmax 600), eight workers, three shards of four simulations. In turn: SIGINT to the whole process group, as
Ctrl-C sends it, SIGTERM to the command, SIGKILL to the command, and a disk that is full after a random number of bytes.
It measures the time from the signal, or from the write that failed, until the command and all its workers have ended.
Every command resumes where the previous one was stopped. Whenever the suite is finished, its shards must be those of a
suite that was never stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import psutil

from benchmarks.measure import header
from common.artifacts import write_json
from common.device import pick_device
from common.progress import Progress

COMMAND = "--lmax 600 --noise-level des_y3 --n-sims 12 --workers 8"
SHARD_BYTES = 4 * 12 * 4 * 256 * 256 * 4
LIMIT_S = 2.0
KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, "full disk")
# The command with small shards, which prints when a write fails.
CHILD = """
import sys, time
import run_mock

def watch():
    import data.mock.suite as suite
    from data.write_shards import ShardWriter
    suite.SIMS_PER_SHARD = 4
    write = ShardWriter.write
    def watched(*arguments):
        try:
            write(*arguments)
        except OSError:
            print("failed at", time.monotonic(), file=sys.stderr, flush=True)
            raise
    ShardWriter.write = watched

if __name__ == "__main__":
    watch()
    run_mock.main()
"""


def name_of(kind: signal.Signals | str) -> str:
    """SIGINT, SIGTERM, SIGKILL or full disk."""
    return kind.name if isinstance(kind, signal.Signals) else kind


def start(folder: Path, log: Path, bytes_per_file: int = resource.RLIM_INFINITY) -> subprocess.Popen[bytes]:
    """Start the command in its own session."""

    def limit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell makes background commands ignore it
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, resource.RLIM_INFINITY))

    script = folder / "run_watched.py"
    script.write_text(CHILD)
    words = [sys.executable, str(script), *COMMAND.split(), "--tiles-dir", str(folder / "tiles")]
    with open(log, "wb") as err:
        return subprocess.Popen(
            words,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=err,
            stderr=err,
            start_new_session=True,
            preexec_fn=limit,
        )


def hashes(folder: Path) -> list[str]:
    """SHA-256 of the shards, in the order of their names."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("tiles/shard_*.parquet"))]


def stop(kind: signal.Signals | str, folder: Path, log: Path, delay: float, rng: np.random.Generator) -> float | None:
    """Start the command and stop it; seconds until all processes have ended, None if it had finished before."""
    limit = int(rng.uniform(1e5, SHARD_BYTES)) if kind == "full disk" else resource.RLIM_INFINITY
    command = start(folder, log, limit)
    process = psutil.Process(command.pid)
    with suppress(subprocess.TimeoutExpired):
        command.wait(delay if isinstance(kind, signal.Signals) else None)
    workers: Sequence[psutil.Process] = []
    if isinstance(kind, signal.Signals):
        if command.returncode is not None:
            return None
        workers, stopped_at = process.children(recursive=True), time.monotonic()
        os.killpg(command.pid, kind) if kind == signal.SIGINT else command.send_signal(kind)
    else:
        lines = [line for line in log.read_text().splitlines() if line.startswith("failed at")]
        if not lines:
            return None
        return time.monotonic() - float(lines[0].split()[-1])
    command.wait()
    while any(_runs(worker) for worker in workers):
        time.sleep(0.01)
    return time.monotonic() - stopped_at


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Stop, resume, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    took: dict[str, list[float]] = {name_of(kind): [] for kind in KINDS}
    finished = 0
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        begin = time.monotonic()
        assert start(folder, log).wait() == 0, log.read_text()
        duration, wanted = time.monotonic() - begin, hashes(folder)
        shutil.rmtree(folder / "tiles")
        with Progress("stopping", options.times, "times") as progress:
            while (n := sum(map(len, took.values()))) < options.times:
                kind = KINDS[n % len(KINDS)]
                seconds = stop(kind, folder, log, rng.uniform(0.2, duration), rng)
                if seconds is not None:
                    took[name_of(kind)].append(seconds)
                    progress.advance(1, f"slowest {max(map(max, filter(None, took.values()))):.2f} s")
                else:
                    assert hashes(folder) == wanted, "the shards differ from those of an uninterrupted suite"
                    finished += 1
                    shutil.rmtree(folder / "tiles")
        assert start(folder, log).wait() == 0, log.read_text()
        assert hashes(folder) == wanted, "the shards differ from those of an uninterrupted suite"
        left = [path.name for path in (folder / "tiles").rglob("*.tmp")]
        assert not left, left
    slowest = {kind: max(seconds) for kind, seconds in took.items()}
    options.results_dir.mkdir(parents=True, exist_ok=True)
    content = {"limit_s": LIMIT_S, "uninterrupted_s": duration, "finished_and_equal": finished + 1, "seconds": took}
    write_json(options.results_dir / "interruptions.json", header(pick_device("cpu")) | content)
    print(f"{options.times} stops of {duration:.0f} s; {finished + 1} suites finished, all the same to the bit")
    for name, all_s in took.items():
        print(f"{name:9} {len(all_s):3d} times, median {np.median(all_s):.2f} s, slowest {slowest[name]:.2f} s")
    if max(slowest.values()) > LIMIT_S:
        sys.exit(f"a stop took longer than {LIMIT_S} s")


if __name__ == "__main__":
    main()
