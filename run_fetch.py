"""Download the published Gower Street tiles of one configuration from the Hugging Face hub.

python run_fetch.py --lmax 200 --noise-level des_y3       here
modal run run_fetch.py --lmax 200                         on Modal, onto the Volume
"""

from typing import Any

from common.command import Command
from data.config import FetchConfig


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    tiles = f"--tiles-dir {result['folder']} --lmax {result['lmax']} --noise-level {result['noise_level']}"
    print(
        f"{result['n_tiles']} tiles of {result['n_sims']} simulations, {result['n_shards']} shards, "
        f"{result['megabytes']} MB, commit {result['commit'][:12]}\n"
        f"tiles     {result['folder']}\n"
        f"look      python run_check.py {tiles} --geometry published\n"
        f"next      python run_compressor.py {tiles} --geometry published"
    )


COMMAND = Command("fetch", FetchConfig, "data.fetch.fetch_tiles", report, machine="cpu")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
