"""Implementation bugs: the run goes on, its result is wrong."""
