from types import SimpleNamespace

from grpo_lightning.ending.waiting import explained

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"


def test_a_collective_that_was_waited_for_in_vain_names_its_setting():
    error = RuntimeError(GLOO)
    found = explained(error, SimpleNamespace(timeout_seconds=5.0))
    assert isinstance(found, TimeoutError)
    assert "another rank hangs" in str(found)
    assert "trainer.strategy.timeout_seconds = 5. " in str(found)
    assert error.__notes__ == [f"error: {found}"]


def test_a_strategy_of_lightnings_has_no_such_setting():
    assert "timeout_seconds" not in str(explained(RuntimeError(GLOO), SimpleNamespace()))


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("out of memory"), TimeoutError("a server timed out"), OSError("timed out")):
        assert explained(error, SimpleNamespace()) is error
        assert not hasattr(error, "__notes__")
