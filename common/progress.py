"""Progress: a bar on a terminal, a plain line now and then elsewhere; metrics as JSON lines."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from tqdm import tqdm

from common.artifacts import atomic_path
from common.errors import leads, say
from common.interrupt import check

METRICS_NAME = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar over `total` steps with a note behind it; off a terminal (a log, CI, SLURM) a plain line now and then."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.printed, self.note = 0, -1, ""
        self.start = self.last_line = time.monotonic()
        bar = {"total": total, "desc": description, "unit": f" {unit}", "dynamic_ncols": True}
        self.bar = tqdm(**bar) if leads() and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif error is None and self.printed < self.done:
            self._print_line()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count steps; `note` replaces the text behind the bar. Raises Interrupted if a signal has come."""
        check()
        self.done += steps
        if note is not None:
            self.note = note
        if self.bar is not None:
            if note is not None:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(steps)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self) -> None:
        self.last_line, self.printed = time.monotonic(), self.done
        elapsed = self.last_line - self.start
        left = f", {elapsed * (self.total - self.done) / self.done:.0f} s left" if 0 < self.done < self.total else ""
        say(f"{self.description}: {self.done}/{self.total} {self.unit}, {elapsed:.0f} s{left}  {self.note}".rstrip())


def write_metrics(path: Path, lines: list[dict[str, float | int]]) -> None:
    """Write metrics.jsonl whole."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")


def append_metrics(path: Path, metrics: dict[str, float | int]) -> None:
    """Append one JSON line to metrics.jsonl; the file is closed again, so a Volume can be committed."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics, allow_nan=False) + "\n")


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """metrics.jsonl as one array (n_epochs,) per quantity."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}
