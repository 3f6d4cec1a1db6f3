"""last.ckpt: everything that an interrupted training goes on from, to the bit."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from common.artifacts import atomic_path
from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import UserError, say
from common.interrupt import Interrupted, deferred
from common.options import difference
from common.progress import METRICS_NAME, append_metrics, write_metrics

LAST_NAME = "last.ckpt"
KIND = "interrupted training"
KEYS = ("begun_with", "position", "state", "files", "elapsed_s")
CURE = "add --restart to start over"


class Part(Protocol):
    """What has a state: modules, optimisers, stoppers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        epoch: that is being run, from 0.
        batch: of that epoch that comes next.
        losses: of its batches so far, all on the device of the training.
        metrics: a line for every finished epoch.
    """

    epoch: int = 0
    batch: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def next_batch(self, loss: torch.Tensor) -> None:
        """A batch is done."""
        self.losses.append(loss.detach())
        self.batch += 1

    def next_epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch is done."""
        self.metrics.append(metrics)
        self.epoch, self.batch, self.losses = self.epoch + 1, 0, []


class LastCheckpoint:
    """Saves a training now and then and when it is interrupted; puts it back where it was; keeps its metrics.jsonl.

    Shuffles are not in it: each epoch has a generator of its own, from the seed.
    """

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any],
        best: str,
        device: torch.device,
        *,
        restart: bool = False,
        seconds_between: float = 60.0,
        on_saved: Callable[[], None] = lambda: None,
    ) -> None:
        """Read what is there, before anything is computed.

        Args:
            folder: of the run.
            options: that make the training what it is; it resumes only with the same.
            best: name of the file with the best weights so far, which is kept and put back with the rest: the one in
                the folder may be of an epoch that comes after the saving.
            device: of the training; what is loaded goes there.
            restart: start over where it cannot resume: the options or the data are others, the file is damaged or of
                another version. (Where it can, it does so even then, or a command with --restart could never be
                interrupted.)
            seconds_between: two savings at least.
            on_saved: called after each.

        Raises:
            UserError: it cannot resume, and not `restart`.
        """
        self.path, self.begun_with, self.best, self.device = folder / LAST_NAME, options, folder / best, device
        self.restart, self.seconds_between, self.on_saved = restart, seconds_between, on_saved
        self.parts: dict[str, Part] = {}
        self.generators: dict[str, torch.Generator] = {}
        self.position = Position()
        self.start = self.saved = time.monotonic()
        self.content: dict[str, Any] | None = None  # of the file, until it is put back
        if self.path.exists():
            try:
                self.content = load_checkpoint(self.path, KIND, KEYS, CURE)
            except UserError:
                if not restart:
                    raise
            self._compare()

    def _compare(self) -> None:
        """Drop the content of a training that was begun with other options or data, or refuse it."""
        if self.content is None:
            return
        there = {name: self.content["begun_with"].get(name) for name in self.begun_with}
        if differs := difference(there, self.begun_with):
            if not self.restart:
                raise UserError(
                    f"{self.path} was begun with others ({differs}); give the same to go on, --restart to start over, "
                    "or --tag NAME for another run"
                )
            self.content = None

    def read_data(self, fingerprints: dict[str, str | None]) -> bool:
        """Compare what the training reads as well, once that is known and before anything is written.

        Args:
            fingerprints: of its data, by what it is; None for what is not used.

        Returns:
            whether there is an interrupted training to resume.

        Raises:
            UserError: it was begun with other data, and not `restart`.
        """
        self.begun_with = self.begun_with | fingerprints
        self._compare()
        return self.content is not None

    def restore(self, parts: dict[str, Part], generators: dict[str, torch.Generator]) -> Position:
        """Put everything back as it was when the training was interrupted; where it was, or the beginning.

        Args:
            parts: what is trained and what trains it; saved from now on.
            generators: that the batches draw from, besides torch's own.

        Raises:
            UserError: it was saved by another version, and not `restart`.
        """
        self.parts, self.generators = parts, generators
        content, self.content = self.content, None
        if content is not None:
            fresh = copy.deepcopy(self._state())
            try:
                self._put_back(content)
                say(f"going on from {self.path}: epoch {self.position.epoch}, batch {self.position.batch}")
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
                if not self.restart:
                    raise UserError(f"{self.path} does not fit this version's training; {CURE}") from None
                self._load_state(fresh)
                self.best.unlink(missing_ok=True)
        write_metrics(self.metrics, self.position.metrics)
        return self.position

    def _put_back(self, content: dict[str, Any]) -> None:
        self._load_state(content["state"])
        position = Position(**content["position"])
        position.losses = [loss.to(self.device) for loss in position.losses]  # where the next ones will be
        files = {self.path.with_name(name): whole.numpy().data for name, whole in content["files"].items()}
        elapsed_s = float(content["elapsed_s"])
        self.best.unlink(missing_ok=True)
        for path, whole in files.items():
            with atomic_path(path) as temporary:
                temporary.write_bytes(whole)
        self.position = position
        self.start -= elapsed_s

    def _state(self) -> dict[str, Any]:
        """All that changes while it trains, but the position."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "rng": rng,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:  # else it was begun on another kind of device
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    @property
    def metrics(self) -> Path:
        """metrics.jsonl, a line for every finished epoch."""
        return self.path.with_name(METRICS_NAME)

    def elapsed_s(self) -> float:
        """Seconds since the beginning, without the time between an interruption and going on."""
        return time.monotonic() - self.start

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch is done: write its line, and save if that is due."""
        append_metrics(self.metrics, metrics)
        self.position.next_epoch(metrics)
        self.save_if_due()

    def save_if_due(self) -> None:
        """Save if the last time is long enough ago."""
        if time.monotonic() - self.saved >= self.seconds_between:
            self.save()

    def save(self) -> None:
        """Write last.ckpt, unless a loss is not finite: the training will stop, and what was good is kept."""
        losses = self.position.losses
        if losses and not torch.stack(losses).isfinite().all():
            return
        files = {}
        if self.best.exists():
            files[self.best.name] = torch.frombuffer(bytearray(self.best.read_bytes()), dtype=torch.uint8)
        content = {
            "begun_with": self.begun_with,
            "position": vars(self.position),
            "state": self._state(),
            "files": files,
            "elapsed_s": self.elapsed_s(),
        }
        save_checkpoint(self.path, KIND, content)
        self.on_saved()
        self.saved = time.monotonic()

    @contextmanager
    def saved_when_interrupted(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM wait for interrupt.check, which has to stand between two batches; then it saves.

        At the end as well, if that is due, since what follows a training may be interrupted too; metrics.jsonl, which
        has grown line by line, is then written whole.
        """
        with deferred():
            try:
                yield
            except Interrupted as stop:
                self.save()
                at = self.position
                raise Interrupted(stop.signum, f"{self.path} has epoch {at.epoch}, batch {at.batch}") from None
            self.save_if_due()
            write_metrics(self.metrics, self.position.metrics)
