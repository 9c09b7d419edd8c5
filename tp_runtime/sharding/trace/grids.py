"""Grids of labels as plain integers: which dims they change along, and which labels meet at one place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHARED = 1 << 60  # flag of a label whose part is copied to several ranks
KEY_LIMIT = 1 << 62  # pairs below it are told apart by one number


def preferred(labels: Tensor) -> Tensor:
    """Keys whose maximum prefers plain labels to SHARED ones and either to 0."""
    plain = (labels > 0) & (labels < SHARED)
    return torch.where(plain, labels | SHARED, torch.where(labels >= SHARED, labels & ~SHARED, 0))


def restore(keys: Tensor) -> Tensor:
    """The labels behind such keys."""
    return torch.where(keys >= SHARED, keys & ~SHARED, torch.where(keys > 0, keys | SHARED, 0))


def _constant(grid: Tensor, dim: int) -> bool:
    """Whether a grid does not change along a dim. Most that do differ at its ends, which is cheap to see."""
    if grid.shape[dim] <= 1 or grid.stride(dim) == 0:
        return True
    if not torch.equal(grid.select(dim, 0), grid.select(dim, -1)):
        return False
    return bool((grid == grid.narrow(dim, 0, 1)).all())


def squeeze_constant(grids: list[Tensor]) -> list[Tensor]:
    """Label grids of one shape without the indices along which none of them changes."""
    for dim in range(grids[0].dim()):
        if grids[0].shape[dim] > 1 and all(_constant(g, dim) for g in grids):
            grids = [g.narrow(dim, 0, 1) for g in grids]
    return grids


def squeeze_each(grids: list[Tensor], dims: int) -> list[Tensor]:
    """Label grids that broadcast to `dims` dimensions, without indices along which none of them changes."""
    grids = [g.reshape((1,) * (dims - g.dim()) + tuple(g.shape)) if g.dim() < dims else g for g in grids]
    for dim in range(dims):
        if any(g.shape[dim] > 1 for g in grids) and all(_constant(g, dim) for g in grids):
            grids = [g.narrow(dim, 0, 1) for g in grids]
    return grids


def pair_up(a: Tensor, b: Tensor, same: bool = False) -> np.ndarray:
    """[n, 2]: the distinct pairs of positive labels at the same place; equal ones only if `same`."""
    a, b = torch.broadcast_tensors(a, b)
    a, b = squeeze_constant([a, b])
    keep = (a > 0) & (b > 0)
    if not same:
        keep &= a != b
    if not bool(keep.any()):
        return np.zeros((0, 2), dtype=np.int64)
    first, second = a[keep].numpy(), b[keep].numpy()
    if len(first) <= 64:
        return np.stack([first, second], 1)
    base = int(second.max()) + 1
    if int(first.max()) < KEY_LIMIT // base:
        keys = np.unique(first * base + second)
        return np.stack([keys // base, keys % base], 1)
    return unique_pairs(first, second)[0]


def unique_pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([n, 2] distinct pairs (a[i], b[i]), which of them each i is)."""
    base = int(b.max()) + 1 if len(b) else 1
    if len(a) and int(a.min()) >= 0 and int(b.min()) >= 0 and int(a.max()) < KEY_LIMIT // base:
        keys, inverse = np.unique(a * base + b, return_inverse=True)
        return np.stack([keys // base, keys % base], 1), inverse.reshape(-1)
    low, place_a = np.unique(a, return_inverse=True)
    high, place_b = np.unique(b, return_inverse=True)
    keys, inverse = np.unique(place_a * len(high) + place_b, return_inverse=True)
    return np.stack([low[keys // max(len(high), 1)], high[keys % max(len(high), 1)]], 1), inverse.reshape(-1)
