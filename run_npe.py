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
    """What the user waited for: the number, the three parts of its error, and what it rests on."""
    fiducial, ensemble, calibration = result.fiducial, result.ensemble, result.calibration
    medians = ensemble.fom_fiducial_medians
    tiles = "" if result.fom_fiducial_std is None else f", tile-to-tile scatter {result.fom_fiducial_std:.0f}"
    learning = "" if ensemble.fom_learning_std is None else f", learning error {ensemble.fom_learning_std:.0f}"
    caveat = " (optimistic: they stopped the training)" if calibration.optimistic else ""
    moved = " and ".join(f"{sigma:.2f}" for sigma in result.augmentation_shift_in_sigma["all"].rms)
    lines = [
        f"FoM(Omega_m, S8), {result.tiles_in_words}, median of "
        f"{len(result.fom_fiducial_all)} tiles of the fiducial simulation {fiducial.sim_id}",
        f"fiducial  {result.fom_fiducial_median:.0f}{tiles}{learning}",
        f"patches   median within {fiducial.fom_median_lo_16:.0f} ... {fiducial.fom_median_hi_84:.0f} (68 %, "
        f"{fiducial.n_patches} patches of sky)",
        f"test      {result.fom_test_median:.0f}  median within {result.fom_test_lo_16:.0f} ... "
        f"{result.fom_test_hi_84:.0f} (68 %), cosmologies of the test split",
        f"posterior {calibration.verdict}, chi2 per dof {calibration.chi2_per_dof:.2f} +- "
        f"{calibration.chi2_per_dof_err:.2f} on {calibration.n_tiles} tiles of {calibration.tiles}{caveat}",
        f"members   {ensemble.n_members}, all but the first on bootstrapped simulations: FoM {min(medians):.0f} ... "
        f"{max(medians):.0f}, mixture {ensemble.mixture.fom_fiducial_median:.0f}, worst divergence "
        f"{ensemble.worst_divergence_nats:.3f} nats",
        f"augmentation moves a summary by {moved} sigma (rms) in {' and '.join(result.params)}",
        *(f"picture   {result.folder}/{name}.png" for name in ("fom", "calibration", "loss_curves", "tiles")),
        f"report    {result.folder}/report.html",
        f"all       {result.folder}/fom_result.json",
    ]
    if wide := result.recalibrated:
        fom = f"recalibrated {wide.fom_fiducial_median:.0f} +- {wide.fom_fiducial_median_err:.0f}"
        lines.insert(5, f"{fom}, with covariances {wide.scale:.2f} +- {wide.scale_err:.2f} times as large")
    print("\n".join(lines))


COMMAND = Command("npe", NPEConfig, "npe.stage.run_npe", report)
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
