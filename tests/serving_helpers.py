"""A server of a stub model on a free port, in a process of its own.

python tests/serving_helpers.py PORT [KEY=VALUE of Limits ...]
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME = 'blobs'


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running_server(**limits: float) -> Iterator[tuple[str, subprocess.Popen]]:
    """`host:port` and the process of a ready server."""
    address = f'127.0.0.1:{free_port()}'
    command = [sys.executable, __file__, address.split(':')[1]]
    command += [f'{key}={value}' for key, value in limits.items()]
    environment = {**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f'http://{address}/v2/health/ready')
                    break
                assert process.poll() is None, 'the server ended'
                time.sleep(0.1)
            yield address, process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def serve(port: int, **limits: float) -> None:
    import resource

    from inference_helpers import stub_inferencer

    from mmbackbones.serving.app import create_app
    from mmbackbones.serving.limits import Limits
    from mmbackbones.serving.server import run_app

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    backend = stub_inferencer().backend
    delay = limits.pop('predict_seconds', 0)
    if delay:
        predict = backend.predict

        def slow(inputs: list) -> list:
            time.sleep(delay)
            return predict(inputs)

        backend.predict = slow
    app = create_app(backend, name=NAME, limits=Limits(**limits))
    run_app(app, port=port)


if __name__ == '__main__':
    options = dict(pair.split('=') for pair in sys.argv[2:])
    serve(
        int(sys.argv[1]),
        **{k: float(v) if '.' in v else int(v) for k, v in options.items()},
    )
