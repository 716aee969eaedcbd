import pytest

from tools.benchmark import machine
from tools.benchmark.machine import BusyMachineError


@pytest.fixture
def processor(monkeypatch):
    """Two readings of /proc/stat: user nice system idle iowait irq softirq steal."""

    def set_to(before, after):
        readings = iter([[f"cpu {before} 0 0"], [f"cpu {after} 0 0"]])
        monkeypatch.setattr(machine, "_lines", lambda path: next(readings))

    return set_to


def test_idle_and_waiting_time_is_not_busy(processor):
    # 10 ticks of user time and 10 stolen, of 100.
    processor("100 0 0 500 0 0 0 0", "110 0 0 570 10 0 0 10")
    assert machine.busy_share(seconds=0.0) == pytest.approx(0.2)


@pytest.mark.parametrize(("user", "is_quiet"), [(4, True), (6, False)])
def test_a_busy_machine_is_refused(processor, user, is_quiet):
    processor("0 0 0 0 0 0 0 0", f"{user} 0 0 {100 - user} 0 0 0 0")
    if is_quiet:
        machine.require_quiet(seconds=0.0, num_trials=1)
        return
    with pytest.raises(BusyMachineError, match="6% busy"):
        machine.require_quiet(seconds=0.0, num_trials=1)


def test_a_busy_moment_is_waited_out(monkeypatch):
    shares = iter([0.9, 0.5, 0.01])
    monkeypatch.setattr(machine, "busy_share", lambda *, seconds: next(shares))
    machine.require_quiet(num_trials=3)
    assert not list(shares)


@pytest.mark.parametrize(("name", "is_there"), [("amx_bf16", True), ("avx512_bf16", True), ("avx512_f", False)])
def test_products_in_half_precision_need_an_instruction(monkeypatch, name, is_there):
    monkeypatch.setattr(machine.torch.cpu, "get_capabilities", lambda: {name: True, "amx_fp16": True})
    assert machine.multiplies_bf16() is is_there


@pytest.mark.parametrize(("load", "is_low"), [(0.5, True), (0.7, False)])
def test_the_load_is_per_core(monkeypatch, load, is_low):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {0, 1})
    if is_low:
        machine.require_low_load(num_trials=1)
        return
    with pytest.raises(BusyMachineError, match="load average"):
        machine.require_low_load(num_trials=1)


def test_the_load_of_what_has_just_ended_is_waited_out(monkeypatch):
    loads, slept = iter([9.0, 5.0, 0.1]), []
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(machine.time, "sleep", slept.append)
    machine.require_low_load()
    assert not list(loads)
    assert slept == [5, 5]


def test_the_machine_is_described():
    assert set(machine.describe()) == {"processor", "cores", "memory_bytes", "multiplies_bf16", "system"}
