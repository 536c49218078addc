"""Load test of the server: requests per second, latency, errors.

python benchmarks/serving.py MODEL [WEIGHTS] --images data/coco/val2017 \
    --out benchmarks/serving_<model>_<conditions>.json

Starts `tools/serve.py` and sends image uploads from 1, 8 and 64 clients, each with one
request at a time; the load shares the machine with the server.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model')
    parser.add_argument('weights', nargs='?')
    parser.add_argument('--images', required=True, help='folder of JPEG files')
    parser.add_argument('--clients', type=int, nargs='+', default=(1, 8, 64))
    parser.add_argument('--seconds', type=float, default=10.0, help='per row')
    parser.add_argument('--out', required=True)
    return parser.parse_args()


async def load(
    url: str, files: list[bytes], num_clients: int, seconds: float
) -> dict[str, float]:
    """One row: clients that ask again as soon as they are answered."""
    latencies, statuses = [], []
    end = time.perf_counter() + seconds

    async def ask(client: httpx.AsyncClient, turn: int) -> None:
        while (started := time.perf_counter()) < end:
            answer = await client.post(url, content=files[turn % len(files)])
            latencies.append(time.perf_counter() - started)
            statuses.append(answer.status_code)
            turn += 1

    limits = httpx.Limits(max_connections=None)
    started = time.perf_counter()
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        await asyncio.gather(*(ask(client, 7 * i) for i in range(num_clients)))
    elapsed = time.perf_counter() - started
    percentiles = statistics.quantiles(latencies, n=100)
    return dict(
        clients=num_clients,
        requests=len(statuses),
        requests_per_s=round(len(statuses) / elapsed, 1),
        p50_ms=round(1000 * percentiles[49], 1),
        p99_ms=round(1000 * percentiles[98], 1),
        errors=sum(status != 200 for status in statuses),
    )


def main() -> None:
    """Print and write the rows."""
    args = parse_args()
    files = [path.read_bytes() for path in sorted(Path(args.images).glob('*.jpg'))]
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(ROOT / 'tools' / 'serve.py'), args.model]
    command += [args.weights] if args.weights else []
    with subprocess.Popen([*command, '--port', str(port)]) as server:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f'http://127.0.0.1:{port}/v2/health/ready')
                    break
                except OSError:
                    time.sleep(0.2)
            url = f'http://127.0.0.1:{port}/predict'
            asyncio.run(load(url, files, 4, 2.0))  # warm
            rows = [
                asyncio.run(load(url, files, n, args.seconds)) for n in args.clients
            ]
        finally:
            server.terminate()
    result = dict(
        conditions=dict(
            model=Path(args.model).stem,
            images=len(files),
            processors=os.cpu_count(),
            seconds=args.seconds,
            load='on the same machine',
        ),
        rows=rows,
    )
    for row in rows:
        print(row)
    Path(args.out).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
