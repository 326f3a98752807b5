#!/usr/bin/env python3
"""Trains a language model: `python run_clm.py --help` lists every setting.

cs_lm/cli/train.py reads the flags, cs_lm/training/trainer.py has the loop. The command
`cs-lm train`, of an installed cs_lm, is the same.
"""

import sys

if __name__ == "__main__":
    try:
        from cs_lm.cli.train import main
    except KeyboardInterrupt:  # while torch is being loaded
        sys.exit(130)
    sys.exit(main())
