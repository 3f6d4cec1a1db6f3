"""What every command needs to run on Modal: image, Volume, GPU, and the way in and out of a container.

Only this file and the foot of each run_*.py know Modal. Without the package `modal` is None here, and
the commands run as they are.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError
from common.interrupt import listening
from common.options import ResultsOptions
from common.versions import COMMIT, COMMIT_VARIABLE

# `python run_x.py` has no use for Modal, and starts in half the time without.
STARTED_HERE = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name.startswith("run_")
try:
    if STARTED_HERE:
        raise ModuleNotFoundError
    import modal
except ModuleNotFoundError:
    modal = None  # type: ignore[assignment]

RESULTS = "/results"
LOCAL_DISK = "/tmp/downloads"  # of a container
VOLUME_NAME = "kappa-fom-results"
GPUS = ["H100", "A100-80GB"]  # in this order, whichever is free first
TIMEOUT_S = 24 * 60 * 60  # per attempt, the longest that Modal allows
MOCK_CORES, MOCK_MEMORY_MIB = 16, 32 * 1024
INGEST_CORES, INGEST_MEMORY_MIB = 2, 6 * 1024  # for one simulation at a time
PATHS = ("tiles_dir", "ckpt", "calibration_tiles", "noiseless_tiles", "run", "tiles")  # options that name a place
QUOTED = ("stage_1", "stage_2")  # options that hold those of other commands
ROOT = Path(__file__).resolve().parent.parent

if modal is not None:
    # As it is: a version that is asked for must be that of a Volume which is there.
    volume = modal.Volume.from_name(VOLUME_NAME, create_if_missing=True)
    image = (
        modal.Image.debian_slim(python_version="3.11")
        .uv_pip_install(requirements=[str(ROOT / "requirements.txt")])
        # Last, so that an edit of the code rebuilds nothing. Everything but caches: the theory table is no .py file.
        .add_local_python_source("common", "data", "compress", "npe", ignore=["**/__pycache__/**"])
    )
    FUNCTION: dict[str, Any] = {
        "image": image,
        "volumes": {RESULTS: volume},
        "env": {COMMIT_VARIABLE: COMMIT},
        "timeout": TIMEOUT_S,
        "retries": modal.Retries(max_retries=10, initial_delay=0.0),
        "single_use_containers": True,
    }
    GPU_FUNCTION: dict[str, Any] = {**FUNCTION, "gpu": GPUS}
    CPU_FUNCTION: dict[str, Any] = {**FUNCTION, "cpu": MOCK_CORES, "memory": MOCK_MEMORY_MIB}
    # For what waits for other containers, long after the client may have gone.
    WAITING_FUNCTION: dict[str, Any] = {**FUNCTION, "cpu": 1, "memory": 2 * 1024, "nonpreemptible": True}
    INGEST_FUNCTION: dict[str, Any] = {**FUNCTION, "cpu": INGEST_CORES, "memory": INGEST_MEMORY_MIB}

Config = TypeVar("Config", bound=ResultsOptions)


def in_container(
    command: Callable[..., dict[str, Any]], config_class: type[Config], options: dict[str, Any]
) -> dict[str, Any]:
    """Run a command inside a container, with its files on the Volume.

    A user's mistake comes back as a value: raised, it would be retried ten times.

    Args:
        command: takes a config and `on_checkpoint`.
        config_class, options: of the command.
    """
    if modal.is_local():  # `.local()`, in tests: no Volume is mounted
        config, on_checkpoint = config_class(**options), _no_volume
    else:
        volume.reload()
        config, on_checkpoint = _on_volume(config_class(**options)), volume.commit
    return with_errors_as_values(lambda: command(config, on_checkpoint=on_checkpoint))


def on_volume(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run something short inside a container: it sees the Volume as it is, and what it writes there is committed."""
    local = modal.is_local()
    if not local:
        volume.reload()
    result = with_errors_as_values(call)
    if not local:
        volume.commit()
    return result


def with_errors_as_values(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a call returns, or its user's mistake as a value, for out_of_container."""
    try:
        with listening():  # a container that is taken away is told by SIGINT; the same input then comes again
            return call()
    except UserError as error:
        return {"user_error": str(error)}


def out_of_container(result: dict[str, Any]) -> dict[str, Any]:
    """The result of a command, or its user's mistake raised where the user sits."""
    if "user_error" in result:
        raise UserError(result["user_error"])
    return result


def _no_volume() -> None:
    """Stands for volume.commit where no Volume is mounted."""


def _on_volume(config: Config) -> Config:
    """The config with its paths below /results: `results/x`, `/results/x` and `x` all mean x on the Volume."""
    moved: dict[str, Any] = {"results_dir": RESULTS}
    for name in PATHS:
        if path := getattr(config, name, ""):
            moved[name] = str(_volume_path(path))
    for name in QUOTED:
        if text := getattr(config, name, ""):
            moved[name] = _moved_in_quotes(text)
    return replace(config, **moved)


def _moved_in_quotes(text: str) -> str:
    """Options of another command, `--tiles-dir results/x` or with `=` between, with their paths below /results."""
    flags = ["--" + name.replace("_", "-") for name in PATHS]
    words = shlex.split(text)
    for i, word in enumerate(words):
        flag, equals, path = word.partition("=")
        if flag in flags and path:
            words[i] = f"{flag}={_volume_path(path)}"
        elif flag in flags and not equals and i + 1 < len(words) and words[i + 1]:
            words[i + 1] = str(_volume_path(words[i + 1]))
    return shlex.join(words)


def _volume_path(path: str) -> Path:
    parts = [part for part in Path(path).parts if part not in ("/", ".")]
    return Path(RESULTS, *(parts[1:] if parts and parts[0] == "results" else parts))
