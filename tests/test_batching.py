"""Images of several clients in one batch."""

import asyncio

import pytest

pytest.importorskip('fastapi', reason='needs fastapi: pip install mmbackbones[serve]')

from mmbackbones.serving.batching import Batcher
from mmbackbones.serving.limits import RequestError


def test_batches_are_filled_while_one_runs_and_results_find_their_way_back() -> None:
    sizes = []

    async def main() -> list:
        batcher = Batcher(
            lambda inputs: [10 * x for x in inputs],
            max_batch_size=4,
            max_delay=0.05,
            observe=lambda size, seconds: sizes.append(size),
        )
        batcher.start()
        results = await asyncio.gather(
            *(batcher.submit([i, i + 100], 5) for i in range(5))
        )
        await batcher.stop()
        with pytest.raises(RequestError, match='shutting down'):
            await batcher.submit([1], 1)
        return results

    results = asyncio.run(main())
    assert results == [[10 * i, 10 * i + 1000] for i in range(5)]
    assert sizes == [4, 4, 2]


def test_what_was_taken_is_finished_and_what_waits_too_long_is_not_computed() -> None:
    import threading

    seen = []
    release = threading.Event()

    def predict(inputs: list[int]) -> list[int]:
        release.wait(5)
        seen.extend(inputs)
        return inputs

    async def main() -> tuple:
        batcher = Batcher(predict, max_batch_size=1, max_delay=0)
        batcher.start()
        first = asyncio.create_task(batcher.submit([1], 5))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError) as late:
            await batcher.submit([2], 0.05)
        third = asyncio.create_task(batcher.submit([3], 5))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(batcher.stop())
        release.set()
        await stopping
        return late.value.status, await first, await third

    assert asyncio.run(main()) == (504, [1], [3])
    assert seen == [1, 3]


@pytest.mark.parametrize('wrong', [dict(max_batch_size=0), dict(max_delay=-1)])
def test_bad_options_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Batcher(list, **wrong)
