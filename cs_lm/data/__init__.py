"""From text to batches: corpus -> tokenizer -> token store -> tokens -> batches.

Nothing here depends on a model.
Read `pipeline` first: it calls the other parts in order. They are `corpus` (which text),
`tokenizers` and `stores` (find or make them), `token_store` (reads) and `store_writer` (writes),
`engines` (compiled tokenizers that may encode in place of ours), `batches` and `prefetch` (the data
of a step). `cache` manages the files in data/. `pipes` saves
text that comes through a pipe.
"""
