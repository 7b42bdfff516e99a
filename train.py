"""Launcher for `python train.py ...` and `torchrun train.py ...`; the same as `dihal train ...`."""

import sys

from dihal.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
