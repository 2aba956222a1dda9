"""A shuffle of any length that is never stored: where one place lands is worked out from the place and the seed alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDS = 7  # four make it indistinguishable for a perfect round function (Luby & Rackoff 1988); ours is a hash, and small domains need more
Places = npt.NDArray[np.int64]


def shuffled(places: Places, count: int, seed: int, epoch: int) -> Places:
    """Where each of `places` (0 to `count` - 1) lands in the shuffle of `count` that `seed` and `epoch` name: a permutation.

    A Feistel network permutes the numbers of 2n bits (Luby & Rackoff 1988); what lands at `count` or beyond is sent through
    again until it does not (cycle walking: Black & Rogaway 2002, section 3), at most four times on average.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    landed = _permuted(places.astype(np.uint64), half, keys)
    while (beyond := landed >= count).any():
        landed[beyond] = _permuted(landed[beyond], half, keys)
    return landed.astype(np.int64)


def _permuted(numbers: npt.NDArray[np.uint64], half: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers of 2 x `half` bits, permuted: each round adds a hash of one half to the other, which the reverse would take away again."""
    bits, mask, rest = np.uint64(half), np.uint64((1 << half) - 1), np.uint64(64 - half)
    left, right = numbers >> bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_hash(right ^ key) >> rest)
    return (left << bits) | right


def _hash(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """MurmurHash3's 64-bit finaliser (Appleby 2011)."""
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        numbers = (numbers ^ (numbers >> np.uint64(33))) * factor
    return numbers ^ (numbers >> np.uint64(33))
