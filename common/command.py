"""What every run_*.py is: parse the options, call a function, print its result; here, or in a container on Modal.

Only this file knows Modal. Without the package `modal` is None here, and the commands run as they are.
"""

import importlib
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal

from common.errors import UserError, exit_on_user_error, leads, n_processes
from common.interrupt import listening
from common.options import Config, ResultsOptions, flag_of, names_of, parse_args, with_signature_of
from common.versions import COMMIT, COMMIT_VARIABLE

modal: Any = None
# `python run_x.py` has no use for it, and starts in half the time without.
if not Path(getattr(sys.modules["__main__"], "__file__", None) or "").name.startswith("run_"):
    with suppress(ModuleNotFoundError):
        import modal

RESULTS = "/results"  # where the Volume is mounted
VOLUME_NAME = "kappa-fom-results"
GPUS = ["H100", "A100-80GB"]  # in this order, whichever is free first
TIMEOUT_S = 24 * 60 * 60  # per attempt, the longest that Modal allows
ROOT = Path(__file__).resolve().parent.parent
Machine = Literal["gpu", "cpu", "small"]


@dataclass(frozen=True)
class Command(Generic[Config]):
    """A command. Functions are named "package.module.name" and imported after parsing: --help needs no torch.

    Attributes:
        name: as in run_{name}.py.
        config_class: its options.
        function: does the work; takes the config and on_checkpoint, to be called after each file that must not be lost.
        report: prints what the function returns.
        machine: what the function needs on Modal.
        plan: is called first, where the user sits; `function` then gets what it returns in place of the config.
        side_by_side: takes the place of `function` on Modal, with `run_all` of `lead` below as its third argument.
    """

    name: str
    config_class: type[Config]
    function: str
    report: Callable[[Any], None]
    machine: Machine = "gpu"
    plan: str = ""
    side_by_side: str = ""

    @exit_on_user_error
    def main(self) -> None:
        """Run it here."""
        config = parse_args(self.config_class)
        if n_processes() > 1 and not hasattr(config, "gpus"):
            raise UserError(f"run_{self.name}.py is one process; start it with python, not with torchrun")
        argument = function_named(self.plan)(config) if self.plan else config
        result = function_named(self.function)(argument)
        if leads():
            self.report(result)

    def modal_app(self) -> Any:
        """What `modal run` looks for in a run_*.py, with this command as its entry point; None without Modal."""
        if modal is not None:
            main = exit_on_user_error(with_signature_of(self.config_class, self._run_on_modal))
            app.local_entrypoint(name=self.name)(main)
        return None if modal is None else app

    def _run_on_modal(self, config: Config) -> None:
        argument: Any = config
        if self.plan:
            argument = function_named(self.plan)(replace(config, results_dir=RESULTS))
        if self.side_by_side:
            call = lead.spawn(self.side_by_side, argument, self.machine)
        else:
            gpus = getattr(argument, "gpus", 1)
            container = CONTAINERS[self.machine]
            container = container if gpus == 1 else container.with_options(gpu=f"{GPUS[0]}:{gpus}")
            call = container.spawn(self.function, argument)
        self.report(raised(call.get()))


def function_named(dotted: str) -> Callable[..., Any]:
    """The function "package.module.name"."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def in_container(function: str, argument: Any, *more: Any) -> Any:
    """Call a function in a container; a user's mistake comes back as a value: raised, Modal would try ten times."""
    mounted = not modal.is_local()  # no Volume is mounted for `.local()`, in tests
    if mounted:
        volume.reload()
        argument = on_volume(argument) if isinstance(argument, ResultsOptions) else argument
    try:
        if (gpus := getattr(argument, "gpus", 1)) > 1:  # what they save the Volume commits by itself, every few seconds
            from common.processes import start_together  # not before it is needed: it imports torch

            return start_together(gpus, in_one_of_them, function, argument)
        with listening():  # a container that is taken away is told by SIGINT; the same input then comes again
            return function_named(function)(argument, volume.commit if mounted else lambda: None, *more)
    except UserError as error:
        return error


def in_one_of_them(function: str, argument: Any) -> Any:
    """As in_container, in each of several processes of a container."""
    try:
        with listening():
            return function_named(function)(argument)
    except UserError as error:
        return error


def raised(result: Any) -> Any:
    """The result of in_container, or the user's mistake raised where the user sits."""
    if isinstance(result, UserError):
        raise result
    return result


def on_volume(config: Config) -> Config:
    """The config with its paths below /results: `results/x`, `/results/x` and `x` all mean x on the Volume."""
    moved: dict[str, Any] = {"results_dir": RESULTS}
    for name in names_of(type(config), "path"):
        if path := getattr(config, name):
            moved[name] = str(_volume_path(path))
    for name in names_of(type(config), "quotes"):
        quoted = type(config).__dataclass_fields__[name].metadata["quotes"]
        flags = [flag_of(path) for path in names_of(quoted, "path")]
        moved[name] = _moved_in_quotes(getattr(config, name), flags)
    return replace(config, **moved)


def _moved_in_quotes(text: str, flags: list[str]) -> str:
    """Options of another command, `--tiles-dir results/x` or with `=` between, with their paths below /results."""
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


if modal is not None:
    app = modal.App("kappa-fom")
    # As it is: a version that is asked for must be that of a Volume which exists.
    volume = modal.Volume.from_name(VOLUME_NAME, create_if_missing=True)
    image = (
        modal.Image.debian_slim(python_version="3.11")
        .uv_pip_install(requirements=[str(ROOT / f"requirements{more}.txt") for more in ("", "-tensorboard")])
        # Last, so that an edit of the code rebuilds nothing. Everything but caches: not all that it needs is Python.
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

    @app.function(**FUNCTION, gpu=GPUS)
    def on_gpu(function: str, argument: Any) -> Any:
        """A function in a container with a GPU."""
        return in_container(function, argument)

    @app.function(**FUNCTION, cpu=16, memory=32 * 1024)
    def on_cpu(function: str, argument: Any) -> Any:
        """A function in a container with many cores."""
        return in_container(function, argument)

    @app.function(**FUNCTION, cpu=2, memory=6 * 1024)
    def on_small(function: str, argument: Any) -> Any:
        """A function in a small container, of which there may be many."""
        return in_container(function, argument)

    CONTAINERS: dict[str, Any] = {"gpu": on_gpu, "cpu": on_cpu, "small": on_small}

    # It waits for other containers, long after the client may have gone.
    @app.function(**FUNCTION, cpu=1, memory=2 * 1024, nonpreemptible=True)
    def lead(function: str, argument: Any, machine: Machine) -> Any:
        """A function that has others run side by side."""

        def run_all(function: str, arguments: list[Any]) -> Iterator[Any]:
            """What a function returns for each argument, in their order, or the exception in its place."""
            mounted = not modal.is_local()
            if mounted:
                volume.commit()
            calls = [(function, argument) for argument in arguments]
            yield from CONTAINERS[machine].starmap(calls, return_exceptions=True)
            if mounted:
                volume.reload()

        return in_container(function, argument, run_all)
