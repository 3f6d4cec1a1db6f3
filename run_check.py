"""Check a folder of tiles before training: what the splits share, odd tiles, the fiducial's place in the prior.

python run_check.py --lmax 200 --noise-level des_y3       here; leaves the cache that training reads
modal run run_check.py --lmax 200                         of tiles on the Modal Volume, same options
"""

from __future__ import annotations

from typing import Any

from common import remote
from common.errors import exit_on_user_error, warn
from common.options import parse_args, with_signature_of
from data.config import CheckConfig


@exit_on_user_error
def main() -> None:
    """Parse, check, print."""
    config = parse_args(CheckConfig)
    from data.audit import check_tiles  # after parsing: --help and a bad value need no pyarrow

    report(check_tiles(config))


def report(result: dict[str, Any]) -> None:
    """What the user waited for, and on stderr what should worry them."""
    covered, fiducial = result["covered_patches"], result["fiducial"]
    where = (
        "unknown (--geometry)" if covered is None else f"the tiles of a simulation cover that of {covered:.1f} tiles"
    )
    lines = [
        f"{result['n_tiles']} tiles of {result['n_sims']} simulations, {result['elapsed_s']:.0f} s",
        f"tiles       {result['folder']}",
        f"twins       {result['n_twins']} tiles are the same pixels as another, "
        f"{result['n_twins_across_sims']} as one of another simulation",
        f"sky         {where}",
    ]
    for name, partners in result["partners"].items():
        line = f"{name:10}  of {partners['n_tiles']} tiles {_share(partners, 'twin')} have a twin in an earlier split"
        lines.append(
            line if covered is None else f"{line}, {_share(partners, 'twin_or_sky')} a twin or most of their sky"
        )
    if fiducial is None:
        lines.append("fiducial    its simulation is not here")
    else:
        lines.append(
            f"fiducial    simulation {fiducial['sim_id']}: {len(fiducial['patch_of_tile'])} tiles, "
            f"{fiducial['n_patches']} patches of sky; outside these ranges of the others: "
            f"{', '.join(fiducial['outside']) or 'nothing'}"
        )
    lines += [f"{name:10}  {low:.4g} ... {high:.4g}" for name, (low, high) in result["ranges"].items()]
    lines.append(f"variance    {result['n_variance_outliers'] or 'no'} tiles are far from the rest of their simulation")
    lines += [
        f"            {tuple(o['key'])}: {o['factor']:.3g} times the median in bin {o['bin']}, {o['sigma']:+.1f} sigma"
        for o in result["variance_outliers"]
    ]
    print("\n".join(lines))
    for warning in result["warnings"]:
        warn(warning)


def _share(partners: dict[str, Any], kind: str) -> str:
    return f"{partners[kind]} ({partners[kind + '_fraction']:.1%})"


if remote.modal is not None:
    app = remote.modal.App("kappa-fom-check")

    @app.function(**remote.CPU_FUNCTION)
    def check_in_container(options: dict[str, Any]) -> dict[str, Any]:
        """The check in a container, beside the tiles."""
        from data.audit import check_tiles

        return remote.in_container(check_tiles, CheckConfig, options)

    @app.local_entrypoint()
    @exit_on_user_error
    @with_signature_of(CheckConfig)
    def modal_main(**options: Any) -> None:
        """The check on Modal."""
        CheckConfig(**options)  # a senseless value is refused here, before anything is sent
        report(remote.out_of_container(check_in_container.remote(options)))


if __name__ == "__main__":
    main()
