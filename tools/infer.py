"""Predict on images, folders, patterns, a video or a camera.

A detector writes annotated pictures and one COCO json, a segmentor coloured pictures
and maps of ids. MODEL is a config (or its name in configs/) with a CHECKPOINT, or an
exported file alone.

python tools/infer.py CONFIG CHECKPOINT photo.jpg
python tools/infer.py CONFIG CHECKPOINT folder/ --out-dir outputs/infer --conf 0.4
python tools/infer.py CONFIG CHECKPOINT 'aerial/*.png' --tile 640 --classes car truck
python tools/infer.py model.onnx video.mp4 --no-pictures --format coco labelme
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.utils import ProgressBar

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import make_parser, run_tool
from mmbackbones.apis.config import load_config
from mmbackbones.apis.inferencer import Inferencer
from mmbackbones.inference.runtimes import SUFFIXES, runtime_of
from mmbackbones.inference.sources import open_source
from mmbackbones.inference.writer import FORMATS, ResultWriter


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        'checkpoint', nargs='?', help='ours, or an official release; with a config'
    )
    parser.add_argument(
        'source', help='image, folder, quoted glob pattern, video, index of a camera'
    )
    parser.add_argument('--out-dir', default='outputs/infer', help='folder to write')
    parser.add_argument('--conf', type=float, help='lowest score (detection; 0.4)')
    parser.add_argument('--classes', nargs='+', help='names of the classes to keep')
    parser.add_argument('--batch-size', type=int, default=1, help='images at once')
    parser.add_argument(
        '--tile', type=int, help='cut large images into windows of this side, in pixels'
    )
    parser.add_argument(
        '--overlap', type=float, default=0.25, help='share of windows (0.25)'
    )
    parser.add_argument(
        '--format',
        nargs='+',
        choices=tuple(FORMATS),
        help='what to write besides pictures and maps (detection: coco)',
    )
    parser.add_argument('--device', help='cpu, cuda, cuda:1; a GPU if there is one')
    parser.add_argument('--backend', choices=('pytorch', *SUFFIXES))
    parser.add_argument('--half', action='store_true', help='PyTorch: half precision')
    parser.add_argument('--compile', action='store_true', help='PyTorch: compile first')
    parser.add_argument(
        '--skip-unreadable', action='store_true', help='go on without broken images'
    )
    parser.add_argument(
        '--no-pictures', action='store_true', help='only the json or maps'
    )
    return parser.parse_intermixed_args()


def open_model(args: argparse.Namespace) -> Inferencer:
    """The model that the command line names."""
    model: str | Config = args.config
    if runtime_of(args.config, args.backend) is None:
        model = load_config(
            args.config,
            data_root=args.data_root,
            work_dir=args.work_dir,
            cfg_options=args.cfg_options,
        )
    elif args.cfg_options or args.data_root:
        raise ValueError(f'{args.config!r} is no config: it takes no options of one')
    return Inferencer(model, args.checkpoint, args.device, args.backend)


def main() -> None:
    """Write pictures, and `detections.json` or maps of ids."""
    args = parse_args()
    is_camera = args.source.isdecimal() and not Path(args.source).exists()
    source = open_source(int(args.source) if is_camera else args.source)
    model = open_model(args)
    formats = args.format or (['coco'] if model.info.task == 'detection' else [])
    writer = ResultWriter(
        args.out_dir, model.info.task, pictures=not args.no_pictures, formats=formats
    )
    writer.check_names(source.names)
    writer.check_sources(source.paths)
    results = model.predict(
        source,
        batch_size=args.batch_size,
        conf=args.conf,
        classes=args.classes,
        tile=args.tile,
        overlap=args.overlap,
        half=args.half,
        compile=args.compile,
        skip_unreadable=args.skip_unreadable,
        stream=True,
    )
    progress = ProgressBar(source.num_frames or 0)  # 0: counts, without an end
    count = found = 0
    try:
        for result in results:
            writer.write(result)
            count += 1
            found += len(result) if model.info.task == 'detection' else 0
            progress.update()
    except ValueError:
        print()  # the error gets a line of its own, below the progress
        raise
    except KeyboardInterrupt:  # how a camera is stopped
        print('\nstopped', end='')
    writer.finish()
    summary = f'{found} detections on' if model.info.task == 'detection' else 'maps of'
    print(f'\n{summary} {count} images, written to {writer.out_dir}')


if __name__ == '__main__':
    run_tool(main)
