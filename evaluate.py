"""Launcher for `python evaluate.py ...` and `torchrun evaluate.py ...`; the same as `dihal evaluate ...`."""

import sys

from dihal.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
