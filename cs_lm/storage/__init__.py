"""Files that survive: written whole, locked, listed with checksums, and read without running code.

Nothing here knows a model, a config or what a file is for.
Read `atomic` first (a name appears only when the content is complete), then `lock`, `manifest`
(lengths and checksums of a folder's files), `safe_load` (what `torch.load` is not given).
"""
