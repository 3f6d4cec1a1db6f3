"""Augmentation against torch's own flips, turns and rolls, and its statistics."""

from __future__ import annotations

import itertools

import pytest
import torch

from data.augment import Symmetries, draw_symmetries, gather_augmented

N, SIDE = 5, 6


@pytest.fixture
def store() -> torch.Tensor:
    return torch.randn(N, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(
        memory_format=torch.channels_last
    )


def by_torch(tile: torch.Tensor, transpose: int, flip_rows: int, flip_cols: int, roll: tuple[int, int]) -> torch.Tensor:
    """The same transformation of one tile (4, N, N), step by step: roll, flip, transpose."""
    tile = torch.roll(tile, (-roll[0], -roll[1]), dims=(1, 2))
    tile = torch.flip(tile, [d for d, on in ((1, flip_rows), (2, flip_cols)) if on])
    return tile.mT if transpose else tile


def test_one_gather_equals_roll_flip_transpose_per_tile(store: torch.Tensor) -> None:
    cases = list(itertools.product((0, 1), (0, 1), (0, 1), range(SIDE), range(SIDE)))
    rows = torch.arange(len(cases)) % N
    symmetries = Symmetries(*torch.tensor(cases).T)
    out = gather_augmented(store, rows, symmetries)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for tile, row, (t, fr, fc, r, c) in zip(out, rows, cases, strict=True):
        assert torch.equal(tile, by_torch(store[row], t, fr, fc, (r, c)))


def test_the_eight_symmetries_are_the_quarter_turns_and_their_mirror_images(store: torch.Tensor) -> None:
    cases = torch.tensor([(*bits, 0, 0) for bits in itertools.product((0, 1), repeat=3)])
    ours = gather_augmented(store, torch.zeros(8, dtype=torch.long), Symmetries(*cases.T))
    turned = [torch.rot90(tile, k, dims=(1, 2)) for tile in (store[0], store[0].flip(2)) for k in range(4)]
    for expected in turned:
        assert sum(torch.equal(expected, tile) for tile in ours) == 1


def test_draws_are_uniform_and_independent_per_tile() -> None:
    n = 40_000
    s = draw_symmetries(n, SIDE, torch.Generator().manual_seed(1))
    joint = (s.transpose * 2 + s.flip_rows) * 2 + s.flip_cols
    for values, size in (
        (joint, 8),
        (s.roll_rows * SIDE + s.roll_cols, SIDE**2),
        (joint * SIDE + s.roll_rows, 8 * SIDE),
    ):
        counts = torch.bincount(values, minlength=size).double()
        chi2 = float(((counts - n / size) ** 2 / (n / size)).sum())
        assert chi2 < size + 5 * (2 * size) ** 0.5  # five sigma above its mean


def test_kinds_can_be_left_out() -> None:
    generator = torch.Generator().manual_seed(1)
    only_rolls = draw_symmetries(100, SIDE, generator, turns=False)
    only_turns = draw_symmetries(100, SIDE, generator, rolls=False)
    assert only_rolls.transpose.sum() == only_rolls.flip_rows.sum() == only_rolls.flip_cols.sum() == 0
    assert only_rolls.roll_rows.sum() > 0
    assert only_turns.roll_rows.sum() == only_turns.roll_cols.sum() == 0
    assert only_turns.transpose.sum() > 0


def test_same_seed_same_tiles(store: torch.Tensor) -> None:
    rows = torch.tensor([0, 3, 3, 1])
    one, two, other = (
        gather_augmented(store, rows, draw_symmetries(4, SIDE, torch.Generator().manual_seed(seed)))
        for seed in (7, 7, 8)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one[1], one[2])  # the same tile twice in a batch is drawn twice
