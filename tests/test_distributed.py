"""Two processes over gloo: they compute what one does, and never wait for ever."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner._flexible_runner import FlexibleRunner
from mmengine.structures import InstanceData
from ranks import make_batch, make_detector, on_ranks, quiet_config, toy_config

import mmbackbones  # noqa: F401
from mmbackbones.apis.config import prepare
from mmbackbones.data.synthetic import draw_detection_set
from mmbackbones.registry import MODELS

ROOT = Path(__file__).parent.parent
Sizes = tuple[tuple[int, ...], ...]


def gradients_of(sizes: Sizes, num_denoising: int) -> dict[str, torch.Tensor]:
    """All gradients of this rank's share of the images.

    Settings under which equality is exact: batch-norm in evaluation mode (there is
    no SyncBN on the CPU); denoising queries without noise (each rank draws its own);
    no distillation (as in the original, averaged over the rank's own queries); as
    many queries as positions (near equals change places by rounding).
    """
    cfg = toy_config()
    cfg.model.decoder.update(
        num_denoising=num_denoising,
        label_noise_ratio=0.0,
        box_noise_scale=0.0,
        num_queries=84,
    )
    cfg.model.criterion.ddf_weight = 0.0
    model = make_detector(cfg)
    if dist.is_initialized():
        rank = dist.get_rank()
        batch = make_batch(sizes[rank], first=sum(map(len, sizes[:rank])))
        wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    else:
        batch = make_batch(sum(sizes, ()))
        wrapped = model
    data = model.data_preprocessor(batch, training=True)
    losses = wrapped(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ('sizes', 'num_denoising'),
    [
        pytest.param(((3, 1), (2, 4)), 0, id='plain'),
        # Groups are as long as the rank's fullest image, here the same on all.
        pytest.param(((4, 1), (1, 4)), 10, id='denoising'),
        pytest.param(((2, 1, 5), (3, 0)), 0, id='unequal numbers of images'),
        pytest.param(((0, 0), (3, 2)), 0, id='a rank without boxes'),
        pytest.param(((0, 0), (0, 0)), 10, id='no boxes at all'),
    ],
)
def test_gradients_equal_one_process(sizes: Sizes, num_denoising: int) -> None:
    (one,) = on_ranks(gradients_of, 1, sizes, num_denoising)
    ranks = on_ranks(gradients_of, 2, sizes, num_denoising)
    # The losses are divided by the boxes per rank, or by 1 where those are fewer: so
    # did the original, and 0 boxes weigh as one on each rank.
    factor = 1.0 if sum(map(sum, sizes)) else 0.5
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert largest > 1e-4
    for rank in ranks:
        for name, expected in one.items():
            torch.testing.assert_close(
                rank[name],
                factor * expected,
                rtol=1e-4,
                atol=1e-6 * largest,
                msg=lambda text, name=name: f'{name}: {text}',
            )


def three_steps(sizes: Sizes) -> list[dict[str, float]]:
    """Logged losses of training as published; DDP tells of unused parameters."""
    model = make_detector()
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    optimiser = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-4))
    logs = []
    for step in range(3):
        # The ranks take turns with their shares.
        share = sizes[(dist.get_rank() + step) % len(sizes)]
        logged = wrapped.train_step(make_batch(share, first=step), optimiser)
        logs.append({name: float(value) for name, value in logged.items()})
    for name, parameter in model.named_parameters():
        mine = parameter.detach().clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine, parameter), name
    return logs


@pytest.mark.parametrize('sizes', [((0, 0), (3, 2)), ((0,), (0, 0)), ((1, 2, 9), (4,))])
def test_ranks_with_different_images_stay_together(sizes: Sizes) -> None:
    first, second = on_ranks(three_steps, 2, sizes)
    for mine, theirs in zip(first, second, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(value == value for value in [*mine.values(), *theirs.values()])


def train_with_runner(root: str) -> dict[str, object]:
    """Multi-scale sizes, weights and averages of this rank after an epoch."""
    cfg = quiet_config(root)
    cfg.model.data_preprocessor.batch_augments = [
        dict(type='MultiScaleResize', base_size=128, base_size_repeat=1)
    ]
    runner = RUNNERS.build(prepare(cfg))
    model = runner.model.module
    sizes = []
    model.backbone.register_forward_pre_hook(
        lambda _, inputs: (
            sizes.append(tuple(inputs[0].shape[-2:])) if model.training else None
        )
    )
    runner.train()
    (ema,) = (hook for hook in runner.hooks if hasattr(hook, 'ema_model'))
    return dict(
        sizes=sizes, weights=model.state_dict(), average=ema.ema_model.state_dict()
    )


def test_sizes_weights_and_averages_agree(tmp_path: Path) -> None:
    draw_detection_set(tmp_path / 'data', num_train=16, num_val=3, image_size=64)
    mine, theirs = on_ranks(train_with_runner, 2, str(tmp_path))
    assert len(set(mine['sizes'])) > 1 and mine['sizes'] == theirs['sizes']
    parameters = {name for name, _ in make_detector().named_parameters()}
    assert torch.equal(mine['average']['steps'], torch.tensor(4))
    for name, value in mine['weights'].items():
        if name in parameters:
            assert torch.equal(value, theirs['weights'][name]), name
    for name, value in mine['average'].items():
        # Batch-norm statistics too: all ranks validate what rank 0 saves.
        assert torch.equal(value, theirs['average'][name]), name
    moved = [
        not torch.equal(mine['weights'][name], mine['average'][f'module.{name}'])
        for name in parameters
    ]
    assert sum(moved) > len(moved) / 2


@MODELS.register_module()
class Oracle(BaseModel):
    """Finds every object, some of them badly: by the number of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs: list, data_samples: list, mode: str) -> list:
        for sample in data_samples:
            truth = sample.gt_instances
            generator = torch.Generator().manual_seed(sample.img_id)
            noise = torch.randn(len(truth), 4, generator=generator) * 2
            sample.pred_instances = InstanceData(
                bboxes=truth.bboxes.tensor + noise,
                scores=torch.rand(len(truth), generator=generator),
                labels=truth.labels,
            )
        return data_samples


