"""Stage 2, posterior and Figure of Merit from a trained compressor.

python run_npe.py --ckpt results/field_compressor_runs/<tag>/best.ckpt       here
modal run run_npe.py --ckpt results/field_compressor_runs/<tag>/best.ckpt    on a Modal GPU, same options
"""

from __future__ import annotations

from typing import Any

from common import remote
from common.errors import exit_on_user_error
from common.options import parse_args, with_signature_of
from npe.config import NPEConfig


@exit_on_user_error
def main() -> None:
    """Parse, train, print."""
    config = parse_args(NPEConfig)
    from npe.train import train_npe  # after parsing: --help and a bad value need no torch

    report(train_npe(config))


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    fiducial, folder = result["fiducial"], result["folder"]
    calibration, medians = result["calibration"], result["ensemble"]["fom_fiducial_medians"]
    caveat = " (optimistic: it stopped the training)" if calibration["optimistic"] else ""
    moved = result["augmentation_shift_in_sigma"]["all"]["rms"]
    std = result["fom_fiducial_std"]  # null for one tile
    scatter = "" if std is None else f"tile-to-tile scatter {std:.0f}, "
    print(
        f"FoM(Omega_m, S8), lmax {result['lmax']}, {result['noise_level']}, median of "
        f"{len(result['fom_fiducial_all'])} tiles of the fiducial simulation {fiducial['sim_id']}\n"
        f"fiducial  {result['fom_fiducial_median']:.0f}  {scatter}"
        f"median within {fiducial['fom_median_lo_16']:.0f} ... {fiducial['fom_median_hi_84']:.0f} (68 %, "
        f"{fiducial['n_patches']} patches of sky)\n"
        f"test      {result['fom_test_median']:.0f}  median within {result['fom_test_lo_16']:.0f} ... "
        f"{result['fom_test_hi_84']:.0f} (68 %), cosmologies of the test split\n"
        f"posterior {calibration['verdict']}, s = {calibration['s']:.2f} +- {calibration['s_err']:.2f} "
        f"on {calibration['n_tiles']} tiles of {calibration['tiles']}{caveat}\n"
        f"members   {result['ensemble']['n_members']} of other initial weights: FoM "
        f"{min(medians):.0f} ... {max(medians):.0f}, mixture "
        f"{result['ensemble']['mixture']['fom_fiducial_median']:.0f}, "
        f"worst divergence {result['ensemble']['worst_divergence_nats']:.3f} nats\n"
        f"augmentation moves a summary by {moved[0]:.2f} and {moved[1]:.2f} sigma (rms) in Omega_m and S8\n"
        f"pictures  {folder}/fom.png\n"
        f"          {folder}/calibration.png\n"
        f"          {folder}/loss_curves.png\n"
        f"          {folder}/tiles.png\n"
        f"report    {folder}/report.html\n"
        f"all       {folder}/fom_result.json"
    )


if remote.modal is not None:
    app = remote.modal.App("kappa-fom-npe")

    @app.function(**remote.GPU_FUNCTION)
    def npe_in_container(options: dict[str, Any]) -> dict[str, Any]:
        """Stage 2 in a container with a GPU."""
        from npe.train import train_npe

        return remote.in_container(train_npe, NPEConfig, options)

    @app.local_entrypoint()
    @exit_on_user_error
    @with_signature_of(NPEConfig)
    def modal_main(**options: Any) -> None:
        """Stage 2 on Modal."""
        NPEConfig(**options)  # a senseless value is refused here, before anything is sent
        report(remote.out_of_container(npe_in_container.spawn(options).get()))


if __name__ == "__main__":
    main()
