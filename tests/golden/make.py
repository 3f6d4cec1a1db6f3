"""Small runs of every command, and what came out of them: `python tests/golden/make.py OUT.json` (a minute).

Two checkouts that write the same file compute the same numbers. tests/test_golden.py compares this one with
tests/golden/golden.json. A commit that changes a number on purpose writes it again, and says which in the CHANGELOG.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import importlib
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on the number of threads
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import pyarrow.parquet as pq
import torch

TILES = "--lmax 32 --noise-level des_y3"
SUITE = f"{TILES} --n-sims 30 --workers 1"
STAGE_1 = f"{TILES} --backbone tiny --max-epochs 3 --batch-size 64 --warmup-steps 5 --norm-tiles 0 --device cpu"
STAGE_2 = "--max-epochs 4 --n-members 2 --device cpu"
RUNS = "results/field_compressor_runs"
COMMANDS = {
    "mock": f"run_mock {SUITE} --seed 1",
    "mock noiseless": f"run_mock {SUITE} --seed 1 --noise-level noiseless",
    "mock fresh": f"run_mock {SUITE} --seed 2 --fresh --n-sims 5",
    "mock flat": f"run_mock {SUITE} --geometry flat --field gaussian --vary Omega_m,S8 --nside 32 "
    "--tiles-dir results/flat",
    "mock published": f"run_mock {SUITE} --geometry published --seed 2 --tiles-dir results/published",
    "compressor 1": f"run_compressor {STAGE_1} --seed 1 --tag seed_1",
    "compressor 2": f"run_compressor {STAGE_1} --seed 2 --tag seed_2",
    "compressor noise": f"run_compressor {STAGE_1} --tag noise --ema-decay 0.99 --norm-tiles 100 --split-by sim "
    "--noiseless-tiles results/tiles/lmax_32_noiseless",
    "compressor power": f"run_compressor {STAGE_1} --backbone power --tag power --nside 32 --tiles-dir results/flat",
    "npe 1": f"run_npe --ckpt {RUNS}/seed_1/best.ckpt {STAGE_2} --seed 1",
    "npe 2": f"run_npe --ckpt {RUNS}/seed_2/best.ckpt {STAGE_2} --seed 2",
    "npe noise": f"run_npe --ckpt {RUNS}/noise/best.ckpt {STAGE_2} "
    "--calibration-tiles results/fresh_tiles/lmax_32_des_y3",
    "npe power": f"run_npe --ckpt {RUNS}/power/best.ckpt {STAGE_2}",
    "predict": "run_predict --run results/field_npe_runs/seed_1 --tiles results/published/shard_0000.parquet "
    "--n-samples 10",
    "sweep": f"run_sweep {TILES} --seeds 2 --stage-1 '{STAGE_1.removeprefix(TILES)}' --stage-2 '{STAGE_2}'",
    "ingest lightcones": f"run_ingest {TILES} --lightcones lightcones --params params.csv --nz nz.txt --workers 1 "
    "--results-dir results/lightcones",
    "ingest maps": f"run_ingest {TILES} --kappa-maps maps/* --params params.csv --workers 1 --results-dir results/maps",
    "fetch": "run_fetch --lmax 32 --noise-level des_y3 --endpoint {hub}",
    "check": f"run_check {TILES} --tiles-dir results/published",
}  # every one writes below results
LEFT_OUT = {
    "elapsed_s", "seconds", "sha256", "reference_sha256", "versions", "commit", "device", "made_on",
}  # fmt: skip


def main() -> None:
    """Run, collect, write."""
    out = Path(sys.argv[1]).resolve()
    found: dict[str, Any] = {"made_on": machine()}
    with tempfile.TemporaryDirectory() as folder, hub() as address:
        os.chdir(folder)
        make_sources()
        for name, command in COMMANDS.items():
            print(name, file=sys.stderr, flush=True)
            printed = run(command.format(hub=address))
            if name == "check":
                found["numbers printed by run_check"] = [re.findall(r"\d[\d.]*", line) for line in printed]
        found |= {str(path): content_of(path) for path in sorted(Path("results").rglob("*")) if path.is_file()}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items() if value is not None]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def machine() -> list[str]:
    """What the last digits depend on."""
    model = "".join(line for line in _lines("/proc/cpuinfo") if line.startswith("model name"))[:80].split(":")[-1]
    return [platform.machine(), model.strip(), torch.__version__, torch.backends.cpu.get_cpu_capability()]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()[:30]
    except OSError:
        return []


def run(command: str) -> list[str]:
    """One command in a process of its own that need not import torch again; the lines that it printed."""
    script, *options = shlex.split(command)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        code = 0
        os.dup2(write, 1)
        try:
            sys.argv = [f"{script}.py", *options]
            importlib.import_module(script).main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    os.close(write)
    with open(read) as pipe:
        lines = pipe.read().splitlines()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(f"{command} failed")
    return [re.sub(r", \d+ s$", "", line) for line in lines]


def content_of(path: Path) -> Any:
    """What a file says, without time, place and version; None for what is no result."""
    if path.suffix == ".json":
        return flat(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [flat(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".ckpt":
        content = torch.load(path, weights_only=True)
        weights = content["members"] if "members" in content else [content["model"]]
        return {"weights": hash_of(*(t.numpy() for one in weights for t in one.values()))}
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        kappa = table["kappa"].combine_chunks().flatten().flatten().flatten().to_numpy()
        labels = [table[name].to_numpy() for name in ("sim_id", "orientation_id", "tile_id", "Omega_m", "S8", "m_nu")]
        return {"rows": hash_of(kappa, *labels)}
    if path.suffix == ".txt":
        return {"text": hashlib.sha256(path.read_bytes()).hexdigest()}
    if path.name == "reference.npz":
        with np.load(path) as arrays:
            return {name: hash_of(arrays[name]) for name in ("summary", "spectra", "theta", "sim_id")}
    return None


def hash_of(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def flat(content: Any, name: str = "") -> dict[str, Any]:
    """Every number and text of nested JSON by its path; of a long list its hash."""
    if isinstance(content, dict):
        items = [(key, value) for key, value in content.items() if key not in LEFT_OUT]
    elif isinstance(content, list) and len(content) > 4:
        return {name: hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    elif isinstance(content, list):
        items = list(enumerate(content))
    else:
        return {name: content}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{name}.{key}" if name else str(key))
    return found or {name: content}


def make_sources() -> None:
    """Lightcones of random counts in 12 shells, maps of random numbers, their tables."""
    import healpy
    from fake_lightcones import write_nz, write_parameters

    from data.ingest.born import HEADER, comoving_distance
    from data.mock.cosmology import design, params_of
    from data.schema import PARAM_NAMES

    sim_ids, cosmologies = design(2, 1, 109)
    write_parameters(Path("params.csv"), sim_ids, cosmologies)
    write_nz(Path("nz.txt"))
    Path("maps").mkdir()
    rng = np.random.default_rng(1)
    for sim_id, params in zip(sim_ids, params_of(cosmologies), strict=True):
        assert len(params) == len(PARAM_NAMES)
        folder = Path(f"lightcones/sim{sim_id:05d}")
        folder.mkdir(parents=True)
        z = np.linspace(0, 3.6, 13)
        chi = comoving_distance(z, params)
        lines = [HEADER + ",delta_cmd(Mpc/h),cmd/box_far,cmd/box_near,delta_cmd/box"]
        for step in range(12, 0, -1):
            near, far = 12 - step, 13 - step
            numbers = [z[far], z[near], z[far] - z[near], chi[far], chi[near], chi[far] - chi[near], 0, 0, 0]
            lines.append(",".join([str(step), *(f"{number:.6f}" for number in numbers)]))
            mean = 1e-7 * (chi[far] ** 3 - chi[near] ** 3)
            np.save(folder / f"run.{step:05d}.lightcone.npy", rng.poisson(mean, 12 * 16**2).astype(np.uint32))
        (folder / "z_values.txt").write_text("\n".join(lines) + "\n")
        healpy.write_map(f"maps/sim{sim_id:05d}.fits", list(rng.normal(0, 0.01, (4, 12 * 16**2))), dtype=np.float32)


@contextlib.contextmanager
def hub() -> Iterator[str]:
    """A server with one shard that speaks what it takes of the Hugging Face hub's protocol."""
    from conftest import make_tiles, write_tiles
    from test_fetch import Hub

    with tempfile.TemporaryDirectory() as folder:
        write_tiles(Path(folder), make_tiles(2, 16, 32), 100)
        Hub.files = {"data/lmax_32_des_y3/shard_0000.parquet": Path(folder, "shard_0000.parquet").read_bytes()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.log_message = lambda *_: None  # type: ignore[method-assign,assignment]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


if __name__ == "__main__":
    main()
