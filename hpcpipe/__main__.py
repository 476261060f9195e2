"""``python -m hpcpipe`` is the same program as the ``hpcpipe`` command."""

import sys

from hpcpipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
