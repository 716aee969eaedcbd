import pickle
import sys

import pytest

from grpo_lightning.rewards.worker import RAISED, RETURNED, _call, load_function

FUNCTIONS = """
def double(x):
    return 2 * x

class Judge:
    @staticmethod
    def grade(x):
        return x + 1

number = 3
"""


@pytest.fixture
def file(tmp_path):
    """A file that no path leads to."""
    path = tmp_path / "functions_of_a_user.py"
    path.write_text(FUNCTIONS)
    yield str(path)
    sys.modules.pop("_worker_functions_of_a_user", None)


def test_a_function_is_loaded_from_its_file_where_its_module_cannot_be_imported(file):
    assert load_function("functions_of_a_user", file, "double")(4) == 8
    assert load_function("__main__", file, "Judge.grade")(4) == 5
    assert load_function("no.such.package", file, "double")(1) == 2


def test_a_function_is_imported_by_its_name_where_that_is_possible(file):
    from json import dumps

    assert load_function("json", file, "dumps") is dumps
    assert load_function("json", None, "dumps") is dumps


@pytest.mark.parametrize(
    ("qualname", "error"), [("absent", AttributeError), ("number", TypeError), ("Judge.absent", AttributeError)]
)
def test_what_is_no_function_is_an_error(file, qualname, error):
    with pytest.raises(error):
        load_function("functions_of_a_user", file, qualname)


def test_what_is_no_python_file_is_an_error(tmp_path):
    with pytest.raises(ImportError, match="is not a Python file"):
        load_function("absent_module", str(tmp_path / "text.txt"), "f")


async def later(x):
    return x + 1


def give_up():
    sys.exit(0)


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (max, ((3, 5), {}), (RETURNED, 5)),
        (dict, ((), {"a": 1}), (RETURNED, {"a": 1})),
        (later, ((2,), {}), (RETURNED, 3)),
    ],
)
def test_the_answer_is_the_functions_value(function, arguments, expected):
    assert pickle.loads(_call(function, pickle.dumps(arguments))) == expected


@pytest.mark.parametrize(
    ("function", "payload", "error"),
    [
        (int, pickle.dumps((("x",), {})), "ValueError"),
        (give_up, pickle.dumps(((), {})), "SystemExit"),
        (int, b"no pickle", "UnpicklingError"),
        (lambda: lambda: None, pickle.dumps(((), {})), "pickle"),  # its value cannot be sent
    ],
    ids=["raises", "exits", "arguments", "value"],
)
def test_whatever_goes_wrong_is_an_answer_with_its_traceback(function, payload, error):
    status, traceback = pickle.loads(_call(function, payload))
    assert status == RAISED
    assert traceback.startswith("Traceback")
    assert error in traceback
