"""Final stage: pipeline, multi-scale, reload of the best, resume on either side."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.runner import IterBasedTrainLoop, Runner
from toy_runner import METRIC, Stamp, toy_runner

import mmbackbones  # noqa: F401
from mmbackbones.engine.ema import RampEMAHook
from mmbackbones.engine.stage_switch import StageSwitchHook

FULL, FINAL = 1, 5  # stamps of the two pipelines


def hooks(num_final_epochs: int, **switch: object) -> dict:
    return dict(
        stage_switch=dict(
            type=StageSwitchHook,
            num_final_epochs=num_final_epochs,
            pipeline=[dict(type=Stamp, value=FINAL)],
            **switch,
        ),
        ema=dict(type=RampEMAHook, momentum=0.1, warmup_iters=3),
        checkpoint=dict(type=CheckpointHook, interval=1, save_best=METRIC),
    )


def state_of(runner: Runner) -> dict:
    """All that a reload restores, copied."""
    ema = next(hook for hook in runner.hooks if isinstance(hook, RampEMAHook))
    optimizer = runner.optim_wrapper.optimizer
    parameters = list(runner.model.parameters())
    return dict(
        model={k: v.clone() for k, v in runner.model.state_dict().items()},
        ema={k: v.clone() for k, v in ema.ema_model.state_dict().items()},
        moments=[optimizer.state[p]['exp_avg_sq'].clone() for p in parameters],
        lr=[group['lr'] for group in optimizer.param_groups],
        schedulers=[s.state_dict()['last_step'] for s in runner.param_schedulers],
    )


class Recorder(StageSwitchHook):
    """Also records the state after each validation and before each epoch."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.before, self.after = [], []

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.after.append(state_of(runner))
        super().after_val_epoch(runner, metrics)

    def before_train_epoch(self, runner: Runner) -> None:
        super().before_train_epoch(runner)
        if runner.iter:
            self.before.append(state_of(runner))


def find(runner: Runner, kind: type) -> object:
    return next(hook for hook in runner.hooks if isinstance(hook, kind))


@pytest.mark.parametrize(
    ('max_epochs', 'num_final', 'expected', 'num_workers'),
    [
        (2, 0, [FULL, FULL], 0),
        (4, 1, [FULL, FULL, FULL, FINAL], 0),
        (3, 2, [FULL, FINAL, FINAL], 2),  # persistent: hold the old pipeline
        (2, 2, [FINAL, FINAL], 0),
        (2, 5, [FINAL, FINAL], 0),
    ],
)
def test_pipeline_changes_at_the_epoch_counted_from_the_end(
    tmp_path: Path, max_epochs: int, num_final: int, expected: list, num_workers: int
) -> None:
    runner = toy_runner(
        tmp_path, hooks(num_final), max_epochs=max_epochs, num_workers=num_workers
    )
    runner.train()
    assert runner.model.seen == [stamp for stamp in expected for _ in range(2)]
    multi_scale = runner.model.data_preprocessor.batch_augments[0]
    assert multi_scale.enabled is (num_final == 0)
    runner.train_dataloader._iterator = None  # ends its workers now


def test_weights_average_optimizer_and_schedule_equal_the_best_at_the_switch(
    tmp_path: Path,
) -> None:
    hook_cfgs = hooks(1)
    hook_cfgs['stage_switch']['type'] = Recorder
    runner = toy_runner(tmp_path, hook_cfgs, max_epochs=4, scores=[0.1, 0.4, 0.2, 0.3])
    runner.train()
    recorder = find(runner, Recorder)
    best, last_of_stage_1 = recorder.after[1], recorder.after[2]
    torch.testing.assert_close(recorder.before[-1], best, rtol=0, atol=0)
    assert recorder.before[-1]['lr'] != last_of_stage_1['lr']
    assert best['ema']['steps'] == 4
    assert runner.epoch == 4 and runner.iter == 8


def test_final_epochs_that_do_not_improve_are_undone(tmp_path: Path) -> None:
    """Scores after the switch, and what upstream's loop does with each of them.

    .3: not above .4, the best of stage 1: undone.
    .1: first after a reload: accepted whatever it is.
    .2: above .1: accepted.
    .2: not above .2: undone.
    .5: first after a reload, and the best of all.
    .6: above .5. .6: the last epoch is never undone.
    """
    hook_cfgs = hooks(7)
    hook_cfgs['stage_switch']['type'] = Recorder
    runner = toy_runner(
        tmp_path,
        hook_cfgs,
        max_epochs=9,
        scores=[0.4, 0.2, 0.3, 0.1, 0.2, 0.2, 0.5, 0.6, 0.6],
    )
    runner.train()
    recorder = find(runner, Recorder)
    best = recorder.after[0]

    def equals_best(state: dict) -> bool:
        return torch.equal(state['model']['weight'], best['model']['weight'])

    # before[i] is taken before epoch i + 1 (0-based).
    undone = [equals_best(state) for state in recorder.before]
    assert undone == [True, True, True, False, False, True, False, False]
    final = state_of(runner)
    torch.testing.assert_close(final, recorder.after[-1], rtol=0, atol=0)
    info = runner.message_hub.runtime_info
    assert info['best_score'] == 0.6 and Path(info['best_ckpt']).is_file()
    assert info['stage_switch']['best_score'] == 0.4


