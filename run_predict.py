"""Answer single tiles: posterior, samples, and whether they look like the training suite.

python run_predict.py --run results/field_npe_runs/<tag> --tiles FILE       here
modal run run_predict.py --run results/field_npe_runs/<tag> --tiles FILE    on Modal, FILE on the Volume
"""

from __future__ import annotations

from typing import Any

from common import remote
from common.errors import exit_on_user_error
from common.options import parse_args, with_signature_of
from npe.config import PredictConfig

SHOWN = 12  # tiles, at the most


@exit_on_user_error
def main() -> None:
    """Parse, predict, print."""
    config = parse_args(PredictConfig)
    from npe.predict import predict_tiles  # after parsing: --help and a bad value need no torch

    report(predict_tiles(config))


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    tiles, folder = result["predictions"], result["folder"]
    for tile in tiles[:SHOWN]:
        (omega_m, s8), (sigma_omega_m, sigma_s8) = tile["mu"], tile["sigma"]
        print(
            f"tile {tile['tile']}: Omega_m {omega_m:.3f} +- {sigma_omega_m:.3f}, S8 {s8:.3f} +- {sigma_s8:.3f}, "
            f"FoM {tile['fom']:.0f}, {tile['verdict']}"
        )
    if len(tiles) > SHOWN:
        print(f"... and {len(tiles) - SHOWN} more")
    print(
        f"unlike    {result['n_unlike']} of {len(tiles)} tiles (1 in 100 ordinary ones is called so)\n"
        f"picture   {folder}/predictions.png\n"
        f"all       {folder}/predict.json"
    )
    if result["config"]["n_samples"]:
        print(f'samples   getdist.loadMCSamples("{folder}/tile_0000")')


if remote.modal is not None:
    app = remote.modal.App("kappa-fom-predict")

    @app.function(**remote.CPU_FUNCTION)
    def predict_in_container(options: dict[str, Any]) -> dict[str, Any]:
        """Predictions in a container."""
        from npe.predict import predict_tiles

        return remote.in_container(predict_tiles, PredictConfig, options)

    @app.local_entrypoint()
    @exit_on_user_error
    @with_signature_of(PredictConfig)
    def modal_main(**options: Any) -> None:
        """Predictions on Modal."""
        PredictConfig(**options)  # a senseless value is refused here, before anything is sent
        report(remote.out_of_container(predict_in_container.spawn(options).get()))


if __name__ == "__main__":
    main()
