"""Captions that are held out: new as combinations, but of known words."""

from __future__ import annotations

import numpy as np
import pytest

from tinydiff import data
from tinydiff.data.held_out import hold_out
from tinydiff.models.text import split


def test_held_out_captions_are_new_but_their_words_are_known():
    captions = data.glyphs(4000, 3, cache=False).captions
    held = hold_out(captions, 0.1)
    out, kept = ({caption for caption, h in zip(captions, held) if h == which} for which in (True, False))
    assert not out & kept and len(out) >= 0.1 * len(out | kept)
    assert {word for caption in out for word in split(caption)} <= {word for caption in kept for word in split(caption)}
    assert np.array_equal(held[:1000], hold_out(captions, 0.1)[:1000])
    assert not np.array_equal(held, hold_out(captions, 0.1, seed=1))


def test_captions_whose_words_occur_once_cannot_be_held_out():
    with pytest.raises(ValueError, match="1 of 2 captions were to be held out, but only 0 have no word of their own"):
        hold_out(["one", "two"], 0.5)
