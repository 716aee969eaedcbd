"""The claims that the learning experiments bear out, from a seed that is not among the reported ones."""

import pytest

from tools.experiments import dynamic_sampling


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [dynamic_sampling.EXPERIMENT], ids=lambda experiment: experiment.name)
def test_the_arms_differ_as_the_paper_says(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # gets the cold start
    curves = {arm: experiment.train(arm, seed=101, num_updates=experiment.num_updates) for arm in experiment.arms}
    for comparison in experiment.comparisons:
        smaller = 0.0 if comparison.smaller is None else experiment.outcome(curves[comparison.smaller])
        assert experiment.outcome(curves[comparison.larger]) > smaller
