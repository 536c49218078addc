"""Train a config; logs, checkpoints and curves go to the work dir.

python tools/train.py configs/dfine_hgnetv2_b4_coco.py --data-root data/coco
python tools/train.py configs/dfine_hgnetv2_b0_custom.py --data-root my_data
python tools/train.py CONFIG --resume auto
python tools/train.py CONFIG --log-to tensorboard
bash tools/dist_train.sh CONFIG 4 --auto-scale-lr
"""

import argparse

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import add_launcher, make_parser, run_tool
from mmbackbones.apis.config import (
    LOG_BACKENDS,
    load_config,
    log_to,
    prepare,
    set_amp,
)


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__)
    add_launcher(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from the newest checkpoint of the work dir, or from a file',
    )
    parser.add_argument(
        '--amp',
        action=argparse.BooleanOptionalAction,
        help="mixed precision on or off; by default the config's choice",
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over the published one',
    )
    parser.add_argument(
        '--log-to',
        nargs='+',
        choices=LOG_BACKENDS,
        default=(),
        help='send the log to these services, too',
    )
    return parser.parse_args()


def main() -> None:
    """Run the training loop of the config."""
    args = parse_args()
    from mmengine.registry import RUNNERS

    cfg = load_config(
        args.config,
        data_root=args.data_root,
        work_dir=args.work_dir,
        cfg_options=args.cfg_options,
    )
    cfg.launcher = args.launcher
    log_to(cfg, args.log_to)
    if args.amp is not None:
        set_amp(cfg, args.amp)
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise ValueError('--auto-scale-lr: the config has no auto_scale_lr')
        cfg.auto_scale_lr.enable = True
    if args.resume == 'auto':
        cfg.resume = 'auto'
    elif args.resume:
        cfg.resume, cfg.load_from = True, args.resume
    RUNNERS.build(prepare(cfg)).train()


if __name__ == '__main__':
    run_tool(main)
