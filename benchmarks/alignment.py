"""Rollouts beside `transformers`' `generate`, and what the chain of alignment reaches.

    python -m benchmarks.alignment [--rounds 5]
    python -m benchmarks.alignment --seeds 0 1 2 --folder FOLDER

The first draws 64 answers of 64 tokens to prompts of 32 with 9.8 M parameters at temperature 1: we
keep the log-probability of each token; they once without, and once with what gives them.
The second runs `cs-lm rlhf` for each seed (about ten minutes each, if FOLDER has no such run yet),
and holds what comes out against the criteria below.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.decoding import NUM_NEW, SMALL, SMALL_CONTEXT, llama, prompts_of
from benchmarks.measure import in_turns

BATCH_SIZE = 64
NO_END = 1 << 20  # no token ends an answer: all are as long


def our_rollouts():
    from cs_lm.alignment.rollouts import draw_answers
    from cs_lm.config.model import ModelConfig
    from cs_lm.inference.sampling import uniform_draws
    from cs_lm.models.transformer import TransformerLM

    model = TransformerLM(ModelConfig(**SMALL, context_length=SMALL_CONTEXT)).eval()
    prompts = prompts_of(BATCH_SIZE).tolist()

    def draw():
        uniform = uniform_draws(0, range(BATCH_SIZE), NUM_NEW)
        return draw_answers(model, prompts, NO_END, uniform)

    draw()
    return draw


def their_answers(with_log_probs: bool):
    import torch

    model = llama(SMALL, SMALL_CONTEXT, bos_token_id=None, pad_token_id=0)
    ids = prompts_of(BATCH_SIZE)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NUM_NEW,
                "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # fmt: skip
    if with_log_probs:
        settings |= {"output_scores": True, "return_dict_in_generate": True}

    def generate():
        with torch.no_grad():
            found = model.generate(ids, **settings)
            if with_log_probs:
                model.compute_transition_scores(
                    found.sequences, found.scores, normalize_logits=True
                )

    generate()
    return generate


def compare_rollouts(rounds: int) -> None:
    contestants = {
        "cs_lm": our_rollouts,
        "transformers": functools.partial(their_answers, False),
        "transformers with log-probabilities": functools.partial(their_answers, True),
    }
    question = "a new token, drawn at temperature 1, batch of 64, 9.8 M parameters"
    in_turns(question, contestants, rounds, repeats=BATCH_SIZE * NUM_NEW)


def _model(name: str, key: str) -> Callable[[dict[str, Any]], float]:
    return lambda found: found["models"][name][key]


# What each seed must reach: name, measured value, whether it is enough.
CRITERIA: dict[str, tuple[Callable[[dict[str, Any]], float], Callable[[float], bool]]] = {
    "SFT is right (0.8)": (_model("SFT", "right"), lambda x: x >= 0.8),
    "SFT ends (0.95)": (_model("SFT", "ended"), lambda x: x >= 0.95),
    "SFT's text loss over the base's (0.05)": (
        lambda found: found["models"]["SFT"]["bits_per_byte"] - found["base_bits_per_byte"],
        lambda x: x <= 0.05,
    ),
    "reward model right on gold (0.87)": (
        lambda found: found["gold_accuracy"],
        lambda x: x >= 0.87,
    ),
    "reward model below the labelers (0.15)": (
        lambda found: found["labeler_accuracy"] - found["reward_model"]["accuracy"],
        lambda x: x <= 0.15,
    ),
    "PPO-ptx gold over SFT (0.15)": (
        lambda found: found["models"]["PPO-ptx"]["gold"] - found["models"]["SFT"]["gold"],
        lambda x: x >= 0.15,
    ),
    "PPO-ptx wins (0.58)": (
        lambda found: found["models"]["PPO-ptx"]["wins"][0],
        lambda x: x >= 0.58,
    ),
    "PPO-ptx KL (below 5)": (_model("PPO-ptx", "kl"), lambda x: x < 5),
    "PPO-ptx right over SFT (0)": (
        lambda found: found["models"]["PPO-ptx"]["right"] - found["models"]["SFT"]["right"],
        lambda x: x >= 0,
    ),
    "PPO-ptx text over SFT (0.02)": (
        lambda found: (
            found["models"]["PPO-ptx"]["bits_per_byte"] - found["models"]["SFT"]["bits_per_byte"]
        ),
        lambda x: x <= 0.02,
    ),
    "PPO text over PPO-ptx (0.05)": (
        lambda found: (
            found["models"]["PPO"]["bits_per_byte"] - found["models"]["PPO-ptx"]["bits_per_byte"]
        ),
        lambda x: x >= 0.05,
    ),
    "without KL, proxy over PPO's (0)": (
        lambda found: found["models"]["PPO without KL"]["proxy"] - found["models"]["PPO"]["proxy"],
        lambda x: x > 0,
    ),
    "without KL, gold over SFT (below 0)": (
        lambda found: found["models"]["PPO without KL"]["gold"] - found["models"]["SFT"]["gold"],
        lambda x: x < 0,
    ),
    "DPO wins (0.57)": (lambda found: found["models"]["DPO"]["wins"][0], lambda x: x >= 0.57),
    "minutes (10)": (lambda found: sum(found["seconds"].values()) / 60, lambda x: x <= 10),
}


def check_seeds(seeds: list[int], folder: Path) -> None:
    """Prints a table: a line for each criterion, a column for each seed."""
    from cs_lm.cli import rlhf

    found = []
    for seed in seeds:
        out = folder / f"seed{seed}"
        if not (out / "summary.json").is_file():
            rlhf.main(["--seed", str(seed), "--out_dir", str(out)])
        found.append(json.loads((out / "summary.json").read_text(encoding="utf-8")))
    width = max(map(len, CRITERIA))
    print(f"\n{'criterion':<{width}}" + "".join(f"{f'seed {seed}':>14}" for seed in seeds))
    for name, (measured, is_enough) in CRITERIA.items():
        values = [measured(one) for one in found]
        cells = (f"{x:.3f} {'yes' if is_enough(x) else 'NO':>3}" for x in values)
        print(f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("runs/rlhf"))
    chosen = parser.parse_args(argv)
    if chosen.seeds:
        check_seeds(chosen.seeds, chosen.folder)
    else:
        compare_rollouts(chosen.rounds)


if __name__ == "__main__":
    main()
