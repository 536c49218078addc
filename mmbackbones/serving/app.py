"""A model over HTTP: the Open Inference Protocol, image uploads, metrics, a page.

| path | what |
|---|---|
| `/` | a page to drop an image on |
| `POST /predict` | an image, as a form field `image` or as the body, to JSON |
| `/v2`, `/v2/models/{name}`, `POST /v2/models/{name}/infer` | the protocol |
| `/v2/health/live`, `/v2/health/ready` | for orchestrators |
| `/metrics` | for Prometheus |

Departs from the source: there is none.
"""

import asyncio
import base64
import io
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from mmengine.logging import print_log
from PIL import Image
from starlette.datastructures import UploadFile

from mmbackbones.inference.backends import Backend
from mmbackbones.inference.drawing import hue_palette
from mmbackbones.inference.results import Detections
from mmbackbones.inference.tiling import Boxes
from mmbackbones.serving.batching import Batcher
from mmbackbones.serving.limits import BodyLimits, Limits, RequestError, decode_image
from mmbackbones.serving.metrics import Metrics
from mmbackbones.serving.protocol import (
    model_metadata,
    parse_request,
    render_response,
)

__all__ = ['Service', 'create_app']

_PAGE = Path(__file__).with_name('page.html')
_NO_CONF = 0.0  # a client of the protocol filters for itself


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
        palette = backend.info.palette or hue_palette(len(backend.info.classes))
        self.palette = [tuple(colour) for colour in palette]

    async def in_thread(self, function: Callable, *args: Any) -> Any:
        """Run something slow beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, function, *args
        )

    async def predict(
        self, images: Sequence[np.ndarray]
    ) -> list[Boxes] | list[np.ndarray]:
        """What is in `(H, W, 3)` uint8 BGR images.

        Raises:
            RequestError: as `Batcher.submit`; 500 where the model fails.
        """
        prepare = partial(self.backend.prepare, name='request')
        inputs = [await self.in_thread(prepare, image) for image in images]
        try:
            return await self.batcher.submit(inputs, self.limits.queue_seconds)
        except RequestError:
            raise
        except Exception as error:
            print_log(f'prediction failed: {error!r}', logger='current', level=40)
            raise RequestError(500, 'the model failed; see the log') from error

    async def close(self) -> None:
        """Finish what was accepted."""
        await self.batcher.stop()
        self._pool.shutdown()


def create_app(
    backend: Backend,
    *,
    name: str = 'model',
    limits: Limits | None = None,
    max_batch_size: int = 8,
    max_delay: float = 0.005,
) -> FastAPI:
    """The server of one model.

    Args:
        backend: `Inferencer(...).backend`.
        name: of the model in paths.
        limits: `Limits()` by default.
        max_batch_size: images that the model sees at once.
        max_delay: seconds that an image waits for others.

    Raises:
        ValueError: a batch size or delay that is none; a segmentor of more than 256
            classes, whose maps no palette picture holds.
    """
    if backend.info.task == 'segmentation' and len(backend.info.classes) > 256:
        raise ValueError(
            f'the model has {len(backend.info.classes)} classes; maps of at most 256 '
            'are served'
        )
    service = Service(
        backend,
        name,
        limits or Limits(),
        dict(max_batch_size=max_batch_size, max_delay=max_delay),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.close()

    app = FastAPI(
        title='mmbackbones', lifespan=lifespan, docs_url='/docs', redoc_url=None
    )
    app.state.service = service
    _add_routes(app, service)
    app.add_middleware(BodyLimits, limits=service.limits)

    @app.exception_handler(RequestError)
    async def answer_error(_: Request, error: RequestError) -> Response:
        return error.response()

    @app.middleware('http')
    async def count(request: Request, call_next: Callable) -> Response:
        started = time.perf_counter()
        response = await call_next(request)
        route = request.scope.get('route')  # its pattern: names are no labels
        service.metrics.observe_request(
            getattr(route, 'path', 'other'),
            response.status_code,
            time.perf_counter() - started,
        )
        return response

    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    page = _PAGE.read_text()

    @app.get('/', include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get('/metrics', include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type='text/plain')

    @app.post('/predict')
    async def predict(request: Request, conf: float = 0.4) -> JSONResponse:
        if not 0 <= conf <= 1:
            raise RequestError(400, f'conf is {conf}; give a number between 0 and 1')
        data = await _upload(request)
        image = await service.in_thread(decode_image, data, service.limits.max_pixels)
        (found,) = await service.predict([image])
        answer = await service.in_thread(_as_json, service, image, found, conf)
        return JSONResponse(answer)

    @app.get('/v2')
    async def server_metadata() -> dict:
        return dict(name='mmbackbones', version='2', extensions=['binary_tensor_data'])

    @app.get('/v2/health/live')
    async def live() -> dict:
        return dict(live=True)

    @app.get('/v2/health/ready')
    async def ready() -> dict:
        _check_ready(service)
        return dict(ready=True)

    for path in ('/v2/models/{model}', '/v2/models/{model}/versions/{version}'):
        _add_model_routes(app, service, path)


def _add_model_routes(app: FastAPI, service: Service, path: str) -> None:
    @app.get(path)
    async def metadata(model: str, version: str = '1') -> dict:
        _check_model(service, model, version)
        return model_metadata(
            service.name, service.backend.info.task, service.backend.name
        )

    @app.get(f'{path}/ready')
    async def model_ready(model: str, version: str = '1') -> dict:
        _check_model(service, model, version)
        _check_ready(service)
        return dict(name=service.name, ready=True)

    @app.post(f'{path}/infer')
    async def infer(request: Request, model: str, version: str = '1') -> Response:
        _check_model(service, model, version)
        task = service.backend.info.task
        body = await request.body()
        parsed = await service.in_thread(
            parse_request, body, request.headers, task, service.limits
        )
        found = await service.predict(parsed.images)
        conf = _NO_CONF if parsed.conf is None else parsed.conf
        tensors = _stack(task, found, conf)
        content, headers = await service.in_thread(
            render_response, service.name, parsed, tensors
        )
        return Response(content, headers=headers)


def _check_model(service: Service, model: str, version: str) -> None:
    if model != service.name or version != '1':
        raise RequestError(404, f'there is one model here: {service.name!r}, version 1')


def _check_ready(service: Service) -> None:
    if not service.batcher.accepting:
        raise RequestError(503, 'the server is starting or shutting down')


async def _upload(request: Request) -> bytes:
    """The form field `image`, or the body."""
    if not request.headers.get('content-type', '').startswith('multipart/form-data'):
        return await request.body()
    try:
        form = await request.form(max_files=1, max_fields=10)
    except Exception as error:  # whatever the parser makes of a broken form
        raise RequestError(400, 'the form cannot be read') from error
    image = form.get('image')
    if not isinstance(image, UploadFile):
        raise RequestError(400, "the form has no file in the field 'image'")
    return await image.read()


def _as_json(
    service: Service, image: np.ndarray, found: Boxes | np.ndarray, conf: float
) -> dict:
    height, width = image.shape[:2]
    answer: dict[str, Any] = dict(width=width, height=height)
    info = service.backend.info
    if info.task == 'segmentation':
        picture = Image.fromarray(found.astype(np.uint8), 'P')
        picture.putpalette([part for colour in service.palette for part in colour])
        file = io.BytesIO()
        picture.save(file, 'PNG')
        labels, pixels = np.unique(found, return_counts=True)
        return answer | dict(
            classes=[
                dict(
                    category_id=info.category_ids[label],
                    category_name=info.classes[label],
                    share=count / found.size,
                    colour=service.palette[label],
                )
                for label, count in zip(labels.tolist(), pixels.tolist(), strict=True)
            ],
            label_map=base64.b64encode(file.getvalue()).decode(),
        )
    kept = found.pick(found.scores >= conf)
    result = Detections(
        **kept._asdict(),
        info=info,
        index=0,
        name='request',
        path=None,
        shape_hw=(height, width),
        held_image=None,
    )
    entries = result.to_coco()
    colours = [service.palette[label] for label in result.labels.tolist()]
    keys = ('category_id', 'category_name', 'bbox', 'score')
    return answer | dict(
        detections=[
            {key: entry[key] for key in keys} | dict(colour=colour)
            for entry, colour in zip(entries, colours, strict=True)
        ]
    )


def _stack(
    task: str, found: Sequence[Boxes] | Sequence[np.ndarray], conf: float
) -> dict[str, np.ndarray]:
    """Results of a request as tensors; missing detections have score 0, label -1."""
    if task == 'segmentation':
        if len({labels.shape for labels in found}) > 1:
            raise RequestError(
                400, 'maps of images of different sizes are no tensor; send them apart'
            )
        return dict(labels=np.stack(found).astype(np.int32))
    kept = [boxes.pick(boxes.scores >= conf) for boxes in found]
    counts = [len(boxes.scores) for boxes in kept]
    num, room = len(kept), max(counts)
    tensors = dict(
        boxes=np.zeros((num, room, 4), np.float32),
        scores=np.zeros((num, room), np.float32),
        labels=np.full((num, room), -1, np.int64),
        num_detections=np.array(counts, np.int32),
    )
    for i, boxes in enumerate(kept):
        tensors['boxes'][i, : counts[i]] = boxes.xyxy
        tensors['scores'][i, : counts[i]] = boxes.scores
        tensors['labels'][i, : counts[i]] = boxes.labels
    return tensors
