"""The published tiles from a server on this machine that speaks what it takes of the hub's protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tiles, write_tiles

from common.errors import UserError
from data.config import FetchConfig
from data.fetch import fetch_tiles
from data.read_shards import read_tiles

REPO, COMMIT, LMAX = "EiffL/GowerStreetDESY3", "0123456789abcdef0123456789abcdef01234567", 32


class Hub(http.server.BaseHTTPRequestHandler):
    """One data set with files of known hash; can hang up early, lie about a hash, or be away."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}  # noqa: RUF012
    downloads: list[tuple[str, str]] = []  # noqa: RUF012
    breaking, most = "", 0  # downloads of this name end after so many bytes
    away = False
    hash_of: Callable[[bytes], str] = staticmethod(lambda content: hashlib.sha256(content).hexdigest())

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            whole = not self.breaking or self.breaking not in self.path
            self.wfile.write(content if whole else content[: self.most])
            self.close_connection = not whole

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        if self.away:
            self.answer(503)
        elif path == f"/api/datasets/{REPO}/revision/main":
            self.answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(tree := f"/api/datasets/{REPO}/tree/{COMMIT}/"):
            self.tree(path.removeprefix(tree))
        elif path.startswith(resolve := f"/datasets/{REPO}/resolve/{COMMIT}/"):
            self.file(path.removeprefix(resolve))
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def tree(self, folder: str) -> None:
        inside = [name for name in self.files if name.startswith(folder + "/")]
        if not inside:
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        entries: list[dict[str, Any]] = []
        for name in sorted(inside):
            content = self.files[name]
            lfs = {"oid": self.hash_of(content), "size": len(content), "pointerSize": 130}
            entries.append({"type": "file", "path": name, "size": len(content), "oid": "0", "lfs": lfs})
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def file(self, name: str) -> None:
        content, wanted = self.files[name], self.headers.get("Range", "")
        if self.command == "GET":
            self.downloads.append((name, wanted))
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        marks = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        if first:
            marks["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.answer(206 if first else 200, content[first:], **marks)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Hub], FetchConfig]]:
    """The server with two shards of lmax 32, and the options that fetch them."""
    write_tiles(tmp_path / "source", make_tiles(10, LMAX // 2, LMAX), 60)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    class Own(Hub):
        files = {  # noqa: RUF012
            f"data/lmax_{LMAX}_des_y3/{path.name}": path.read_bytes() for path in (tmp_path / "source").iterdir()
        }
        downloads: list[tuple[str, str]] = []  # noqa: RUF012

    Own.files["README.md"] = b"hello"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield Own, FetchConfig(lmax=LMAX, results_dir=str(tmp_path / "results"), endpoint=url)
        server.shutdown()


def folder_of(config: FetchConfig) -> Path:
    return Path(config.results_dir, "gower_street", "data", config.configuration)


def test_what_is_fetched_is_what_the_hub_has(
    hub: tuple[type[Hub], FetchConfig], tmp_path: Path, run_command: Callable
) -> None:
    server, config = hub
    code, out, _ = run_command(
        "run_fetch.py", "--lmax", LMAX, "--results-dir", config.results_dir, "--endpoint", config.endpoint
    )
    assert code == 0
    assert f"120 tiles of 10 simulations, 2 shards, {sum(map(len, server.files.values())) // 1_000_000} MB" in out
    found, wanted = (read_tiles(folder, LMAX, "des_y3") for folder in (folder_of(config), tmp_path / "source"))
    assert np.array_equal(found.kappa, wanted.kappa)
    assert np.array_equal(found.keys, wanted.keys)
    assert len(server.downloads) == 2

    first = min(folder_of(config).iterdir())  # a damaged shard comes again, and that one alone
    content = bytearray(first.read_bytes())
    content[1000] ^= 1
    first.write_bytes(content)
    assert fetch_tiles(config)["commit"] == COMMIT
    assert [name for name, _ in server.downloads[2:]] == [f"data/{config.configuration}/{first.name}"]
    assert first.read_bytes() == server.files[f"data/{config.configuration}/{first.name}"]


def test_an_interrupted_download_resumes(hub: tuple[type[Hub], FetchConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the shard that was being fetched; those before it are kept."""
    server, config = hub
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's own attempts
    server.breaking, server.most = "shard_0001", 40_000
    with pytest.raises(UserError, match="the same command resumes from here"):
        fetch_tiles(config)
    server.breaking = ""
    server.downloads.clear()
    fetch_tiles(config)
    assert [Path(name).name for name, _ in server.downloads] == ["shard_0001.parquet"]


def test_what_cannot_be_is_refused(hub: tuple[type[Hub], FetchConfig], tmp_path: Path) -> None:
    server, config = hub
    given = {"results_dir": config.results_dir, "endpoint": config.endpoint}
    with pytest.raises(UserError, match="has no data/lmax_400_des_y3; it has lmax_32_des_y3"):
        fetch_tiles(FetchConfig(lmax=400, **given))
    with pytest.raises(UserError, match="the hub has no tiles in nobody/nothing at main"):
        fetch_tiles(FetchConfig(lmax=LMAX, repo="nobody/nothing", **given))
    server.hash_of = staticmethod(lambda _: "0" * 64)
    with pytest.raises(UserError, match=r"shard_0000.parquet came twice and is not what the hub says"):
        fetch_tiles(config)
    assert not list(folder_of(config).glob("*.parquet"))
    server.away = True
    with pytest.raises(UserError, match="the hub cannot be reached"):
        fetch_tiles(config)
    shutil.rmtree(tmp_path / "results")
