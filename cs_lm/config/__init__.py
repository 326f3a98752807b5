"""Every setting of a run: dataclass fields, their checks, the flags made from them, presets.

Standard library only: no tensors, and no file formats of this project.
Read `fields` first: it shows how a field becomes a flag. Then read `model`, `data` and `optim`,
which `run` combines. `presets` has the published model sizes. `shared` has the settings that
several commands use. `flags` turns a command line into a config.
"""
