"""`python -m cs_lm <command>`: the commands besides training."""

import sys

if __name__ == "__main__":
    from cs_lm.cli.commands import main

    sys.exit(main())
