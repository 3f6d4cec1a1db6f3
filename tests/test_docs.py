"""What the papers say is so: their commands run on a tiny suite, their links lead somewhere, and no key is left out."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import GUARD_S, ROOT
from test_layers import imports_of

from common.options import parse_args
from common.results import table_of_keys
from compress.config import CompressorConfig
from compress.result import CompressorResult
from data.audit import Audit
from data.config import CheckConfig, FetchConfig
from data.ingest.config import IngestConfig
from data.mock.config import MockConfig
from data.split import SplitManifest
from npe.config import NPEConfig, PredictConfig, SweepConfig
from npe.predict import PredictResult
from npe.result import FomResult, LearningCurves, SweepResult

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
ALL_PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
FILES = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
CONFIGS: dict[str, Any] = {
    "run_mock.py": MockConfig,
    "run_check.py": CheckConfig,
    "run_compressor.py": CompressorConfig,
    "run_npe.py": NPEConfig,
    "run_sweep.py": SweepConfig,
    "run_ingest.py": IngestConfig,
    "run_predict.py": PredictConfig,
    "run_fetch.py": FetchConfig,
}
# Appended to a command that is run: the last value of an option counts.
SMALLER = {
    "run_mock.py": ["--n-sims", "6"],
    "run_compressor.py": ["--max-epochs", "1", "--batch-size", "8"],
    "run_npe.py": ["--max-epochs", "2"],
    "run_predict.py": ["--n-samples", "10"],
    "run_sweep.py": ["--lmax", "200", "--seeds", "1"],
}
# Commands that are parsed but not run: a pattern that they match, and why.
ONLY_PARSED = {
    r"^modal ": "needs an account; tests/test_modal.py runs the same functions",
    r"^make ": "takes minutes to an hour, and installs; the target exists",
    r"sbatch|srun": "needs a cluster",
    r"torchrun": "needs GPUs; tests/test_processes.py has two processes",
    r"run_fetch\.py": "needs the network; tests/test_fetch.py has a hub of its own",
    r"run_ingest\.py": "needs simulations; tests/test_ingest.py makes some",
    r"results/gower_street": "needs the published tiles, 3.85 GB",
    r"my_priors\.txt": "needs the user's table; tests/test_nuisance.py has its own",
    r"efficientnet_v2_s": "needs a GPU, or days",
    r"^pip install": "installs",
    r"^tensorboard": "serves pages until it is stopped; tests/test_board.py reads what it shows",
    r"^python -m pytest": "is a test itself",
    r"^grep ": "only looks",
}


@dataclass(frozen=True)
class Command:
    """A command of a page; `script` is its run_*.py, empty if it has none, and `options` are the words behind it."""

    text: str
    script: str
    options: tuple[str, ...]

    def config(self) -> Any:
        """Its options as the command itself would read them."""
        return parse_args(CONFIGS[self.script], list(self.options))

    def reason_not_to_run(self) -> str:
        """From ONLY_PARSED; empty if it can run."""
        values = f"{self.text} {getattr(self.config(), 'backbone', '')}" if self.script else self.text
        return next((reason for pattern, reason in ONLY_PARSED.items() if re.search(pattern, values)), "")

    def smaller(self) -> list[str]:
        """Its options, for a tiny suite."""
        options = [*self.options, *SMALLER.get(self.script, [])]
        if self.script == "run_sweep.py":
            config = self.config()
            options += ["--n-sims", "3,4,5,6"] if config.n_sims else []
            for flag, text, stage in (
                ("--stage-1", config.stage_1, "run_compressor.py"),
                ("--stage-2", config.stage_2, "run_npe.py"),
            ):
                options += [flag, " ".join([text, *SMALLER[stage]])]
        return options


def command_of(line: str) -> Command:
    """A command line, with or without a run_*.py in it."""
    words = shlex.split(line, comments=True)
    place = next((i for i, word in enumerate(words) if re.fullmatch(r"run_\w+\.py", word)), None)
    if place is None:
        return Command(shlex.join(words), "", tuple(words[1:]))
    return Command(shlex.join(words), words[place], tuple(words[place + 1 :]))


def commands_of(text: str) -> list[Command]:
    """Commands of the ```sh blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [command_of(line) for line in lines if line.strip() and not line.strip().startswith("#")]


def inline_commands_of(text: str) -> list[Command]:
    """Commands with a run_*.py in the running text and in tables; those with something left out (…) are no commands."""
    found = re.findall(
        r"`((?:python|modal run) [^`]*run_\w+\.py[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    return [command_of(" ".join(line.split())) for line in found if "…" not in line]


def slurm_commands() -> list[Command]:
    """The srun lines of docs/slurm.sh, with the default of every variable in its place."""
    script = (ROOT / "docs" / "slurm.sh").read_text(encoding="utf-8").replace(' "$@"', "")
    for name, default in reversed(re.findall(r"^(\w+)=\$\{\1:-(.*?)\}$", script, flags=re.MULTILINE)):
        script = re.sub(rf"\$\{{{name}\}}|\${name}\b", default, script)
    return [command_of(line) for line in script.replace("\\\n", " ").splitlines() if line.startswith("srun ")]


@dataclass
class Workplace:
    """A folder where a user works; every command runs once."""

    folder: Path
    done: set[str]

    def run(self, command: Command) -> None:
        """Run a command in its own process, as a user does, and see that it wrote what it says."""
        if command.text in self.done:
            return
        done = subprocess.run(
            [sys.executable, command.script, *command.smaller()],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=GUARD_S,
        )
        assert done.returncode == 0, f"{command.text}\n{done.stderr}"
        for line in done.stdout.splitlines():
            if line.startswith(("picture", "          ", "report ", "all ")):
                assert (self.folder / line.split()[-1]).stat().st_size > 0, line
        self.done.add(command.text)


def quick_start() -> list[Command]:
    """The three commands of the README."""
    return commands_of(README.read_text(encoding="utf-8").split("## The three commands")[1].split("\n## ")[0])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Where the quick start has been run, and my_tile.npy lies."""
    folder = tmp_path_factory.mktemp("user")
    for script in CONFIGS:
        (folder / script).symlink_to(ROOT / script)
    here = Workplace(folder, set())
    for command in quick_start():
        here.run(command)
    first = pq.read_table(next(folder.rglob("shard_*.parquet")), columns=["kappa"]).slice(0, 1)
    np.save(folder / "my_tile.npy", np.array(first["kappa"].to_pylist(), dtype=np.float32))
    return here


def test_the_quick_start_runs_from_tiles_to_fom(workplace: Workplace) -> None:
    assert [command.script for command in quick_start()] == ["run_mock.py", "run_compressor.py", "run_npe.py"]
    assert list(workplace.folder.rglob("fom_result.json"))


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, workplace: Workplace) -> None:
    for command in commands_of(page.read_text(encoding="utf-8")):
        if not command.reason_not_to_run():
            assert command.script, f"{command.text} is of no kind that is known here; run it, or say why not"
            workplace.run(command)


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_every_command_has_options_that_exist_and_values_that_are_accepted(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command in commands_of(text) + inline_commands_of(text):
        if command.script:
            command.config()  # also builds the options in the quotes of a sweep


def test_the_slurm_script_has_options_that_exist() -> None:
    commands = slurm_commands()
    assert [command.script for command in commands] == ["run_compressor.py", "run_npe.py"]
    compressor, npe = (command.config() for command in commands)
    assert Path(npe.ckpt).parent.name == compressor.run_tag


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_make_targets_and_scripts_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make (\w[\w-]*)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for line in re.findall(r"`python ((?:benchmarks|tests)/[^`]+)`", text):
        script, *options = shlex.split(line)
        source = (ROOT / script).read_text(encoding="utf-8")
        shared = (ROOT / "benchmarks" / "measure.py").read_text(encoding="utf-8")
        for word in options:
            if word.startswith("--") and " " in word:
                parse_args(CompressorConfig, shlex.split(word))  # options of stage 1 in quotes
            elif word.startswith("--"):
                assert f'"{word}"' in source + shared, f"{script} has no {word}"


GENERATED = {
    "split_manifest.json": (SplitManifest, ""),
    "result.json": (CompressorResult, "audit"),
    "fom_result.json": (FomResult, "audit"),
    "audit": (Audit, ""),
    "predict.json": (PredictResult, ""),
    "fom_vs_lmax.json": (SweepResult, ""),
    "learning_curve.json": (LearningCurves, "fom"),
}


def with_tables_of_the_types(text: str) -> str:
    """docs/files.md with the tables that the result types give."""
    for name, (result_class, without) in GENERATED.items():
        table = f"<!-- {name} -->\n| key | meaning |\n|---|---|\n{table_of_keys(result_class, without)}\n<!-- end -->"
        text, found = re.subn(
            rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->", lambda _, table=table: table, text, flags=re.DOTALL
        )
        assert found == 1, name
    return text


def test_the_tables_of_keys_are_those_of_the_types() -> None:
    assert with_tables_of_the_types(FILES) == FILES, "`python tests/test_docs.py` writes them"


def heads_of(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_exists(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in heads_of(target.read_text(encoding="utf-8")), link


def test_every_picture_is_shown_somewhere_and_every_page_is_linked_from_the_readme() -> None:
    everything = "".join(page.read_text(encoding="utf-8") for page in ALL_PAGES)
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.name in everything, picture
    for page in DOCS:
        assert f"docs/{page.name}" in README.read_text(encoding="utf-8"), page


def test_the_readme_stays_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 2000


def test_the_picture_of_the_imports_is_true() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    arrows = re.findall(r"^ +(npe|compress|data)_(\w+) --> (npe|compress|data)_(\w+)$", text, flags=re.MULTILINE)
    assert len(arrows) > 40
    for layer, name, other_layer, other in arrows:
        folder = ROOT / layer / name
        names = set().union(*map(imports_of, folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]))
        assert any(found.startswith(f"{other_layer}.{other}.") for found in names), f"{layer}/{name} has no {other}"
    for layer in ("npe", "compress", "data"):
        for path in (ROOT / layer).glob("*.py"):
            if path.stem not in ("__init__", "config", "schema"):
                assert f'{layer}_{path.stem}["' in text, f"docs/architecture.md does not show {layer}/{path.name}"


def leaves_of(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values that are no objects; the entries of a list of objects share their paths."""
    if isinstance(content, dict) and content:
        for name, value in content.items():
            yield from leaves_of(value, (*path, name))
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        for value in content:
            yield from leaves_of(value, path)
    else:
        yield path


def is_explained(path: tuple[str, ...], keys: set[str]) -> bool:
    """Whether a key is in a table, with its whole path or without one name in it, such as that of a split.

    A key whose row stands alone explains all that is below it, as `config` does.
    """
    shorter = (path[:i] + path[i + 1 :] for i in range(1, len(path) - 1))
    if any(".".join(names) in keys for names in (path, *shorter)):
        return True
    above = [".".join(path[:i]) for i in range(1, len(path))]
    return any(name in keys and not any(key.startswith(f"{name}.") for key in keys) for name in above)


def section_of(head: str) -> set[str]:
    """What stands in backticks in a section of docs/files.md."""
    assert f"\n## {head}\n" in FILES, f"docs/files.md has no section {head}"
    section = FILES.split(f"\n## {head}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`([^`\s]+)`", section))


def test_every_key_and_every_file_stands_in_the_page_of_files(workplace: Workplace) -> None:
    """Of all that the commands above wrote: the quick start's files at least."""
    files = [path for path in (workplace.folder / "results").rglob("*") if path.is_file()]
    assert {"result.json", "fom_result.json", "split_manifest.json", "norm_stats.json"} <= {path.name for path in files}
    for path in files:
        if path.parent.name == "tensorboard":  # named by TensorBoard
            continue
        many = re.match(r"shard_|tile_(?=\d)|\..*\.lock$", path.name)  # named by a number or after a run
        known = (".lock" if path.suffix == ".lock" else many[0]) if many else path.name
        assert known in FILES, f"docs/files.md does not name {path.name}"
        if path.suffix not in (".json", ".jsonl"):
            continue
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        keys = section_of(path.name)
        for leaf in leaves_of(content):
            assert is_explained(leaf, keys), f"docs/files.md does not explain {'.'.join(leaf)} of {path.name}"
        if "audit" in content:
            for leaf in leaves_of(content["audit"]):
                assert is_explained(leaf, section_of("The audit")), f"docs/files.md does not explain audit.{leaf}"


if __name__ == "__main__":
    (ROOT / "docs" / "files.md").write_text(with_tables_of_the_types(FILES), encoding="utf-8")
