"""Predict an image or many.

A detector writes annotated pictures and one COCO json, a segmentor coloured pictures
and maps of ids.

python tools/infer.py CONFIG CHECKPOINT photo.jpg
python tools/infer.py CONFIG CHECKPOINT folder/ --out-dir outputs/infer --conf 0.4
python tools/infer.py CONFIG CHECKPOINT 'shots/*.png' --no-pictures
"""

import argparse

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import make_parser, run_tool
from mmbackbones.apis.config import is_segmentor, load_config
from mmbackbones.apis.detection import detect_files, find_images


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__, checkpoint=True)
    parser.add_argument('source', help='image, folder, or quoted glob pattern')
    parser.add_argument('--out-dir', default='outputs/infer', help='folder to write')
    parser.add_argument(
        '--conf', type=float, default=0.4, help='lowest score (detection)'
    )
    parser.add_argument('--batch-size', type=int, default=1, help='detection')
    parser.add_argument('--device', help='cpu, cuda, cuda:1; a GPU if there is one')
    parser.add_argument(
        '--no-pictures', action='store_true', help='only the json or maps'
    )
    return parser.parse_args()


def main() -> None:
    """Write pictures, and `detections.json` or maps of ids."""
    args = parse_args()
    files = find_images(args.source)
    cfg = load_config(
        args.config,
        data_root=args.data_root,
        work_dir=args.work_dir,
        cfg_options=args.cfg_options,
    )
    shared = dict(
        out_dir=args.out_dir, device=args.device, pictures=not args.no_pictures
    )
    if is_segmentor(cfg):
        from mmbackbones.apis.segmentation import segment_files

        segment_files(cfg, args.checkpoint, files, **shared)
    else:
        detect_files(
            cfg,
            args.checkpoint,
            files,
            conf=args.conf,
            batch_size=args.batch_size,
            **shared,
        )


if __name__ == '__main__':
    run_tool(main)
