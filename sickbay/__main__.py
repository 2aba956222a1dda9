"""`python -m sickbay`: the same as the `sickbay` command, where launchers want a module (`torchrun -m sickbay run train.py`)."""

from sickbay.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
