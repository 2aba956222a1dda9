"""`python -m sickbay`: the same as the `sickbay` command, where launchers want a module (`torchrun -m sickbay run train.py`)."""

import os
import sys

if __name__ == "__main__":
    # Python has put the current folder first: a json.py beside the user's script is the script's, not ours.
    if sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    from sickbay.cli.main import main

    raise SystemExit(main())
