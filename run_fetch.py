"""Download the published Gower Street tiles of one configuration from the Hugging Face hub.

python run_fetch.py --lmax 200 --noise-level des_y3       here
modal run run_fetch.py --lmax 200                         on Modal, onto the Volume
"""

from __future__ import annotations

from typing import Any

from common import remote
from common.errors import exit_on_user_error
from common.options import parse_args, with_signature_of
from data.config import FetchConfig


@exit_on_user_error
def main() -> None:
    """Parse, download, print."""
    config = parse_args(FetchConfig)
    from data.fetch import fetch_tiles  # after parsing: --help and a bad value need no huggingface_hub

    report(fetch_tiles(config))


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


if remote.modal is not None:
    app = remote.modal.App("kappa-fom-fetch")

    @app.function(**remote.CPU_FUNCTION)
    def fetch_in_container(options: dict[str, Any]) -> dict[str, Any]:
        """The download, in a container."""
        from data.fetch import fetch_tiles

        return remote.in_container(fetch_tiles, FetchConfig, options)

    @app.local_entrypoint()
    @exit_on_user_error
    @with_signature_of(FetchConfig)
    def modal_main(**options: Any) -> None:
        """The download on Modal."""
        FetchConfig(**options)  # a senseless value is refused here, before anything is sent
        report(remote.out_of_container(fetch_in_container.spawn(options).get()))


if __name__ == "__main__":
    main()
