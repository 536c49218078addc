"""The server, with a stub for a model: what it answers."""

import base64
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from serving_helpers import NAME

pytest.importorskip('fastapi', reason='needs fastapi: pip install mmbackbones[serve]')
pytest.importorskip('httpx', reason='needs httpx, for the test client')

from fastapi.testclient import TestClient
from inference_helpers import export_info
from served_pictures import encoded, picture, small_client

from mmbackbones.serving.app import create_app
from mmbackbones.serving.limits import decode_image


@pytest.fixture
def client() -> Iterator[TestClient]:
    with small_client() as client:
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


def test_a_form_without_an_image_is_named(client: TestClient) -> None:
    answer = client.post('/predict', files=dict(file=b'abc'))
    assert answer.status_code == 400 and "'image'" in answer.json()['error']
    answer = client.post(
        '/predict', content=b'x', headers={'Content-Type': 'multipart/form-data'}
    )
    assert answer.status_code == 400


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
    answer = client.get(path)
    assert answer.status_code == 404 and list(answer.json()) == ['error']


@pytest.mark.parametrize(
    ('method', 'path', 'status', 'message'),
    [
        (
            'POST',
            '/predict?conf=abc',
            400,
            "conf is 'abc': Input should be a valid",
        ),
        ('POST', '/predict?conf=1.5', 400, 'conf is 1.5'),
        ('GET', '/predict', 405, 'GET /predict: Method Not Allowed'),
        ('GET', '/nothing', 404, 'GET /nothing: Not Found'),
    ],
)
def test_all_errors_have_one_form(
    client: TestClient, method: str, path: str, status: int, message: str
) -> None:
    content = encoded(picture()) if method == 'POST' else None
    answer = client.request(method, path, content=content)
    assert answer.status_code == status
    assert list(answer.json()) == ['error'] and message in answer.json()['error']


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


def test_decode_equals_what_files_give(tmp_path) -> None:
    from mmbackbones.inference.sources import read_image

    data = encoded(picture(33, 51), '.jpg')
    (tmp_path / 'a.jpg').write_bytes(data)
    expected = read_image(str(tmp_path / 'a.jpg'))
    np.testing.assert_array_equal(decode_image(data, 10_000), expected)
