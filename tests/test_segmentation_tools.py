"""Segmentation through the tools, as a user calls them, on a drawn set."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmbackbones.data.synthetic import SEGMENTS, draw_segmentation_set

ROOT = Path(__file__).parent.parent
CONFIG = 'configs/upernet_hgnetv2_b0_custom.py'
TINY = (
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'test_dataloader.num_workers=0',
    'train_dataloader.dataset.pipeline.2.scale=(256,64)',
    'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
    'val_dataloader.dataset.pipeline.1.scale=(256,64)',
    'test_dataloader.dataset.pipeline.1.scale=(256,64)',
    'model.data_preprocessor.size=(64,64)',
    'model.test_cfg.crop_size=(64,64)',
    'model.test_cfg.stride=(42,42)',
    'model.decode_head.channels=16',
    'model.auxiliary_head.channels=8',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=2',
    'train_cfg.max_iters=4',
    'train_cfg.val_interval=2',
    'param_scheduler.0.end=1',
    'param_scheduler.1.begin=1',
    # Where the drawn set differs from the config.
    'train_dataloader.dataset.class_file=classes.txt',
    'train_dataloader.dataset.data_prefix.img_path=images/training',
    'train_dataloader.dataset.data_prefix.seg_map_path=annotations/training',
    *(
        f'{split}_dataloader.dataset.{option}'
        for split in ('val', 'test')
        for option in (
            'class_file=classes.txt',
            'data_prefix.img_path=images/validation',
            'data_prefix.seg_map_path=annotations/validation',
        )
    ),
)


def tool(root: Path, name: str, *arguments: object) -> str:
    """Run a tool in a process of its own; its whole output."""
    done = subprocess.run(
        [
            *(sys.executable, f'tools/{name}.py', CONFIG, *map(str, arguments)),
            *('--data-root', str(root / 'data'), '--work-dir', str(root / 'run')),
            *('--cfg-options', *TINY),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn set and a run of four iterations on it."""
    root = tmp_path_factory.mktemp('segmentation')
    draw_segmentation_set(root / 'data', num_train=4, num_val=2, image_size=64)
    tool(root, 'train')
    return root


def checkpoint(folder: Path) -> Path:
    return next((folder / 'run').glob('best_mIoU_iter_*.pth'))


def test_training_logs_scores_and_knows_its_classes(folder: Path) -> None:
    log = next((folder / 'run').glob('*/*.log')).read_text()
    assert all(name in log for name in ('aAcc', 'mIoU', 'mAcc', 'decode.loss_ce'))
    assert '4 images with label maps, 6 classes' in log
    scalars = next((folder / 'run').glob('*/vis_data/scalars.json')).read_text()
    entries = [json.loads(line) for line in scalars.splitlines()]
    validations = [entry for entry in entries if 'mIoU' in entry]
    assert [entry['step'] for entry in validations] == [2, 4]
    assert next((folder / 'run').glob('*/curves.png')).stat().st_size > 5000
    meta = torch.load(checkpoint(folder), weights_only=False)['meta']['dataset_meta']
    assert meta['classes'] == SEGMENTS
    assert meta['category_ids'] == (1, 2, 3, 4, 5, 6)


def test_test_prints_a_table_and_draws(folder: Path) -> None:
    pictures = folder / 'pictures'
    output = tool(folder, 'test', checkpoint(folder), '--show-dir', pictures)
    assert all(name in output for name in ('aAcc', 'mIoU', 'mAcc', *SEGMENTS))
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ['000000.jpg', '000001.jpg']
    image = Image.open(folder / 'data/images/validation/000000.jpg')
    drawn = Image.open(pictures / '000000.jpg')
    assert drawn.size == (2 * image.width, image.height)


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('test', ('x.pth', '--out', 'x.json'), '--out is for detection'),
        ('browse_dataset', ('--final',), '--final: this config has no final epochs'),
    ],
)
def test_what_segmentors_do_not_have(
    name: str,
    arguments: tuple,
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ('--data-root', str(folder / 'data'), '--work-dir', str(folder / 'run'))
    monkeypatch.setattr(
        'sys.argv',
        [name, CONFIG, *arguments, *options, '--cfg-options', *TINY],
    )
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        runpy.run_path(f'tools/{name}.py')['main']()


def test_infer_writes_ids_and_overlays(folder: Path) -> None:
    out = folder / 'infer'
    images = folder / 'data' / 'images' / 'validation'
    tool(folder, 'infer', checkpoint(folder), images, '--out-dir', out)
    for path in images.iterdir():
        image = Image.open(path)
        ids = np.asarray(Image.open(out / 'id_maps' / f'{path.stem}.png'))
        assert ids.shape == (image.height, image.width) and ids.dtype == np.uint8
        assert set(np.unique(ids)) <= {1, 2, 3, 4, 5, 6}
        assert Image.open(out / 'pictures' / path.name).size == image.size


def test_browse_shows_maps(folder: Path) -> None:
    out = folder / 'browse'
    tool(folder, 'browse_dataset', '--out-dir', out, '--num', '2')
    assert len(list(out.iterdir())) == 2
