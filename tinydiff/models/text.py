"""Images from words: a tokenizer, a small text encoder, and a U-Net that listens.

    tokenizer = Tokenizer.fit(captions)                              # every word of the captions has a number
    encoder = TextEncoder(tokenizer.size, tokenizer.length, 64)
    net = TextToImage(encoder, UNet(3, (48, 96), context=64), tokenizer)
    denoiser = Denoiser(net, sigma_data=0.5)
    ids = tokenizer.encode(captions)                                 # (N, length), in host memory
    edm_loss(denoiser, x0, rng, tokens=drop_prompts(ids, 0.1, rng))  # the encoder learns with the net
    words = net.encode(tokenizer.encode(["a red seven"] * 8))        # once, and not at every step
    sample(Guided(denoiser, 2.0), (8, 32, 32, 3), KarrasSDE(), 0, **words)
    save("run.npz", net.state_dict())                                # the words are in it, as "vocabulary"

The null prompt is the empty one, "": padding alone. Of padding, attention sees nothing, except at the first position.
So no query is ever without a key, and what the encoder makes of a first position of padding is the one vector of the
null prompt. It is learned like all others, if some captions are replaced by "" in training (`drop_prompts`; Ho and
Salimans 2022). A prompt that is not given is the null prompt, so `Guided` needs nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .. import nn
from ..arguments import integer, number
from ..backend import Array, to_device, to_host, xp
from ..describing import rebuildable
from ..engine import Tensor
from ..modes import no_grad
from ..operators import array_of
from ..rng import Rng, as_rng

PADDING = 0


@rebuildable
class Tokenizer:
    """Prompts as numbers: each word, in lower case, and each punctuation mark has one, from 1 on; 0 is padding.

    words: those it knows; words[i] is number i + 1. length: of every encoded prompt, in words and punctuation marks.
    Errors: ValueError for a length that is no positive integer, no words, or a word that comes twice.
    """

    def __init__(self, words: Sequence[str], length: int):
        self.words, self.length = list(words), integer("Tokenizer: length", length)
        self._numbers = {word: i for i, word in enumerate(self.words, 1)}
        if not self.words or len(self._numbers) < len(self.words):
            raise ValueError(f"Tokenizer: one or more words, all different, are needed, not {self.words!r:.200}")

    @classmethod
    def fit(cls, captions: Iterable[str], length: int | None = None) -> Tokenizer:
        """The words of the captions, in alphabetical order. length: unless given, that of the longest caption."""
        found = [split(caption) for caption in captions]
        longest = max(map(len, found), default=0)
        return cls(sorted({word for words in found for word in words}), longest if length is None else length)

    @property
    def size(self) -> int:
        """How many different numbers there are, with that of padding."""
        return len(self.words) + 1

    def encode(self, prompts: str | Sequence[str]) -> Any:
        """The numbers of each prompt, followed by padding: int64 (N, length), in host memory. "" is the null prompt.

        Errors: ValueError that names a word it does not know, and the nearest ones it knows, or that quotes the length
        of a prompt that is too long.
        """
        rows = [self._encode(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        return to_host(rows).reshape(-1, self.length).astype("int64")

    def _encode(self, prompt: str) -> list[int]:
        words = split(prompt)
        for word in words:
            if word not in self._numbers:
                nearest = difflib.get_close_matches(word, self.words, cutoff=0.0)
                raise ValueError(
                    f"the word {word!r} of the prompt {prompt!r} is not among the {len(self.words)} known ones: the "
                    f"nearest are {', '.join(map(repr, nearest))}"
                )
        if len(words) > self.length:
            raise ValueError(
                f"the prompt {prompt!r} has {len(words)} words and punctuation marks, but this tokenizer takes at most "
                f"{self.length}"
            )
        return [self._numbers[word] for word in words] + [PADDING] * (self.length - len(words))

    def decode(self, ids: Any) -> list[str]:
        """The prompts of (N, length), or of one (length,). Waits for the device.
        Errors: IndexError for numbers that no word has."""
        rows = to_host(array_of(ids))
        if rows.size and not 0 <= rows.min() <= rows.max() < self.size:
            raise IndexError(f"decode: numbers must be 0 to {self.size - 1}, but run from {rows.min()} to {rows.max()}")
        rows = rows.reshape(-1, rows.shape[-1])
        found = [" ".join(self.words[i - 1] for i in row if i != PADDING) for row in rows.tolist()]
        return [re.sub(r" ([,.;:!?])", r"\1", prompt) for prompt in found]

    def to_array(self) -> Array:
        """The vocabulary as uint8, a line for the length and for each word: as the buffer of a net it is in the net's
        checkpoint."""
        return to_device(to_host(list("\n".join([str(self.length), *self.words]).encode())).astype("uint8"))

    @classmethod
    def from_array(cls, data: Any) -> Tokenizer:
        """The inverse. Errors: ValueError for other arrays."""
        lines = bytes(to_host(array_of(data))).decode(errors="replace").split("\n")
        if not lines[0].isdecimal():
            raise ValueError(f"this is no vocabulary of a Tokenizer, which begins with its length: {lines[0]!r:.80}")
        return cls(lines[1:], int(lines[0]))


def split(prompt: str) -> list[str]:
    """Words, in lower case, and punctuation marks: "A red 7!" -> ["a", "red", "7", "!"]."""
    return re.findall(r"\w+|[^\w\s]", prompt.lower())


def drop_prompts(ids: Any, p: float, rng: Rng, *, sample_offset: int = 0) -> Array:
    """ids (N, length) with each row replaced by the null prompt with probability p, on the device. Row i draws as
    sample `sample_offset + i`. Errors: ValueError for p outside [0, 1]."""
    p, ids = number("drop_prompts: p", p, "[0, 1]"), to_device(array_of(ids))
    kept = rng.uniform(len(ids), sample_offset=sample_offset) >= p  # (N,)
    return xp.where(kept[:, None], ids, PADDING)


@rebuildable
class TextEncoder(nn.Module):
    """Numbers of words -> a vector for each, which knows the others and its place: (N, L) -> (N, L, features), and
    which of them count, (N, L) of bool.

    An embedding, sinusoidal positions, `blocks` pre-norm transformer blocks, a norm. Padding is seen by nobody, except
    at the first position, where it is the null prompt.
    size: how many numbers there are (Tokenizer.size). length: L at most.
    Errors: ValueError for sizes that are not positive integers, odd features, or heads that do not divide them.
    """

    def __init__(
        self,
        size: int,
        length: int,
        features: int = 64,
        blocks: int = 2,
        heads: int = 4,
        *,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        self.length, self.features = integer("TextEncoder: length", length), integer("TextEncoder: features", features)
        self.embedding = nn.Embedding(integer("TextEncoder: size", size), self.features, rng=rng)
        self.positions = nn.SinusoidalPositions(self.length, self.features)
        self.blocks = [
            nn.TransformerBlock(self.features, heads, rng=rng) for _ in range(integer("TextEncoder: blocks", blocks))
        ]
        self.norm = nn.LayerNorm(self.features)

    def forward(self, tokens: Any) -> tuple[Any, Array]:
        """Errors: ValueError for tokens that are not (N, L), L <= length; and those of Embedding."""
        tokens = array_of(tokens)
        if not hasattr(tokens, "shape"):
            tokens = to_host(tokens)
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(f"TextEncoder: tokens must be (N, {self.length} or less), not {tokens.shape}")
        x = self.positions(self.embedding(tokens))  # (N, L) -> (N, L, features)
        tokens = to_device(tokens)
        seen = (tokens != PADDING) | (xp.arange(tokens.shape[1]) == 0)  # (N, L)
        for block in self.blocks:
            x = block(x, mask=seen[:, None, None])  # (N, heads, queries, L), where the new axes have length 1
        return self.norm(x), seen


@rebuildable
class TextToImage(nn.Module):
    """A text encoder, and a net that takes its vectors as context, as one net, so that both learn together:
    F(x, noise, tokens=..., **labels), x (N, H, W, C), tokens (N, L) or (1, L), a prompt for all.

    Or F(x, noise, **encode(tokens), **labels), where the prompts are encoded already. With neither it is the null
    prompt. net: a UNet, or any net(x, noise, context=..., context_mask=..., **labels). With a tokenizer, its words are
    the buffer `vocabulary`, so that a checkpoint of the net has them: Tokenizer.from_array.
    """

    def __init__(self, encoder: nn.Module, net: nn.Module, tokenizer: Tokenizer | None = None):
        self.encoder, self.net = encoder, net
        if tokenizer is not None:
            self.vocabulary = Tensor(tokenizer.to_array())

    def forward(self, x: Any, noise: Any, tokens: Any = None, **condition: Any) -> Any:
        """Errors: ValueError for tokens beside a context; those of the encoder and the net."""
        if "context" not in condition:
            states, seen = self.encoder(xp.zeros((1, 1), "int64") if tokens is None else tokens)
            condition = {"context": states, "context_mask": seen, **condition}
        elif tokens is not None:
            raise ValueError("TextToImage: give the tokens or, encoded already, the context, but not both")
        return self.net(x, noise, **condition)

    @no_grad()
    def encode(self, tokens: Any) -> dict[str, Array]:
        """The conditions for `sample` that these tokens (N, L) mean, {"context", "context_mask"}, without a gradient.
        They are computed once, where `tokens=` would be encoded again at every step."""
        states, seen = self.encoder(tokens)
        return {"context": array_of(states), "context_mask": seen}
