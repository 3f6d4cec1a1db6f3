"""Make tiles from simulated lightcones or from full-sky convergence maps.

python run_ingest.py --lightcones DIR --params gower_street_runs.csv --nz nz.txt --lmax 200    here, all cores
modal run run_ingest.py --lightcones URL ...            on Modal, a container per simulation, onto the Volume
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from common import remote
from common.errors import UserError, exit_on_user_error
from common.options import parse_args, with_signature_of
from data.ingest.config import IngestConfig


@exit_on_user_error
def main() -> None:
    """Parse, ingest, print."""
    config = parse_args(IngestConfig)
    from data.ingest.suite import run_ingest  # after parsing: --help and a bad value need no healpy

    report(run_ingest(config))


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    print(f"{result['n_sims']} simulations, {result['n_tiles']} tiles in each folder, {result['elapsed_s']:.0f} s")
    summary = f"{result['folders'][0]}/ingest.json"
    if not result["n_sims"]:
        raise UserError(f"no simulation could be used; the reasons are above and in {summary}")
    for folder in result["folders"]:
        print(f"tiles     {folder}\npicture   {folder}/suite.png")
    if result["left_out"]:
        print(f"left out  {len(result['left_out'])} simulations; reasons in {summary}")


if remote.modal is not None:
    app = remote.modal.App("kappa-fom-ingest")

    @app.function(**remote.INGEST_FUNCTION)
    def ingest_in_container(job: Any) -> dict[str, Any]:
        """One simulation: downloaded to the container's own disk, its tiles onto the Volume."""
        from data.ingest.simulation import ingest

        here = replace(job, downloads=remote.LOCAL_DISK)
        return remote.on_volume(lambda: {"outcome": ingest(here)})

    @app.function(**remote.WAITING_FUNCTION)
    def all_in_container(jobs: list[Any], restart: bool, strict: bool) -> dict[str, Any]:
        """All simulations that are not finished, side by side, and what has become of them."""
        from data.ingest.suite import collected, summarise, unfinished

        def run() -> dict[str, Any]:
            start = time.monotonic()
            left = remote.out_of_container(remote.on_volume(lambda: {"jobs": unfinished(jobs, restart)}))["jobs"]
            results = ingest_in_container.map(left, order_outputs=False)
            outcomes = collected((remote.out_of_container(one)["outcome"] for one in results), strict, len(left))
            return remote.out_of_container(
                remote.on_volume(lambda: summarise(jobs, outcomes, time.monotonic() - start))
            )

        return remote.with_errors_as_values(run)

    @app.local_entrypoint()
    @exit_on_user_error
    @with_signature_of(IngestConfig)
    def modal_main(**options: Any) -> None:
        """Lightcones to tiles on Modal."""
        config = replace(IngestConfig(**options), results_dir=remote.RESULTS)
        if "://" not in config.lightcones:
            raise UserError("on Modal, give the URL that serves the simulations as --lightcones")
        from data.ingest.suite import plan

        jobs = plan(config)
        report(remote.out_of_container(all_in_container.spawn(jobs, config.restart, config.strict).get()))


if __name__ == "__main__":
    main()
