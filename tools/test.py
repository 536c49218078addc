"""Evaluate a checkpoint.

Of a detector: the twelve COCO numbers and AP per class; of a segmentor: mIoU, mAcc,
aAcc and IoU per class.

python tools/test.py configs/dfine_hgnetv2_b4_coco.py dfine_l_coco.pth
python tools/test.py CONFIG CHECKPOINT --data-root data/coco --show-dir pictures
bash tools/dist_test.sh CONFIG CHECKPOINT 4
"""

import argparse
from pathlib import Path

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import add_launcher, make_parser, run_tool
from mmbackbones.apis.config import is_segmentor, load_config, prepare
from mmbackbones.apis.named_files import check_checkpoint


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__, checkpoint=True)
    add_launcher(parser)
    parser.add_argument('--out', help='detection: write a COCO json, OUT.bbox.json')
    parser.add_argument('--show-dir', help='write annotated pictures to this folder')
    return parser.parse_args()


def main() -> None:
    """Run the test loop of the config."""
    args = parse_args()
    from mmengine.runner import Runner

    cfg = load_config(
        args.config,
        data_root=args.data_root,
        work_dir=args.work_dir,
        cfg_options=args.cfg_options,
    )
    cfg.launcher = args.launcher
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.out:
        if is_segmentor(cfg):
            raise ValueError('--out is for detection; tools/infer.py writes id maps')
        cfg.test_evaluator.outfile_prefix = args.out.removesuffix('.json')
    if args.show_dir:
        # mmdet puts a relative folder inside the work dir; users mean their own.
        folder = str(Path(args.show_dir).absolute())
        cfg.default_hooks.visualization.update(draw=True, test_out_dir=folder)
    check_checkpoint(args.checkpoint)
    Runner.from_cfg(prepare(cfg, training=False)).test()


if __name__ == '__main__':
    run_tool(main)
