"""The commands: one file each, with `main(argv=None) -> int`.

No formula and no file format lives here; modules with a leading underscore are no commands.
Read `commands` first (which there are), then `train`, which is also run_clm.py; `generate`,
`evaluate`; `train_tokenizer`, `tokenizer_report`, `encode`; `import_weights`, `export_weights`;
`plot`, `verify`, `cache`, `selfcheck`, `book`.
"""
