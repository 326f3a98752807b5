"""Low-rank adaptation: only a small change of each weight matrix is trained.

    W' = W + (alpha / r) B A          B (d_out, r) begins at 0, A (r, d_in)

for every linear layer of the blocks; all else is frozen. The forward pass is that of the merged
model: it reads W', so it is exactly what is saved and exported. The optimizer keeps moments of A
and B alone. Source: Hu et al. 2021, LoRA: low-rank adaptation of large language models.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cs_lm.errors import Problem, UserError
from cs_lm.models.base import LanguageModel
from cs_lm.models.layers import Linear


class LowRankAdapter(nn.Module):
    """The matrices A and B of all adapted layers of a model, which are its parameters.

    `merge` gives the model its present weights. `state_dict` and `load_state_dict` are those of the
    merged model, so that a checkpoint is one of a plain model; `matrices` are A and B.
    Raises: UserError for a rank above the model's width.
    """

    def __init__(self, model: LanguageModel, rank: int, alpha: float, seed: int):
        super().__init__()
        self._model = [model]  # in a list: its frozen weights are no parameters of this module
        if rank > model.config.d_model:
            what, need = f"got {rank}", f"at most {model.config.d_model}, the model's width"
            raise UserError(Problem("--lora_rank", what, need))
        self._scale = alpha / rank
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._layers = {
            name: layer for name, layer in model.layers.named_modules() if isinstance(layer, Linear)
        }
        self._bases: dict[str, Tensor] = {}
        self._has_bases = False
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self._layers.items():
            base = layer._parameters.pop("weight").detach()
            bound = 1 / math.sqrt(base.shape[1])
            a = torch.empty(rank, base.shape[1]).uniform_(-bound, bound, generator=generator)
            b = torch.zeros(base.shape[0], rank)
            self._bases[name] = base
            for letter, matrix in (("a", a), ("b", b)):
                self.register_parameter(
                    f"{letter}_{name.replace('.', '_')}", nn.Parameter(matrix.to(base.device))
                )
        self.merge()

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        own = name.replace(".", "_")
        return getattr(self, f"a_{own}"), getattr(self, f"b_{own}")

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        for name, base in self._bases.items():
            a, b = self._of(name)
            with torch.autocast(base.device.type, enabled=False):  # weights stay float32
                yield name, torch.addmm(base, b, a, alpha=self._scale)

    def merge(self) -> LanguageModel:
        """The model with its present weights; with gradients on, they lead to A and B."""
        for name, weight in self._merged():
            self._layers[name].weight = weight
        return self._model[0]

    def seed_dropout(self, seed: int) -> None:
        self._model[0].seed_dropout(seed)

    def train(self, mode: bool = True) -> "LowRankAdapter":
        self._model[0].train(mode)
        return super().train(mode)

    @torch.no_grad()
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        merged = {f"layers.{name}.weight": weight for name, weight in self._merged()}
        return {**self._model[0].state_dict(), **merged}

    def load_state_dict(self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Takes the frozen weights; later calls keep them, because `state` then is merged."""
        if self._has_bases:
            return
        self._has_bases = True
        rest = dict(state)
        for name, base in self._bases.items():
            base.copy_(rest.pop(f"layers.{name}.weight"))
        self._model[0].load_state_dict(rest)

    def matrices(self) -> dict[str, Tensor]:
        """A and B of each layer, by name."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_matrices(self, matrices: Mapping[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            parameter.copy_(matrices[name])
