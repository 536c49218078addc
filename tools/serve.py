"""Serve a model over HTTP, images of many clients in one batch.

python tools/serve.py dfine_hgnetv2_b4_coco dfine_l_coco.pth
python tools/serve.py model.onnx --port 8000 --max-batch-size 16
curl -F image=@photo.jpg 'localhost:8000/predict?conf=0.5'

http://localhost:8000/ is a page to drop an image on. `tritonclient.http` is a client
as it is; `/metrics` is for Prometheus. Ctrl-C and SIGTERM finish what was accepted.
"""

import argparse
import resource
from dataclasses import fields
from pathlib import Path

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import run_tool


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', help='config, its name, or an exported file')
    parser.add_argument('weights', nargs='?', help='checkpoint, with a config')
    parser.add_argument('--name', help="of the model in paths (the file's stem)")
    parser.add_argument('--device', help='cpu, cuda, cuda:1; a GPU if there is one')
    parser.add_argument('--half', action='store_true', help='PyTorch in 16 bits')
    parser.add_argument(
        '--host', default='127.0.0.1', help='0.0.0.0 to be reached from elsewhere'
    )
    parser.add_argument(
        '--port', type=int, default=8000, help='0 takes a free one (8000)'
    )
    parser.add_argument(
        '--max-batch-size', type=int, default=8, help='images at once (8)'
    )
    parser.add_argument(
        '--max-delay', type=float, default=0.005, help='seconds an image waits (0.005)'
    )
    from mmbackbones.serving.limits import Limits

    for field in fields(Limits):
        parser.add_argument(
            '--' + field.name.replace('_', '-'),
            type=type(field.default),
            default=field.default,
            help=f'limit ({field.default})',
        )
    return parser.parse_args()


def main() -> None:
    """Load the model, then answer until a signal comes."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f'serving needs {error.name}: pip install "mmbackbones[serve]"'
        ) from error
    args = parse_args()
    from mmbackbones.apis.inferencer import Inferencer
    from mmbackbones.serving.app import create_app
    from mmbackbones.serving.limits import Limits
    from mmbackbones.serving.server import run_app

    backend = Inferencer(args.model, args.weights, args.device).backend
    backend.set_options(half=args.half, compile=False)
    app = create_app(
        backend,
        name=args.name or Path(args.model).stem,
        limits=Limits(**{f.name: getattr(args, f.name) for f in fields(Limits)}),
        max_batch_size=args.max_batch_size,
        max_delay=args.max_delay,
    )
    # A connection is a file: a thousand clients need more than the usual 1024.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run_app(
        app,
        host=args.host,
        port=args.port,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(args.queue_seconds) + 1,
    )


if __name__ == '__main__':
    run_tool(main)
