"""Build a mock suite: tomographic convergence tiles with known cosmology.

python run_mock.py --lmax 200 --noise-level des_y3 --n-sims 791       here, all cores
modal run run_mock.py --lmax 200                                      on Modal, onto the Volume
"""

from typing import Any

from common.command import Command
from data.mock.config import MockConfig


def report(results: list[dict[str, Any]]) -> None:
    """What the user waited for."""
    for one in results:
        print(
            f"{one['n_sims']} simulations, {one['n_tiles']} tiles of {one['nside']} x {one['nside']} pixels, "
            f"{one['elapsed_s']:.0f} s\n"
            f"tiles     {one['folder']}\n"
            f"picture   {one['folder']}/suite.png"
        )


COMMAND = Command("mock", MockConfig, "data.mock.suite.build_suites", report, machine="cpu")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
