"""What is done with a model besides training it: sampling, text, evaluation.

Nothing here changes a weight.
Read `sampling` first (from logits to one token), then `generate` (token after token, with the
key-value cache), `text` (what can be shown as soon as it is certain), `evaluate`.
"""
