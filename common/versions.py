"""What a result was made by: the commit of this code, and the versions of what it stands on."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "KAPPA_FOM_COMMIT"  # says it where the code lies without its repository, as in a container


def commit() -> str:
    """Hash of the checked-out commit, with `+changes` if a tracked file differs; or `unknown`."""
    if said := os.environ.get(COMMIT_VARIABLE):
        return said
    if not (ROOT / ".git").exists():  # unpacked from an archive; git would look in the folders above
        return "unknown"
    found = [_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")]
    if None in found:
        return "unknown"
    head, changed = found
    return f"{head}+changes" if changed else str(head)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository that is not ours to read
        return None
    return done.stdout.strip()


COMMIT = commit()  # when the code is imported: by the end of a training another one may be checked out


def versions() -> dict[str, str]:
    """The commit, Python, and the packages that a result depends on."""
    packages = ("torch", "torchvision", "numpy")
    return {"commit": COMMIT, "python": platform.python_version(), **{name: version(name) for name in packages}}
