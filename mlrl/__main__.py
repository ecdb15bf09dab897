"""`python -m mlrl ...` is the `mlrl` command."""

import sys

from mlrl.main import main

if __name__ == "__main__":
    sys.exit(main())
