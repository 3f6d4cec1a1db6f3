"""Stage 2, posterior and Figure of Merit from a trained compressor.

python run_npe.py --ckpt results/field_compressor_runs/<tag>/best.ckpt       here
modal run run_npe.py --ckpt results/field_compressor_runs/<tag>/best.ckpt    on a Modal GPU, same options
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.command import Command
from npe.config import NPEConfig

if TYPE_CHECKING:  # it needs torch, and --help does not
    from npe.result import FomResult


def report(result: FomResult) -> None:
    """What the user waited for."""
    fiducial, ensemble, calibration, folder = result.fiducial, result.ensemble, result.calibration, result.folder
    std = result.fom_fiducial_std  # None for one tile
    scatter = "" if std is None else f"tile-to-tile scatter {std:.0f}, "
    caveat = " (optimistic: it stopped the training)" if calibration.optimistic else ""
    moved = " and ".join(f"{sigma:.2f}" for sigma in result.augmentation_shift_in_sigma["all"].rms)
    medians = ensemble.fom_fiducial_medians
    print(
        f"FoM(Omega_m, S8), lmax {result.lmax}, {result.noise_level}, median of "
        f"{len(result.fom_fiducial_all)} tiles of the fiducial simulation {fiducial.sim_id}\n"
        f"fiducial  {result.fom_fiducial_median:.0f}  {scatter}"
        f"median within {fiducial.fom_median_lo_16:.0f} ... {fiducial.fom_median_hi_84:.0f} (68 %, "
        f"{fiducial.n_patches} patches of sky)\n"
        f"test      {result.fom_test_median:.0f}  median within {result.fom_test_lo_16:.0f} ... "
        f"{result.fom_test_hi_84:.0f} (68 %), cosmologies of the test split\n"
        f"posterior {calibration.verdict}, chi2 per dof {calibration.chi2_per_dof:.2f} +- "
        f"{calibration.chi2_per_dof_err:.2f} on {calibration.n_tiles} tiles of {calibration.tiles}{caveat}\n"
        f"members   {ensemble.n_members} of other initial weights: FoM {min(medians):.0f} ... {max(medians):.0f}, "
        f"mixture {ensemble.mixture.fom_fiducial_median:.0f}, "
        f"worst divergence {ensemble.worst_divergence_nats:.3f} nats\n"
        f"augmentation moves a summary by {moved} sigma (rms) in {' and '.join(result.params)}\n"
        f"pictures  {folder}/fom.png\n"
        f"          {folder}/calibration.png\n"
        f"          {folder}/loss_curves.png\n"
        f"          {folder}/tiles.png\n"
        f"report    {folder}/report.html\n"
        f"all       {folder}/fom_result.json"
    )


COMMAND = Command("npe", NPEConfig, "npe.stage.run_npe", report)
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
