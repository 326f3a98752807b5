"""Runs the command that `python -m cs_lm <command>` names."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from cs_lm.cli._errors import readable_errors
from cs_lm.errors import UserError

COMMANDS = {
    "train": "train a language model on a text; the same as run_clm.py",
    "train-tokenizer": "learn a byte-pair vocabulary from a text",
    "tokenizer-report": "how a tokenizer cuts a text, and how it comes to a word's tokens",
    "encode": "turn a text into a token store",
    "evaluate": "loss, perplexity and bits per byte of a trained model on a text",
    "score": "how surprised a trained model is by each token of a text, in colours",
    "eval": "a trained model answers the questions of a task, after demonstrations or without",
    "generate": "let a trained model write",
    "serve": "a local page to prompt trained models, and OpenAI-style endpoints",
    "import-weights": "pretrained weights of other programs, as a run",
    "export-weights": "a trained model for other programs",
    "convert": "a run's checkpoint in one file, in parts, or for torch.distributed.checkpoint",
    "book": "the books' experiment: GPT-2's shape on a short story, beside the published losses",
    "sft": "fine-tune a trained model on conversations, instructions or pairs",
    "rank": "sample answers to prompts, and rank them by a rule, a reward model or yourself",
    "reward": "train a reward model on rankings",
    "dpo": "train a model on rankings directly, without a reward model",
    "ppo": "train a model on the scores of its own answers, held near where it began",
    "grpo": "train a model on which of its answers to a prompt are the better ones",
    "chat": "talk with a trained model on the terminal",
    "compare": "which of several models answers better, by a rule, a reward model or yourself",
    "rlhf": "all of these on a task about words, from a text to a report, in minutes",
    "plan": "what to train with a budget, and what a run takes, before it costs anything",
    "sweep": "train a family of runs, and show which settings give the lowest loss",
    "scaling-law": "fit scaling laws to trained models, and predict larger ones",
    "plot": "draw the losses, speed or gradient norms of one or several runs",
    "report": "one HTML page of a run: curves, samples, settings, faults",
    "cache": "what lies in data/: sizes and last uses; removes what is named",
    "verify": "read token stores and runs completely: is all of it as it was written?",
    "selfcheck": "compare every hand-written operation with torch's on this machine",
}


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: cs-lm <command> [--help]\n\ncommands:")
        for name, does in COMMANDS.items():
            print(f"  {name:<{width}}  {does}")
        print("\n`python -m cs_lm` is the same as cs-lm.")
        return 0
    if argv[0] not in COMMANDS:
        nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"need one of {', '.join(COMMANDS)}"
        raise UserError(f"cs_lm: got command {argv[0]!r}; {hint}")
    module = importlib.import_module(f"cs_lm.cli.{argv[0].replace('-', '_')}")
    return module.main(argv[1:])
