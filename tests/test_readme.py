"""The README's commands run as they stand there, on a tiny suite; what it says of files and options is so."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from compress.config import CompressorConfig
from data.config import CheckConfig, FetchConfig
from data.ingest.config import IngestConfig
from data.mock.config import MockConfig
from npe.config import NPEConfig, PredictConfig, SweepConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Appended to each command: the last value of an option counts.
SMALLER = {
    "run_mock.py": ["--n-sims", "6"],
    "run_compressor.py": ["--max-epochs", "1", "--batch-size", "8"],
    "run_npe.py": ["--max-epochs", "2"],
}
CONFIGS = {
    "run_mock.py": MockConfig,
    "run_check.py": CheckConfig,
    "run_compressor.py": CompressorConfig,
    "run_npe.py": NPEConfig,
    "run_sweep.py": SweepConfig,
    "run_ingest.py": IngestConfig,
    "run_predict.py": PredictConfig,
    "run_fetch.py": FetchConfig,
}


def commands(prefix: str, text: str = README) -> list[list[str]]:
    """Commands of the ```sh blocks that start with a prefix, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip().startswith(prefix)]


def test_the_quick_start_runs_from_tiles_to_fom(tmp_path: Path) -> None:
    section = README.split("## The three commands")[1].split("\n## ")[0]
    quick = commands("python run_", section)
    assert [command[1] for command in quick] == ["run_mock.py", "run_compressor.py", "run_npe.py"]
    for script in CONFIGS:
        (tmp_path / script).symlink_to(ROOT / script)
    for command in quick:
        done = subprocess.run(
            [sys.executable, *command[1:], *SMALLER[command[1]]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():  # every file that a command says it wrote
            if line.startswith(("picture", "          ", "all ")):
                assert (tmp_path / line.split()[-1]).stat().st_size > 0, line
    result = json.loads(next(tmp_path.rglob("fom_result.json")).read_text())
    for key in result:
        assert f"`{key}`" in README, f"the README does not explain {key} of fom_result.json"
    for key in json.loads(next(tmp_path.rglob("result.json")).read_text()):
        assert f"`{key}`" in README, f"the README does not explain {key} of result.json"
    for key in json.loads(next(tmp_path.rglob("split_manifest.json")).read_text()):
        assert f"`{key}`" in README, f"the README does not explain {key} of split_manifest.json"
    for path in (tmp_path / "results").rglob("*.*"):
        name = "shard_" if path.name.startswith("shard_") else ".lock" if path.suffix == ".lock" else path.name
        assert name in README, f"the README does not name {path.name}"


def flags_of(script: str) -> set[str]:
    return {"--" + name.replace("_", "-") for name in CONFIGS[script].__dataclass_fields__}


SLURM = f"```sh\n{(ROOT / 'docs' / 'slurm.sh').read_text()}```"


@pytest.mark.parametrize(
    ("prefix", "text"), [("python run_", README), ("modal run", README), ("srun python run_", SLURM)]
)
def test_every_option_in_readme_and_slurm_script_exists(prefix: str, text: str) -> None:
    found = commands(prefix, text)
    assert found
    for command in found:
        script = next(word for word in command if word.startswith("run_"))
        for option, stage in (("--stage-1", "run_compressor.py"), ("--stage-2", "run_npe.py")):
            if option in command:  # options within an option
                inner = command.pop(command.index(option) + 1)
                assert {word for word in shlex.split(inner) if word.startswith("--")} <= flags_of(stage), command
        assert {word for word in command if word.startswith("--") and word != "--detach"} <= flags_of(script), command


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("make "):
        assert re.search(rf"^{command[1]}:", makefile, flags=re.MULTILINE), command


def test_every_link_and_picture_in_the_readme_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert any(link.endswith(".png") for link in links)
    for link in links:
        assert (ROOT / link).exists(), link
