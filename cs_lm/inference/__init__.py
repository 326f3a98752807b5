"""Text from a trained model: sampling, beam search, streaming.

Nothing here changes a weight or judges a text.
Read `filters` first (from logits to logits), then `sampling` (their order, and the draw of one
token), `decoder` (the logits after many rows, with the key-value cache), `generate` (many tokens),
`beam_search`, and `text` (streams text as soon as it is certain). `decoding_config` has the
settings.
"""
