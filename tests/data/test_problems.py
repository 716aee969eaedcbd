import pytest

from grpo_lightning.data.problems import Step, bounded, bracketed, chain, integer, modular, rounded, write_working


def steps(problem):
    return [str(step) for step in problem.steps]


def test_modular_keeps_the_remainder_of_every_step():
    # 7+5 = 12 -> 2;  2-8 = -6 -> 4;  4*3 = 12 -> 2
    problem = chain([7, 5, 8, 3], "+-*", modular(10))
    assert problem.text == "7+5-8*3"
    assert steps(problem) == ["7+5=2", "2-8=4", "4*3=2"]
    assert problem.answer == "2"


def test_integer_goes_from_left_to_right_and_below_zero():
    problem = chain([2, 9, 3], "-*", integer)
    assert steps(problem) == ["2-9=-7", "-7*3=-21"]
    assert problem.answer == "-21"


def test_bounded_turns_an_operation_round_where_the_value_would_leave():
    # 95+8 = 103 > 99: minus.   87-8 stays.   4-9 < 0: plus.
    assert chain([95, 8, 8], "+-", bounded(99)).text == "95-8-8"
    assert chain([4, 9], "-", bounded(99)).text == "4+9"


def test_bounded_reaches_both_ends():
    assert chain([94, 5], "+", bounded(99)).answer == "99"
    assert chain([5, 5], "-", bounded(99)).answer == "0"


def test_brackets_stand_around_every_operation_but_the_last():
    # Four numbers cut in the middle (0.4 of 3 places -> after the second), then both halves.
    problem = bracketed([3, 4, 5, 7], "+*-", [0.4, 0.0, 0.0])
    assert problem.text == "(3+4)*(5-7)"
    assert steps(problem) == ["3+4=7", "5-7=-2", "7*(-2)=-14"]
    assert problem.answer == "-14"


@pytest.mark.parametrize(
    ("cuts", "text"),
    [([0.0, 0.0], "3+(4*5)"), ([0.99, 0.0], "(3+4)*5")],
)
def test_the_cut_says_where_an_expression_divides(cuts, text):
    assert bracketed([3, 4, 5], "+*", cuts).text == text


def test_a_problem_of_two_numbers_has_no_brackets():
    assert bracketed([3, 4], "+", [0.5]).text == "3+4"


@pytest.mark.parametrize(
    ("style", "written"),
    [("steps", "37+8=45,45-9=36"), ("chained", "37+8=45-9=36"), ("totals", "45,36")],
)
def test_working_is_written_in_three_styles(style, written):
    assert write_working(chain([37, 8, 9], "+-", integer), style) == written


def test_a_negative_number_on_the_right_stands_in_brackets():
    assert str(Step(3, "-", -2, 5)) == "3-(-2)=5"


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(7, 1, 7), (0, 3, 0), (1, 3, 0), (2, 3, 3), (7, 3, 6), (-2, 3, -3), (-4, 3, -3), (5, 2, 6), (-5, 2, -4)],
)
def test_rounding_takes_the_nearest_multiple_and_the_greater_of_two(value, unit, expected):
    assert rounded(value, unit) == expected
