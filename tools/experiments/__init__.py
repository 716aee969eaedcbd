"""Learning experiments: what a part of the objective does to a run, over five seeds; see ``docs/experiments.md``."""
