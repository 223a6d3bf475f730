"""Pictures that look alike: a 64-bit fingerprint of each, and the pairs whose fingerprints hardly differ.

The fingerprint is the usual perceptual hash: grey, 32 x 32, cosine transform, and for each of the 64 slowest waves
whether it is stronger than their median. Saving anew, scaling or brightening turns a few bits at most.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

ALIKE = 4  # bits in which the fingerprints of two savings of one picture may differ

_SIDE, _WAVES = 32, 8
_FLAT = 2.0  # grey levels: a picture that spreads less has nothing to tell it by
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(_WAVES), np.arange(_SIDE) + 0.5))


def fingerprint(image: Image.Image) -> int | None:
    """The fingerprint of a picture; None for one without anything in it, such as a black frame."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    if grey.std() < _FLAT:
        return None
    waves = (_COSINES @ grey @ _COSINES.T).ravel()
    return int.from_bytes(np.packbits(waves > np.median(waves[1:])).tobytes(), "big")


def nearest(ours: Sequence[int | None], theirs: Sequence[int | None]) -> list[tuple[int, int, int]]:
    """For each of `theirs` the nearest of `ours`, if at most ALIKE bits away: (index of ours, of theirs, bits)."""
    known = [index for index, print_ in enumerate(ours) if print_ is not None]
    if not known:
        return []
    prints = np.array([ours[index] for index in known], np.uint64)
    pairs = []
    for index, print_ in enumerate(theirs):
        if print_ is None:
            continue
        bits = np.bitwise_count(prints ^ np.uint64(print_))
        if bits[best := int(bits.argmin())] <= ALIKE:
            pairs.append((known[best], index, int(bits[best])))
    return pairs
