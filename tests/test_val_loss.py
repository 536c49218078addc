"""The validation loss: the criterion's own numbers, whatever the batches and ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import RUNNERS
from ranks import on_ranks, quiet_config

from mmbackbones.apis.config import prepare
from mmbackbones.data.synthetic import draw_detection_set
from mmbackbones.engine import val_loss

Metrics = dict[str, float]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    # An odd number of images would count one twice on two ranks.
    draw_detection_set(tmp_path / 'data', num_train=1, num_val=16, image_size=64)
    return str(tmp_path)


def runner_of(root: str, batch_size: int, *, in_input_pixels: bool = False) -> object:
    cfg = quiet_config(root)
    cfg.default_hooks.checkpoint.save_best = None
    cfg.val_dataloader.batch_size = batch_size
    if in_input_pixels:
        pipeline = cfg.val_dataloader.dataset.pipeline
        pipeline[1], pipeline[2] = pipeline[2], pipeline[1]
        assert 'LoadAnnotations' in str(pipeline[1].type)
    return RUNNERS.build(prepare(cfg))


def validate(
    root: str, batch_size: int, in_input_pixels: bool = False
) -> tuple[Metrics, Metrics]:
    """Metrics of a validation in training, and the scalars that go to the log."""
    runner = runner_of(root, batch_size, in_input_pixels=in_input_pixels)
    runner.register_hook(val_loss.ValLossHook())
    model = runner.model.module if dist.is_initialized() else runner.model
    model.load_state_dict(torch.load(f'{root}/weights.pth'))
    runner.call_hook('before_run')
    for hook in runner.hooks:
        if isinstance(hook, val_loss.ValLossHook):
            hook.before_train(runner)
    loop = runner.build_val_loop(runner.cfg.val_cfg)
    runner._val_loop = loop
    metrics = loop.run()
    return metrics, {
        name: float(scalar.current())
        for name, scalar in runner.message_hub.log_scalars.items()
    }


def by_hand(root: str) -> Metrics:
    """One batch of all images, its ground truth loaded before the resizing."""
    runner = runner_of(root, batch_size=16, in_input_pixels=True)
    model = runner.model.eval()
    torch.save(model.state_dict(), f'{root}/weights.pth')
    (batch,) = runner.val_dataloader
    with torch.no_grad():
        losses = model(**model.data_preprocessor(batch), mode='loss')
    return {name: float(value) for name, value in losses.items()}


def test_equals_the_criterion_and_does_not_depend_on_batches(folder: str) -> None:
    (losses,) = on_ranks(by_hand, 1, folder)
    assert set(losses) == {'loss_vfl', 'loss_bbox', 'loss_giou', 'loss_fgl'}
    expected = {f'val_{name}': value for name, value in losses.items()}
    expected['val_loss'] = sum(losses.values())
    runs = {
        'one process': on_ranks(validate, 1, folder, 16),
        'batches of three': on_ranks(validate, 1, folder, 3),
        'annotations first': on_ranks(validate, 1, folder, 5, True),
        'two ranks': on_ranks(validate, 2, folder, 3),
    }
    for name, results in runs.items():
        for metrics, logged in results:
            for key, value in expected.items():
                assert metrics[key] == pytest.approx(value, rel=1e-4), (name, key)
                assert logged[f'val/{key}'] == metrics[key]
            assert 'coco/bbox_mAP' in metrics


def without_ground_truth(root: str) -> tuple[Metrics, list[str]]:
    runner = runner_of(root, 4)
    hook = val_loss.ValLossHook()
    hook.before_train(runner)
    dataset = runner.val_dataloader.dataset
    dataset.pipeline.transforms = [
        step
        for step in dataset.pipeline.transforms
        if type(step).__name__ != 'LoadAnnotations'
    ]
    said = []
    runner.logger.warning = said.append
    metrics = {}
    for _ in range(2):
        hook.before_val_epoch(runner)
        hook.after_val_iter(runner, 0, None, [])
        hook.after_val_epoch(runner, metrics)
    return metrics, said


def test_missing_ground_truth_is_said_once(folder: str) -> None:
    ((metrics, said),) = on_ranks(without_ground_truth, 1, folder)
    assert metrics == {}
    assert said == [
        'There will be no val_loss: the validation pipeline has no LoadAnnotations'
    ]
