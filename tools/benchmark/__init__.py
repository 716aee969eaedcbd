"""Whole training steps of this framework and of TRL, on one machine, with equal work: see `__main__`."""