@pytest.mark.parametrize('resume_after', [1, 2, 3, 4])
def test_resume_lands_on_the_right_side(tmp_path: Path, resume_after: int) -> None:
    """Interrupted after any epoch, the run ends in the same state."""
    scores = [0.2, 0.4, 0.1, 0.3, 0.5]

    def run(work_dir: Path, **kwargs: object) -> Runner:
        runner = toy_runner(work_dir, hooks(2), **kwargs)
        runner.train()
        return runner

    whole = run(tmp_path / 'whole', max_epochs=5, scores=scores)
    assert whole.model.seen == [FULL] * 6 + [FINAL] * 4

    class Interrupt(Exception):
        pass

    class InterruptHook(CheckpointHook):
        priority = 'LOWEST'

        def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
            if runner.epoch == resume_after:
                raise Interrupt

    work_dir = tmp_path / 'parts'
    first = toy_runner(work_dir, hooks(2), max_epochs=5, scores=scores)
    first.register_hook(InterruptHook(interval=-1))
    with pytest.raises(Interrupt):
        first.train()
    second = run(work_dir, max_epochs=5, scores=scores[resume_after:], resume=True)
    assert first.model.seen + second.model.seen == whole.model.seen
    torch.testing.assert_close(state_of(second), state_of(whole), rtol=0, atol=0)


def test_longer_run_leaves_the_final_stage_again(tmp_path: Path) -> None:
    toy_runner(tmp_path, hooks(1), max_epochs=2, scores=[0.1, 0.2]).train()
    runner = toy_runner(
        tmp_path, hooks(1), max_epochs=4, scores=[0.3, 0.4], resume=True
    )
    runner.train()
    assert runner.model.seen == [FULL] * 2 + [FINAL] * 2
    assert runner.message_hub.get_info('stage_switch')['best_score'] == 0.3


@pytest.mark.parametrize('damage', ['no evaluation', 'truncated', 'removed'])
def test_no_best_goes_on_with_a_warning(tmp_path: Path, damage: str) -> None:
    scores = None if damage == 'no evaluation' else [0.2, 0.1, 0.3]

    class Damage(CheckpointHook):
        priority = 'LOWEST'

        def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
            best = Path(runner.work_dir) / 'stage1_best.pth'
            if damage == 'removed':
                best.unlink(missing_ok=True)
            else:
                best.write_bytes(best.read_bytes()[:500])

    runner = toy_runner(tmp_path, hooks(1), max_epochs=3, scores=scores)
    runner.register_hook(Damage(interval=-1))
    messages = []
    runner.logger.warning = lambda message, *args: messages.append(message)
    runner.train()
    assert runner.model.seen[-2:] == [FINAL, FINAL]
    assert any('goes on from the current weights' in text for text in messages)


def test_reload_and_momentum_are_optional(tmp_path: Path) -> None:
    hook_cfgs = hooks(2, reload_best=False, ema_momentum=0.3)
    runner = toy_runner(tmp_path, hook_cfgs, max_epochs=3, scores=[0.4, 0.3, 0.2])
    runner.train()
    assert not (tmp_path / 'stage1_best.pth').exists()
    assert find(runner, RampEMAHook).ema_model.momentum == 0.3


def test_missing_metric_is_said(tmp_path: Path) -> None:
    runner = toy_runner(
        tmp_path, hooks(1, monitor='coco/segm_mAP'), max_epochs=2, scores=[0.1, 0.2]
    )
    messages = []
    runner.logger.warning = lambda message, *args: messages.append(message)
    runner.train()
    assert any("'coco/segm_mAP'" in m and METRIC in m for m in messages)


def test_nan_is_not_the_best(tmp_path: Path) -> None:
    """It would stay so: nothing is greater."""
    hook_cfgs = hooks(1)
    del hook_cfgs['checkpoint']
    scores = [math.nan, 0.1, math.nan, 0.3]
    runner = toy_runner(tmp_path, hook_cfgs, max_epochs=4, scores=scores)
    runner.train()
    assert runner.message_hub.get_info('stage_switch')['best_score'] == 0.1


def test_validation_alone_saves_nothing(tmp_path: Path) -> None:
    hook_cfgs = hooks(1)
    del hook_cfgs['checkpoint']
    runner = toy_runner(tmp_path, hook_cfgs, max_epochs=2, scores=[0.5])
    runner.val()
    assert not list(tmp_path.glob('*.pth'))


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='num_final_epochs is -1'):
        StageSwitchHook(-1, [])
    runner = toy_runner(
        tmp_path,
        hooks(1),
        max_epochs=1,
        train_cfg=dict(type=IterBasedTrainLoop, max_iters=2),
    )
    with pytest.raises(ValueError, match='IterBasedTrainLoop'):
        runner.train()
