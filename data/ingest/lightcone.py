"""The shells of one simulated lightcone, read one after another and projected to convergence.

A simulation is a folder, or a tar file (compressed or not) that is read as a stream and never unpacked. It contains
z_values.txt, a file run.NNNNN.lightcone.npy for the shell of step NNNNN (particle counts per pixel, RING), and for some
shells run.NNNNN.incomplete.npy, which says that the box did not cover the whole sky: such a shell is left out.
"""

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np

from common.errors import UserError
from data.ingest.born import Shells, born_weights, check_reach, parse_shells, sources_inside, weights_with
from data.nuisance import Nuisance, PriorsTooWideError
from data.schema import PARAM_NAMES

Z_VALUES = "z_values.txt"
SHELL = re.compile(r"run\.(\d+)\.(lightcone|incomplete)\.npy")
CHUNK = 1 << 20  # pixels at a time
MAGIC: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
MAX_LOST_SHARE = 0.01  # of a bin's lensing weight or sources, in incomplete shells
IRRELEVANT_SHARE = 1e-6  # of them, below which a shell may be missing
DENSITY_TOLERANCE = 0.1  # relative, of a shell's mean density against the others'
DENSITY_CHECKED_FROM = 500.0  # [Mpc/h]; the density of nearer, smaller shells varies naturally
DAMAGES = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, ValueError)


class BadSimulationError(UserError):
    """A simulation cannot be used; the others can."""


class _TooLate(Exception):
    """A tar file has something after its shells that is needed before them."""


def project_lightcone(
    source: Path, params: np.ndarray, z: np.ndarray, nz: np.ndarray, nuisances: Sequence[Nuisance] = ()
) -> tuple[np.ndarray, list[int]]:
    """Convergence in every bin from the shells of one simulation, with params (8,), in a folder or tar file.

    Every shell is read once. Takes the memory of all maps and one shell, in float32. z, nz are those of read_nz.

    Returns:
        kappa, float32 in RING order, with mean zero: of lensing (n_bins, 12 nside^2), and then as many maps with each
        of the nuisances, whose shear bias is left to the caller; and the steps left out as incomplete.

    Raises:
        BadSimulationError: something is missing, damaged or inconsistent: names the file.
        PriorsTooWideError: a shift moves sources to where there are no shells.
    """
    projection = _Projection(source, params, z, nz, nuisances)
    try:
        if source.is_dir():
            projection.learn(_files(source))
            projection.add_all(_files(source))
        else:
            try:
                projection.add_all(_files(source))
            except _TooLate:
                projection = _Projection(source, params, z, nz, nuisances)
                projection.learn(_files(source))
                projection.add_all(_files(source))
        return projection.finish()
    except (BadSimulationError, PriorsTooWideError):
        raise
    except UserError as error:
        raise BadSimulationError(str(error)) from None
    except DAMAGES as error:
        raise BadSimulationError(f"{source} is truncated or damaged ({reason_of(error)}); download it again") from None


def reason_of(error: Exception) -> str:
    """What a library says of a file, short enough for our message."""
    return (str(error) or type(error).__name__).splitlines()[0][:160]


