"""A model, its queue and its numbers: what the routes call."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import cv2
import numpy as np
from mmengine.logging import print_log

from mmbackbones.inference.backends import Backend
from mmbackbones.inference.drawing import hue_palette
from mmbackbones.inference.tiling import Boxes
from mmbackbones.serving.batching import Batcher
from mmbackbones.serving.limits import Limits, RequestError
from mmbackbones.serving.metrics import Metrics

__all__ = ['Service']


class Service:
    """What the routes call.

    Args:
        backend: a model that is ready to predict.
        name: of the model in paths.
        limits: of the server.
        batcher: options of `Batcher`.
    """

    def __init__(
        self, backend: Backend, name: str, limits: Limits, batcher: dict
    ) -> None:
        self.backend, self.name, self.limits = backend, name, limits
        self.metrics = Metrics()
        self.batcher = Batcher(
            backend.predict, observe=self.metrics.observe_batch, **batcher
        )
        self.metrics.watch_queue(self.batcher.__len__)
        # Decoding more images at once than there are processors only takes memory.
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, 'decode')
        # Held from the decoding of images until they are prepared, and let go of: those
        # of all clients that wait for the model would not fit.
        self.reading = asyncio.Semaphore(os.cpu_count() or 1)
        palette = backend.info.palette or hue_palette(len(backend.info.classes))
        self.palette = [tuple(colour) for colour in palette]

    async def in_thread(self, function: Callable, *args: Any) -> Any:
        """Run something slow beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, function, *args
        )

    async def prepare(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Inputs of the model, from `(H, W, 3)` uint8 BGR images.

        Raises:
            RequestError: 422 where a side of an image rounds to no pixel; 500 where
                it fails otherwise.
        """
        prepare = partial(self.backend.prepare, name='request')
        try:
            return [await self.in_thread(prepare, image) for image in images]
        except cv2.error as error:
            raise RequestError(
                422, 'an image cannot be brought to the size of the model'
            ) from error
        except Exception as error:
            raise _failure(error) from error

    async def predict(self, inputs: Sequence[Any]) -> list[Boxes] | list[np.ndarray]:
        """What is in prepared images.

        Raises:
            RequestError: as `Batcher.submit`; 500 where the model fails.
        """
        try:
            return await self.batcher.submit(inputs, self.limits.queue_seconds)
        except RequestError:
            raise
        except Exception as error:
            raise _failure(error) from error

    async def close(self) -> None:
        """Finish what was accepted."""
        await self.batcher.stop()
        self._pool.shutdown()


def _failure(error: Exception) -> RequestError:
    """What a client sees of something that should not happen."""
    print_log(f'prediction failed: {error!r}', logger='current', level=40)
    return RequestError(500, 'the model failed; see the log')
