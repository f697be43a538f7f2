"""`python -m sandmartin`."""

import sys

from sandmartin.cli import main

if __name__ == "__main__":
    sys.exit(main())
