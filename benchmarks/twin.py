"""The same model from torch's own layers: what ours is measured against.

`torch.nn` modules, `scaled_dot_product_attention`, `F.cross_entropy`, fused `torch.optim.AdamW`
and `clip_grad_norm_`, in the way a careful user puts them together.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs_lm.config.model import ModelConfig


class TwinBlock(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d_model, self.num_heads = config.d_model, config.num_heads
        self.ln1 = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.ln2 = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        self.w1 = nn.Linear(d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, d_model, bias=False)
        self.w3 = nn.Linear(d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.ln1(x)
        q, k, v = (
            projection(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output_proj(attended.transpose(1, 2).flatten(-2))
        h = self.ln2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Twin(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(TwinBlock(config) for _ in range(config.num_layers))
        self.ln_final = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        head_size = config.d_model // config.num_heads
        frequency = config.rope_theta ** -(torch.arange(0, head_size, 2) / head_size)
        angle = torch.arange(config.context_length).unsqueeze(-1) * frequency
        angle = torch.cat((angle, angle), -1)  # the halves are the pairs, as in transformers
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        cos, sin = self.cos[: token_ids.shape[1]], self.sin[: token_ids.shape[1]]
        x = self.embedding(token_ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.lm_head(self.ln_final(x))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def twin_loss(model: Twin, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def twin_step(
    model: Twin,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    max_norm: float,
    dtype: str,
    loss_function: Callable[[Twin, Tensor, Tensor], Tensor] = twin_loss,
) -> Tensor:
    """One update, with its loss."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = loss_function(model, x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.detach()


def twin_optimizer(model: Twin, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True, **settings)
