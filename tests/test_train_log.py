"""The log line is short but complete, and histories of scalars stay short."""

import re
from pathlib import Path

import pytest
from mmengine.hooks import Hook, IterTimerHook
from mmengine.runner import LogProcessor, Runner
from torch import Tensor
from toy_runner import ToyModel, toy_runner

import mmbackbones  # noqa: F401
from mmbackbones.engine.train_log import CompactLogProcessor, LogHistoryHook


class ManyLosses(ToyModel):
    """D-FINE's kinds of names."""

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> object:
        losses = super().forward(inputs, mode)
        names = ['vfl', 'vfl_aux_0', 'ddf_dn_1', 'giou_pre', 'bbox_enc_0', 'fgl_dn_pre']
        return {f'loss_{name}': losses['loss'] for name in names}


def test_line_has_progress_and_the_main_losses(tmp_path: Path) -> None:
    lines, tags = {}, {}

    class Spy(CompactLogProcessor):
        def get_log_after_iter(self, *args: object) -> tuple[dict, str]:
            tags['all'], lines['short'] = super().get_log_after_iter(*args)
            lines['whole'] = LogProcessor.get_log_after_iter(self, *args)[1]
            return tags['all'], lines['short']

    runner = toy_runner(
        tmp_path,
        dict(timer=dict(type=IterTimerHook)),
        model=ManyLosses(),
        max_epochs=2,
        log_processor=dict(type=Spy),
    )
    runner.train()
    names = re.findall(r'(\w+): ', lines['short'])
    # `images/s` is found without its first word.
    assert names == [
        *('lr', 'eta', 'time', 'data_wait', 's', 'memory', 'loss', 'loss_vfl')
    ]
    assert 'loss_fgl_dn_pre' in lines['whole'] and 'loss_fgl_dn_pre' in tags['all']
    assert lines['short'].startswith('Epoch(train) [2][2/2]')


def test_speed_is_right(tmp_path: Path) -> None:
    class Half(Hook):
        priority = 'BELOW_NORMAL'  # after IterTimerHook

        def after_train_iter(self, runner: Runner, *_: object, **__: object) -> None:
            for name, value in (('time', 0.5), ('data_time', 0.125)):
                runner.message_hub.log_scalars.pop(f'train/{name}')
                runner.message_hub.update_scalar(f'train/{name}', value)
            log['tag'], log['line'] = runner.log_processor.get_log_after_iter(
                runner, 0, 'train'
            )

    log = {}
    hooks = dict(timer=dict(type=IterTimerHook), half=dict(type=Half))
    processor = dict(type=CompactLogProcessor)
    toy_runner(tmp_path, hooks, max_epochs=1, log_processor=processor).train()
    # Batches of two in half a second, a quarter of which was waiting.
    assert log['tag']['images_per_s'] == 4
    assert log['tag']['data_wait'] == 0.25
    assert 20 < log['tag']['memory'] < 100_000  # MB of this process
    assert 'time: 0.5000  data_wait: 25%  images/s: 4.0  memory: ' in log['line']


def test_histories_are_bounded(tmp_path: Path) -> None:
    hooks = dict(history=dict(type=LogHistoryHook, max_length=3))
    runner = toy_runner(tmp_path, hooks, max_epochs=5)
    runner.train()
    history, _ = runner.message_hub.get_scalar('train/loss').data
    assert len(history) == 3
    assert runner.message_hub.get_scalar('train/loss').mean(3) == history.mean()


def test_bad_length_is_named() -> None:
    with pytest.raises(ValueError, match='max_length is 0'):
        LogHistoryHook(0)
