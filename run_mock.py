"""Build a mock suite: tomographic convergence tiles with known cosmology.

python run_mock.py --lmax 200 --noise-level des_y3 --n-sims 791       here, all cores
modal run run_mock.py --lmax 200                                      on Modal, onto the Volume
"""

from typing import Any

from common.command import Command
from data.mock.config import MockConfig


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    print(
        f"{result['n_sims']} simulations, {result['n_tiles']} tiles of {result['nside']} x {result['nside']} pixels, "
        f"{result['elapsed_s']:.0f} s\n"
        f"tiles     {result['folder']}\n"
        f"picture   {result['folder']}/suite.png"
    )


COMMAND = Command("mock", MockConfig, "data.mock.suite.build_suite", report, machine="cpu")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
