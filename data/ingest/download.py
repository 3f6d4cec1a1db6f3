"""Download a large file; an interrupted download resumes where it stopped."""

import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from data.ingest.lightcone import BadSimulationError

ATTEMPTS = 5
RANGE_BEYOND_END = 416  # HTTP status: the requested range starts at the end of the file, or beyond
SECONDS_BEFORE_RETRY = 2.0  # doubled every time
TIMEOUT_S = 60.0
BLOCK = 1 << 20  # bytes at a time


def download(url: str, path: Path) -> None:
    """Fetch a URL into a file; if the file exists, it is the beginning, and only the rest is fetched.

    Raises:
        BadSimulationError: the server does not have it, or the connection breaks again and again.
    """
    for attempt in range(ATTEMPTS):
        try:
            if _fetch_rest(url, path):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == RANGE_BEYOND_END and path.exists():
                return
            if error.code < 500:
                raise BadSimulationError(f"{url}: the server says {error.code} {error.reason}") from None
            reason = f"the server says {error.code}"
        except (OSError, ValueError) as error:  # timeouts, refused and broken connections
            reason = str(error) or type(error).__name__
        if attempt + 1 < ATTEMPTS:
            time.sleep(SECONDS_BEFORE_RETRY * 2**attempt)
    raise BadSimulationError(f"{url} could not be downloaded in {ATTEMPTS} attempts ({reason}); try again later")


def _fetch_rest(url: str, path: Path) -> bool:
    """Append what is missing; True if the file is then complete."""
    have = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        if answer.status == 200:
            have = 0  # a server without ranges sends the whole file
        length = int(answer.headers.get("Content-Length") or -1)
        with open(path, "ab" if have else "wb") as file:
            shutil.copyfileobj(answer, file, BLOCK)
    return length < 0 or path.stat().st_size == have + length
