"""Build a mock suite: tomographic convergence tiles with known cosmology.

python run_mock.py --lmax 200 --noise-level des_y3 --n-sims 791       here, all cores
modal run run_mock.py --lmax 200                                      on Modal, onto the Volume
"""

from __future__ import annotations

from typing import Any

from common import remote
from common.errors import exit_on_user_error
from common.options import parse_args, with_signature_of
from data.mock.config import MockConfig


@exit_on_user_error
def main() -> None:
    """Parse, build, print."""
    config = parse_args(MockConfig)
    from data.mock.suite import build_suite  # after parsing: --help and a bad value need no ducc0

    report(build_suite(config))


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    print(
        f"{result['n_sims']} simulations, {result['n_tiles']} tiles of {result['nside']} x {result['nside']} pixels, "
        f"{result['elapsed_s']:.0f} s\n"
        f"tiles     {result['folder']}\n"
        f"picture   {result['folder']}/suite.png"
    )


if remote.modal is not None:
    app = remote.modal.App("kappa-fom-mock")

    @app.function(**remote.CPU_FUNCTION)
    def mock_in_container(options: dict[str, Any]) -> dict[str, Any]:
        """The suite in a container with many cores."""
        from data.mock.suite import build_suite

        return remote.in_container(build_suite, MockConfig, options)

    @app.local_entrypoint()
    @exit_on_user_error
    @with_signature_of(MockConfig)
    def modal_main(**options: Any) -> None:
        """The suite on Modal."""
        MockConfig(**options)  # a senseless value is refused here, before anything is sent
        report(remote.out_of_container(mock_in_container.spawn(options).get()))


if __name__ == "__main__":
    main()
