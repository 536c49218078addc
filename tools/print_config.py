"""Print a config as one flat text file, inheritance and overrides resolved.

python tools/print_config.py configs/dfine_hgnetv2_b0_coco.py
python tools/print_config.py CONFIG --cfg-options train_cfg.max_epochs=10 --out flat.py
"""

import argparse

from mmengine.config import Config, DictAction

from mmbackbones.apis.command_line import check_keys, run_tool
from mmbackbones.apis.named_files import find_config


def main() -> None:
    """Print, or write to a file, what the config resolves to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file, or its name in configs/')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    parser.add_argument('--out', help='write here; the file is a config itself')
    args = parser.parse_args()
    cfg = Config.fromfile(find_config(args.config))
    if args.cfg_options:
        check_keys(cfg, args.cfg_options)
        cfg.merge_from_dict(args.cfg_options)
    if args.out:
        cfg.dump(args.out)
    else:
        print(cfg.pretty_text)


if __name__ == '__main__':
    run_tool(main)
