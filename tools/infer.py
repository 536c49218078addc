"""Detect objects: annotated pictures and one COCO json of an image or many.

python tools/infer.py CONFIG CHECKPOINT photo.jpg
python tools/infer.py CONFIG CHECKPOINT folder/ --out-dir outputs/infer --conf 0.4
python tools/infer.py CONFIG CHECKPOINT 'shots/*.png' --no-pictures
"""

import argparse

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import make_parser, run_tool
from mmbackbones.apis.config import load_config
from mmbackbones.apis.detection import detect_files, find_images


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__, checkpoint=True)
    parser.add_argument('source', help='image, folder, or quoted glob pattern')
    parser.add_argument('--out-dir', default='outputs/infer', help='folder to write')
    parser.add_argument('--conf', type=float, default=0.4, help='score threshold')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--device', help='cpu, cuda, cuda:1; a GPU if there is one')
    parser.add_argument('--no-pictures', action='store_true', help='only the json')
    return parser.parse_args()


def main() -> None:
    """Write pictures and `detections.json`."""
    args = parse_args()
    files = find_images(args.source)
    cfg = load_config(
        args.config,
        data_root=args.data_root,
        work_dir=args.work_dir,
        cfg_options=args.cfg_options,
    )
    detect_files(
        cfg,
        args.checkpoint,
        files,
        out_dir=args.out_dir,
        conf=args.conf,
        batch_size=args.batch_size,
        device=args.device,
        pictures=not args.no_pictures,
    )


if __name__ == '__main__':
    run_tool(main)
