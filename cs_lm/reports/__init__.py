"""Pages and pictures that people look at: HTML that opens from a file, without network.

Nothing here trains, samples or scores: it is given numbers and text.
Read `page` first (the frame of every page), then `curves` and `run_report`, `scored_text`,
`alignment_report` and `accuracy_plot`.
"""
