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

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from mmengine.logging import print_log
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from mmbackbones.inference.backends import Backend
from mmbackbones.serving.answers import as_json, as_tensors
from mmbackbones.serving.limits import BodyLimits, Limits, RequestError, decode_image
from mmbackbones.serving.protocol import (
    model_metadata,
    parse_request,
    render_response,
)
from mmbackbones.serving.service import Service

__all__ = ['create_app']

_PAGE = Path(__file__).with_name('page.html')
_NO_CONF = 0.0  # a client of the protocol filters for itself


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
        max_batch_size: images that the model sees at once; of a file whose batch is
            fixed, at most as many as it takes.
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
    if backend.max_batch is not None and backend.max_batch < max_batch_size:
        max_batch_size = backend.max_batch
        print_log(
            f'the file takes {max_batch_size} at once, and so do batches; one that is '
            'exported with --dynamic-batch takes more',
            logger='current',
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

    _add_error_handlers(app)

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


def _add_error_handlers(app: FastAPI) -> None:
    """One form of all errors, also of those that the framework finds."""

    @app.exception_handler(RequestError)
    async def answer_error(_: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def answer_wrong_value(_: Request, error: RequestValidationError) -> Response:
        wrong = '; '.join(
            f'{entry["loc"][-1]} is {entry.get("input")!r}: {entry["msg"]}'
            for entry in error.errors()
        )
        return RequestError(400, wrong).response()

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        what = f'{request.method} {request.url.path}: {error.detail}'
        return JSONResponse({'error': what}, error.status_code, error.headers)


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
        async with service.reading:
            image = await service.in_thread(
                decode_image, data, service.limits.max_pixels
            )
            inputs, shape_hw = await service.prepare([image]), image.shape[:2]
            del image
        (found,) = await service.predict(inputs)
        answer = await service.in_thread(
            as_json, service.backend.info, service.palette, shape_hw, found, conf
        )
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
        async with service.reading:
            parsed = await service.in_thread(
                parse_request, body, request.headers, task, service.limits
            )
            inputs = await service.prepare(parsed.images)
            parsed.images.clear()
        found = await service.predict(inputs)
        conf = _NO_CONF if parsed.conf is None else parsed.conf
        tensors = as_tensors(task, found, conf)
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
