"""Words as tokens and back, and what is said of prompts that cannot be read; captions that are held out."""

from __future__ import annotations

import numpy as np
import pytest

from tinydiff import data
from tinydiff.data.held_out import hold_out
from tinydiff.data.tokenizer import PADDING, START, Tokenizer, split

CAPTIONS = ["a small seven, leaning left", "A bold Seven", "two"]


def test_tokens_and_back():
    tokenizer = Tokenizer.of(CAPTIONS)
    assert tokenizer.words == [",", "a", "bold", "leaning", "left", "seven", "small", "two"]
    assert len(tokenizer) == 10 and tokenizer.length == 7  # the longest has five words and a comma; and the start
    tokens = tokenizer.encode(CAPTIONS)
    assert tokens.dtype == np.int64 and tokens.tolist() == [
        [START, 3, 8, 7, 2, 5, 6],
        [START, 3, 4, 7, PADDING, PADDING, PADDING],
        [START, 9, PADDING, PADDING, PADDING, PADDING, PADDING],
    ]
    assert tokenizer.decode(tokens) == ["a small seven , leaning left", "a bold seven", "two"]


def test_the_null_prompt_is_the_start_alone():
    tokenizer = Tokenizer.of(CAPTIONS)
    assert tokenizer.encode("").tolist() == tokenizer.encode([" "]).tolist() == [[START] + 6 * [PADDING]]
    assert tokenizer.decode(tokenizer.encode("")) == [""]


def test_the_vocabulary_as_bytes_and_back():
    tokenizer = Tokenizer.of(["öl über zwei, 8 äpfel", "8"])
    again = Tokenizer.from_bytes(tokenizer.to_bytes())
    assert (again.words, again.length) == (tokenizer.words, tokenizer.length)
    assert np.array_equal(again.encode("über zwei äpfel"), tokenizer.encode("über zwei äpfel"))


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a bald seven", "the word 'bald' of the prompt 'a bald seven' is unknown: the nearest known words are bold"),
        ("xyz", "the word 'xyz' of the prompt 'xyz' is unknown: the known words are ,, a, bold, leaning, left"),
        ("a a a a a a a", "the prompt 'a a a a a a a' has 7 words, but at most 6 fit"),
    ],
)
def test_prompts_that_cannot_be_read(prompt, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.of(CAPTIONS).encode(["two", prompt])


def test_vocabularies_that_are_none():
    with pytest.raises(ValueError, match="the captions have no words"):
        Tokenizer.of(["", " "])
    with pytest.raises(ValueError, match="a word stands in the vocabulary twice"):
        Tokenizer(["a", "b", "a"], 4)
    with pytest.raises(ValueError, match="length must be an integer of 2 or more, not 1"):
        Tokenizer(["a"], 1)


def test_every_caption_of_the_glyphs_can_be_read():
    captions = data.glyphs(500, 3, cache=False).captions
    tokenizer = Tokenizer.of(captions)
    assert [" ".join(split(caption)) for caption in captions] == tokenizer.decode(tokenizer.encode(captions))


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
