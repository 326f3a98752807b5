"""The language models: layers, architectures, and what follows from a config alone.

A model owns its parameters and its forward pass, nothing else: training, sampling and import of
weights live elsewhere.
Read `layers` first, then `transformer` (the course's model) and `base`, what all models have in
common; `gpt2`; `kv_cache` for generation; `init` (how weights begin); `weight_counts` and `stats`
(how many, at which cost); `registry`, which names the architectures.
"""
