"""last.ckpt: everything that an interrupted training needs to resume and end in the same bits."""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from common.artifacts import atomic_path
from common.board import Board
from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import UserError, say
from common.interrupt import Interrupted, deferred
from common.options import ResumableOptions, difference, identity
from common.processes import ALONE, Processes
from common.progress import METRICS_NAME, append_metrics, write_metrics

LAST_NAME = "last.ckpt"
KIND = "interrupted training"
KEYS = ("options", "data", "position", "state", "best", "elapsed_s")
CURE = "add --restart to start over"


def refuse_finished_run(folder: Path, result_file: str, restart: bool) -> None:
    """Keep a finished run safe: raises UserError if the folder holds a result and --restart was not given.

    With --restart nothing is resumed: a last.ckpt beside a result is one that a kill at the end has left there.
    """
    if (folder / result_file).exists():
        if not restart:
            raise UserError(f"{folder} holds a finished run; add --restart to replace it, or --tag NAME to keep both")
        (folder / LAST_NAME).unlink(missing_ok=True)


class Part(Protocol):
    """What has a state: modules, optimisers, early stopping."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


@dataclass
class Position:
    """How far a training has come."""

    epoch: int = 0  # the current one
    batch: int = 0  # the next one of this epoch
    losses: list[torch.Tensor] = field(default_factory=list)  # of this epoch's batches so far, on the device
    metrics: list[dict[str, Any]] = field(default_factory=list)  # a line per finished epoch

    def next_batch(self, loss: torch.Tensor) -> None:
        """A batch is done."""
        self.losses.append(loss.detach())
        self.batch += 1


class LastCheckpoint:
    """Saves a training now and then and when it is interrupted, and puts it back where it was.

    Shuffles are not saved: each epoch has a generator of its own, made from the seed.
    """

    def __init__(
        self,
        folder: Path,
        config: ResumableOptions,
        fixed: Mapping[str, str | None],
        best: str,
        device: torch.device,
        on_saved: Callable[[], None] = lambda: None,
        processes: Processes = ALONE,
    ) -> None:
        """Read the file if there is one, before anything is computed.

        Args:
            folder: of the run.
            config: its options; the training resumes only with the same. With --restart it starts over where it
                cannot resume. (Where it can, it does, or a command with --restart could never be interrupted.)
            fixed: what else must be the same, such as the precision that an option chose.
            best: name of the file with the best weights so far. It is saved and put back with the rest, because the
                one in the folder may come from a later epoch.
            device: of the training.
            on_saved: called after each saving.
            processes: that train together; the first reads and writes.

        Raises:
            UserError: it cannot resume, and not --restart; likewise the methods below.
        """
        self.path, self.best, self.device = folder / LAST_NAME, folder / best, device
        self.config, self.options = config, dataclasses.asdict(config)
        self.data: dict[str, str | None] = dict(fixed)
        self.on_saved = on_saved
        self.parts: dict[str, Part] = {}
        self.generators: dict[str, torch.Generator] = {}
        self.position = Position()
        self.start = self.saved = time.monotonic()
        self.content: dict[str, Any] | None = None  # of the file, until it is put back
        self.processes = processes
        self.board = Board(folder, config.tensorboard and processes.lead)
        if processes.lead and self.path.exists():
            try:
                self.content = load_checkpoint(self.path, KIND, KEYS, CURE)
            except UserError:
                if not config.restart:
                    raise
            self._compare()

    def _compare(self) -> None:
        """Drop the content if its options or data are others, or refuse it."""
        if self.content is None:
            return
        there, here = (
            identity(type(self.config), options) | {name: data.get(name) for name in self.data}
            for options, data in ((self.content["options"], self.content["data"]), (self.options, self.data))
        )
        if differs := difference(there, here):
            if not self.config.restart:
                raise UserError(
                    f"{self.path} was made with others ({differs}); give the same to resume, --restart to start over, "
                    "or --tag NAME for another run"
                )
            self.content = None

    def can_resume(self, fingerprints: dict[str, str | None]) -> bool:
        """Whether an interrupted training resumes with these data; to be asked before anything is written.

        Fingerprints are named as in results; None for data that are not used.
        """
        self.data |= fingerprints
        self._compare()
        return self.content is not None

    def restore(self, parts: dict[str, Part], generators: dict[str, torch.Generator]) -> Position:
        """Put everything back as it was when the training was interrupted; returns where that was, or the beginning.

        Args:
            parts: what is trained and what trains it; saved from now on.
            generators: that the batches draw from, besides torch's own.
        """
        self.parts, self.generators = parts, generators
        content, self.content = self.processes.of_leader(self.content), None
        if content is not None:
            fresh = copy.deepcopy(self._state())
            try:
                self._put_back(content)
                say(f"resuming from {self.path}: epoch {self.position.epoch}, batch {self.position.batch}")
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
                if not self.config.restart:
                    raise UserError(f"{self.path} does not fit this version's training; {CURE}") from None
                self._load_state(fresh)
                if self.processes.lead:
                    self.best.unlink(missing_ok=True)
        self._write_metrics()
        self.board.begin(self.position.metrics)
        self.processes.draw_apart()
        return self.position

    def _put_back(self, content: dict[str, Any]) -> None:
        self._load_state(content["state"])
        position = Position(**content["position"])
        position.losses = [loss.to(self.device) for loss in position.losses]  # where the next ones will be
        elapsed_s = float(content["elapsed_s"])
        if self.processes.lead:
            self.best.unlink(missing_ok=True)
            if (best := content["best"]) is not None:
                with atomic_path(self.best) as temporary:
                    temporary.write_bytes(best.numpy().data)
        self.position = position
        self.start -= elapsed_s

    def _state(self) -> dict[str, Any]:
        """All that changes while it trains, except the position."""
        on_cuda = self.device.type == "cuda"
        return {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:  # else it began on another kind of device
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl, a line for every finished epoch."""
        return self.path.with_name(METRICS_NAME)

    def elapsed_s(self) -> float:
        """Seconds of training, without the time between an interruption and resuming."""
        return time.monotonic() - self.start

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch is done: write its line, and save if that is due."""
        if self.processes.lead:
            append_metrics(self.metrics_path, metrics)
        self.board.add(metrics)
        at = self.position
        at.metrics.append(metrics)
        at.epoch, at.batch, at.losses = at.epoch + 1, 0, []
        self.save_if_due()

    def save_if_due(self) -> None:
        """Save if the last time is long enough ago."""
        if self.processes.lead and time.monotonic() - self.saved >= self.config.checkpoint_seconds:
            self.save()

    def save(self) -> None:
        """Write last.ckpt; not after a loss that is not finite: the training will stop, and the good file is kept."""
        losses = self.position.losses
        if losses and not torch.stack(losses).isfinite().all():
            return
        best = torch.frombuffer(bytearray(self.best.read_bytes()), dtype=torch.uint8) if self.best.exists() else None
        content = {
            "options": self.options,
            "data": self.data,
            "position": vars(self.position),
            "state": self._state(),
            "best": best,
            "elapsed_s": self.elapsed_s(),
        }
        save_checkpoint(self.path, KIND, content)
        self.on_saved()
        self.saved = time.monotonic()

    @contextmanager
    def saved_when_interrupted(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM wait for interrupt.check between two batches; then it saves.

        At the end it saves if that is due, as what follows a training may be interrupted too, and writes metrics.jsonl
        whole, which has grown line by line.
        """
        with deferred(together=self.processes.size > 1, follower=not self.processes.lead):
            try:
                yield
                self.processes.check()
            except Interrupted as stop:
                if self.processes.lead:
                    self.save()
                at = self.position
                raise Interrupted(stop.signum, f"{self.path} has epoch {at.epoch}, batch {at.batch}") from None
            self.save_if_due()
            self._write_metrics()

    def _write_metrics(self) -> None:
        if self.processes.lead:
            write_metrics(self.metrics_path, self.position.metrics)
