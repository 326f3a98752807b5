"""Weights and tokenizers of other programs: in and out, in the layouts that they read.

The only wing that knows the names of other programs' tensors and settings.
Read `layouts` first (which there are), then `tensor_mapping` and `hf_config` (what theirs is called
and means), `sources` (their files), `import_weights`, `export_weights`, `tokenizers`.
"""
