"""Timing as ratios within one run: what is compared takes turns, so that other load affects everything equally."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.artifacts import write_json
from common.device import describe_device
from common.progress import Progress
from common.versions import versions

ROUNDS = 5  # after one that warms up and does not count


@dataclass(frozen=True)
class Row:
    """One line of the table; ours, limit and usual have one value for each round.

    Attributes:
        what: what is measured, with its size.
        unit: of the three values that follow.
        ours: this project.
        limit: the arithmetic, or the copying, that cannot be avoided; empty if there is none to compare with.
        usual: the usual way; empty if there is none to compare with.
        target: the aim, in words.
    """

    what: str
    unit: str
    ours: Sequence[float]
    limit: Sequence[float] = ()
    usual: Sequence[float] = ()
    target: str = ""


def in_turns(ways: dict[str, Callable[[], float]], what: str, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Call every way once a round, in alternating order; the first round does not count.

    Args:
        ways: functions that return what they measured.
        what: shown beside the progress.
        rounds: rounds that count.

    Returns:
        what each way has measured, round by round.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    with Progress(what, (rounds + 1) * len(ways), "runs") as progress:
        for number in range(rounds + 1):
            for name in list(ways) if number % 2 else reversed(ways):
                value = ways[name]()
                progress.advance()
                if number:
                    found[name].append(value)
    return found


def seconds(function: Callable[[], Any], device: torch.device | None = None) -> float:
    """How long a call takes, until the device has finished it."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def _figure(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g}" if values else ""


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} ... {max(values):.3f})" if values else ""


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: medians over the rounds, ratios with their range."""
    lines = [
        "| what | unit | ours | limit | usual way | ours / limit | usual / ours | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.what, row.unit, _figure(row.ours), _figure(row.limit), _figure(row.usual)]
        cells += [_spread(ratios(row.ours, row.limit)) if row.limit else ""]
        cells += [_spread(ratios(row.usual, row.ours)) if row.usual else "", row.target]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def header(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": describe_device(device),
        "versions": versions(),
    }


def report(rows: Sequence[Row], device: torch.device, path: Path) -> None:
    """Write the rows as JSON with hardware and versions, and print them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, header(device) | {"rows": [asdict(row) for row in rows]})
    print(f"\n{header(device)}\n\n{table(rows)}\n\nall  {path}", flush=True)
