"""How much memory pretrained weights take on their way into a model, beside transformers.

    python -m benchmarks.importing [--model gpt2-small ...] [--rounds 3]

Peak memory above that of the process with all its imports, as a ratio to the weights. The files are
made here, in the layout that transformers reads.
"""

import argparse
import functools
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.measure import Found, in_turns, peak_mb

FORMATS = ("safetensors", "pytorch")


def write(name: str, file_format: str, folder: Path) -> float:
    """Writes files of that size; returns the size of the weights [MB].

    In a process of its own: a process begins with the peak of the one that started it.
    """
    import torch
    from torch import nn

    from cs_lm.config.run import named_run
    from cs_lm.interop.export_weights import write_weights
    from cs_lm.models.gpt2 import GPT2LM
    from cs_lm.models.stats import num_parameters
    from cs_lm.tokenizer import BPETokenizer

    config = named_run(name).model
    model = GPT2LM(config, device="meta")
    for module in model.modules():
        for kind, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, kind, nn.Parameter(torch.full(parameter.shape, 0.01)))
    tokenizer = BPETokenizer({i: bytes([i]) for i in range(256)}, [])
    write_weights(model, tokenizer, folder, file_format, 2_000_000_000)
    return num_parameters(config) * 4 / 1e6


def importing(who: str, folder: Path, weights_mb: float):
    import safetensors.torch  # noqa: F401
    import transformers

    from cs_lm.interop.import_weights import read_weights

    theirs = transformers.GPT2LMHeadModel.from_pretrained
    read = theirs if who == "transformers" else read_weights
    before = peak_mb()

    def timed() -> Found:
        model = read(folder)
        assert sum(p.sum().item() for p in model.parameters()) > 0
        return Found(peak_of_weights=(peak_mb() - before) * 1.048576 / weights_mb)

    return timed


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["gpt2-small", "gpt2-medium", "gpt2-large"])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    for name in given.model:
        for file_format in FORMATS:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / name
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    weights_mb = process.submit(write, name, file_format, folder).result()
                contestants = {
                    who: functools.partial(importing, who, folder, weights_mb)
                    for who in ("cs_lm", "transformers")
                }
                question = f"weights in, {name}, {file_format}, {weights_mb:,.0f} MB"
                in_turns(question, contestants, given.rounds)


if __name__ == "__main__":
    main()
