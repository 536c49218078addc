"""Histories of logged scalars stay short, and the log still averages."""

from pathlib import Path

import pytest
from toy_runner import toy_runner

import mmbackbones  # noqa: F401
from mmbackbones.engine.log_history import LogHistoryHook


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
