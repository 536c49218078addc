"""Watch D-FINE learn: draws a data set, trains on it, evaluates, shows detections.

Everything goes to outputs/demo; a second call goes on from what is there.

python tools/demo.py
python tools/demo.py --out-dir /tmp/demo --fresh
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mmbackbones.apis.command_line import run_tool
from mmbackbones.data.synthetic import draw_detection_set

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'dfine_demo.py'


def call(*arguments: object) -> None:
    """Run one of the tools, showing the command as a user would type it."""
    command = [str(argument) for argument in arguments]
    print(f'\n$ python {shlex.join(command)}\n', flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def best_ap(work_dir: Path) -> float:
    """The highest COCO AP in the logs of a work dir."""
    lines = [
        json.loads(line)
        for log in work_dir.glob('*/vis_data/scalars.json')
        for line in log.read_text().splitlines()
    ]
    return max(line['coco/bbox_mAP'] for line in lines if 'coco/bbox_mAP' in line)


def main() -> None:
    """Draw, train, evaluate, predict; then say where everything is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out-dir', default='outputs/demo', help='folder to write')
    parser.add_argument('--fresh', action='store_true', help='forget earlier results')
    args = parser.parse_args()
    start = time.time()
    out = Path(args.out_dir)
    data, work_dir = out / 'data', out / 'train'
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    draw_detection_set(data, num_train=800, num_val=100, image_size=160)
    print(f'Drawn objects in COCO layout: {data}')
    shared = ('--data-root', data, '--work-dir', work_dir)
    call('tools/train.py', CONFIG.relative_to(ROOT), *shared, '--resume', 'auto')
    checkpoint = next(iter(work_dir.glob('best_coco_bbox_mAP_*.pth')))
    call(
        *('tools/infer.py', CONFIG.relative_to(ROOT), checkpoint, data / 'val'),
        *('--work-dir', work_dir, '--out-dir', out / 'pictures', '--batch-size', 16),
    )
    print(
        f'\nDone in {time.time() - start:.0f} s; AP {best_ap(work_dir):.3f} on images'
    )
    print('that it was not trained on.')
    print(f'  detections on unseen images: {out / "pictures"}')
    print(f'  loss and AP curves:          {sorted(work_dir.glob("*/curves.png"))[-1]}')
    print(f'  checkpoint:                  {checkpoint}')


if __name__ == '__main__':
    run_tool(main)
