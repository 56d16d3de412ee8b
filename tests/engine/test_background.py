"""Jobs in the background, and a signal at any instruction of what hands them in."""

import os
import signal
import sys
import threading

import pytest
import torch

from merge_callback.engine.background import Background
from merge_callback.reduce import compiled, threads
from merge_callback.reduce.ranges import in_ranges

CALLS = {
    "submit": lambda background, done: background.submit(lambda: done.append(True)),
    "drain": lambda background, done: (background.submit(lambda: done.append(True)), background.drain()),
}


class CtrlCAt:
    """A Ctrl-C before one instruction, in this thread, of the package's code or of ``threading``."""

    def __init__(self, at):
        self.left = at

    def __enter__(self):
        sys.settrace(self.enter_frame)

    def __exit__(self, *_):
        sys.settrace(None)

    def enter_frame(self, frame, event, arg):
        if "/merge_callback/" not in frame.f_code.co_filename and "threading" not in frame.f_code.co_filename:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self.trace

    def trace(self, frame, event, arg):
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self.trace


@pytest.mark.parametrize("name", [pytest.param("submit", marks=pytest.mark.slow), "drain"])
def test_an_interrupted_call_leaves_jobs_that_are_run_and_waited_for(name):
    at, was_interrupted = 0, True
    while was_interrupted:
        at, background, done = at + 1, Background(), []
        try:
            with CtrlCAt(at):
                CALLS[name](background, done)
            was_interrupted = False
        except KeyboardInterrupt:
            pass
        later = background.submit(lambda done=done: done.append("later"))

        assert background.drain(timeout=20), f"interrupted at instruction {at}"
        assert later.is_set()
        assert done in (["later"], [True, "later"])
        for thread in threading.enumerate():
            if thread.name == "merge-background":
                thread.join(20)
                assert not thread.is_alive()
    assert at > 50


def test_jobs_run_in_order_and_may_submit_others():
    background, done = Background(), []

    def first():
        background.submit(lambda: done.append("third"))
        assert background.is_current
        assert background.drain()  # does not wait for itself
        done.append("first")

    background.submit(first)
    background.submit(lambda: done.append("second"))

    assert background.drain(20)
    assert done[0] == "first"
    assert sorted(done[1:]) == ["second", "third"]
    assert not background.is_current


def test_draining_ends_in_time_and_jobs_that_raise_are_done():
    background, gate = Background(), threading.Event()
    waits = background.submit(gate.wait)
    fails = background.submit(lambda: 1 / 0)

    assert not background.drain(timeout=0.01)
    assert not waits.wait(0.01)
    gate.set()
    assert background.drain(20)
    assert [waits.wait(), waits.wait(), fails.is_set()] == [True, True, True]


def test_without_threads_the_caller_runs_the_job(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    done = []
    assert Background().submit(lambda: done.append(threading.current_thread())).is_set()
    assert done == [threading.main_thread()]


def test_threads_take_short_turns_while_a_job_runs_in_any_background():
    before, gate, seen = sys.getswitchinterval(), threading.Event(), []
    first, second = Background(), Background()
    first.submit(gate.wait)
    second.submit(lambda: seen.append(sys.getswitchinterval()))
    assert second.drain(20)
    gate.set()
    assert first.drain(20)
    assert seen == [pytest.approx(1e-3)]
    assert sys.getswitchinterval() == before


def test_passes_in_the_background_leave_training_half_of_the_cores_and_precedence(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    usual, seen = os.getpriority(os.PRIO_PROCESS, 0), []
    lower = min(19, usual + 10) if sys.platform == "linux" else usual

    def note(*_):
        seen.append((threading.current_thread().name, os.getpriority(os.PRIO_PROCESS, 0)))

    def passes():
        seen.clear()
        compiled._in_threads(note, compiled._Pass(), most=8)
        nested = in_ranges(1 << 22, torch.device("cpu"), lambda *_: threads.most())
        note()
        return seen[:], nested

    in_training, nested = passes()
    assert [priority for _, priority in in_training] == [usual] * 7
    assert nested == [6] * 4
    found = []
    assert Background().submit(lambda: found.append(passes())).wait(60)
    ((in_background, nested),) = found
    assert in_background == [("reduce", lower)] * 3 + [("merge-background", usual)]
    assert nested == [3] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == usual
