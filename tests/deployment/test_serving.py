# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Batches of what concurrent clients ask."""

from __future__ import annotations

import asyncio
import threading

import pytest

from peft_sdpt.deployment.serving import Batcher
from peft_sdpt.errors import InputError


class Handler:
    """Doubles numbers. Notes the batches, and waits in each one until `free` is set."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        assert self.free.wait(60)
        if -1 in numbers:
            raise RuntimeError("damaged")
        return [2 * number for number in numbers]


@pytest.fixture
def handler():
    return Handler()


def test_items_that_come_together_share_a_batch(handler):
    async def clients() -> list[int]:
        batcher = Batcher(handler, lambda _: None, 4, 0.0)
        async with batcher.running():
            return await asyncio.gather(*map(batcher, range(6)))

    assert asyncio.run(clients()) == [0, 2, 4, 6, 8, 10]
    assert handler.batches == [[0, 1, 2, 3], [4, 5]]


def test_an_item_waits_for_others_but_not_longer_than_allowed(handler):
    async def clients() -> None:
        batcher = Batcher(handler, lambda _: None, 2, 30.0)
        async with batcher.running():
            first = asyncio.create_task(batcher(1))
            await asyncio.sleep(0.05)
            assert not handler.batches
            # A full batch does not wait.
            assert await batcher(2) == 4 and await first == 2
        batcher = Batcher(handler, lambda _: None, 2, 0.01)
        async with batcher.running():
            assert await batcher(3) == 6

    asyncio.run(clients())
    assert handler.batches == [[1, 2], [3]]


def test_items_gather_while_a_batch_is_at_work(handler):
    async def clients() -> None:
        batcher = Batcher(handler, lambda _: None, 8, 0.0)
        async with batcher.running():
            handler.free.clear()
            tasks = [asyncio.create_task(batcher(0))]
            while not handler.batches:
                await asyncio.sleep(0)
            tasks += [asyncio.create_task(batcher(number)) for number in (1, 2, 3)]
            await asyncio.sleep(0)
            handler.free.set()
            assert await asyncio.gather(*tasks) == [0, 2, 4, 6]

    asyncio.run(clients())
    assert handler.batches == [[0], [1, 2, 3]]


def test_a_batch_has_one_key_and_the_oldest_item_is_in_it(handler):
    async def clients() -> None:
        batcher = Batcher(handler, lambda number: number % 2, 2, 0.0)
        async with batcher.running():
            await asyncio.gather(*map(batcher, (1, 2, 4, 6, 3, 5)))

    asyncio.run(clients())
    assert handler.batches == [[1, 3], [2, 4], [6], [5]]


def test_an_error_belongs_to_its_batch(handler):
    async def clients() -> list:
        batcher = Batcher(handler, lambda _: None, 2, 0.0)
        async with batcher.running():
            return await asyncio.gather(*map(batcher, (-1, 1, 2)), return_exceptions=True)

    one, two, three = asyncio.run(clients())
    assert isinstance(one, RuntimeError) and isinstance(two, RuntimeError) and three == 4


def test_a_client_that_goes_away_costs_nothing(handler):
    async def clients() -> None:
        batcher = Batcher(handler, lambda _: None, 8, 0.05)
        async with batcher.running():
            gone = asyncio.create_task(batcher(1))
            await asyncio.sleep(0)
            gone.cancel()
            assert await batcher(2) == 4

    asyncio.run(clients())
    assert handler.batches == [[2]]


def test_what_waits_at_the_end_is_answered(handler):
    async def clients() -> list[int]:
        batcher = Batcher(handler, lambda _: None, 2, 60.0)
        async with batcher.running():
            tasks = [asyncio.create_task(batcher(number)) for number in range(3)]
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks)

    assert asyncio.run(clients()) == [0, 2, 4]


def without_hanging(client) -> None:
    asyncio.run(asyncio.wait_for(client(), 60))


def no_answer(items: list[int]) -> list[int]:
    return next(iter([]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda items: items[1:], "run: must return an answer for each of 2 items; returned 1."),
        (lambda items: [*items, 0], "run: must return an answer for each of 2 items; returned 3."),
        (lambda items: None, "'NoneType' object is not iterable"),
        (no_answer, "run: raised StopIteration."),
    ],
)
def test_answers_that_are_wrong_belong_to_their_batch(wrong, message):
    async def clients() -> None:
        batcher = Batcher(lambda items: items if 3 in items else wrong(items), lambda _: None, 2, 0.0)
        async with batcher.running():
            errors = await asyncio.gather(batcher(1), batcher(2), return_exceptions=True)
            assert [str(error) for error in errors] == [message] * 2
            assert await batcher(3) == 3

    without_hanging(clients)


def test_an_item_without_a_key_gets_the_error_alone(handler):
    async def clients() -> None:
        batcher = Batcher(handler, lambda number: 1 // number, 2, 0.0)
        async with batcher.running():
            bad, good = await asyncio.gather(batcher(0), batcher(1), return_exceptions=True)
            assert isinstance(bad, ZeroDivisionError) and good == 2

    without_hanging(clients)


def test_nothing_is_asked_of_a_batcher_that_does_not_run(handler):
    async def clients() -> None:
        batcher = Batcher(handler, lambda _: None, 2, 0.0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="only within"):
                await batcher(1)
            async with batcher.running():
                assert await batcher(1) == 2
                with pytest.raises(RuntimeError, match="only run once at a time"):
                    async with batcher.running():
                        pass
                assert await batcher(2) == 4
        with pytest.raises(RuntimeError, match="only within"):
            await batcher(1)

    without_hanging(clients)


@pytest.mark.parametrize(
    ("size", "wait", "message"),
    [
        (0, 0.0, "max_batch_size=0: must be a whole number of at least 1."),
        (2.5, 0.0, "max_batch_size=2.5: must be a whole number of at least 1."),
        (1, -1.0, "max_wait=-1.0: must be at least 0 seconds."),
        (1, float("nan"), "max_wait=nan: must be at least 0 seconds."),
    ],
)
def test_bad_arguments_of_a_batcher(size, wait, message, handler):
    with pytest.raises(InputError) as error:
        Batcher(handler, lambda _: None, size, wait)
    assert str(error.value) == message
