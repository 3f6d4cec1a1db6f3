"""FomResult: the main product of this program, and all that it rests on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import NONE
from common.results import key, read_result
from data.audit import Audit
from data.schema import FOM_PARAMS
from npe.model import Posterior, posterior_of_moments

RESULT_NAME = "fom_result.json"


@dataclass(frozen=True)
class FiducialTiles:
    """The posteriors of the fiducial simulation's tiles."""

    sim_id: int = key("the fiducial simulation")
    theta: list[str] = key("names of the inferred parameters")
    theta_true: list[float] = key("their true values")
    mu: list[list[float]] = key("posterior mean of each tile")
    cov: list[list[list[float]]] = key("posterior covariance of each tile")
    fom_min: float = key("smallest FoM of the tiles")
    fom_max: float = key("largest FoM of the tiles")
    n_patches: int = key("distinct patches of sky among the tiles")
    fom_median_lo_16: float = key("16th percentile of the median, bootstrapped over patches")
    fom_median_hi_84: float = key("84th percentile of it")


@dataclass(frozen=True)
class NPETraining:
    """How the first member was trained."""

    epochs: int = key("epochs of the training, until the last member had stopped")
    best_epoch: int = key("epoch of the first member's best weights, from 0")
    best_test_nll: float = key("its loss on the test split then [nats, normalised theta]")
    stopped: str = key("what ended its training: `early stopping` or `max_epochs`")
    n_train_tiles: int = key("tiles that it learnt from")
    n_test_tiles: int = key("tiles of the test split")


@dataclass(frozen=True)
class Mixture:
    """The Gaussian with the moments of the members' mixture, tile by tile."""

    fom_fiducial_median: float = key("its median FoM")
    fom_fiducial_all: list[float] = key("its FoM of each tile")
    mu: list[list[float]] = key("its mean for each tile")
    cov: list[list[list[float]]] = key("its covariance for each tile")


@dataclass(frozen=True)
class Ensemble:
    """How far posteriors of the fiducial tiles differ that were learnt independently."""

    n_members: int = key("posteriors that are compared: the members of this run")
    fom_fiducial_medians: list[float] = key("median FoM of each")
    fom_learning_std: float | None = key(
        "**the learning error**: sample standard deviation of all but the first, which learnt from bootstrapped "
        "simulations; null for fewer than three members"
    )
    mixture: Mixture = key("the Gaussian with the moments of their mixture")
    worst_divergence_nats: float = key("largest mean KL divergence between two of them [nats]")


@dataclass(frozen=True)
class Calibration:
    """Is the posterior as wide as it should be? Every error is a bootstrap over simulations, whose tiles share theta.

    d2 is the squared Mahalanobis distance of the truth; chi^2 with one degree of freedom per parameter if calibrated.
    """

    tiles: str = key("the tiles that it was checked on")
    optimistic: bool = key("whether these tiles also stopped the training")
    verdict: str = key("`calibrated`, `over-confident` or `under-confident`: off by three errors or more")
    n_tiles: int = key("number of tiles")
    n_sims: int = key("number of their simulations")
    theta: list[str] = key("names of the parameters")
    z_mean: list[float] = key("mean of (mu - theta)/σ, per parameter; 0 if calibrated")
    z_mean_err: list[float] = key("its error")
    z_std: list[float] = key("scatter of (mu - theta)/σ, per parameter; 1 if calibrated")
    z_std_err: list[float] = key("its error")
    chi2_per_dof: float = key("mean squared Mahalanobis distance per parameter; 1 if calibrated, above 1 if too narrow")
    chi2_per_dof_err: float = key("its error")
    nll: float = key(
        "mean negative log-density of the true (Omega_m, S8), physical units [nats]: the lower, the more a tile tells; "
        "runs that are checked on the same tiles compare by it"
    )
    nll_err: float = key("its error")
    chi2_per_dof_of_fom: float = key("the same of (Omega_m, S8) alone, marginalised over other parameters")
    chi2_per_dof_of_fom_err: float = key("its error")
    fom_rescaled: float = key("the FoM if all covariances were chi2_per_dof_of_fom times as large")
    levels: list[float] = key("credibility levels of the coverage")
    coverage: list[float] = key("share of tiles whose truth lies inside the credible region of each level")
    coverage_lo_16: list[float] = key("16th percentile of the coverage")
    coverage_hi_84: list[float] = key("84th percentile of the coverage")


