"""Augmentation: quarter turns, flips and circular rolls, one draw per tile, a whole batch in one gather.

Every symmetry of a square followed by a roll reads pixel (i, j) of the new tile from a pixel of the
old one whose row depends on i alone and whose column on j alone, or the other way round. So its
place in memory is a(i) + b(j): one broadcast sum gives all indices of a batch, one gather all tiles.

A HEALPix face is not periodic and its turns are not exact isometries of the sphere, so these are
approximate symmetries: stage 2 reports how far they move the summaries.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Symmetries:
    """One transformation per tile, each attribute an int64 tensor (n,).

    New tile [i, j] = old tile [r(i), c(j)], or [r(j), c(i)] where `transpose` is 1, with
    r(i) = (i or N-1-i where `flip_rows` is 1) + roll_rows modulo N, and c likewise.
    Transpose and the two flips make the eight symmetries of the square.
    """

    transpose: torch.Tensor
    flip_rows: torch.Tensor
    flip_cols: torch.Tensor
    roll_rows: torch.Tensor
    roll_cols: torch.Tensor

    def __getitem__(self, some: slice) -> "Symmetries":
        """Those of some tiles."""
        return Symmetries(*(of_all[some] for of_all in vars(self).values()))


def draw_symmetries(
    n_tiles: int, nside: int, generator: torch.Generator, *, turns: bool = True, rolls: bool = True
) -> Symmetries:
    """Draw uniformly from the eight symmetries (`turns`) and from all rolls (`rolls`), independently per tile."""
    bits = torch.randint(2 if turns else 1, (3, n_tiles), generator=generator)
    shifts = torch.randint(nside if rolls else 1, (2, n_tiles), generator=generator)
    return Symmetries(*bits, *shifts)


def gather_augmented(store: torch.Tensor, rows: torch.Tensor, symmetries: Symmetries) -> torch.Tensor:
    """Pick tiles out of a store and transform each in the same pass.

    Args:
        store: (n, bins, N, N), channels_last in memory (otherwise this copies the whole store).
        rows: int64 (B,), which tiles.
        symmetries: one per picked tile.

    Returns:
        (B, bins, N, N), channels_last, on the store's device.
    """
    n, n_bins, nside, _ = store.shape
    rows, transpose, flip_rows, flip_cols, roll_rows, roll_cols = (
        t.to(store.device)[:, None]  # (B, 1)
        for t in (rows, *(getattr(symmetries, f) for f in Symmetries.__dataclass_fields__))
    )
    pixel = torch.arange(nside, device=store.device)[None, :]  # (1, N)
    source_row = (torch.where(flip_rows == 1, nside - 1 - pixel, pixel) + roll_rows) % nside  # (B, N)
    source_col = (torch.where(flip_cols == 1, nside - 1 - pixel, pixel) + roll_cols) % nside  # (B, N)
    row_part = source_row * nside
    of_i = torch.where(transpose == 1, source_col, row_part) + rows * nside**2  # (B, N)
    of_j = torch.where(transpose == 1, row_part, source_col)  # (B, N)
    place = (of_i[:, :, None] + of_j[:, None, :]).reshape(-1)  # (B * N * N,)
    pixels = store.permute(0, 2, 3, 1).reshape(n * nside**2, n_bins)  # (n * N * N, bins), a view
    picked = pixels.index_select(0, place).reshape(-1, nside, nside, n_bins)  # (B, N, N, bins)
    return picked.permute(0, 3, 1, 2)  # (B, bins, N, N), channels_last
