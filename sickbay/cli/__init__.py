"""The commands, one file each: the file's docstring is its help, `add_arguments` its options, `main` what it does."""
