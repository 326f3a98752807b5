"""The commands: one file each, with `main(argv=None) -> int`.

They contain no formula and no file format; modules with a leading underscore are not commands.
Read `commands` first (the list of them), then `train`, which is also run_clm.py; `generate`,
`chat`, `serve`; `evaluate`, `score`, `eval`; `plot`, `report`; `plan`, `sweep`, `scaling_law`;
`sft`, `rank`, `reward`, `dpo`, `ppo`, `grpo`, `compare`, `rlhf` (all of these in a row);
`train_tokenizer`, `tokenizer_report`, `encode`; `import_weights`, `export_weights`, `convert`;
`verify`, `cache`, `selfcheck`, `book`.
"""
