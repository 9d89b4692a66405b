"""CLIP's tokenizer: a prompt as 77 numbers, by byte-pair encoding.

    "a lighthouse!" -> a | light house | !        the words, in lower case, then the longest pieces that have a number

Each word starts as its bytes, the last of them marked as the end of a word. Then the two neighbours whose pair comes
first in the list of merges become one piece, again and again until no pair is in the list: frequent words end as one
piece, others as several, and nothing is unknown, not even an emoji. Around the pieces come a start and an end; the
rest of the 77 places is padding. Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword
units"; Radford et al. 2021, "CLIP".
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ...arguments import integer
from ...backend import to_host
from ...saving import write_atomically
from .weights import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
LAST = "</w>"  # marks the last piece of a word
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONGEST = 2**16  # places for a prompt that a file may ask for
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class Tokenizer:
    """vocabulary: piece -> number. merges: pairs of pieces, the most frequent first. length: of an encoded prompt.
    padding: the piece that fills it, of version 1 the end, of version 2 "!".

    Errors: ValueError for a vocabulary without the start, the end, the padding or one of the 256 bytes, or with
    a number that is none.
    """

    def __init__(
        self, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], length: int = 77, padding: str = END
    ):
        self.vocabulary, self.length = vocabulary, integer("Tokenizer: length", length, 3)
        wrong = [(p, n) for p, n in vocabulary.items() if not isinstance(n, int) or not 0 <= n < 2**31]
        if wrong:
            raise ValueError(
                f"the vocabulary's number of {wrong[0][0]!r} is no whole number from 0 on: {wrong[0][1]!r}"
            )
        self._ranks = {pair: i for i, pair in enumerate(merges)}
        bytes_of_words = [c + end for c in BYTES.values() for end in ("", LAST)]
        if missing := [piece for piece in (START, END, padding, *bytes_of_words) if piece not in vocabulary]:
            raise ValueError(
                f"this is no vocabulary of CLIP: it has no {missing[0]!r} ({len(missing)} pieces are missing)"
            )
        self.start, self.end, self.padding = (vocabulary[piece] for piece in (START, END, padding))
        # Written in a prompt, they are taken as what they are; the padding too, as others do it.
        self._special = re.compile("(" + "|".join(map(re.escape, {START, END, padding})) + ")")
        self._pieces = functools.lru_cache(65536)(self._merge)

    @classmethod
    def from_folder(cls, folder: Any) -> Tokenizer:
        """From vocab.json and merges.txt, and, if they are there, tokenizer_config.json and special_tokens_map.json,
        which name the padding. Errors: FileNotFoundError; ValueError that names the file."""
        folder, length = Path(folder), 77
        padding: Any = END
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                found = read_json(folder / name)
                given = found.get("pad_token", padding)
                padding = given.get("content") if isinstance(given, dict) else given
                length = found.get("model_max_length", length)
                if not isinstance(padding, str):
                    raise ValueError(f"{str(folder / name)!r}: its pad_token must be a piece, not {given!r:.80}")
                if type(length) is not int or not 3 <= length <= LONGEST:
                    raise ValueError(
                        f"{str(folder / name)!r}: its model_max_length must be a number from 3 to {LONGEST}, not "
                        f"{length!r:.80}"
                    )
        merges, path = [], folder / "merges.txt"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(path)!r} is not UTF-8: {error}") from error
        for number, line in enumerate(lines, 1):
            if line.startswith("#version") or not line.strip():
                continue
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise ValueError(f"{str(path)!r}, line {number}: two pieces are expected, not {line!r:.80}")
            merges.append(pair)
        vocabulary, path = read_json(folder / "vocab.json"), folder / "vocab.json"
        try:
            return cls(vocabulary, merges, length, padding)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error

    def save(self, folder: Any) -> None:
        """vocab.json, merges.txt and tokenizer_config.json, as from_folder reads them. Errors: OSError."""
        merges = "".join(f"{left} {right}\n" for left, right in self._ranks)
        padding = next(piece for piece, number in self.vocabulary.items() if number == self.padding)
        config = {
            "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END,
            "pad_token": padding, "model_max_length": self.length,
        }  # fmt: skip
        files = {
            "vocab.json": json.dumps(self.vocabulary, ensure_ascii=False),
            "merges.txt": f"#version: 0.2\n{merges}",
            "tokenizer_config.json": json.dumps(config),
        }
        for name, text in files.items():
            write_atomically(Path(folder) / name, functools.partial(_write, text.encode()))

    def encode(self, prompts: str | Sequence[str]) -> Any:
        """int64 (N, length), in host memory. What is beyond the last place is cut off, and a warning says what."""
        rows = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            ids = self.numbers(prompt)
            room = self.length - 2
            if len(ids) > room:
                warnings.warn(
                    f"the prompt has {len(ids)} tokens, and only the first {room} fit; this is cut off: "
                    f"{self.decode(ids[room:])!r}",
                    stacklevel=2,
                )
            row = [self.start, *ids[:room], self.end]
            rows.append(row + [self.padding] * (self.length - len(row)))
        return to_host(rows).reshape(-1, self.length).astype("int64")

    def numbers(self, prompt: str) -> list[int]:
        """Of the pieces of a prompt, without start, end and padding. Errors: TypeError for what is no string."""
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt is a string, not {type(prompt).__name__}: {prompt!r:.80}")
        found = []
        for i, part in enumerate(self._special.split(prompt)):
            if i % 2:
                found.append(self.vocabulary[part])
                continue
            for word in split(part):
                letters = "".join(BYTES[b] for b in word.encode("utf-8", "replace"))
                found += [self.vocabulary.get(piece, self.end) for piece in self._pieces(letters)]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these numbers, without start, end and padding at the end."""
        return "".join(self.pieces(ids)).strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each number, with a space after the last of a word. Half a letter is "\ufffd"."""
        texts, found = {number: piece for piece, number in self.vocabulary.items()}, []
        for number in ids:
            piece = texts[int(number)]
            if piece in (START, END):
                found.append("")
                continue
            end = " " if piece.endswith(LAST) else ""
            data = bytes(LETTERS[c] for c in piece.removesuffix(LAST))
            found.append(data.decode("utf-8", "replace") + end)
        return found

    def _merge(self, letters: str) -> tuple[str, ...]:
        """The pieces of one word, of which `letters` has a letter for each byte."""
        word = [*letters[:-1], letters[-1] + LAST]
        while len(word) > 1:
            pairs = list(zip(word, word[1:]))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(word):  # all occurrences of the pair, from the left
                together = i + 1 < len(word) and (word[i], word[i + 1]) == best
                merged.append(word[i] + word[i + 1] if together else word[i])
                i += 1 + together
            word = merged
        return tuple(word)


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def split(text: str) -> list[str]:
    """The words in lower case: runs of letters, single digits, runs of anything else but space, and "'s" and the like
    alone. Accents are joined to their letters first (NFC)."""
    text = re.sub(f"[{SPACES}]+", " ", unicodedata.normalize("NFC", text))
    text = "".join(c.lower() for c in text)  # one by one: no letter knows that it ends a word, as a sigma would
    kinds = "".join(" " if c == " " else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "o") for c in text)
    found, i = [], 0
    while i < len(text):
        short = next((s for s in CONTRACTIONS if text.startswith(s, i)), "")
        length = len(short)
        if not short:
            length = 1
            while kinds[i] in "Lo" and i + length < len(text) and kinds[i + length] == kinds[i]:
                length += 1
        if kinds[i] != " ":
            found.append(text[i : i + length])
        i += length
    return found


def _letters_of_bytes() -> dict[int, str]:
    """A printable letter for each byte, so that vocab.json and merges.txt can be text: Latin-1's, where it has one, and
    from U+0100 on for the others. Source: GPT-2 (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTES = _letters_of_bytes()
LETTERS = {letter: b for b, letter in BYTES.items()}
