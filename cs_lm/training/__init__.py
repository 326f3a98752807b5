"""The training loop and all that keeps a run from losing work.

No architecture, no tokenizer format and no command lives here.
Read `step` first (one update), then `trainer` (the loop), `task` (its hooks) and
`language_modeling` (the task of this library); `state` and `checkpoint` (what is saved),
`checkpoint_manager` and `async_checkpoint` (where and when), `run_dir` (a run's folder);
`reporter` with `metrics_log`, `console`, `tensorboard`, `throughput`, `plots` (what is told);
`nonfinite`, `signals`, `best_measure`, `malloc`, `estimate` (a dry run).
"""
