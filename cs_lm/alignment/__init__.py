"""From a language model to one that follows instructions.

Here live the losses of fine-tuning, reward models, PPO, DPO and GRPO, and what they are computed
from, conversations as token ids, and one `Task` for each kind of training. No training loop:
that is training/. Read in this order:
`conversations` (messages, templates), `records` (their files), `examples` (their batches, padded or
packed), `masked` (sums over the tokens of an answer), `kl` (distance from the reference),
`advantages` (which token was better than expected), `losses` (one formula each), `stage` (settings
of every kind of training here), `text_mix` (pre-training text beside it), `answers` (to
conversations), `lora` (small changes of weights), `sft`
(fine-tuning on demonstrations), `reward_model` (scores and rankings),
`ranking_task`, `reward_training`, `dpo`, `rules` (scores without a model), `rollouts` (answers with
their log-probabilities), `policy_task` (what learns from them), `ppo`, `grpo`, `comparison` (of
answers), `words` (a task of which all is known).
"""
