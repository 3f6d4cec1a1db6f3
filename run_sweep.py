"""Both stages for several lmax and seeds: the Figure of Merit against lmax.

python run_sweep.py --lmax 200,400,600 --seeds 3               here, one after the other
modal run --detach run_sweep.py --lmax 200,400,600 --seeds 3   on Modal, side by side, a container for every point
"""

from __future__ import annotations

from typing import Any

from common import remote
from common.errors import exit_on_user_error
from common.options import parse_args, with_signature_of
from npe.config import SweepConfig


@exit_on_user_error
def main() -> None:
    """Parse, run, print."""
    config = parse_args(SweepConfig)
    from npe.sweep import run_sweep  # after parsing: --help and a bad value need no torch

    report(run_sweep(config))


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    for row in result["curve"]:
        seeds = "" if row["std_over_seeds"] is None else f"+- {row['std_over_seeds']:.0f} over {row['n_seeds']} seeds, "
        tiles = "" if row["std_over_tiles"] is None else f"+- {row['std_over_tiles']:.0f} over tiles"
        print(f"lmax {row['lmax']:5d}  FoM {row['fom']:.0f}  {seeds}{tiles}".rstrip(" ,"))
    for point in result["points"]:
        if "error" in point:
            print(f"failed    {point['tag']}: {point['error']}")
    print(f"picture   {result['folder']}/fom_vs_lmax.png\nall       {result['folder']}/fom_vs_lmax.json")


if remote.modal is not None:
    app = remote.modal.App("kappa-fom-sweep")

    @app.function(**remote.GPU_FUNCTION)
    def point_in_container(options: dict[str, Any], number: int) -> dict[str, Any]:
        """One point of the sweep in a container with a GPU."""
        from npe.sweep import run_point

        def run(config: SweepConfig, on_checkpoint: Any) -> dict[str, Any]:
            return run_point(config.runs[number], on_checkpoint)

        return remote.in_container(run, SweepConfig, options)

    @app.function(**remote.WAITING_FUNCTION)
    def sweep_in_container(options: dict[str, Any]) -> dict[str, Any]:
        """All points, side by side, and the curve through them."""
        from npe.sweep import run_sweep

        def run(config: SweepConfig, on_checkpoint: Any) -> dict[str, Any]:
            runs = config.runs
            returned = point_in_container.starmap([(options, k) for k in range(len(runs))], return_exceptions=True)
            points = [
                {"lmax": run.lmax, "seed": run.seed, "tag": run.tag, "error": str(point)}
                if isinstance(point, BaseException)
                else point
                for run, point in zip(runs, returned, strict=True)
            ]
            return run_sweep(config, on_checkpoint, points)

        return remote.in_container(run, SweepConfig, options)

    @app.local_entrypoint()
    @exit_on_user_error
    @with_signature_of(SweepConfig)
    def modal_main(**options: Any) -> None:
        """The sweep on Modal."""
        SweepConfig(**options)  # a senseless value is refused here, before anything is sent
        report(remote.out_of_container(sweep_in_container.spawn(options).get()))


if __name__ == "__main__":
    main()
