"""What to train: plans of runs before they cost anything, sweeps of settings, scaling laws.

Read `laws` (published laws) and `compute_table` first; then `devices`, `meshes`, `reliability` for
runs on many devices, which `published_runs` holds against papers, and `run_time` for one device.
`sweep` (a family of runs from a file), `sweep_runs` (trains them), `sweep_results`, `sweep_plots`;
`coordinate_check` (muP). `points` and `fits` (laws through measured runs), `fit_plots`.
`text_table` is how tables are shown.
"""
