"""What is kept out of training: a share of the pictures, to measure the loss; or all pictures of some captions, to see
whether a model understands combinations of words that it has never seen together.

Both are functions of the names and a seed. No counter and no order comes in, so what was held out yesterday is not in
the training set of today because a picture was added.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from ..arguments import integer, number


def validation_mask(names: Sequence[str], share: float, seed: int = 0) -> np.ndarray:
    """Which of the names belong to the validation set, bool (N,): about `share` of them.

    A name is in it if its hash, as a number in [0, 1), is less than `share`. So another name changes nothing, and a
    larger share only adds names.
    Errors: ValueError for a share outside (0, 1), a seed that is no integer of 0 or more, or if one part were empty.
    """
    share, seed = number("the share for validation", share, "(0, 1)"), integer("seed", seed, 0)
    mask = np.array([_place(name, seed) for name in names], np.uint64) < share * 2**64
    if mask.all() or not mask.any():
        part = "training" if mask.all() else "validation"
        raise ValueError(
            f"of {len(mask)} pictures none is left for {part}, with share {share} and seed {seed}: take another share "
            "or another seed, or more pictures"
        )
    return mask


def hold_out(captions: Sequence[str], share: float = 0.1, seed: int = 0) -> np.ndarray:
    """Which samples to hold out so that whole captions are new, though each of their words is known: bool (N,).

        held = hold_out(data.captions, 0.1)
        train on data.images[~held], then compare the loss, or the pictures, for the captions in held

    Of the distinct captions at least `share` are held out, with all their samples, and every word of a held-out caption
    occurs in one that is kept. Captions that differ only in capitals and punctuation are one; the empty caption is
    always kept.
    Errors: ValueError for a share outside (0, 1), a seed that is no integer of 0 or more, or if not enough captions
    are found whose words all occur elsewhere.
    """
    share, seed = number("the share to hold out", share, "(0, 1)"), integer("seed", seed, 0)
    keys = [tuple(re.findall(r"\w+", caption.casefold())) for caption in captions]
    order = sorted(set(keys) - {()}, key=lambda words: (_place(" ".join(words), seed), words))
    wanted = math.ceil(share * len(order))
    kept = _covering(order)
    free = [words for words in order if words not in kept]
    if not order or len(free) < wanted:
        raise ValueError(
            f"{wanted or 'some'} of {len(order)} captions were to be held out, but only {len(free)} have no word of "
            "their own, one that must be kept to be known: take a smaller share"
        )
    held = set(free[:wanted])
    return np.array([words in held for words in keys])


def _covering(captions: list[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """A few of the captions that have all the words: again and again the one with most of those that are missing (the
    greedy cover; to find the smallest is NP-hard). Ties go to the first."""
    # A caption can only lose missing words, so an old count is an upper bound: only the top of the heap is recounted.
    heap = [(-len(set(words)), i) for i, words in enumerate(captions)]
    heapq.heapify(heap)
    known: set[str] = set()
    chosen = set()
    while heap:
        bound, i = heapq.heappop(heap)
        missing = len(set(captions[i]) - known)
        if missing == -bound:
            known.update(captions[i])
            chosen.add(captions[i])
        elif missing:
            heapq.heappush(heap, (-missing, i))
    return chosen


def _place(name: str, seed: int) -> int:
    """A hash of 64 bits, the same on every machine."""
    # Some file systems take letters with accents apart. A name on disk need not even be text, but backslashreplace has
    # bytes for whatever Python made of it.
    text = unicodedata.normalize("NFC", f"{seed}/{name}").encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
