"""Which numbers dropout keeps: drawn by a generator that is a pure function of its key.

The draws of a place in a model follow from (seed, forward pass, place) and nothing else: the same
on every device, compiled or not, when a block is computed again, and after a resume. torch's
generators have a state, which a compiled graph cannot carry.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cs_lm.ops import reference as clear_ops
from cs_lm.ops.manual_backward import CACHE_NUMBERS

DropoutFn = Callable[[Tensor], Tensor]
# Odd factors of a 32-bit mixing function. Source of the first: Wellons 2018, lowbias32.
_FACTORS = (0x7FEB352D, 0x046CA68B, 0x735A2D97)
_STEP = 0x1E3779B9  # between forward passes and between places
_LEVELS = 1 << 16


def new_state(seed: int, device: torch.device | str | None = None) -> Tensor:
    """(3) int32: the two halves of the seed, and the number of the next forward pass."""
    return torch.tensor([*_halves(seed), 0], dtype=torch.int32, device=device)


def reseed(state: Tensor, seed: int) -> None:
    """Makes it what `new_state(seed)` is, without waiting for the device."""
    for stream, word in zip(state, (*_halves(seed), 0)):
        stream.fill_(word)


def next_pass(state: Tensor) -> Tensor:
    """The key (2) of a forward pass; the state moves on to the next one."""
    key = torch.stack((_mixed(state[0] ^ state[2] * _STEP), state[1]))
    state[2] += 1
    return key


def dropout_mask(shape: torch.Size, probability: float, key: Tensor, stream: int) -> Tensor:
    """Boolean, False with the probability (to the next 2^-16), for `ops.dropout`.

    key    (2) int32 on the device of the result
    place  draws of other places are others
    Cost: 1.6 ns a number on one core of an AMD EPYC, a quarter of `Tensor.bernoulli_`.
    """
    size = math.prod(shape)
    words = torch.arange((size + 1) // 2, dtype=torch.int32, device=key.device)
    first = _mixed(key[0] ^ _signed(stream * _STEP))
    second = _mixed(key[1] ^ first)  # that places whose words overlap draw others all the same
    is_whole = key.device.type != "cpu" or torch.compiler.is_compiling()
    # on a CPU, in parts that stay in its cache
    for part in (words,) if is_whole else words.split(CACHE_NUMBERS // 4):
        _mix_(part.bitwise_xor_(first))
        _mix_(part.bitwise_xor_(second))
    numbers = words.view(torch.int16)[:size].view(shape)
    return numbers >= round(probability * _LEVELS) - _LEVELS // 2


def dropout_at(probability: float, key: Tensor, stream: int) -> DropoutFn:
    """`ops.dropout` with the draws of that place in the pass."""

    def drop(x: Tensor) -> Tensor:
        return clear_ops.dropout(x, dropout_mask(x.shape, probability, key, stream), probability)

    return drop


def _mix_(words: Tensor) -> Tensor:
    """Sends each int32 to another one, such that a change of one bit changes half of them."""
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
