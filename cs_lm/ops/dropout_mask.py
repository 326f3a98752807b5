"""Dropout masks, drawn by a random generator that is a pure function of its key.

A mask depends on (seed, forward pass, stream) and nothing else; each place in a model has its own
stream number. So a mask is the same on every device, compiled or not, when activation
checkpointing computes a block again, and after a resume. torch's generators have a state, which a
compiled graph cannot hold.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cs_lm.ops import reference
from cs_lm.ops.manual_backward import CACHE_NUMBERS

DropoutFn = Callable[[Tensor], Tensor]
# Odd factors of a 32-bit mixing function. Source of the first: Wellons 2018, lowbias32.
_FACTORS = (0x7FEB352D, 0x046CA68B, 0x735A2D97)
_STEP = 0x1E3779B9  # distance between forward passes, and between streams
_LEVELS = 1 << 16


def new_state(seed: int, device: torch.device | str | None = None) -> Tensor:
    """(3) int32: the two halves of the seed, and the number of the next forward pass."""
    return torch.tensor([*_halves(seed), 0], dtype=torch.int32, device=device)


def reseed(state: Tensor, seed: int) -> None:
    """Sets the state to `new_state(seed)` in place, without waiting for the device."""
    for entry, word in zip(state, (*_halves(seed), 0)):
        entry.fill_(word)


def next_pass(state: Tensor) -> Tensor:
    """The key (2) of this forward pass. Advances the state to the next pass."""
    key = torch.stack((_mixed(state[0] ^ state[2] * _STEP), state[1]))
    state[2] += 1
    return key


def dropout_mask(
    shape: torch.Size, probability: float, key: Tensor, stream: int, first: int = 0
) -> Tensor:
    """Boolean mask for `ops.dropout`: False with `probability`, rounded to 2^-16.

    key     (2) int32 on the device of the result
    stream  a number for the place in the model; different streams draw different masks
    first   the number of the first entry, if the mask is a part of a larger one
    Cost: 1.6 ns a number on one core of an AMD EPYC, a quarter of `Tensor.bernoulli_`.
    """
    size, skipped = math.prod(shape), first % 2  # two entries a word
    words = torch.arange((skipped + size + 1) // 2, dtype=torch.int32, device=key.device)
    if first:
        words.add_(_signed(first // 2))
    one = _mixed(key[0] ^ _signed(stream * _STEP))
    other = _mixed(key[1] ^ one)  # streams whose words overlap still draw different masks
    is_whole = key.device.type != "cpu" or torch.compiler.is_compiling()
    # on a CPU, in parts that fit its cache
    for part in (words,) if is_whole else words.split(CACHE_NUMBERS // 4):
        _mix_(part.bitwise_xor_(one))
        _mix_(part.bitwise_xor_(other))
    numbers = words.view(torch.int16)[skipped : skipped + size].view(shape)
    return numbers >= round(probability * _LEVELS) - _LEVELS // 2


def dropout_at(probability: float, key: Tensor, stream: int, first_row: int = 0) -> DropoutFn:
    """`ops.dropout` with the mask of this stream in this forward pass.

    first_row  place of the first row of x in the batch that several processes share
    """

    def drop(x: Tensor) -> Tensor:
        first = first_row * math.prod(x.shape[1:])
        mask = dropout_mask(x.shape, probability, key, stream, first)
        return reference.dropout(x, mask, probability)

    return drop


def _mix_(words: Tensor) -> Tensor:
    """Maps each int32 in place to another one; one changed bit changes about half of the bits."""
    for factor in _FACTORS:
        words.mul_(factor)
        words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))
    return words


def _mixed(words: Tensor) -> Tensor:
    return _mix_(words.clone())


def _halves(seed: int) -> tuple[int, int]:
    return _signed(seed), _signed(seed >> 32)


def _signed(word: int) -> int:
    """The lower 32 bits as an int32."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)
