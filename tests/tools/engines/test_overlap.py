from tools.engines.overlap import compared, medians


def row(iteration, generate, hidden=""):
    return {"time/iteration": iteration, "time/generate": generate, "time/generate_hidden": hidden, "reward/mean": "1"}


def test_the_first_iterations_and_rows_without_times_are_left_out():
    rows = [row("9", "9"), row("", ""), row("9", "9"), row("4", "1", "3"), row("6", "2", "2"), row("5", "3", "4")]
    assert medians(rows) == {"iteration": 5.0, "generate": 2.0, "generate_hidden": 3.0}


def test_the_fall_is_that_of_the_medians():
    # Medians of 4, 5, 4 and of 3, 2, 3; a rollout of 2 beside the 2 of the rest.
    rounds = [
        {"in turn": {"iteration": 4.0, "generate": 2.0}, "ahead": {"iteration": 3.0}},
        {"in turn": {"iteration": 5.0, "generate": 2.5}, "ahead": {"iteration": 2.0}},
        {"in turn": {"iteration": 4.0, "generate": 1.0}, "ahead": {"iteration": 3.0}},
    ]
    assert compared(rounds) == {"in turn": 4.0, "ahead": 3.0, "fall": 0.25, "generate_over_rest": 1.0}