@dataclass(frozen=True)
class Recalibrated:
    """The fiducial posteriors with every covariance times one factor, which independent simulations ask for."""

    scale: float = key("the factor: `calibration.chi2_per_dof_of_fom`")
    scale_err: float = key("its error, bootstrapped over simulations")
    fom_fiducial_median: float = key("median FoM of the fiducial tiles then")
    fom_fiducial_median_err: float = key("its error from that of the scale alone")
    fom_fiducial_all: list[float] = key("FoM of each tile then")


@dataclass(frozen=True)
class Shift:
    """How far summaries move, per parameter, in units of each tile's posterior σ."""

    rms: list[float] = key("root mean square over tiles and draws, per parameter")
    mean: list[float] = key("mean over tiles and draws, per parameter")


@dataclass(frozen=True)
class CompressorUsed:
    """The compressor that stage 2 has used."""

    sha256: str = key("hash of its checkpoint")
    val_loss: float = key("its validation loss, of the kind in `config`: mean squared error or NLL")
    epoch: int = key("epoch of its weights")
    config: dict[str, Any] = key("every option of stage 1")


@dataclass(frozen=True)
class CurvePoint:
    """The runs of one lmax and nuisance, which differ in their seeds."""

    lmax: int = key("largest multipole")
    nuisance: str = key("nuisances of the survey that vary, or `none`")
    n_seeds: int = key("runs that succeeded")
    fom: float = key("mean over seeds of the median FoM")
    std_over_seeds: float | None = key("sample standard deviation over seeds; null for one seed")
    std_over_tiles: float | None = key("mean over seeds of the tile-to-tile scatter; null for one tile")
    chi2_per_dof_of_fom: float = key("mean over seeds of the calibration's chi2_per_dof_of_fom")
    fom_recalibrated: float | None = key("mean over seeds of the recalibrated FoM; null without --calibration-tiles")
    mixture_fom: float = key("median FoM of the mixture of the runs' posteriors, tile by tile")
    worst_divergence_nats: float = key("largest mean KL divergence between two runs [nats]")
    to_bare: float | None = key("mean over seeds of the FoM over the bare run's; null without such a run")
    to_bare_err: float | None = key("error of that mean from its scatter over seeds; null for one seed")
    recalibrated_to_bare: float | None = key("the same of the recalibrated FoMs; null without --calibration-tiles")
    recalibrated_to_bare_err: float | None = key("the same of its error")


@dataclass(frozen=True)
class SweepResult:
    """The content of fom_vs_lmax.json."""

    noise_level: str = key("shape noise of the tiles")
    curve: list[CurvePoint] = key("one entry per lmax and nuisance")
    points: list[dict[str, Any]] = key(
        "one entry per run: `lmax`, `nuisance`, `seed`, `tag`, FoMs and figures of the calibration; or `error`"
    )
    failed: list[str] = key("tags of the runs that failed")
    folder: str = key("folder of the sweep")
    versions: dict[str, str] = key("commit of this code, Python and the packages")


@dataclass(frozen=True)
class CurveFit:
    """The law floor + c N^-a of a figure that is learnt from N simulations, and what it says of twice as many."""

    floor: float = key("what it tends to with ever more simulations")
    c: float = key("c of floor + c N^-a; negative if it grows with N")
    a: float = key("a of it")
    a_lo_16: float = key("16th percentile of the exponents that the points allow")
    a_hi_84: float = key("84th percentile of them")
    at_largest: float = key("the law at the largest number of simulations")
    at_largest_err: float = key("its error")
    at_twice: float = key("at twice as many")
    at_twice_err: float = key("its error, over all exponents that the points allow")
    gain: float = key("at twice as many, less that at the largest")
    gain_err: float = key("its error, which is not that of two independent numbers")

    def at(self, n_sims: np.ndarray) -> np.ndarray:
        """The law at numbers of simulations (m,), (m,)."""
        return self.floor + self.c * n_sims**-self.a


@dataclass(frozen=True)
class LearningCurve:
    """How the figures of one lmax change with the number of simulations."""

    lmax: int = key("largest multipole")
    stages: str = key("`both stages`, or `stage 2 alone` with the compressor of the largest number")
    n_sims: list[int] = key("number of simulations of each run that succeeded, the fiducial one counted")
    nll_of_runs: list[float] = key("`calibration.nll` of each")
    fom_of_runs: list[float] = key("`fom_fiducial_median` of each")
    nll: CurveFit | None = key("fit to the NLL; null for fewer than four different numbers of simulations")
    fom: CurveFit | None = key("fit to the FoM: `floor`, `c` and `a` are those of ln FoM; null as well")


