"""Work on the next items while the caller is busy with the last one."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ['map_ahead']

In = TypeVar('In')
Out = TypeVar('Out')


def map_ahead(
    function: Callable[[In], Out],
    items: Iterable[In],
    *,
    num_workers: int,
    num_ahead: int,
) -> Iterator[Out]:
    """Like `map`, in order, computed by threads ahead of what is taken.

    Threads, since decoding and resizing release the interpreter's lock. Errors of
    the function and of the items arrive in their place. Closing the generator stops
    the threads.

    Args:
        function: called in threads; for several items at a time.
        items: iterated in a thread of its own: decoding a video counts, too.
        num_workers: threads; 0 does everything in the caller's.
        num_ahead: results that may wait to be taken, at least 1.
    """
    if num_workers == 0:
        with contextlib.closing(_iterate(items)) as iterator:
            for item in iterator:
                yield function(item)
        return
    slots = threading.Semaphore(num_ahead)
    stopped = threading.Event()
    futures: queue.SimpleQueue[Future | None] = queue.SimpleQueue()

    def submit_all() -> None:
        try:
            with contextlib.closing(_iterate(items)) as iterator:
                for item in iterator:
                    slots.acquire()
                    if stopped.is_set():
                        return
                    futures.put(pool.submit(function, item))
        except BaseException as error:  # handed to the caller, who raises it
            failed: Future = Future()
            failed.set_exception(error)
            futures.put(failed)
        futures.put(None)

    with ThreadPoolExecutor(num_workers) as pool:
        feeder = threading.Thread(target=submit_all, daemon=True)
        feeder.start()
        try:
            while (future := futures.get()) is not None:
                result = future.result()
                slots.release()
                yield result
        finally:
            stopped.set()
            slots.release()
            feeder.join()
            pool.shutdown(cancel_futures=True)


def _iterate(items: Iterable[In]) -> Iterator[In]:
    """A generator over items: closing it closes theirs."""
    yield from items
