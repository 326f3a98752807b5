"""Safe files: atomic writes, file locks, checksums, and loading without running code.

This package does not depend on models, configs or the purpose of a file.
Read `atomic` first: a file gets its name only when its content is complete. Then read `lock`,
`manifest` (lengths and checksums of a folder's files), `json_file` and `safe_load` (checks before
`torch.load`).
"""
