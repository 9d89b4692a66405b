"""Words: the tokens of a caption (data/tokenizer.py) become states (TextEncoder), and these steer a U-Net (TextUNet).

    captions = ["a bold seven", "a small serif three"]
    tokenizer = Tokenizer.of(captions)
    net = TextUNet(tokenizer, 1, (32, 64))
    denoiser = Denoiser(net, sigma_data)
    denoiser(x, sigma, tokens=tokenizer.encode(captions))

The prompt "" is the null prompt: it has no words, and stands for no condition. A net learns it if captions are replaced
by it at random in training (Ho and Salimans 2022), and is given it where it is given no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import nn, ops
from ..arguments import integer
from ..backend import Array, active, to_device, xp
from ..data.tokenizer import PADDING, START, Tokenizer
from ..engine import Tensor
from ..operators import array_of
from ..rng import Rng, as_rng
from .unet import UNet


class TextEncoder(nn.Module):
    """Tokens to states: (N, L) integers -> (N, L, width). A small transformer, trained together with the net.

    Each word attends to all words of its prompt, in both directions; none attends to padding.
    """

    def __init__(
        self, tokens: int, length: int, width: int = 96, blocks: int = 2, heads: int = 4,
        *, rng: Rng | int | None = None,
    ):  # fmt: skip
        rng = as_rng(rng)
        self.embedding = nn.Embedding(tokens, width, rng=rng)
        self.positions = nn.LearnedPositions(length, width, rng=rng)
        self.blocks = [
            nn.TransformerBlock(width, heads, rng=rng) for _ in range(integer("TextEncoder: blocks", blocks))
        ]
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Any) -> Tensor:
        x = self.positions(self.embedding(tokens))  # (N, L) -> (N, L, width)
        for block in self.blocks:
            x = block(x, mask=words_of(tokens))
        return self.norm(x)


def words_of(tokens: Any) -> Array:
    """Which keys may be attended to, all but padding, as a mask of attention: (N, L) -> bool (N, 1, 1, L)."""
    return (array_of(tokens) != PADDING)[:, None, None, :]


class TextUNet(nn.Module):
    """A U-Net (models/unet.py) that is told what to draw in words: F(x, noise, tokens=, states=, **labels).

    tokens: (N, length) of the tokenizer, or (1, length) for all samples; the null prompt if they are not given. states:
    what `encode` makes of the tokens, so that sampling does so once, and not in every step. channels, options: as UNet.
    width: of the states. attention: the levels at which pixels attend to words (all but the finest unless given, and
    that one if there is no other). The vocabulary is a buffer, so a checkpoint has it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        in_channels: int = 1,
        channels: Sequence[int] = (48, 96),
        *,
        width: int = 96,
        attention: Sequence[int] | None = None,
        rng: Rng | int | None = None,
        **options: Any,
    ):
        rng = as_rng(rng)
        levels = range(len(channels))
        attention = (levels[1:] or levels) if attention is None else attention
        self.vocabulary = Tensor(to_device(tokenizer.to_bytes()))
        self.encoder = TextEncoder(len(tokenizer), tokenizer.length, width, rng=rng)
        self.unet = UNet(in_channels, channels, context=width, attention=attention, rng=rng, **options)
        self._null = tokenizer.encode("")

    def encode(self, tokens: Any) -> Tensor:
        """The states of tokens: (N, length) -> (N, length, width)."""
        return self.encoder(self._checked(tokens))

    def forward(self, x: Any, noise: Any, *, tokens: Any = None, states: Any = None, **labels: Any) -> Any:
        tokens = self._checked(self._null if tokens is None else tokens)
        states = self.encoder(tokens) if states is None else states
        n, of_words = len(x), words_of(tokens)
        if len(tokens) == 1 != n:  # one prompt for all
            states = ops.broadcast_to(states, shape=(n, *states.shape[1:]))
        return self.unet(x, noise, context=states, context_mask=of_words, **labels)

    def _checked(self, tokens: Any) -> Array:
        tokens = array_of(tokens)
        if hasattr(tokens, "shape") and not active().is_array(tokens):
            tokens = to_device(tokens)
        shape, length = getattr(tokens, "shape", None), self._null.shape[1]
        if shape is None or len(shape) != 2 or shape[1] != length or tokens.dtype.kind not in "iu":
            found = f"{tokens.dtype} of shape {shape}" if shape is not None else repr(tokens)
            raise ValueError(
                f"TextUNet: the tokens must be integers (N, {length}), as Tokenizer.encode gives, not {found}"
            )
        return tokens


def dropped(tokens: Array, kept: Array) -> Array:
    """The tokens (N, L), with the null prompt where `kept` (N,) is false."""
    first = xp.arange(tokens.shape[1]) == 0
    return xp.where(kept[:, None], tokens, xp.where(first, START, PADDING))
