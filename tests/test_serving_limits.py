"""The server, with a stub for a model: what it refuses, and holds at once."""

import asyncio
import json
import struct
import weakref
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from serving_helpers import NAME

pytest.importorskip('fastapi', reason='needs fastapi: pip install mmbackbones[serve]')
pytest.importorskip('httpx', reason='needs httpx, for the test client')

import httpx
from fastapi.testclient import TestClient
from inference_helpers import export_info, stub_inferencer
from served_pictures import encoded, picture, small_client

from mmbackbones.inference.metadata import Slide
from mmbackbones.serving.app import create_app
from mmbackbones.serving.limits import BodyLimits, Limits, decode_image


@pytest.fixture
def client() -> Iterator[TestClient]:
    with small_client() as client:
        yield client


async def answers_at_once(app: object, requests: list) -> list[int]:
    """Statuses of requests: path, body and headers."""
    app.state.service.batcher.start()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url='http://x') as client:
        posts = (client.post(p, content=b, headers=h) for p, b, h in requests)
        statuses = [r.status_code for r in await asyncio.gather(*posts)]
    await app.state.service.close()
    return statuses


def bomb() -> bytes:
    """A PNG of 50000 x 50000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + crc

    header = struct.pack('>IIBBBBB', 50_000, 50_000, 8, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(bytes(1000)))
        + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize(
    ('data', 'status', 'message'),
    [
        (b'', 415, 'not an image'),
        (b'GIF89a' + bytes(50), 415, 'not an image'),
        (b'<svg/>', 415, 'not an image'),
        (encoded(picture(), '.jpg')[:-200], 422, 'broken'),
        (encoded(picture())[:200], 422, 'broken'),
        (encoded(picture(201, 200)), 413, '200 x 201 pixels'),
        (bomb(), 413, 'pixels'),
        (bytes(400_001), 413, 'more than 400000 bytes'),
    ],
)
def test_bad_uploads_get_their_status(
    client: TestClient, data: bytes, status: int, message: str
) -> None:
    answer = client.post('/predict', content=data)
    assert answer.status_code == status
    assert message in answer.json()['error']
    assert client.post('/predict', content=encoded(picture())).status_code == 200


def binary_body(data: bytes, number: int) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with a file, several times."""
    files = (len(data).to_bytes(4, 'little') + data) * number
    size = dict(binary_data_size=len(files))
    tensor = dict(name='images', datatype='BYTES', shape=[number], parameters=size)
    head = json.dumps(dict(inputs=[tensor])).encode()
    return head + files, {'Inference-Header-Content-Length': str(len(head))}


def test_files_of_one_request_are_bounded_together(client: TestClient) -> None:
    """Small files may hold many pixels: here 15,000 each, and 40,000 are taken."""
    data = encoded(np.zeros((100, 150, 3), np.uint8))
    for number, status in ((2, 200), (3, 413)):
        body, headers = binary_body(data, number)
        path = f'/v2/models/{NAME}/infer'
        answer = client.post(path, content=body, headers=headers)
        assert answer.status_code == status
    assert 'more than 40000 pixels together' in answer.json()['error']


@pytest.mark.parametrize('path', ['/predict', f'/v2/models/{NAME}/infer'])
def test_few_decoded_images_are_held_at_once(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for the model is prepared, and small, whatever was sent."""
    monkeypatch.setattr('os.cpu_count', lambda: 2)
    decoded: list[weakref.ref] = []
    held: list[int] = []

    def decode(*args: object) -> np.ndarray:
        image = decode_image(*args)
        decoded.append(weakref.ref(image))
        held.append(sum(one() is not None for one in decoded))
        return image

    for module in ('app', 'protocol'):
        monkeypatch.setattr(f'mmbackbones.serving.{module}.decode_image', decode)
    app = create_app(stub_inferencer().backend, name=NAME)
    body, headers = encoded(picture()), {}
    if path != '/predict':
        body, headers = binary_body(body, 1)
    statuses = asyncio.run(answers_at_once(app, [(path, body, headers)] * 20))
    assert statuses == [200] * 20 and len(held) == 20
    assert max(held) <= 4  # one by processor, and what a thread has not let go of


def test_bodies_without_a_stated_length_are_counted(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield bytes(10_000)

    answer = client.post('/predict', content=chunks())
    assert answer.status_code == 413


def test_a_slow_client_is_answered_and_let_go() -> None:
    answers = []

    async def receive() -> dict:
        await asyncio.sleep(5)
        raise AssertionError('the time was over')

    async def send(message: dict) -> None:
        answers.append(message)

    limited = BodyLimits(None, Limits(body_seconds=0.05))
    scope = dict(type='http', method='POST', path='/predict', headers=[])
    asyncio.run(limited(scope, receive, send))
    assert answers[0]['status'] == 408 and b'0.05 s' in answers[1]['body']
    assert limited.num_requests == 0


def test_batches_are_no_larger_than_a_file_takes() -> None:
    """A file with a fixed batch of 2, and five clients at once."""
    backend = stub_inferencer().backend
    backend._session.fixed_batch = 2
    app = create_app(backend, max_batch_size=8, max_delay=0.5)
    requests = [('/predict', encoded(picture()), {})] * 5
    assert asyncio.run(answers_at_once(app, requests)) == [200] * 5
    assert 'mmb_batch_size_bucket{le="2.0"} 3.0' in (
        app.state.service.metrics.render().decode()
    )


def test_an_image_too_thin_for_the_model_is_named() -> None:
    slide = Slide(stride_hw=(64, 64), scale_wh=(256, 64), align_corners=False)
    changes = dict(task='segmentation', input_size_hw=(64, 64), resize='keep_ratio')
    app = create_app(stub_inferencer(**changes, slide=slide).backend)
    with TestClient(app) as client:
        answer = client.post('/predict', content=encoded(np.zeros((3, 4000, 3))))
    assert answer.status_code == 422 and 'size of the model' in answer.text


def test_too_many_classes_for_a_map_are_refused() -> None:
    class Backend:
        name = 'stub'
        info = export_info(
            task='segmentation',
            classes=tuple(map(str, range(300))),
            category_ids=tuple(range(300)),
        )

    with pytest.raises(ValueError, match='300 classes'):
        create_app(Backend())
