"""The books' experiment with several seeds: `cs_lm book` beside the book's model from torch.nn.

    python -m benchmarks.book STORY VOCAB MERGES --seeds 123 1 2 3 4 --out FILE
    python -m benchmarks.book --plot FILE PICTURE
    python -m benchmarks.book STORY --same_windows

A seed of either takes about eight minutes on two cores, and 3 GB of memory. FILE gets one JSON
line an evaluation. The plot shows each one's median over the seeds, and its range. With
--same_windows, small models of both kinds get the same windows in the same order: two minutes.
"""

import argparse
import functools
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

NUM_EPOCHS, EVAL_INTERVAL = 10, 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.book", description=__doc__)
    parser.add_argument("files", nargs="*", help="the story, and GPT-2's vocab.json and merges.txt")
    parser.add_argument("--who", nargs="+", default=["ours", "twin"], choices=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[123, 1, 2, 3, 4])
    parser.add_argument("--out", default="book-seeds.jsonl")
    parser.add_argument("--plot", nargs=2, metavar=("FILE", "PICTURE"))
    parser.add_argument("--same_windows", action="store_true")
    chosen = parser.parse_args()
    if chosen.same_windows:
        return same_windows(chosen.files[0])
    if chosen.plot:
        print(table(chosen.plot[0]))
        return draw(*chosen.plot)
    for seed in chosen.seeds:
        for who in chosen.who:
            RUNS[who](seed, *chosen.files, functools.partial(note, chosen.out, who, seed))


def note(out: str, who: str, seed: int, updates: int, train_loss: float, loss: float) -> None:
    """Prints an evaluation, and appends it to the file."""
    facts = {"question": "the books' experiment", "who": who, "seed": seed, "updates": updates}
    losses = {"train_loss_nats": round(train_loss, 4), "loss_nats": round(loss, 4)}
    line = json.dumps({**facts, **losses})
    print(line, flush=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def run_twin(seed: int, story: str, vocab: str, merges: str, on_losses) -> None:
    from benchmarks import book_twin
    from cs_lm import BPETokenizer

    encode = BPETokenizer.from_files(vocab, merges).encode
    text = Path(story).read_text(encoding="utf-8")
    book_twin.train(encode, text, seed, NUM_EPOCHS, EVAL_INTERVAL, on_losses)


def run_ours(seed: int, story: str, vocab: str, merges: str, on_losses) -> None:
    from cs_lm.cli import book

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--corpus_path", story, "--vocab_path", vocab, "--merges_path", merges]
        if book.main([*flags, "--seed", str(seed), "--out_dir", folder]):
            raise SystemExit("the run did not end")
        for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == "valid":
                on_losses(record["step"], record["train_loss_nats"], record["loss_nats"])


RUNS = {"ours": run_ours, "twin": run_twin}


def same_windows(story: str, num_seeds: int = 4, num_epochs: int = 8) -> None:
    """Prints the training losses at the end, of both kinds of a small model, seed by seed."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    from benchmarks import book_twin
    from cs_lm import GPT2LM, AdamW, Batch, BPETokenizer, GPT2Config, train_bpe, train_step
    from cs_lm.optim.param_groups import parameter_groups

    sizes = book_twin.Sizes(600, 64, 128, 4, 6)
    lr, weight_decay, betas = 1e-3, book_twin.WEIGHT_DECAY, (0.9, 0.999)
    text = Path(story).read_text(encoding="utf-8")[:6000]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(text, encoding="utf-8")
        ids = BPETokenizer(*train_bpe(path, sizes.vocab_size)).encode(text)

    def twin(seed: int):
        model = book_twin.BookGPT(sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)

        def step(_number: int, x, y) -> None:
            optimizer.zero_grad()
            book_twin.batch_loss(model, x, y).backward()
            optimizer.step()

        return model, step

    def ours(seed: int):
        book_twin.BookGPT(sizes)  # leaves torch's generator, and so the order, as for the twin
        shape = dict(sizes._asdict(), d_ff=4 * sizes.d_model, qkv_bias=False, tied_head=False)
        generator = torch.Generator().manual_seed(seed)
        model = GPT2LM(GPT2Config(**shape, init="torch"), generator=generator)
        optimizer = AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas)

        def step(number: int, x, y) -> None:
            model.seed_dropout(seed * 100_003 + number)
            train_step(model, optimizer, [Batch(x, y)], float("inf"))

        return model, step

    for seed in range(num_seeds):
        losses = {}
        for name, make in (("torch.nn", twin), ("cs_lm", ours)):
            data = book_twin.windows(ids, sizes.context_length)
            loader = DataLoader(data, book_twin.BATCH_SIZE, shuffle=True, drop_last=True)
            torch.manual_seed(seed)
            model, step = make(seed)
            model.train()
            number = 0
            for _ in range(num_epochs):
                for x, y in loader:
                    step(number, x, y)
                    number += 1
            model.eval()
            with torch.no_grad():
                found = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in loader]
            losses[name] = round(torch.stack(found).mean().item(), 4)
        print(json.dumps({"question": "the same windows", "seed": seed, **losses}), flush=True)


def curves(path: str) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(who, which loss) -> updates -> the losses of all seeds."""
    found = defaultdict(lambda: defaultdict(list))
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for which in ("train_loss_nats", "loss_nats"):
            found[record["who"], which][record["updates"]].append(record[which])
    return found


def table(path: str) -> str:
    lines = []
    for (who, which), by_updates in curves(path).items():
        last = max(by_updates)
        for updates in (1, *(u for u in (15, 16, 85, 86) if u in by_updates), last):
            losses = sorted(by_updates[updates])
            shown = f"{statistics.median(losses):.3f} ({losses[0]:.3f} to {losses[-1]:.3f})"
            lines.append(f"{who:5} {which:16} after {updates:2} updates: {shown} n={len(losses)}")
    return "\n".join(lines)


def draw(path: str, picture: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from cs_lm.cli.book import PUBLISHED

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = {"ours": "tab:blue", "twin": "tab:orange"}
    names = {"ours": "cs_lm", "twin": "torch.nn"}
    for (who, which), by_updates in curves(path).items():
        is_train = which == "train_loss_nats"
        steps = sorted(by_updates)
        label = f"{names[who]}, {'training' if is_train else 'validation'}"
        middle = [statistics.median(by_updates[u]) for u in steps]
        style = "-" if is_train else "--"
        axes.plot(steps, middle, style, color=colours[who], label=label)
        low, high = ([pick(by_updates[u]) for u in steps] for pick in (min, max))
        axes.fill_between(steps, low, high, color=colours[who], alpha=0.2, linewidth=0)
    updates, train_losses, losses = zip(*PUBLISHED)
    axes.plot(updates, train_losses, "k^", label="published, training")
    axes.plot(updates, losses, "kv", label="published, validation")
    axes.set(xlabel="updates", ylabel="loss [nats per token]", ylim=(0, None))
    axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
