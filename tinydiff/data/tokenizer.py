"""Captions as numbers, a number for each word.

    tokenizer = Tokenizer.of(["a bold seven", "a small serif three"])
    tokenizer.encode("a bold three")                  [[1, 2, 3, 7, 0]]

Token 0 is padding, and token 1 the start, with which every row begins, so that there is something to attend to in the
prompt "" too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..arguments import integer
from ..backend import to_host
from ..operators import array_of

PADDING, START = 0, 1  # the tokens that are no words


class Tokenizer:
    """Words and marks of punctuation as numbers, and back. Capitals do not count.

    words: the vocabulary; word i is token i + 2. length: of every row of tokens, that of the longest caption and the
    start. Errors: ValueError for a vocabulary with a word twice, or a length below 2.
    """

    def __init__(self, words: Sequence[str], length: int):
        self.words, self.length = list(words), integer("Tokenizer: length", length, 2)
        self._tokens = {word: i + START + 1 for i, word in enumerate(self.words)}
        if len(self._tokens) != len(self.words):
            raise ValueError("Tokenizer: a word stands in the vocabulary twice")

    @classmethod
    def of(cls, captions: Iterable[str]) -> Tokenizer:
        """The tokenizer for all words of these captions. Errors: ValueError if they have no words."""
        rows = [split(caption) for caption in captions]
        words = sorted({word for row in rows for word in row})
        if not words:
            raise ValueError("Tokenizer: the captions have no words")
        return cls(words, max(map(len, rows)) + 1)

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.words) + START + 1

    def encode(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Tokens, int64 (N, length): the start, the words, padding.

        Errors: ValueError for a word that is not in the vocabulary, with the known ones that are nearest to it, and for
        a prompt that is too long.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = np.full((len(prompts), self.length), PADDING, np.int64)
        rows[:, 0] = START
        for row, prompt in zip(rows, prompts):
            words = split(prompt)
            if unknown := [word for word in words if word not in self._tokens]:
                near = difflib.get_close_matches(unknown[0], self.words, 3, cutoff=0.5)
                known = f"the nearest known words are {', '.join(near)}" if near else self._some_words()
                raise ValueError(f"the word {unknown[0]!r} of the prompt {prompt!r} is unknown: {known}")
            if len(words) >= self.length:
                raise ValueError(f"the prompt {prompt!r} has {len(words)} words, but at most {self.length - 1} fit")
            row[1 : len(words) + 1] = [self._tokens[word] for word in words]
        return rows

    def _some_words(self) -> str:
        shown = ", ".join(self.words[:20])
        return f"the known words are {shown}{', ...' if len(self.words) > 20 else ''}"

    def decode(self, tokens: Any) -> list[str]:
        """Tokens (N, L) as prompts, a space between any two words."""
        rows = to_host(array_of(tokens))
        return [" ".join(self.words[t - START - 1] for t in row if t > START) for row in rows]

    # ---- as a part of a checkpoint

    def to_bytes(self) -> np.ndarray:
        """The vocabulary as uint8: the length, then the words, a line each."""
        return np.frombuffer("\n".join([str(self.length), *self.words]).encode(), np.uint8).copy()

    @classmethod
    def from_bytes(cls, data: Any) -> Tokenizer:
        """The inverse. Errors: ValueError for other bytes."""
        length, *words = bytes(to_host(array_of(data))).decode().split("\n")
        return cls(words, int(length))


def split(caption: str) -> list[str]:
    """The words and marks of punctuation of a caption, in small letters."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())
