from tools.engines.overlap import compared, medians


def rows(*iterations):
    """Of two steps each: the first repeats the times of the iteration before."""
    times = [{"time/iteration": i, "time/generate": g, "time/generate_hidden": h} for i, g, h in iterations]
    before = [dict.fromkeys(times[0], ""), *times[:-1]]
    pairs = zip(before, times, strict=True)
    return [{**row, "step": str(step)} for step, row in enumerate(row for pair in pairs for row in pair)]


def test_the_first_iterations_and_rows_that_repeat_are_left_out():
    measured = rows(("9", "9", ""), ("9", "9", "1"), ("4", "1", "3"), ("6", "2", "2"), ("5", "3", "4"))
    assert medians(measured, steps_per_iteration=2) == {"iteration": 5.0, "generate": 2.0, "generate_hidden": 3.0}


def test_the_fall_is_that_of_the_medians():
    # Medians of 4, 5, 4 and of 3, 2, 3; a rollout of 2 beside the 2 of the rest.
    rounds = [
        {"in turn": {"iteration": 4.0, "generate": 2.0}, "ahead": {"iteration": 3.0}},
        {"in turn": {"iteration": 5.0, "generate": 2.5}, "ahead": {"iteration": 2.0}},
        {"in turn": {"iteration": 4.0, "generate": 1.0}, "ahead": {"iteration": 3.0}},
    ]
    assert compared(rounds) == {"in turn": 4.0, "ahead": 3.0, "fall": 0.25, "generate_over_rest": 1.0}
