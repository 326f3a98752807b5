"""Uses of a trained model: sampling, text generation, evaluation.

Nothing here changes a weight.
Read `sampling` first (from logits to one token), then `generate` (many tokens, with the key-value
cache), `text` (streams text as soon as it is certain), and `evaluate`.
"""
