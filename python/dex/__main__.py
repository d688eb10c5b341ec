"""``python -m dex``: the ``dex`` command, for when another program has that name."""

import sys

from dex.cli import main

if __name__ == "__main__":
    sys.exit(main())
