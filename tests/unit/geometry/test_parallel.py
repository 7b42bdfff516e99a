"""Layers at a time: same numbers whatever the number of workers, order and failures as without."""

from __future__ import annotations

import threading

import pytest
import torch

from dihal import score_layers
from dihal.config import ScoreConfig
from dihal.geometry.parallel import layer_queue, layer_workers
from tests.kit import tiny_backbone
from tests.unit.geometry.test_windows import documents

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_layers_at_a_time_as_threads_each_on_one(threads: int) -> None:
    torch.set_num_threads(threads)
    together = threading.Barrier(threads, timeout=30)

    def work(number: int) -> tuple[int, int]:
        together.wait()  # passes only if all workers are in it at once
        return number, torch.get_num_threads()

    with layer_workers(CPU) as over:
        found = list(over(work, range(2 * threads)))
        assert torch.get_num_threads() == threads
    assert found == [(number, 1) for number in range(2 * threads)]
    inherited: list[int] = []
    later = threading.Thread(target=lambda: inherited.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == inherited[0] == threads


def test_the_first_failure_in_order_is_raised_and_threads_are_restored() -> None:
    torch.set_num_threads(2)

    def work(number: int) -> int:
        if number >= 3:
            raise ValueError(f"layer {number}")
        return number

    with pytest.raises(ValueError, match="layer 3"), layer_workers(CPU) as over:
        list(over(work, range(20)))
    assert torch.get_num_threads() == 2


def test_elsewhere_than_on_a_cpu_nothing_runs_beside() -> None:
    with layer_workers(torch.device("meta")) as over:
        assert list(over(lambda _: threading.current_thread(), range(2))) == [threading.current_thread()] * 2


def test_number_of_workers_changes_no_number(monkeypatch) -> None:
    # The forward pass is not ours to pin: the states are computed by one thread, everything else by 1 or 3.
    from dihal.geometry import streaming

    states = streaming._states

    def by_one_thread(*arguments):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return states(*arguments)
        finally:
            torch.set_num_threads(threads)

    monkeypatch.setattr(streaming, "_states", by_one_thread)
    config = ScoreConfig(tokens=1500, sequence_length=48, batch_tokens=512, pool=700, anchors=90, bootstrap=30)
    reports = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        reports.append(score_layers(tiny_backbone(), documents(40), config))
    one, three = reports
    assert one.coordinates == three.coordinates
    assert one.layers == three.layers


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_queue_works_beside_its_caller_and_drops_what_has_not_begun(device: str) -> None:
    torch.set_num_threads(1)
    release, begun, done = threading.Event(), threading.Event(), []

    def work(number: int) -> int:
        begun.set()
        release.wait(30)
        done.append(number)
        return number

    def use() -> None:
        with layer_queue(torch.device(device)) as submit:
            futures = [submit(work, number) for number in range(3)]
            assert begun.wait(30)
            assert not futures[0].done()
            futures[1].cancel()
            release.set()
            assert futures[0].result() == 0
            assert futures[2].result() == 2
            release.clear()
            begun.clear()
            submit(work, 3)
            assert begun.wait(30)
            submit(work, 4)
            threading.Timer(0.2, release.set).start()
            raise ValueError("the caller failed")

    with pytest.raises(ValueError, match="the caller failed"):
        use()
    assert done == [0, 2, 3]
    assert torch.get_num_threads() == 1
