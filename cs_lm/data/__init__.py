"""The way of a text: corpus -> tokenizer -> token store -> tokens -> batches.

Nothing here knows a model.
Read `pipeline` first: it is the way, downwards. Its parts are `corpus` (which text), `tokenizers`
and `stores` (found or made), `token_store` (reads) and `store_writer` (writes), `batches` and
`prefetch` (what a step gets). `cache` keeps what was made in data/, `pipes` what came in once.
"""
