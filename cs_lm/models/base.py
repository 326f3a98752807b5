"""The base class of the language models, the next-token loss, and new key-value caches."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cs_lm.config.model import ArchitectureConfig
from cs_lm.errors import UserError
from cs_lm.models.kv_cache import KVCache, positions_after
from cs_lm.models.layers import is_product
from cs_lm.ops import reference
from cs_lm.ops.activation_checkpoint import checkpoint_activations
from cs_lm.ops.reference import IGNORE_INDEX, Ops, cross_entropy

FinishLayer = Callable[[nn.Module], object]


def leave_it(_layer: nn.Module) -> None:
    """What is done with a new layer by default: nothing."""


class LanguageModel(nn.Module):
    """Logits of every next token, given the tokens before it.

    A subclass creates `token_embeddings`, `layers`, `ln_final` and `lm_head` (None: the embedding
    is also the head), and defines `embed`, the input of the layers.

    ops        the implementation of the operations: `ops.CLEAR` or `ops.fused.FAST`
    activation_checkpointing  keep only each block's input for backward, and compute the block again
    finish_layer  called with each layer when it has its weights, before the next one has them
    first_row  place of the first row in the batch of which this process has a part; dropout masks
               are those of the whole batch
    Raises: UserError for an invalid config.
    """

    def __init__(
        self, config: ArchitectureConfig, ops: Ops, activation_checkpointing: bool = False
    ):
        super().__init__()
        if problems := config.validate():
            raise UserError(*problems)
        self.config = config
        self.ops = ops
        self.activation_checkpointing = activation_checkpointing
        self.first_row = 0

    def embed(
        self, token_ids: Tensor, token_positions: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The input of the first layer (..., T, D), and the extra arguments of each layer."""
        raise NotImplementedError

    def make_tables(self, device: torch.device | str | None = None) -> None:
        """Creates the model's buffers, which are all its tensors but the parameters."""

    def seed_dropout(self, seed: int) -> None:
        """Seeds all dropout masks from here on."""

    @property
    def output_embedding(self) -> Tensor:
        """(V, D), the weight that the logits are computed with."""
        return (self.token_embeddings if self.lm_head is None else self.lm_head).weight

    def hidden_states(
        self,
        token_ids: Tensor,
        token_positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The input of the head: (..., T) ids to (..., T, D).

        token_positions  (..., T); by default they start at the cache's length, or at 0
        mask             (..., T, S) boolean, True = attend, in addition to the causal mask
        cache            keys and values of earlier tokens; those of the new tokens are added
        Raises: ValueError for a sequence longer than the context, without positions;
        IndexError (on CPU) for a position beyond the context.
        """
        if token_positions is None:
            token_positions = positions_after(cache, token_ids, self.config.context_length)
        x, of_layers = self.embed(token_ids, token_positions)
        recomputing = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for index, (layer, further) in enumerate(zip(self.layers, of_layers)):
            block = functools.partial(layer, mask=mask, cache=cache, layer=index, **further)
            x = (
                checkpoint_activations(block, x, list(layer.parameters()))
                if recomputing
                else block(x)
            )
        if cache is not None:
            cache.advance(token_ids.shape[-1])
        return self.ln_final(x)

    def forward(
        self,
        token_ids: Tensor,
        token_positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token at every position: (..., T) ids to (..., T, V)."""
        return self.logits_of(self.hidden_states(token_ids, token_positions, mask, cache))

    def logits_of(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., V)
        return (
            self.ops.linear(hidden, self.output_embedding)
            if self.has_plain_head
            else self.lm_head(hidden)
        )

    @property
    def has_plain_head(self) -> bool:
        """Whether the logits are a product with `output_embedding`, and nothing else."""
        return self.lm_head is None or is_product(self.lm_head)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the `with` block; restores the mode after it.

    A model that is in evaluation mode already is left alone, because to set the mode of every
    layer costs as much time as a fifth of a small model's step.
    """
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


class TokenBatch(Protocol):
    """inputs and targets, both (..., T) int64."""

    inputs: Tensor
    targets: Tensor


def next_token_loss(model: LanguageModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the targets given the inputs: sum [nats] and count.

    Targets that are `IGNORE_INDEX` do not count.
    """
    return target_loss(model, model.hidden_states(batch.inputs), batch.targets)


def target_loss(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the targets (...) after the hidden states (..., D): sum and count."""
    if not model.has_plain_head:
        return cross_entropy(model.logits_of(hidden), targets, IGNORE_INDEX)
    loss = model.ops.linear_cross_entropy
    return loss(hidden, model.output_embedding, targets, IGNORE_INDEX)


def token_log_probs(
    model: LanguageModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`ops.token_log_probs` of the model's logits after its hidden states, both (...)."""
    if not model.has_plain_head:
        return reference.token_log_probs(model.logits_of(hidden), targets, temperature)
    return model.ops.linear_log_probs(hidden, model.output_embedding, targets, temperature)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters cast in place, for generation; buffers keep their dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def new_cache(model: LanguageModel, batch_size: int, capacity: int) -> KVCache:
    """An empty key-value cache in the weights' dtype.

    On a CPU it is at least float32, because bfloat16 products there copy the keys.
    """
    config, weight = model.config, model.output_embedding
    head_size = config.d_model // config.num_heads
    dtype = weight.dtype
    if weight.device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    shape = config.num_layers, batch_size, config.num_heads, capacity, head_size
    return KVCache(shape, dtype, weight.device)
