"""`python -m dihal`: the command line where the console script is not installed."""

from dihal.cli import main

if __name__ == "__main__":
    main()
