"""D-FINE-N learns 16 real images by heart (slow; needs a COCO folder).

MMB_COCO_DIR=data/coco python -m pytest -m slow tests/test_overfit.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COCO = os.environ.get('MMB_COCO_DIR')

# The final pipeline less its flip (what is learned is what is tested), at 320 px.
OPTIONS = (
    'train_dataloader.dataset.indices=16',
    'train_dataloader.batch_size=8',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.dataset.indices=16',
    'val_dataloader.dataset.ann_file=annotations/instances_train2017.json',
    'val_dataloader.dataset.data_prefix.img=train2017/',
    'val_dataloader.batch_size=8',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'val_evaluator.ann_file=None',
    'val_dataloader.dataset.pipeline.1.scale=(320,320)',
    'default_hooks.stage_switch.pipeline.3.prob=0.0',
    'default_hooks.stage_switch.pipeline.4.scale=(320,320)',
    'default_hooks.stage_switch.num_final_epochs=250',
    'default_hooks.stage_switch.reload_best=False',
    'default_hooks.ema.momentum=0.02',
    'default_hooks.ema.warmup_iters=50',
    'default_hooks.checkpoint.interval=250',
    'param_scheduler.0.end=30',
    'train_cfg.max_epochs=250',
    'train_cfg.val_interval=50',
)


@pytest.mark.slow
@pytest.mark.skipif(not COCO, reason='MMB_COCO_DIR does not name a COCO folder')
def test_nano_overfits_16_images(tmp_path: Path) -> None:
    command = [
        sys.executable,
        'tools/train.py',
        'configs/dfine_nano_hgnetv2_b0_coco.py',
    ]
    command += ['--data-root', COCO, '--work-dir', str(tmp_path)]
    done = subprocess.run(
        [*command, '--cfg-options', *OPTIONS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    found = [float(ap) for ap in re.findall(r'coco/bbox_mAP: (\d\.\d+)', output)]
    assert max(found) > 0.9, found
