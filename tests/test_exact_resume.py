"""Training that is killed and resumed, by the tool: the losses of one that is not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mmengine.config import Config

from mmbackbones.data.synthetic import draw_detection_set

ROOT = Path(__file__).parent.parent
ITERATIONS = 20  # 4 epochs of 5; the last one is of the final stage


def small_config(folder: Path) -> Path:
    """The demo with all of the augmentation, noise, and a final stage; saved flat."""
    cfg = Config.fromfile(ROOT / 'configs/dfine_demo.py')
    full = Config.fromfile(ROOT / 'configs/dfine_hgnetv2_b0_coco.py')
    weak = cfg.train_dataloader.dataset.pipeline
    strong = full.plain_train_pipeline[2:5]
    cfg.train_dataloader.dataset.pipeline = [*weak[:2], *strong, *weak[2:]]
    cfg.train_dataloader.update(batch_size=4, num_workers=2)
    cfg.default_hooks.stage_switch.update(pipeline=weak, num_final_epochs=1)
    cfg.default_hooks.checkpoint.update(interval=1, iter_interval=2)
    cfg.default_hooks.logger.interval = 1
    cfg.log_processor.window_size = 1
    cfg.train_cfg.update(max_epochs=4, val_interval=1)
    cfg.model.neck.hidden_dim = cfg.model.decoder.hidden_dim = 32
    cfg.model.decoder.num_layers = 1
    cfg.param_scheduler = cfg.param_scheduler[:1]
    cfg.dump(folder / 'small.py')
    return folder / 'small.py'


def losses(work_dir: Path) -> dict[int, dict[str, float]]:
    """Logged values by iteration; of one that was done twice both have to agree."""
    table: dict[int, dict[str, float]] = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut by a kill
            if 'loss' in entry:
                values = {
                    name: value
                    for name, value in entry.items()
                    if name.startswith('loss') or name in ('grad_norm', 'lr')
                }
                assert table.setdefault(entry['iter'], values) == values
    return table


def train(folder: Path, work_dir: Path, *, kill_at: int | None = None) -> None:
    """Run `tools/train.py`, killed once `kill_at` iterations are in the log."""
    command = [
        *(sys.executable, 'tools/train.py', folder / 'small.py', '--resume', 'auto'),
        *('--data-root', folder / 'data', '--work-dir', work_dir),
    ]
    output = work_dir.with_suffix('.txt')
    with (
        output.open('a') as file,
        subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        if kill_at is None:
            assert process.wait() == 0, output.read_text()[-3000:]
            return
        while max(losses(work_dir), default=0) < kill_at:
            assert process.poll() is None, output.read_text()[-3000:]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_run_killed_thrice_equals_one_that_was_not(tmp_path: Path) -> None:
    draw_detection_set(tmp_path / 'data', num_train=20, num_val=4, image_size=96)
    small_config(tmp_path)
    train(tmp_path, tmp_path / 'whole')
    draw = random.SystemRandom()
    # Within the first epoch, in the middle, and about the switch of stages.
    kills = [draw.randint(1, 4), draw.randint(5, 13), draw.randint(14, 18)]
    for kill_at in kills:
        train(tmp_path, tmp_path / 'parts', kill_at=kill_at)
    train(tmp_path, tmp_path / 'parts')
    whole, parts = losses(tmp_path / 'whole'), losses(tmp_path / 'parts')
    assert sorted(whole) == list(range(1, ITERATIONS + 1))
    assert len(list((tmp_path / 'parts').glob('*/vis_data/scalars.json'))) == 4
    assert parts == whole, f'killed at {kills}'
