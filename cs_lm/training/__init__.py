"""The training loop, and everything that protects the work of a run.

This package contains no architecture, no tokenizer format and no command.
Read `step` first (one update), then `trainer` (the loop), `task` (its hooks) and
`language_modeling` (the task of this library); `state` and `checkpoint` (what is saved),
`sharded_checkpoint` (in parts), `checkpoint_manager` and `async_checkpoint` (where and when),
`convert` and `dcp` (other forms), `run_dir` (a run's folder);
`reporter` with `metrics_log`, `console`, `trackers`, `throughput`, `plots`, `figures` (display),
`other_ranks` (no logs: of several processes, rank 0 writes them);
`nonfinite` (NaN losses), `signals`, `best_measure` (which losses are comparable), `malloc`,
`estimate` (a dry run).
"""
