"""Requests of many clients, predicted together.

Departs from the source: there is none.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mmbackbones.serving.limits import RequestError

__all__ = ['Batcher']


class _Waiting(NamedTuple):
    input: Any
    result: asyncio.Future


class Batcher:
    """Collects inputs for a moment and predicts them in one thread.

    A batch runs when it is full, or when its first input has waited `max_delay`
    seconds. While one runs, the next collects, so a busy server has full batches and
    an idle one answers at once.

    Args:
        predict: inputs to results, one by one in order; called in one thread.
        max_batch_size: inputs at once.
        max_delay: seconds that an input waits for others.
        observe: called with the size and the seconds of each batch.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_batch_size: int = 8,
        max_delay: float = 0.005,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f'max_batch_size is {max_batch_size}; give 1 or more')
        if max_delay < 0:
            raise ValueError(f'max_delay is {max_delay}; give 0 seconds or more')
        self.max_batch_size, self.max_delay = max_batch_size, max_delay
        self._predict, self._observe = predict, observe
        self._queue: asyncio.Queue[_Waiting | None] = asyncio.Queue()
        self._pool = ThreadPoolExecutor(1, 'predict')
        self._task: asyncio.Task | None = None
        self.accepting = False

    def __len__(self) -> int:
        """Inputs that wait."""
        return self._queue.qsize()

    def start(self) -> None:
        """Begin; within a running event loop."""
        self._task = asyncio.create_task(self._run())
        self.accepting = True

    async def stop(self) -> None:
        """Take nothing more, finish what was taken."""
        self.accepting = False
        if self._task is not None:
            self._queue.put_nowait(None)
            await self._task
        self._pool.shutdown()

    async def submit(self, inputs: Sequence[Any], timeout: float) -> list[Any]:
        """Results of some inputs, which may be parted over batches.

        Args:
            inputs: of one request.
            timeout: seconds.

        Raises:
            RequestError: 503 after `stop`, 504 when the time is over.
        """
        if not self.accepting:
            raise RequestError(503, 'the server is shutting down')
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(item, loop.create_future()) for item in inputs]
        for item in waiting:
            self._queue.put_nowait(item)
        gathered = asyncio.gather(*(item.result for item in waiting))
        try:
            async with asyncio.timeout(timeout):
                return await gathered
        except TimeoutError:  # the inputs are cancelled, and left out of batches
            raise RequestError(504, f'no result after {timeout:g} s') from None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        ending = False
        while not ending:
            batch, ending = await self._collect()
            batch = [item for item in batch if not item.result.done()]
            if not batch:
                continue
            started = time.perf_counter()
            try:
                results = await loop.run_in_executor(
                    self._pool, self._predict, [item.input for item in batch]
                )
            except Exception as error:
                for item in batch:
                    if not item.result.done():
                        item.result.set_exception(error)
            else:
                for item, result in zip(batch, results, strict=True):
                    if not item.result.done():
                        item.result.set_result(result)
            self._observe(len(batch), time.perf_counter() - started)

    async def _collect(self) -> tuple[list[_Waiting], bool]:
        """The next batch, and whether it is the last."""
        first = await self._queue.get()
        if first is None:
            return [], True
        batch = [first]
        deadline = time.monotonic() + self.max_delay
        while len(batch) < self.max_batch_size:
            remaining = deadline - time.monotonic()
            try:
                if self._queue.empty() and remaining > 0:
                    item = await asyncio.wait_for(self._queue.get(), remaining)
                else:
                    item = self._queue.get_nowait()
            except (TimeoutError, asyncio.QueueEmpty):
                break
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False
