"""How good a trained model is: perplexity, and answers to tasks.

Nothing here changes a weight.
Read `perplexity` first, then `scoring` (token by token). In-context evaluation is `tasks` (files of
questions), `prompts`, `likelihood` (of an answer), `in_context` (asks and judges), `intervals` and
`contamination`. `lm_eval_model` lends our models to EleutherAI's harness.
"""
