"""The language models: layers, architectures, and the counts that follow from a config.

A model owns its parameters and its forward pass, nothing else. Training, sampling and import of
weights live elsewhere.
Read `layers` first, then `transformer` (the course's model), `base` (common to all models) and
`gpt2`. Then `kv_cache` (for generation), `init` (initial weights), `weight_counts` and `stats`
(number of weights, FLOPs), and `registry`, which maps names to architectures.
"""
