"""The server, with a stub for a model: what it answers, and what it refuses."""

import asyncio
import base64
import io
import json
import struct
import weakref
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from PIL import Image
from serving_helpers import NAME

pytest.importorskip('fastapi', reason='needs fastapi: pip install mmbackbones[serve]')
pytest.importorskip('httpx', reason='needs httpx, for the test client')

import httpx
from fastapi.testclient import TestClient
from inference_helpers import export_info, stub_inferencer

from mmbackbones.inference.metadata import Slide
from mmbackbones.serving.app import create_app
from mmbackbones.serving.batching import Batcher
from mmbackbones.serving.limits import BodyLimits, Limits, RequestError, decode_image

SMALL = Limits(max_body_bytes=400_000, max_pixels=40_000, max_images=3)


def picture(height: int = 96, width: int = 96) -> np.ndarray:
    """RGB: a red rectangle x 10..40, y 20..50 and a green one, on black."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[20:50, 10:40] = (255, 0, 0)
    rgb[60:80, 50:90] = (0, 255, 0)
    return rgb


def encoded(rgb: np.ndarray, suffix: str = '.png') -> bytes:
    return cv2.imencode(suffix, rgb[..., ::-1])[1].tobytes()


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = create_app(stub_inferencer().backend, name=NAME, limits=SMALL)
    with TestClient(app) as client:
        yield client


def infer_body(**changes: object) -> dict:
    tensor = dict(
        name='images',
        datatype='UINT8',
        shape=[1, 96, 96, 3],
        data=picture().ravel().tolist(),
    )
    return dict(inputs=[{**tensor, **changes}])


@pytest.mark.parametrize('form', [True, False])
def test_predict_answers_an_upload(client: TestClient, form: bool) -> None:
    data = encoded(picture())
    answer = (
        client.post('/predict', files=dict(image=('../../etc/passwd', data)))
        if form
        else client.post('/predict', content=data)
    )
    assert answer.status_code == 200
    body = answer.json()
    assert (body['width'], body['height']) == (96, 96)
    found = {d['category_name']: d for d in body['detections']}
    assert found['dark']['bbox'] == [10, 20, 30, 30]
    assert found['bright']['bbox'] == [50, 60, 40, 20]
    assert found['dark']['category_id'] == 7 and found['dark']['score'] > 0.89
    assert client.post('/predict?conf=0.95', content=data).json()['detections'] == []


def test_uploads_are_turned_upright(client: TestClient) -> None:
    image = Image.fromarray(picture(80, 120))
    exif = image.getexif()
    exif[274] = 6  # to be turned clockwise
    file = io.BytesIO()
    image.save(file, 'PNG', exif=exif)
    body = client.post('/predict', content=file.getvalue()).json()
    assert (body['width'], body['height']) == (80, 120)


def test_a_segmentor_answers_a_map_of_its_classes() -> None:
    class Halves:
        name = 'stub'
        max_batch = None
        info = export_info(task='segmentation', classes=('sky', 'sea'))

        def prepare(self, image: np.ndarray, name: str) -> np.ndarray:
            return image

        def predict(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
            maps = [np.zeros(image.shape[:2], np.int32) for image in inputs]
            for labels in maps:
                labels[len(labels) // 2 :] = 1
            return maps

    with TestClient(create_app(Halves(), name=NAME)) as client:
        body = client.post('/predict', content=encoded(picture(40, 60))).json()
        shares = {c['category_name']: c['share'] for c in body['classes']}
        assert shares == dict(sky=0.5, sea=0.5)
        labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(body['label_map']))))
        assert labels.shape == (40, 60)
        assert not labels[:20].any() and labels[20:].all()
        answer = client.post(f'/v2/models/{NAME}/infer', json=infer_body()).json()
        assert answer['outputs'][0]['shape'] == [1, 96, 96]


def test_protocol_describes_and_predicts(client: TestClient) -> None:
    assert client.get('/v2').json()['name'] == 'mmbackbones'
    assert client.get('/v2/health/live').json() == dict(live=True)
    assert client.get('/v2/health/ready').json() == dict(ready=True)
    described = client.get(f'/v2/models/{NAME}').json()
    assert described['inputs'][0]['name'] == 'images'
    names = [output['name'] for output in described['outputs']]
    assert names == ['boxes', 'scores', 'labels', 'num_detections']
    assert client.get(f'/v2/models/{NAME}/versions/1/ready').json()['ready']

    body = {**infer_body(), 'id': 'seven', 'parameters': dict(conf=0.5)}
    answer = client.post(f'/v2/models/{NAME}/infer', json=body).json()
    assert answer['id'] == 'seven'
    outputs = {output['name']: output for output in answer['outputs']}
    assert outputs['boxes']['shape'] == [1, 2, 4]
    assert sorted(outputs['labels']['data']) == [0, 1]
    assert outputs['num_detections']['data'] == [2]


def test_images_of_one_request_are_filled_up_to_one_tensor(client: TestClient) -> None:
    pixels = np.stack([picture(), np.zeros_like(picture())])
    body = infer_body(shape=[2, 96, 96, 3], data=pixels.ravel().tolist())
    body['parameters'] = dict(conf=0.5)
    answer = client.post(f'/v2/models/{NAME}/infer', json=body).json()
    outputs = {output['name']: output for output in answer['outputs']}
    assert outputs['num_detections']['data'] == [2, 0]
    assert outputs['labels']['data'][2:] == [-1, -1]
    assert outputs['scores']['data'][2:] == [0, 0]


@pytest.mark.parametrize(
    ('body', 'status', 'message'),
    [
        (b'{', 400, 'not JSON'),
        (b'[' * 50_000, 400, 'not JSON'),
        (b'[]', 400, 'not a JSON object'),
        (dict(), 400, "one tensor, 'images'"),
        (dict(inputs=[]), 400, "one tensor, 'images'"),
        (infer_body(name='image'), 400, "no input 'image'"),
        (infer_body(shape=[1, 96, 96]), 400, 'shape [1, 96, 96]'),
        (infer_body(shape=[1, 96, 95, 3]), 400, 'do not fit shape'),
        (infer_body(shape=[-1, 96, 96, 3]), 400, 'positive whole numbers'),
        (infer_body(shape='x'), 400, 'positive whole numbers'),
        (infer_body(shape=[1, 300, 300, 3]), 413, '300 x 300 pixels'),
        (infer_body(shape=[4, 9, 9, 3]), 413, '4 images'),
        (infer_body(datatype='FP32'), 400, "datatype 'FP32'"),
        (infer_body(data=[0.5] * 27648), 400, 'whole numbers from 0 to 255'),
        (infer_body(data=[256] * 27648), 400, 'whole numbers from 0 to 255'),
        (infer_body(data=['a']), 400, 'whole numbers from 0 to 255'),
        (infer_body(data=[[1], [1, 2]]), 400, 'do not fit shape'),
        (infer_body(datatype='BYTES', shape=[1]), 400, 'is binary'),
        ({**infer_body(), 'outputs': [dict(name='masks')]}, 400, "no output 'masks'"),
        ({**infer_body(), 'outputs': 'boxes'}, 400, 'outputs is not a list'),
        ({**infer_body(), 'parameters': dict(conf=2)}, 400, 'conf is 2'),
        ({**infer_body(), 'parameters': [1]}, 400, 'parameters is not'),
    ],
)
def test_wrong_requests_are_named(
    client: TestClient, body: object, status: int, message: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(f'/v2/models/{NAME}/infer', content=content)
    assert answer.status_code == status, answer.text
    assert message in answer.json()['error']
    assert client.get('/v2/health/ready').status_code == 200


@pytest.mark.parametrize(
    ('header', 'message'),
    [('ten', 'not a number'), ('3', 'not JSON'), ('999999', 'not JSON')],
)
def test_wrong_binary_requests_are_named(
    client: TestClient, header: str, message: str
) -> None:
    answer = client.post(
        f'/v2/models/{NAME}/infer',
        content=b'{"inputs": 1',
        headers={'Inference-Header-Content-Length': header},
    )
    assert answer.status_code == 400 and message in answer.json()['error']


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


async def answers_at_once(app: object, requests: list) -> list[int]:
    """Statuses of requests: path, body and headers."""
    app.state.service.batcher.start()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url='http://x') as client:
        posts = (client.post(p, content=b, headers=h) for p, b, h in requests)
        statuses = [r.status_code for r in await asyncio.gather(*posts)]
    await app.state.service.close()
    return statuses


def test_a_form_without_an_image_is_named(client: TestClient) -> None:
    answer = client.post('/predict', files=dict(file=b'abc'))
    assert answer.status_code == 400 and "'image'" in answer.json()['error']
    answer = client.post(
        '/predict', content=b'x', headers={'Content-Type': 'multipart/form-data'}
    )
    assert answer.status_code == 400


def test_bodies_without_a_stated_length_are_counted(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield bytes(10_000)

    answer = client.post('/predict', content=chunks())
    assert answer.status_code == 413


@pytest.mark.parametrize(
    'path',
    [
        '/v2/models/other',
        f'/v2/models/{NAME}/versions/2',
        '/v2/models/..%2f..%2fetc%2fpasswd',
        '/../../etc/passwd',
        '/page.html',
    ],
)
def test_there_is_nothing_else(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


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


def test_metrics_count_what_happened(client: TestClient) -> None:
    client.post('/predict', content=encoded(picture()))
    client.post('/predict', content=b'')
    text = client.get('/metrics').text
    assert 'mmb_requests_total{route="/predict",status="200"} 1.0' in text
    assert 'mmb_requests_total{route="/predict",status="415"} 1.0' in text
    assert 'mmb_batch_size_count 1.0' in text
    assert 'mmb_queue_length 0.0' in text


@pytest.mark.parametrize('part', ['prepare', 'predict'])
def test_a_model_that_fails_is_status_500_and_the_server_stays(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    service = client.app.state.service
    data = encoded(picture())
    with monkeypatch.context() as patch:
        if part == 'prepare':
            patch.setattr(service.backend, 'prepare', lambda image, name: 1 / 0)
        else:
            patch.setattr(service.batcher, '_predict', lambda inputs: 1 / 0)
        answer = client.post('/predict', content=data)
    assert answer.status_code == 500 and 'division' not in answer.text
    assert 'the model failed' in answer.json()['error']
    assert client.post('/predict', content=data).status_code == 200


def test_page_is_one_file_without_foreign_parts(client: TestClient) -> None:
    page = client.get('/').text
    assert '<canvas' in page and 'http' not in page.replace('http-equiv', '')


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


def test_decode_equals_what_files_give(tmp_path) -> None:
    from mmbackbones.inference.sources import read_image

    data = encoded(picture(33, 51), '.jpg')
    (tmp_path / 'a.jpg').write_bytes(data)
    expected = read_image(str(tmp_path / 'a.jpg'))
    np.testing.assert_array_equal(decode_image(data, 10_000), expected)


# -- batches -------------------------------------------------------------------------


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
