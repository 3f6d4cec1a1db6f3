"""Files appear whole or not at all: when the power fails, the disk is full, or two processes want one folder."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GUARD_S, ROOT, SMALL_LMAX, make_tiles

from common.artifacts import write_json
from common.checkpoint import save_checkpoint
from common.errors import UserError
from common.figures import figure
from common.lock import exclusive
from common.progress import write_metrics
from data.write_shards import open_shard


class Disk:
    """What would be left of a folder if the power failed now: contents and names count once they are synced."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.contents, self.names = folder, {}, {}
        self.states: list[dict[str, bytes]] = []
        self.sync, self.replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "replace", self._replace)

    def after_a_crash(self) -> dict[str, bytes]:
        return {name: self.contents.get(inode, b"") for name, inode in self.names.items()}

    def _fsync(self, descriptor: int) -> None:
        self.sync(descriptor)
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            self.names = {path.name: path.stat().st_ino for path in self.folder.iterdir()}
        else:
            self.contents[info.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
        self.states.append(self.after_a_crash())

    def _replace(self, source: Path, target: Path) -> None:
        self.replace(source, target)
        # The worst that a file system may do: the new name is there already, what it stands for only if synced.
        self.states.append(self.after_a_crash() | {target.name: self.contents.get(target.stat().st_ino, b"")})


def write_picture(path: Path, version: int) -> None:
    with figure(path, 2, 2) as drawn:
        drawn.subplots().plot([0, version])


def write_shard(path: Path, version: int) -> None:
    tiles = make_tiles(2, 4, 8, seed=version)
    with open_shard(path, {}) as shard:
        shard.write(tiles.kappa, tiles.keys, tiles.params, tiles.noise_level)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files through /proc")
@pytest.mark.parametrize(
    "write",
    [
        lambda path, version: write_json(path, {"version": version}),
        lambda path, version: write_metrics(path, [{"epoch": version}]),
        lambda path, version: save_checkpoint(path, "test", {"weights": torch.full((3,), version)}),
        write_shard,
        write_picture,
    ],
    ids=["json", "metrics", "checkpoint", "shard", "picture"],
)
def test_a_power_failure_at_any_instant_leaves_the_old_or_the_new(
    write: Callable[[Path, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, versions = tmp_path / "file", []
    disk = Disk(tmp_path, monkeypatch)
    for version in (1, 2):
        write(path, version)
        versions.append(path.read_bytes())
        assert disk.after_a_crash()["file"] == versions[-1]  # once it has returned, it stays
    assert len(disk.states) >= 4
    assert all(state["file"] in versions for state in disk.states if "file" in state)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def run_limited(command: str, bytes_per_file: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that may write no file larger than that: it fails like a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, resource.RLIM_INFINITY))

    words = [sys.executable, *command.split()]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=GUARD_S, preexec_fn=limit)


@pytest.mark.parametrize(
    ("options", "bytes_per_file", "named"),
    [
        ("run_mock.py --n-sims 20 --restart", 100_000, "shard_0000.parquet"),
        ("run_compressor.py --backbone tiny --max-epochs 2 --tag t --device cpu", 200_000, "best.ckpt"),
        (
            "run_compressor.py --backbone tiny --max-epochs 2 --tag t --device cpu --checkpoint-seconds 0",
            500_000,
            "last.ckpt",
        ),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    small_suite: Path, tmp_path: Path, options: str, bytes_per_file: int, named: str
) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    command = f"{options} --results-dir {tmp_path} --lmax {SMALL_LMAX} --noise-level noiseless"
    done = run_limited(command, bytes_per_file, tmp_path)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write")
    assert named in last
    assert "make room" in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob(named))
    again = run_limited(command, resource.RLIM_INFINITY, tmp_path)
    assert again.returncode == 0, again.stderr


def test_two_processes_cannot_write_one_folder_and_a_dead_one_does_not_hold_it(
    small_suite: Path, tmp_path: Path, run_command: Callable
) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    folder = tmp_path / "field_compressor_runs" / "t"
    folder.mkdir(parents=True)
    options = ["--results-dir", tmp_path, "--lmax", SMALL_LMAX, "--noise-level", "noiseless", "--backbone", "tiny"]
    options += ["--tag", "t", "--max-epochs", 1, "--device", "cpu"]
    hold = f"from pathlib import Path; from common.lock import exclusive\nwith exclusive(Path({str(folder)!r})): "
    code = hold + "print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    code, _, err = run_command("run_compressor.py", *options)
    assert code == 2
    assert "another process is writing" in err
    assert list(folder.iterdir()) == []
    holder.kill()
    holder.wait()
    assert run_command("run_compressor.py", *options)[0] == 0


def test_where_nothing_can_be_written_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*--results-dir"), exclusive(tmp_path / "file" / "runs" / "t"):
        pass


def test_where_the_file_system_has_no_locks_it_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    for _ in range(2):  # nothing is left that the next process, or container, would wait for
        with exclusive(tmp_path / "run"):
            (tmp_path / "run").mkdir(exist_ok=True)
            assert "without locks" in capsys.readouterr().err
