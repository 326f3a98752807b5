"""`python -m benchmarks [TEXT] [--rounds N]`: the whole table; TEXT is a large file of text."""

import argparse

from benchmarks import batches, decoding, importing, memory, parts, saving, tokenizer, training


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("text", nargs="?", help="for the tokenizer's part, which needs some 100 MB")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    rounds = ["--rounds", str(chosen.rounds)]
    training.main(rounds)
    parts.main(rounds)
    memory.main(rounds)
    batches.main(rounds)
    saving.main(rounds)
    decoding.main(rounds)
    importing.main(rounds)
    if chosen.text:
        tokenizer.main([chosen.text, *rounds])


if __name__ == "__main__":
    main()
