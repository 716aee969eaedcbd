import traceback

from grpo_lightning.rewards.first_failure import summarize


def test_a_traceback_becomes_its_error_and_the_last_place_in_a_users_file():
    failure = """Traceback (most recent call last):
  File "/venv/lib/python3.12/site-packages/grpo_lightning/rewards/scoring.py", line 120, in _scores
    return expect_list(reward, reward.score(prompts, completions))
  File "/home/me/my_rewards.py", line 7, in graded
    return [json.loads(text) for text in completions]
  File "/usr/lib/python3.12/json/__init__.py", line 346, in loads
    return _default_decoder.decode(s)
json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)
and what else it said"""
    assert summarize(failure) == (
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)\n"
        "/home/me/my_rewards.py, line 7, in graded"
    )


def test_a_real_traceback_ends_where_it_was_raised():
    try:
        raise ValueError("of mine")
    except ValueError:
        error, place = summarize(traceback.format_exc()).splitlines()
    assert error == "ValueError: of mine"
    assert "test_first_failure.py, line " in place


def test_where_no_place_is_a_users_the_last_one_is_named():
    failure = 'Traceback\n  File "/usr/lib/python3.12/json/__init__.py", line 3, in loads\n    x\nValueError: no'
    assert summarize(failure) == "ValueError: no\n/usr/lib/python3.12/json/__init__.py, line 3, in loads"


def test_a_text_without_a_traceback_is_cut_to_two_lines():
    assert summarize("It returned nan.\nTwice.\nOr more.") == "It returned nan.\nTwice."
