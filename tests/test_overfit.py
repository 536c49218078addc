"""Each dialect learns a few real images by heart (slow; needs a COCO folder).

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

# Images, their side in pixels, epochs, and what a config of its own needs: without
# pre-trained weights the whole network learns, at one rate.
CASES = {
    'dfine_nano_hgnetv2_b0_coco': (16, 320, 250, ['param_scheduler.0.end=30']),
    'rtdetr_r18vd_coco': (
        8,
        192,
        200,
        [
            'optim_wrapper.optimizer.lr=2e-4',
            'optim_wrapper.paramwise_cfg.groups.0.lr_mult=1.0',
            'optim_wrapper.paramwise_cfg.groups.1.lr_mult=1.0',
        ],
    ),
    'rtdetrv2_r18vd_coco': (
        8,
        192,
        200,
        [
            'optim_wrapper.optimizer.lr=2e-4',
            'param_scheduler.0.end=30',
        ],
    ),
    'deim_nano_hgnetv2_b0_coco': (8, 192, 300, ['param_scheduler.0.warmup=30']),
    'deim_rtdetrv2_r18vd_coco': (
        8,
        192,
        200,
        ['param_scheduler.0.warmup=30', 'param_scheduler.0.gamma=1.0'],
    ),
    'deimv2_nano_hgnetv2_b0_coco': (
        8,
        256,
        300,
        [
            'param_scheduler.0.warmup=30',
            'param_scheduler.0.flat_until=60',
            'param_scheduler.0.gamma=0.02',
        ],
    ),
    'deimv2_hgnetv2_atto_coco': (
        8,
        320,
        400,
        [
            'param_scheduler.0.warmup=30',
            'param_scheduler.0.gamma=0.02',
            'default_hooks.stage_switch.ends=(0,0,0,0)',
            'default_hooks.stage_switch.pipeline.2.min_size=1',
            'default_hooks.stage_switch.pipeline.5.min_size=1',
        ],
    ),
}


def options(num_images: int, side: int, epochs: int, *, phases: bool) -> list[str]:
    """The final pipeline less its flip: what is learned is what is tested.

    Images are resampled as in evaluation, too: the usual steps of training differ from
    those by one grey level or two, which undoes what was learned by heart.
    """
    switch = 'default_hooks.stage_switch.'
    final_from_the_start = (
        [f'{switch}of_epochs={epochs}', f'{switch}ends=(0,0,0)']
        if phases
        else [f'{switch}num_final_epochs={epochs}']
    )
    return [
        f'train_dataloader.dataset.indices={num_images}',
        'train_dataloader.batch_size=8',
        'train_dataloader.num_workers=0',
        f'val_dataloader.dataset.indices={num_images}',
        'val_dataloader.dataset.ann_file=annotations/instances_train2017.json',
        'val_dataloader.dataset.data_prefix.img=train2017/',
        'val_dataloader.batch_size=8',
        'val_dataloader.num_workers=0',
        'val_evaluator.ann_file=None',
        f'val_dataloader.dataset.pipeline.1.scale=({side},{side})',
        f'{switch}pipeline.0.type=LoadImage',
        f'{switch}pipeline.3.type=RandomFlip',
        f'{switch}pipeline.3.prob=0.0',
        f'{switch}pipeline.4.type=Resize',
        f'{switch}pipeline.4.keep_ratio=False',
        f'{switch}pipeline.4.backend=pillow',
        f'{switch}pipeline.4.interpolation=bilinear',
        f'{switch}pipeline.6.type=PackDetInputs',
        f'default_hooks.stage_switch.pipeline.4.scale=({side},{side})',
        *final_from_the_start,
        'default_hooks.stage_switch.reload_best=False',
        'default_hooks.ema.momentum=0.02',
        'default_hooks.ema.warmup_iters=50',
        f'default_hooks.checkpoint.interval={epochs}',
        f'train_cfg.max_epochs={epochs}',
        'train_cfg.val_interval=50',
    ]


@pytest.mark.slow
@pytest.mark.skipif(not COCO, reason='MMB_COCO_DIR does not name a COCO folder')
@pytest.mark.parametrize('name', CASES)
def test_a_few_images_are_learned_by_heart(name: str, tmp_path: Path) -> None:
    *sizes, own = CASES[name]
    phases = name.startswith('deim')
    command = [sys.executable, 'tools/train.py', f'configs/{name}.py']
    command += ['--no-amp', '--data-root', COCO, '--work-dir', str(tmp_path)]
    done = subprocess.run(
        [*command, '--cfg-options', *options(*sizes, phases=phases), *own],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    found = [float(ap) for ap in re.findall(r'coco/bbox_mAP: (\d\.\d+)', output)]
    print(f'{name}: AP at every 50th epoch {found}')
    assert max(found) > 0.9, found
