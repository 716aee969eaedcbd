import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from reward_functions import act

from grpo_lightning.rewards.isolation import CallStatus, FunctionSource, WorkerPool, locate
from grpo_lightning.types import ConfigurationError

DEADLINE_SECONDS = 1.0  # of a call that never ends; calls that end need a few milliseconds


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"  # an orphan is collected by the system, not by us
    except FileNotFoundError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 30.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def call(action, value=None):
    return ((action,), {"value": value})


@pytest.fixture(scope="module")
def shared_pool():
    """Keeps its processes from test to test, as a run does from iteration to iteration."""
    pool = WorkerPool(locate(act), timeout_seconds=DEADLINE_SECONDS, num_workers=2)
    yield pool
    pool.close()


def test_results_come_in_the_order_of_the_calls(shared_pool):
    results = shared_pool.map([call("return", value) for value in range(20)])
    assert [result.value for result in results] == list(range(20))
    assert {result.status for result in results} == {CallStatus.RETURNED}


@pytest.mark.parametrize(
    ("action", "status", "error"),
    [
        ("loop", CallStatus.TIMED_OUT, "No result within 1 s"),
        ("exit", CallStatus.CRASHED, "exit code 3"),
        ("abort", CallStatus.CRASHED, "SIGABRT"),
        ("raise", CallStatus.RAISED, "ValueError"),
        ("sys.exit", CallStatus.RAISED, "SystemExit"),
        ("unpicklable", CallStatus.RAISED, "pickle"),
    ],
)
def test_a_call_that_goes_wrong_leaves_the_others_alone(shared_pool, action, status, error):
    calls = [call("return", 1), call(action), call("return", 3), call("return", 4)]
    results = shared_pool.map(calls)
    assert results[1].status is status
    assert error in results[1].error
    assert results[1].value is None
    assert [results[index].value for index in (0, 2, 3)] == [1, 3, 4]


def test_arguments_that_cannot_be_sent_are_an_error_of_that_call(shared_pool):
    results = shared_pool.map([call("return", threading.Lock()), call("return", 2)])
    assert results[0].status is CallStatus.RAISED
    assert results[1].value == 2


def test_messages_larger_than_a_pipe_go_through_both_ways(shared_pool):
    text = "y" * 5_000_000
    results = shared_pool.map([call("big", 5_000_000), call("return", text)])
    assert results[0].value == "x" * 5_000_000
    assert results[1].value == text


def test_what_a_function_prints_does_not_disturb_its_result(shared_pool, capfd):
    assert shared_pool.map([call("print", 5)])[0].value == 5
    captured = capfd.readouterr()
    assert captured.out == ""


def test_the_deadline_holds_off_the_main_thread(shared_pool):
    results = []
    thread = threading.Thread(target=lambda: results.extend(shared_pool.map([call("loop"), call("return", 2)])))
    thread.start()
    thread.join(60)
    assert [result.status for result in results] == [CallStatus.TIMED_OUT, CallStatus.RETURNED]


def test_a_process_serves_many_calls_and_none_is_left_after_close():
    pool = WorkerPool(locate(act), timeout_seconds=60.0, num_workers=2)
    pids = {result.value for result in pool.map([call("pid") for _ in range(20)])}
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids
    pool.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)  # neither running nor a zombie
    pool.close()
    assert pool.map([call("return", 7)])[0].value == 7  # starts again when needed
    pool.close()


def test_no_process_is_left_when_the_pool_is_forgotten():
    pool = WorkerPool(locate(act), timeout_seconds=60.0, num_workers=1)
    pid = pool.map([call("pid")])[0].value
    assert is_alive(pid)
    del pool
    assert wait_until(lambda: not is_alive(pid))


def test_what_a_function_started_ends_with_its_process():
    pool = WorkerPool(locate(act), timeout_seconds=60.0, num_workers=1)
    pid = pool.map([call("child")])[0].value
    assert is_alive(pid)
    pool.close()
    assert wait_until(lambda: not is_alive(pid))


def test_a_process_that_died_between_calls_is_replaced():
    pool = WorkerPool(locate(act), timeout_seconds=60.0, num_workers=1)
    pid = pool.map([call("pid")])[0].value
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid))
    assert pool.map([call("return", 8)])[0].value == 8
    pool.close()


def test_a_process_that_is_dying_when_a_call_comes_is_not_the_calls_fault(monkeypatch):
    pool = WorkerPool(locate(act), timeout_seconds=60.0, num_workers=1)
    pid = pool.map([call("pid")])[0].value
    process = pool._workers[0]._process
    monkeypatch.setattr(process, "poll", lambda: None)  # as long as a process is dying, it still seems to run
    os.kill(pid, signal.SIGKILL)
    assert pool.map([call("return", 9)])[0].value == 9
    pool.close()


def test_a_worker_ends_when_its_parent_was_killed(tmp_path):
    (tmp_path / "endless.py").write_text(
        "import os\ndef f(path):\n    open(path, 'w').write(str(os.getpid()))\n    while True: pass\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from grpo_lightning.rewards.isolation import FunctionSource, WorkerPool
            sys.path.insert(0, sys.argv[1])
            pool = WorkerPool(FunctionSource("endless", None, "f"), timeout_seconds=None, num_workers=1)
            pool.map([((sys.argv[1] + "/pid",), {})])
            """
        )
    )
    parent = subprocess.Popen([sys.executable, script, tmp_path])
    pid_file = tmp_path / "pid"
    assert wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    pid = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not is_alive(pid))


def test_a_worker_does_not_import_our_package():
    source = FunctionSource("sys", None, "modules.copy")
    pool = WorkerPool(source, timeout_seconds=60.0, num_workers=1)
    result = pool.map([((), {})])[0]
    pool.close()
    assert result.status is CallStatus.RAISED  # modules cannot be sent; the worker ran it all the same
    pool = WorkerPool(FunctionSource("builtins", None, "eval"), timeout_seconds=60.0, num_workers=1)
    loaded = pool.map([(("list(__import__('sys').modules)",), {})])[0].value
    pool.close()
    assert not {"torch", "lightning", "grpo_lightning"} & set(loaded)


def test_a_function_that_does_not_load_in_a_worker_is_a_configuration_error(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_dependency\n")
    pool = WorkerPool(FunctionSource("no_such_module", str(broken), "f"), timeout_seconds=1.0, num_workers=1)
    with pytest.raises(ConfigurationError, match=r"(?s)no_such_module\.f:.*no_such_dependency") as caught:
        pool.map([((), {})])
    assert len(str(caught.value).splitlines()) <= 3


def test_a_function_of_a_script_is_found_by_its_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def double(x):\n    return 2 * x\n")
    pool = WorkerPool(FunctionSource("__main__", str(script), "double"), timeout_seconds=60.0, num_workers=1)
    assert pool.map([((4,), {})])[0].value == 8
    pool.close()


class Judge:
    @staticmethod
    def static(x):
        return x

    def method(self, x):
        return x

    def __call__(self, x):
        return x


@pytest.mark.parametrize("function", [lambda: 0, functools.partial(act, "loop"), Judge(), Judge().method])
def test_what_has_no_name_to_import_by_is_refused(function):
    with pytest.raises(ConfigurationError, match="top level"):
        locate(function)


def test_a_static_method_has_a_name():
    assert locate(Judge.static).qualname == "Judge.static"
