"""`python -m codjax` is `codjax`."""

import sys

from codjax import cli

if __name__ == "__main__":
    sys.exit(cli.main())
