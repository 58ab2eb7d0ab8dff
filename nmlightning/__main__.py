"""`python -m nmlightning` is `nm`."""

import sys

from nmlightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
