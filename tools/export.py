r"""Export a model, compare the file with the model, and say how far they lie apart.

python tools/export.py CONFIG CHECKPOINT --format onnx
python tools/export.py CONFIG CHECKPOINT --format openvino --precision int8 \
    --data-root data/coco --size 640 640 --images data/coco/val2017

Writes the file and `<file>.report.json` and `.txt`. Exit status 1: the file differs
by more than the tolerance.
"""

import argparse
import sys

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import make_parser, run_tool
from mmbackbones.export.programs import SAMPLINGS

FORMATS = ('onnx', 'openvino', 'torch_export', 'tensorrt', 'executorch', 'triton')
PRECISIONS = ('fp32', 'fp16', 'int8')


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__, checkpoint=True)
    parser.add_argument(
        '--format', choices=FORMATS, default='onnx', help='what is written (onnx)'
    )
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='fp32',
        help='of the weights and the arithmetic (fp32); fp16 and int8 need --images, '
        'int8 is for openvino',
    )
    parser.add_argument(
        '--out',
        help='file to write (<work dir>/<config name>.<suffix>); of triton the folder '
        'of the repository (<work dir>/repository)',
    )
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help="input (the config's)"
    )
    parser.add_argument(
        '--batch-size', type=int, default=1, help='of a fixed batch (1)'
    )
    parser.add_argument(
        '--dynamic-batch', action='store_true', help='take any number of images'
    )
    parser.add_argument(
        '--backbone', action='store_true', help='export the bare backbone'
    )
    parser.add_argument(
        '--sampling',
        choices=SAMPLINGS,
        default='grid_sample',
        help='grid_sample; gather: for runtimes whose GridSample is wrong or missing',
    )
    parser.add_argument(
        '--images',
        help='image, folder or pattern: what both sides are compared on, and what '
        'half and integer precision are calibrated with',
    )
    parser.add_argument(
        '--num-images',
        type=int,
        default=16,
        help='the first so many of --images (16); int8 wants some hundreds',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        help='largest difference of a score, of a box as a share of the input, of '
        'maps relative to their maximum, share of pixels (1e-3; fp16 0.02; int8 none)',
    )
    parser.add_argument(
        '--evaluate',
        action='store_true',
        help="also evaluate both sides on the config's test set",
    )
    parser.add_argument('--max-images', type=int, help='of the test set')
    parser.add_argument('--licence', help="of the weights (that of the backbone's)")
    return parser.parse_args()


def main() -> None:
    """Export, compare, report."""
    args = parse_args()
    from mmbackbones.apis.config import load_config
    from mmbackbones.apis.export import export_model
    from mmbackbones.apis.export_options import ExportOptions

    cfg = load_config(
        args.config,
        data_root=args.data_root,
        work_dir=args.work_dir,
        cfg_options=args.cfg_options,
    )
    report = export_model(
        cfg,
        args.config,
        args.checkpoint,
        ExportOptions(
            format=args.format,
            precision=args.precision,
            out=args.out,
            size_hw=None if args.size is None else tuple(args.size),
            batch_size=args.batch_size,
            dynamic_batch=args.dynamic_batch,
            backbone=args.backbone,
            sampling=args.sampling,
            images=args.images,
            num_images=args.num_images,
            tolerance=args.tolerance,
            evaluate=args.evaluate,
            max_images=args.max_images,
            licence=args.licence,
        ),
    )
    print(report.text())
    if not report.passed:
        sys.exit(1)


if __name__ == '__main__':
    run_tool(main)