def evaluate(root: str, num_images: int) -> dict[str, float]:
    """The numbers of a validation of the first images."""
    cfg = quiet_config(root)
    cfg.model = dict(type='Oracle')
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_dataloader.dataset.indices = num_images
    cfg.test_evaluator.outfile_prefix = f'{root}/of_{os.environ["WORLD_SIZE"]}'
    return RUNNERS.build(prepare(cfg)).test()


@pytest.mark.parametrize('num_images', [5, 1])
def test_evaluation_equals_one_process(tmp_path: Path, num_images: int) -> None:
    draw_detection_set(tmp_path / 'data', num_train=1, num_val=5, image_size=64)
    (one,) = on_ranks(evaluate, 1, str(tmp_path), num_images)
    two = on_ranks(evaluate, 2, str(tmp_path), num_images)
    assert 0.1 < one['coco/bbox_mAP'] < 0.99
    assert two == [one, one]
    found = [
        sorted(json.loads((tmp_path / f'of_{n}.bbox.json').read_text()), key=str)
        for n in (1, 2)
    ]
    assert found[0] == found[1]  # none is missing, none counts twice


def shard(root: str) -> tuple[float, bool, int]:
    """Loss of a step under FSDP, whether weights moved, and how many are here."""
    cfg = prepare(quiet_config(root))
    wrapper = dict(use_orig_params=True)
    if not torch.cuda.is_available():
        # Left to itself, FSDP looks for an accelerator.
        wrapper['device_id'] = torch.device('cpu')
    runner = FlexibleRunner(
        model=cfg.model,
        work_dir=cfg.work_dir,
        strategy=dict(type='FSDPStrategy', model_wrapper=wrapper),
        train_dataloader=cfg.train_dataloader,
        optim_wrapper=cfg.optim_wrapper,
        train_cfg=dict(by_epoch=False, max_iters=1),
        default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=1)),
        launcher='pytorch',
        default_scope='mmdet',
        log_level='ERROR',
        cfg=Config(),
    )
    before = []

    class Remember(Hook):
        def before_train_iter(self, runner: FlexibleRunner, *_: object, **__: object):
            before.extend(p.detach().clone() for p in runner.model.parameters())

    runner.register_hook(Remember())
    runner.train()
    after = list(runner.model.parameters())
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    held = sum(parameter.numel() for parameter in after)
    loss = runner.message_hub.get_scalar('train/loss').current()
    return float(loss), moved, held


def test_fully_sharded_step(tmp_path: Path) -> None:
    draw_detection_set(tmp_path / 'data', num_train=4, num_val=1, image_size=64)
    ranks = on_ranks(shard, 2, str(tmp_path))
    whole = sum(p.numel() for p in make_detector().parameters())
    for loss, moved, held in ranks:
        assert loss == loss and loss > 0 and moved
        assert held < 0.6 * whole  # each rank holds its half


def run_of(work_dir: Path, folder: Path, *arguments: str) -> list[str]:
    """Command line of two training processes that may be started again once."""
    options = (
        *('train_dataloader.batch_size=2', 'train_dataloader.num_workers=0'),
        *('train_dataloader.persistent_workers=False', 'train_cfg.max_epochs=6'),
        *('val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False'),
        *('default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=1'),
        *('model.decoder.num_layers=1', 'train_cfg.val_interval=100'),
    )
    return [
        *('bash', 'tools/dist_train.sh', 'configs/dfine_demo.py', '2'),
        *('--data-root', str(folder), '--work-dir', str(work_dir), *arguments),
        *('--cfg-options', *options),
    ]


@pytest.mark.slow
def test_killed_process_is_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    data, work_dir = tmp_path / 'data', tmp_path / 'run'
    draw_detection_set(data, num_train=16, num_val=3, image_size=64)
    environment = dict(
        os.environ, PYTHON=sys.executable, MAX_RESTARTS='1', MASTER_PORT='29651'
    )
    with subprocess.Popen(
        run_of(work_dir, data, '--resume', 'auto'),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        log = []
        for line in launcher.stdout:
            first = not any('[3][1/4]' in before for before in log)
            log.append(line)
            if '[3][1/4]' in line and first:
                children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children')
                os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    text = ''.join(log)
    assert launcher.returncode == 0, text[-3000:]
    (resumed,) = re.findall(r'resumed epoch: (\d+)', text)
    epochs = re.findall(r'Epoch\(train\) \[(\d)\]\[4/4\]', text)
    assert int(resumed) >= 1
    assert epochs[-1] == '6' and epochs.count('6') == 1
    assert (work_dir / 'epoch_6.pth').exists()
