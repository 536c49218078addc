"""A server in a process of its own, met by real clients."""

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from export_helpers import random_checkpoint
from mmengine.config import Config
from serving_helpers import NAME, ROOT, running_server
from test_serving import encoded, picture  # skips without fastapi and httpx

from mmbackbones.apis.named_files import find_config

httpx = pytest.importorskip('httpx', reason='needs httpx')


@pytest.fixture(scope='module')
def address() -> Iterator[str]:
    with running_server(max_requests=100, body_seconds=120.0) as (address, _):
        yield address


@pytest.mark.parametrize('binary', [True, False])
@pytest.mark.parametrize('kind', ['pixels', 'files'])
def test_tritonclient_is_a_client_as_it_is(
    address: str, binary: bool, kind: str
) -> None:
    triton = pytest.importorskip('tritonclient.http', reason='needs tritonclient[http]')
    if kind == 'files' and not binary:
        pytest.skip('files are sent as binary tensors only')
    client = triton.InferenceServerClient(address)
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(NAME)
    (entry,) = client.get_model_metadata(NAME)['inputs']
    pixels = picture()[None]
    values = pixels if kind == 'pixels' else np.array([encoded(picture())], object)
    datatype = 'UINT8' if kind == 'pixels' else 'BYTES'
    tensor = triton.InferInput(entry['name'], list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    names = ('boxes', 'scores', 'labels', 'num_detections')
    wanted = [triton.InferRequestedOutput(n, binary_data=binary) for n in names]
    result = client.infer(NAME, [tensor], outputs=wanted, parameters=dict(conf=0.5))
    assert result.as_numpy('num_detections').tolist() == [2]
    boxes = dict(
        zip(
            result.as_numpy('labels')[0].tolist(),
            result.as_numpy('boxes')[0].tolist(),
            strict=True,
        )
    )
    assert boxes == {0: [10, 20, 40, 50], 1: [50, 60, 90, 80]}
    with pytest.raises(triton.InferenceServerException, match='one model here'):
        client.infer('other', [tensor])


def test_a_thousand_requests_at_once_leave_the_server_up(address: str) -> None:
    data = encoded(picture())

    async def main() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            requests = (
                client.post(f'http://{address}/predict', content=data)
                for _ in range(1000)
            )
            return [r.status_code for r in await asyncio.gather(*requests)]

    statuses = asyncio.run(main())
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 100
    assert httpx.post(f'http://{address}/predict', content=data).status_code == 200


def test_a_signal_lets_the_server_finish_what_it_accepted() -> None:
    with running_server(predict_seconds=1.5) as (address, process):
        answers = []
        data = encoded(picture())
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f'http://{address}/predict', content=data, timeout=30)
            )
        )
        thread.start()
        time.sleep(0.7)  # the model is at work
        process.send_signal(signal.SIGTERM)
        thread.join(30)
        assert answers[0].status_code == 200
        assert len(answers[0].json()['detections']) == 2
        process.wait(30)


def test_the_tool_says_where_it_serves(tmp_path: Path) -> None:
    """Once it does: whoever has read the line gets an answer."""
    name = 'deimv2_hgnetv2_atto_coco'
    cfg = Config.fromfile(find_config(name))
    checkpoint = random_checkpoint(cfg, tmp_path / 'atto.pth')
    command = [sys.executable, 'tools/serve.py', name, checkpoint]
    command += ['--device', 'cpu', '--port', '0', '--name', 'atto']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            said = (line.decode() for line in process.stdout)
            line = next(line for line in said if line.startswith('serving'))
            expected = (
                r"serving 'atto' \(pytorch, detection, 80 classes\) at (http.*)\n"
            )
            address = re.fullmatch(expected, line)[1]
            assert httpx.get(f'{address}v2/health/ready').status_code == 200
        finally:
            process.terminate()


@pytest.mark.slow
def test_the_page_shows_boxes(address: str, tmp_path: Path) -> None:
    """Headless Chromium chooses an image and moves the slider."""
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if chromium is None:
        pytest.skip('chromium is not installed')
    image = tmp_path / 'blobs.png'
    image.write_bytes(encoded(picture(240, 320)))
    playwright = pytest.importorskip(
        'playwright.sync_api', reason='needs playwright: pip install playwright'
    )
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(
            executable_path=chromium, args=['--no-sandbox', '--disable-gpu']
        )
        page = browser.new_page()
        page.goto(f'http://{address}/')
        page.set_input_files('#file', str(image))
        status = page.locator('#status')
        status.filter(has_text='2 detections').wait_for(timeout=20_000)
        page.screenshot(path=str(tmp_path / 'page.png'))
        page.locator('#slider').fill('0.95')
        status.filter(has_text='0 detections').wait_for(timeout=5_000)
        broken = tmp_path / 'broken.png'
        broken.write_bytes(b'no image')
        page.set_input_files('#file', str(broken))
        page.locator('#status.error').wait_for(timeout=5_000)
        browser.close()
    assert (tmp_path / 'page.png').stat().st_size > 1000
