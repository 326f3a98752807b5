"""Few-shot beside zero-shot, on a small model that was trained on a family of tasks.

    python -m benchmarks.few_shot FOLDER [--steps 3000]

Each document of the training text shows one rule on new words: "first letter", "second", "third"
or "fourth". A question alone does not say which rule is meant; demonstrations do. Writes the text,
trains (about ten minutes on two cores), then evaluates with 0 to 16 demonstrations on words and
rules in an order that training never saw, and draws accuracy against their number.
"""

import argparse
import json
import random
import string
from pathlib import Path

NUM_RULES = WORD_LENGTH = 4
QUESTIONS = 20  # in a document


def question(rng: random.Random, rule: int) -> dict[str, str]:
    word = "".join(rng.sample(string.ascii_lowercase, WORD_LENGTH))
    return {"question": word, "answer": word[rule], "subject": f"letter {rule + 1}"}


def document(rng: random.Random) -> str:
    rule = rng.randrange(NUM_RULES)
    return "".join(
        "{question} > {answer}\n".format(**question(rng, rule)) for _ in range(QUESTIONS)
    )


def write_files(folder: Path, num_documents: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    text = "<|endoftext|>".join(document(rng) for _ in range(num_documents))
    (folder / "train.txt").write_text(text, encoding="utf-8")
    for name, count in (("demonstrations", 50), ("dev", 50), ("test", 250)):
        lines = [json.dumps(question(rng, rule)) for rule in range(NUM_RULES) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def train(folder: Path, steps: int) -> None:
    from cs_lm.cli.train import main as run

    sizes = {"vocab_size": 257, "d_model": 128, "num_layers": 4, "num_heads": 4, "d_ff": 344}
    settings = {"max_seq_length": 256, "seq_length": 192, "batch_size": 32, "lr": 2e-3}
    rest = {"max_steps": steps, "eval_interval": 250, "out_dir": folder / "run"}
    flags = {"corpus_path": folder / "train.txt", **sizes, **settings, **rest}
    run([word for name, value in flags.items() for word in (f"--{name}", str(value))])


def evaluate(folder: Path) -> None:
    from cs_lm.cli.commands import main as command

    files = [
        ("--task_path", "test.jsonl"),
        ("--demonstrations_path", "demonstrations.jsonl"),
        ("--results_path", "results.jsonl"),
        ("--plot_path", "few-shot.png"),
    ]
    paths = [word for flag, name in files for word in (flag, str(folder / name))]
    argv = ["eval", "--out_dir", str(folder / "run"), *paths, "--kind", "completion"]
    shots = ["--num_shots", "0", "1", "2", "4", "8", "16"]
    command([*argv, *shots, "--template", "{question} > {answer}", "--separator", "\n"])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.few_shot")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--documents", type=int, default=100_000)
    chosen = parser.parse_args(argv)
    if not (chosen.folder / "run").exists():
        write_files(chosen.folder, chosen.documents)
        train(chosen.folder, chosen.steps)
    evaluate(chosen.folder)


if __name__ == "__main__":
    main()
