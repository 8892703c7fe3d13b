"""Ctrl-C once, twice, delivered twice, and with a handler that is not ours."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from disttrain.resilience import Interrupts


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_press_is_a_request_and_logs_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupts() as interrupts:
        assert interrupts.requested is None
        press()
        assert interrupts.requested == "interrupt"
    assert capfd.readouterr().err.count("\n") == 1


def test_the_same_press_delivered_twice_counts_once() -> None:
    now = [10.0]
    with Interrupts(now=lambda: now[0]) as interrupts:
        press()
        now[0] += 0.9
        press()
        assert interrupts.requested


def test_a_second_press_stops_at_once() -> None:
    now = [10.0]
    with Interrupts(now=lambda: now[0]) as interrupts:
        press()
        now[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            press()
        assert interrupts.requested


def test_the_previous_handler_is_restored_and_leaving_twice_is_harmless() -> None:
    interrupts = Interrupts()
    interrupts.__enter__()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    interrupts.__exit__(None, None, None)
    interrupts.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_ctrl_c_still_ignores_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts:
        press()
        assert not interrupts.requested


def test_in_another_thread_it_does_nothing() -> None:
    seen: list[object] = []

    def enter() -> None:
        with Interrupts() as interrupts:
            seen.extend([interrupts.requested, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None, signal.default_int_handler]