class _Projection:
    """Adds up shells in whatever order they come."""

    def __init__(
        self, source: Path, params: np.ndarray, z: np.ndarray, nz: np.ndarray, nuisances: Sequence[Nuisance]
    ) -> None:
        self.source, self.params, self.z, self.nz, self.nuisances = source, params, z, nz, nuisances
        self.shells: Shells | None = None
        self.weights = np.empty((len(nz), 0))  # (n_maps, n_shells)
        self.share = np.empty((len(nz), 0))  # of each bin's weight in a shell; if there are alignments, of its sources
        self.density: dict[int, float] = {}  # by step: particles per (Mpc/h)^3
        self.incomplete: set[int] = set()
        self.kappa = np.empty((len(nz), 0), dtype=np.float32)
        self.knows_all = False

    def learn(self, files: Iterator[tuple[str, IO[bytes]]]) -> None:
        """Read everything but the shells, before any shell is added."""
        for name, file in files:
            self._notice(name, file)
        self.knows_all = True

    def _notice(self, name: str, file: IO[bytes]) -> int | None:
        """The step of a shell's counts; any other file is read, and None returned."""
        if name == Z_VALUES and self.shells is None:
            text = file.read().decode(errors="replace")
            self.shells = parse_shells(text, f"{self.source}/{Z_VALUES}", self.params)
            omega_m, w = (float(self.params[PARAM_NAMES.index(name)]) for name in ("Omega_m", "w"))
            sources = self.shells, self.z, self.nz, omega_m
            check_reach(self.shells, self.z, self.nz)
            lensing = born_weights(*sources)
            self.weights = np.concatenate([lensing, *(weights_with(n, *sources, w) for n in self.nuisances)])
            self.share = lensing / lensing.sum(axis=1, keepdims=True)
            # The same for every draw, which must not decide whether a simulation is used.
            if any(nuisance.a_ia for nuisance in self.nuisances):
                self.share = np.concatenate([self.share, sources_inside(self.shells, self.z, self.nz)])
        if (match := SHELL.fullmatch(name)) is None:
            return None
        step = int(match[1])
        if match[2] == "incomplete":
            self.incomplete.add(step)
            if step in self.density:
                raise _TooLate
            return None
        return step

    def add_all(self, files: Iterator[tuple[str, IO[bytes]]]) -> None:
        """Add every complete shell that has weight in a map."""
        for name, file in files:
            step = self._notice(name, file)
            if step is None or step in self.incomplete:
                continue
            if self.shells is None:
                if self.knows_all:
                    raise BadSimulationError(f"{self.source} has no {Z_VALUES}; download it again")
                raise _TooLate
            if step not in self.shells.step:
                raise BadSimulationError(f"{self.source}/{name}: {Z_VALUES} has no step {step}; download it again")
            if step in self.density:
                raise BadSimulationError(f"{self.source}/{name} is in it twice; download it again")
            k = int(np.argmax(self.shells.step == step))
            if self.weights[:, k].any():
                self._add(k, name, file)

    def _add(self, k: int, name: str, file: IO[bytes]) -> None:
        assert self.shells is not None
        counts = read_counts(file, f"{self.source}/{name}")
        if self.kappa.shape[1] == 0:
            self.kappa = np.zeros((len(self.weights), len(counts)), dtype=np.float32)
        if len(counts) != self.kappa.shape[1]:
            n_pixels = f"{len(counts)} pixels, the shells before it {self.kappa.shape[1]}"
            raise BadSimulationError(f"{self.source}/{name} has {n_pixels}; download it again")
        total = counts.sum(dtype=np.float64)
        if not (np.isfinite(total) and total > 0 and counts.min() >= 0):
            raise BadSimulationError(f"{self.source}/{name} has no particles, or negative ones; download it again")
        self.density[int(self.shells.step[k])] = total / self.shells.volume[k]
        mean, weight = total / len(counts), self.weights[:, k].astype(np.float32)
        for start in range(0, len(counts), CHUNK):  # so that the pixels stay in the processor's cache
            chunk = slice(start, start + CHUNK)
            delta = counts[chunk] * np.float32(1 / mean) - np.float32(1)  # (CHUNK,)
            for bin_kappa, of_bin in zip(self.kappa, weight, strict=True):
                bin_kappa[chunk] += of_bin * delta

    def finish(self) -> tuple[np.ndarray, list[int]]:
        """The sum, after checking that it is complete."""
        if self.shells is None:
            raise BadSimulationError(f"{self.source} has no {Z_VALUES}; download it again")
        step = self.shells.step
        absent = ~np.isin(step, list(self.density))
        marked = np.isin(step, list(self.incomplete))
        share = self.share.max(axis=0)  # (n_shells,)
        if (gone := absent & ~marked & (share > IRRELEVANT_SHARE)).any():
            name = f"run.{step[gone][0]:05d}.lightcone.npy"
            raise BadSimulationError(f"{self.source} lacks {name} ({gone.sum()} missing in all); download it again")
        if (lost := self.share[:, absent].sum(axis=1).max()) > MAX_LOST_SHARE:
            names = ", ".join(map(str, sorted(step[absent & (share > IRRELEVANT_SHARE)])))
            raise BadSimulationError(
                f"{self.source}: the incomplete shells (steps {names}) carry {100 * lost:.1f} % of a bin's lensing "
                "weight, or of its sources; give nearer sources as --nz, or exclude it with --sims"
            )
        self._compare_densities()
        return self.kappa, sorted(int(s) for s in step[marked & (share > IRRELEVANT_SHARE)])

    def _compare_densities(self) -> None:
        """Raise BadSimulationError if a shell's density differs from the rest: its counts belong to another shell."""
        assert self.shells is not None
        far = [int(s) for s in self.shells.step[self.shells.chi_near > DENSITY_CHECKED_FROM] if s in self.density]
        if not far:
            return
        usual = float(np.median([self.density[s] for s in far]))
        worst = max(far, key=lambda s: abs(self.density[s] / usual - 1))
        if abs(self.density[worst] / usual - 1) > DENSITY_TOLERANCE:
            raise BadSimulationError(
                f"{self.source}/run.{worst:05d}.lightcone.npy has {self.density[worst] / usual:.2f} times the density "
                f"of the others; it belongs to another step, or {Z_VALUES} to another simulation"
            )


def _files(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names, without folders, and open files of a simulation."""
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.is_file():
                with open(path, "rb") as file:
                    yield path.name, file
        return
    with _decompressed(source) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as archive:  # nothing is unpacked, nothing is read twice
            for member in archive:
                opened = archive.extractfile(member)
                if opened is not None:
                    yield PurePosixPath(member.name).name, opened
        while stream.read(CHUNK):  # to the end, where the checksum is
            pass


def _decompressed(source: Path) -> IO[bytes]:
    """A file, opened through its decompressor if it is compressed."""
    with open(source, "rb") as file:
        start = file.read(max(map(len, MAGIC)))
    for magic, opener in MAGIC.items():
        if start.startswith(magic):
            return cast(IO[bytes], opener(source))
    return open(source, "rb")


def read_counts(file: IO[bytes], name: str) -> np.ndarray:
    """Counts of one shell, float32 (12 nside^2), from an npy file that is read as a stream.

    Raises:
        BadSimulationError: the file is not a HEALPix map in npy format, or ends too early.
    """
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        n_pixels = int(np.prod(shape))
        nside = round((n_pixels / 12) ** 0.5)
        if dtype.kind not in "iuf" or 12 * nside**2 != n_pixels or nside & (nside - 1) or n_pixels != max(shape):
            raise ValueError(f"{dtype} {shape} is not a HEALPix map")
        counts = np.empty(n_pixels, dtype=np.float32)
        for start in range(0, n_pixels, CHUNK):
            n = min(CHUNK, n_pixels - start)
            content = file.read(n * dtype.itemsize)
            if len(content) < n * dtype.itemsize:
                raise ValueError(f"ends after {start + len(content) // dtype.itemsize} of {n_pixels} pixels")
            counts[start : start + n] = np.frombuffer(content, dtype=dtype)
        if file.read(1):
            raise ValueError(f"has more than {n_pixels} pixels")
    except DAMAGES as error:
        raise BadSimulationError(f"{name} is truncated or damaged ({reason_of(error)}); download it again") from None
    return counts
