"""Few-shot beside zero-shot, on a small model that was trained on a family of tasks.

    python -m benchmarks.few_shot FOLDER [--steps 700]

Each document of the training text is a task of its own: a secret code that replaces eight letters
by eight others, shown on sixty-four letters of one to eight kinds: "aq fx bt aq ...". A question
alone does not say what the code is; demonstrations do, if the letter is among them. Writes the
text, trains (about ten minutes on two cores), then evaluates with 0 to 32 demonstrations on codes
that training never saw, and draws accuracy against their number. Whoever remembers every
demonstration knows the answer with probability 1 - (7/8)^K, and guesses otherwise.
"""

import argparse
import json
import random
from pathlib import Path

LETTERS, SECRETS = "abcdefgh", "qrstuvwx"
PAIRS = 64  # in a document


def new_code(rng: random.Random) -> dict[str, str]:
    return dict(zip(LETTERS, rng.sample(SECRETS, len(SECRETS))))


def document(rng: random.Random) -> str:
    code = new_code(rng)
    some = rng.sample(LETTERS, rng.randint(1, len(LETTERS)))  # few letters are learnt first
    letters = rng.choices(some, k=PAIRS)
    return "".join(f"{letter}{code[letter]} " for letter in letters)


def write_files(folder: Path, num_documents: int, num_codes: int = 200) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    text = "<|endoftext|>".join(document(rng) for _ in range(num_documents))
    (folder / "train.txt").write_text(text, encoding="utf-8")
    lines: dict[str, list[str]] = {"demonstrations": [], "dev": [], "test": []}
    for number in range(num_codes):
        code = new_code(rng)
        for name, count in (("demonstrations", 64), ("dev", 2), ("test", 5)):
            for index, letter in enumerate(rng.choices(LETTERS, k=count)):
                answer = {"question": letter, "answer": code[letter], "subject": f"code {number}"}
                lines[name].append(json.dumps(answer | {"index": index}))
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")


def train(folder: Path, steps: int) -> None:
    from cs_lm.cli.train import main as run

    sizes = {"vocab_size": 257, "d_model": 128, "num_layers": 3, "num_heads": 4, "d_ff": 344}
    settings = {"max_seq_length": 256, "seq_length": 192, "batch_size": 32, "lr": 2e-3}
    rest = {"max_steps": steps, "eval_interval": 250, "out_dir": folder / "run"}
    flags = {"corpus_path": folder / "train.txt", **sizes, **settings, **rest}
    status = run([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    if status:
        raise SystemExit(status)


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
    shots = ["--num_shots", "0", "1", "2", "4", "8", "16", "32"]
    command([*argv, *shots, "--template", "{question}{answer}", "--separator", " "])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_shot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--documents", type=int, default=40_000)
    chosen = parser.parse_args(argv)
    if not (chosen.folder / "run").exists():
        write_files(chosen.folder, chosen.documents)
        train(chosen.folder, chosen.steps)
    evaluate(chosen.folder)


if __name__ == "__main__":
    main()
