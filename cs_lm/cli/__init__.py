"""The commands: each module has `main(argv=None) -> int`."""
