"""The published tiles from the Hugging Face hub: one configuration, checked, and resumable.

Not by snapshot_download, which checks no hashes, and after Ctrl-C first completes the files that it is downloading.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from common.artifacts import CannotWriteError, sha256_of_file
from common.errors import UserError
from common.lock import exclusive
from common.progress import Progress
from data.config import FetchConfig
from data.read_shards import read_index
from data.schema import TILES_PER_SIM

FOLDER = "gower_street"  # below --results-dir; in it the files lie as in the repository
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the library below, which is another in each version


def fetch_tiles(config: FetchConfig, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Download the shards of one configuration that are not here yet, and check all of them.

    on_checkpoint is called after every shard (Modal commits its Volume).

    Returns:
        folder, n_shards, n_tiles, n_sims, megabytes, commit (of the repository), lmax, noise_level.

    Raises:
        UserError: there is no such configuration, the hub cannot be reached, or what came is not what it has.
    """
    home = Path(config.results_dir, FOLDER)
    with exclusive(home):
        commit, files = _download(config, home, on_checkpoint)
    folder = home / "data" / config.configuration
    index = read_index(folder, config.lmax, config.noise_level)
    return {
        "folder": str(folder),
        "n_shards": len(files),
        "n_tiles": len(index.keys),
        "n_sims": len(index.keys) // TILES_PER_SIM,
        "megabytes": sum(file.size for file in files) // 1_000_000,
        "commit": commit,
        "lmax": config.lmax,
        "noise_level": config.noise_level,
    }


def _download(config: FetchConfig, home: Path, on_checkpoint: Callable[[], None]) -> tuple[str, list[RepoFile]]:
    """Every shard that is not here yet; the commit that they are from, and all shards."""
    if not sys.stderr.isatty():
        disable_progress_bars()  # of single files
    api = HfApi(endpoint=config.endpoint or None)
    try:
        commit = api.dataset_info(config.repo, revision=config.revision).sha or config.revision
        files = _shards_of(api, config, commit)
        with Progress("fetching", len(files), "shards") as progress:
            for file in files:
                _fetch(api, file, config.repo, commit, home)
                on_checkpoint()
                progress.advance(note=Path(file.path).name)
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError):
        raise UserError(f"the hub has no tiles in {config.repo} at {config.revision}; check --repo") from None
    except (HfHubHTTPError, TRANSPORT_ERROR, ConnectionError, TimeoutError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"the hub cannot be reached ({reason}); the same command resumes from here") from None
    except OSError as error:
        raise CannotWriteError(home, error) from None
    return commit, files


def _shards_of(api: HfApi, config: FetchConfig, commit: str) -> list[RepoFile]:
    tree = api.list_repo_tree(config.repo, "data", recursive=True, repo_type="dataset", revision=commit)
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    shards = [file for file in files if Path(file.path).match(f"{config.configuration}/shard_*.parquet")]
    if not shards:
        found = ", ".join(sorted({Path(file.path).parent.name for file in files}))
        raise UserError(f"{config.repo} has no data/{config.configuration}; it has {found}")
    return shards


def _fetch(api: HfApi, file: RepoFile, repo: str, commit: str, home: Path) -> None:
    """Download one file unless it is here, a second time if its hash is wrong; raises UserError if it still is."""
    path = home / file.path
    for _ in range(2):
        if _is_right(path, file):
            return
        path.unlink(missing_ok=True)
        api.hf_hub_download(repo, file.path, repo_type="dataset", revision=commit, local_dir=home)
    if not _is_right(path, file):
        path.unlink()
        raise UserError(f"{path} came twice and is not what the hub says (its hash does not fit); try again later")


def _is_right(path: Path, file: RepoFile) -> bool:
    """Whether a file has the hub's hash: the library looks at its size alone, and not at a damaged disk."""
    if not path.exists() or path.stat().st_size != file.size:
        return False
    return file.lfs is None or sha256_of_file(path) == file.lfs.sha256