@dataclass(frozen=True)
class LearningCurves:
    """The content of learning_curve.json."""

    noise_level: str = key("shape noise of the tiles")
    curves: list[LearningCurve] = key("two for every lmax")
    points: list[dict[str, Any]] = key(
        "one entry per run: `lmax`, `seed`, `tag`, `n_sims` and `compressor_n_sims`, FoMs, `chi2_per_dof` and `nll` "
        "with `nll_err`; or `error`"
    )
    failed: list[str] = key("tags of the runs that failed")
    folder: str = key("folder of the sweep")
    versions: dict[str, str] = key("commit of this code, Python and the packages")


@dataclass(frozen=True)
class FomResult:
    """The content of fom_result.json."""

    lmax: int = key("largest multipole of the tiles")
    noise_level: str = key("shape noise of the tiles")
    fom_fiducial_median: float = key(
        "**the number**: median FoM of (Omega_m, S8) over the fiducial simulation's tiles, marginalised over the rest"
    )
    fom_fiducial_std: float | None = key("tile-to-tile scatter (sample standard deviation; null for one tile)")
    fom_fiducial_all: list[float] = key("FoM of each tile")
    fom_test_median: float = key("median FoM over the test split, whose cosmologies are spread over the prior")
    fom_test_lo_16: float = key("16th percentile of that median, bootstrapped over simulations")
    fom_test_hi_84: float = key("84th percentile of it")
    compressor_checkpoint: str = key("`{tag}/best.ckpt` of stage 1")
    nuisance: str = key("nuisances of the survey that the tiles vary, or `none`")
    nuisance_priors: dict[str, list[Any]] | None = key(
        "shape and two numbers of each nuisance's prior, as in a table of priors; null if the shards name none"
    )
    fiducial: FiducialTiles = key("the posteriors of the fiducial tiles")
    npe: NPETraining = key("the training")
    ensemble: Ensemble = key("the members, see [the FoM's error](calibration.md#the-foms-error)")
    calibration: Calibration = key("is the posterior as wide as it should be? See [calibration](calibration.md)")
    recalibrated: Recalibrated | None = key("the fiducial posteriors as wide as --calibration-tiles ask; null without")
    augmentation_shift_in_sigma: dict[str, Shift] = key(
        "how far `turns` and flips, `rolls`, and both (`all`) move the summaries of the test split"
    )
    audit: Audit = key("what stage 1's splits share, and more, see [leakage](leakage.md)")
    compressor: CompressorUsed = key("the compressor")
    reference_sha256: str = key("hash of reference.npz")
    manifest_sha256: str = key("hash of split_manifest.json")
    fingerprints: dict[str, str | None] = key("SHA-256 of `tiles`, `noiseless_tiles`, `calibration_tiles`, or null")
    folder: str = key("folder of the run")
    elapsed_s: float = key("seconds of training, over all interruptions")
    device: str = key("hardware")
    precision: str = key("of the compressor's arithmetic: float32 or bfloat16")
    versions: dict[str, str] = key("`commit` of this code (`+changes` if a tracked file differs), Python, packages")
    config: dict[str, Any] = key("every option")

    @property
    def tiles_in_words(self) -> str:
        """What the tiles are, as titles say it."""
        nuisances = "" if self.nuisance == NONE else f", nuisances {self.nuisance}"
        return f"lmax {self.lmax}, {self.noise_level}{nuisances}"

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the inferred parameters."""
        return tuple(self.fiducial.theta)

    @property
    def posterior(self) -> Posterior:
        """Of the fiducial tiles."""
        posterior = posterior_of_moments(self.params, np.array(self.fiducial.mu), np.array(self.fiducial.cov))
        two = len(self.params) == len(FOM_PARAMS)  # then the FoM is the inverse volume, as it was before rounding
        return replace(posterior, inverse_volume=np.array(self.fom_fiducial_all)) if two else posterior


def read_fom_result(folder: Path) -> FomResult:
    """The result of a stage-2 run; UserError if there is none, it was changed, or another version wrote it."""
    return read_result(folder / RESULT_NAME, FomResult, "stage 2")
