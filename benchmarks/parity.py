"""Scores of GPT-2 beside transformers, with weights that went in and out through files.

    python -m benchmarks.parity [--model gpt2-small ...] [--num_layers 4]

Random weights of the sizes' shapes; one JSON line for each size, head and direction, with the
largest difference of any score (1e-4 is asked for) and the largest score.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from cs_lm.config.model import GPT2Config
from cs_lm.config.presets import GPT_SIZES
from cs_lm.config.run import named_run

SIZES = [name for name in GPT_SIZES if name.startswith("gpt2-")]
T = 64


def their_model(config: GPT2Config):
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=config.d_model,
            n_head=config.num_heads,
            n_layer=config.num_layers,
            n_inner=config.d_ff,
            n_positions=config.context_length,
            vocab_size=config.vocab_size,
            tie_word_embeddings=config.tied_head,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and gains, which begin at 0 and 1
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return theirs


def differences(config: GPT2Config, folder: Path) -> dict[str, dict[str, float]]:
    """Their model in; and out again, where transformers reads it."""
    import torch
    import transformers

    from cs_lm.interop.export_weights import write_weights
    from cs_lm.interop.import_weights import read_weights
    from cs_lm.tokenizer import BPETokenizer

    ids = torch.randint(0, config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    found = {}
    with torch.no_grad():
        theirs = their_model(config)
        theirs.save_pretrained(folder / "theirs")
        expected = theirs(ids).logits
        del theirs
        ours = read_weights(folder / "theirs").eval()
        actual = ours(ids)
        found["in"] = _compared(actual, expected)
        tokenizer = BPETokenizer({i: bytes([i]) for i in range(256)}, [])
        write_weights(ours, tokenizer, folder / "ours")
        del ours
        back = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours").eval()
        found["out"] = _compared(actual, back(ids).logits)
    return found


def _compared(actual, expected) -> dict[str, float]:
    difference = (actual - expected).abs().max().item()
    return {"difference": float(f"{difference:.2g}"), "largest": round(expected.max().item(), 2)}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--num_layers", type=int, help="fewer than the size has, to save memory")
    given = parser.parse_args(argv)
    for name in given.model:
        config = named_run(name).model
        layers = min(config.num_layers, given.num_layers or config.num_layers)
        for tied in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                config = dataclasses.replace(config, num_layers=layers, tied_head=tied)
                for direction, numbers in differences(config, Path(folder)).items():
                    facts = {"model": name, "layers": layers, "head": "tied" if tied else "own"}
                    print(json.dumps({**facts, "weights": direction, **numbers}), flush=True)


if __name__ == "__main__":
    main()
