"""Import and export of weights and tokenizers, in the file layouts of other programs.

Only this package knows the names of other programs' tensors and settings.
Read `layouts` first (the list of them), then `tensor_mapping` and `hf_config` (their tensors and
settings, and ours), `sources` (their files), `import_weights`, `export_weights`, `tokenizers`.
"""
