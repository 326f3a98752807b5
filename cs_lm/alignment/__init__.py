"""From a language model to one that follows instructions.

Here live the losses of fine-tuning, reward models, PPO, DPO and GRPO, and what they are computed
from. No training loop: that is training/. Read in this order: `masked` (sums over the tokens of an
answer), `kl` (distance from the reference), `advantages` (which token was better than expected),
`losses` (one formula each).
"""
