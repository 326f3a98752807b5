"""`python -m cs_lm <command>`: the same as `cs-lm`."""

import sys

if __name__ == "__main__":
    try:
        from cs_lm.cli.commands import main
    except KeyboardInterrupt:  # while torch is being loaded
        sys.exit(130)
    sys.exit(main())
