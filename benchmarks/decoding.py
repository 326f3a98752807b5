"""Generation token by token beside `transformers`' `generate`, for a Llama of the same shape.

    python -m benchmarks.decoding [--rounds 5] [--only batches]

One prompt, greedy, the 57.7 M parameters of `benchmarks.training`: a step's cost is mostly reading
the weights. Then batches of 1, 8 and 64 prompts of 32 tokens with 9.8 M parameters, sampled (top-k
50, top-p 0.9) and greedy: what a step costs besides.
"""

import argparse
import functools
import time

from benchmarks.measure import Found, in_turns
from benchmarks.training import MODELS

PROMPT = [11, 7, 5, 3]
NUM_TOKENS = 200
LONG = 2000


def our_model(dtype: str, context_length: int):
    import torch

    from cs_lm.config.model import ModelConfig
    from cs_lm.models.base import cast_weights
    from cs_lm.models.transformer import TransformerLM

    sizes = MODELS["57.7 M, B 8, T 256"][0] | {"context_length": context_length}
    model = TransformerLM(ModelConfig(**sizes)).eval()
    return cast_weights(model, getattr(torch, dtype))


def ours(dtype: str):
    from cs_lm.inference.decoding_config import DecodingConfig
    from cs_lm.inference.generate import generate

    model = our_model(dtype, 512)
    generate(model, [PROMPT], DecodingConfig(max_new_tokens=8, temperature=0))
    config = DecodingConfig(max_new_tokens=NUM_TOKENS, temperature=0)
    return lambda: generate(model, [PROMPT], config)


def llama(sizes: dict, context_length: int, **tokens):
    """`transformers`' model of the same shape, without a token that ends a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_ff"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        max_position_embeddings=context_length,
        eos_token_id=None,
        **tokens,
    )
    return LlamaForCausalLM(config).eval()


def transformers(dtype: str):
    import torch

    model = llama(MODELS["57.7 M, B 8, T 256"][0], 512).to(getattr(torch, dtype))
    ids = torch.tensor([PROMPT])

    def generate(num_tokens=NUM_TOKENS):
        with torch.no_grad():
            model.generate(ids, max_new_tokens=num_tokens, do_sample=False)

    generate(8)
    return generate


SMALL = {"vocab_size": 8192, "d_model": 256, "num_layers": 7, "num_heads": 4, "d_ff": 704}
SMALL_CONTEXT, NUM_PROMPT, NUM_NEW = 256, 32, 64
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}


def prompts_of(batch_size: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, SMALL["vocab_size"], (batch_size, NUM_PROMPT), generator=generator)


def our_batch(batch_size: int, sampled: bool):
    from cs_lm.config.model import ModelConfig
    from cs_lm.inference.decoding_config import DecodingConfig
    from cs_lm.inference.generate import generate
    from cs_lm.models.transformer import TransformerLM

    model = TransformerLM(ModelConfig(**SMALL, context_length=SMALL_CONTEXT)).eval()
    prompts = prompts_of(batch_size).tolist()
    settings = SAMPLED if sampled else {"temperature": 0.0}
    config = DecodingConfig(max_new_tokens=NUM_NEW, **settings)
    generate(model, prompts, config)
    return lambda: generate(model, prompts, config)


def their_batch(batch_size: int, sampled: bool):
    import torch

    model = llama(SMALL, SMALL_CONTEXT, bos_token_id=None, pad_token_id=0)
    ids = prompts_of(batch_size)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NUM_NEW}
    settings |= {"do_sample": sampled} | (SAMPLED if sampled else {})

    def generate():
        with torch.no_grad():
            model.generate(ids, **settings)

    generate()
    return generate


def compare_batches(rounds: int) -> None:
    for sampled in (True, False):
        for batch_size in (1, 8, 64):
            how = "sampled" if sampled else "greedy"
            contestants = {
                "cs_lm": functools.partial(our_batch, batch_size, sampled),
                "transformers": functools.partial(their_batch, batch_size, sampled),
            }
            question = f"a new token, {how}, batch of {batch_size}, 9.8 M parameters"
            in_turns(question, contestants, rounds, repeats=batch_size * NUM_NEW)


def by_length(dtype: str):
    """Whether a token late in the text costs what an early one does."""
    from cs_lm.inference.decoding_config import DecodingConfig
    from cs_lm.inference.generate import generate_tokens

    model = our_model(dtype, len(PROMPT) + LONG)

    def timed() -> Found:
        config = DecodingConfig(max_new_tokens=LONG, temperature=0)
        times_s = [time.perf_counter()]
        for _ in generate_tokens(model, [PROMPT], config, [False]):
            times_s.append(time.perf_counter())
        first, last = times_s[201] - times_s[1], times_s[-1] - times_s[-201]
        return Found(tokens_1_to_200=first / 200, last_200=last / 200, last_over_first=last / first)

    return timed


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["batches"])
    chosen = parser.parse_args(argv)
    rounds = chosen.rounds
    compare_batches(rounds)
    if chosen.only:
        return
    contestants = {
        "cs_lm": functools.partial(ours, "float32"),
        "transformers": functools.partial(transformers, "float32"),
        "cs_lm, bfloat16 weights": functools.partial(ours, "bfloat16"),
        "transformers, bfloat16 weights": functools.partial(transformers, "bfloat16"),
    }
    in_turns("a token of 200, one prompt", contestants, rounds, repeats=NUM_TOKENS)
    for dtype in ("float32", "bfloat16"):
        who = {f"cs_lm, {dtype} weights": functools.partial(by_length, dtype)}
        in_turns(f"a token, by length, up to {LONG}", who, rounds=1, repeats=LONG)


if __name__ == "__main__":
    main()
