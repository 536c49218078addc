"""What a server takes from strangers: sizes, times, kinds of images.

Departs from the source: there is none.
"""

import asyncio
import io
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from starlette.responses import JSONResponse

from mmbackbones.inference.sources import open_source

__all__ = ['BodyLimits', 'Limits', 'RequestError', 'decode_image']

_KINDS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF')

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Of one server.

    Attributes:
        max_body_bytes: of a request.
        max_pixels: of an image; of all encoded images of a request together.
        max_images: of a request.
        max_requests: that are being received, wait or are computed at once; further
            ones get status 503.
        body_seconds: a client may take to send a request.
        queue_seconds: a request may wait for its result.
    """

    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 64
    max_requests: int = 256
    body_seconds: float = 20.0
    queue_seconds: float = 30.0


class RequestError(Exception):
    """A request that gets an answer other than 200.

    Args:
        status: of HTTP.
        message: for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    def response(self) -> JSONResponse:
        """In the form of the Open Inference Protocol."""
        headers = {'Retry-After': '1'} if self.status == 503 else None
        return JSONResponse({'error': self.message}, self.status, headers)


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """An encoded image as `(H, W, 3)` uint8 BGR, upright.

    The size is looked at before a pixel is decoded.

    Raises:
        RequestError: 413 for too many pixels, 415 for another kind of file, 422 for
            a broken one.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_KINDS)
    except Image.DecompressionBombError as error:
        raise RequestError(413, str(error)) from error
    except Exception as error:
        raise RequestError(
            415, f'not an image of a known kind; send one of {", ".join(_KINDS)}'
        ) from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise RequestError(
                413,
                f'the image has {width} x {height} pixels; at most {max_pixels} are '
                'taken',
            )
        try:
            return next(iter(open_source(image))).image
        except Exception as error:  # Pillow's decoders raise anything
            raise RequestError(422, f'the image is broken: {error}') from error


class BodyLimits:
    """ASGI middleware: admits, receives and bounds a request before the app sees it.

    Args:
        app: ASGI application.
        limits: of the server.
    """

    def __init__(self, app: Callable, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.num_requests = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer 411, 413, 408 or 503 in place of the app where a limit is broken."""
        if scope['type'] != 'http' or scope['method'] not in ('POST', 'PUT', 'PATCH'):
            await self.app(scope, receive, send)
            return
        if self.num_requests >= self.limits.max_requests:
            error = RequestError(503, 'the server is busy; try again')
            await error.response()(scope, receive, send)
            return
        self.num_requests += 1
        try:
            body = await self._receive_body(scope, receive)
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
        except RequestError as error:
            await error.response()(scope, receive, send)
        finally:
            self.num_requests -= 1

    async def _receive_body(self, scope: Message, receive: Receive) -> bytes | None:
        limit = self.limits.max_body_bytes
        too_large = RequestError(413, f'the request has more than {limit} bytes')
        stated = dict(scope['headers']).get(b'content-length', b'0')
        if not stated.isdigit() or int(stated) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message['type'] == 'http.disconnect':
                        return None
                    body += message.get('body', b'')
                    if len(body) > limit:
                        raise too_large
                    if not message.get('more_body'):
                        return bytes(body)
        except TimeoutError:
            raise RequestError(
                408, f'the request took more than {self.limits.body_seconds:g} s'
            ) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body at once, then whatever the connection says."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {'type': 'http.request', 'body': body, 'more_body': False}

    return replay
