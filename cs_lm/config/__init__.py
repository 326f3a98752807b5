"""Every setting of a run: dataclass fields, their checks, the flags made from them, presets.

Standard library only; nothing here knows a tensor or a file format of ours.
Read `fields` first (how a field becomes a flag), then `model`, `data`, `optim`, which `run` puts
together; `presets` has the published sizes, `shared` what several commands have in common, `flags`
turns a command line into a config.
"""
