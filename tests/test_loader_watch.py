"""The warning about a slow loader: when it comes, and what it advises."""

from types import SimpleNamespace

import pytest

import mmbackbones  # noqa: F401
from mmbackbones.engine import loader_watch
from mmbackbones.engine.loader_watch import LoaderWatchHook, workers_to_try


@pytest.mark.parametrize(
    ('num_workers', 'step', 'wait', 'expected'),
    [
        (4, 1.0, 0.5, 8),  # 4 workers make a batch a second, 2 a second are needed
        (2, 0.9, 0.6, 6),
        (0, 1.0, 0.5, 1),  # one worker loads while the other half is computed
        (0, 1.0, 0.8, 4),
        (3, 1.0, 0.01, 4),  # always at least one more
        (1, 1.0, 1.0, 1000),  # nothing but waiting
    ],
)
def test_workers_to_try(
    num_workers: int, step: float, wait: float, expected: int
) -> None:
    assert workers_to_try(num_workers, step, wait) == expected


def value_of(value: float) -> SimpleNamespace:
    return SimpleNamespace(current=lambda: value)


def warnings_of(
    hook: LoaderWatchHook, waits: list[float], num_workers: int = 2, epoch: int = 1000
) -> list[str]:
    """What is said in steps of one second with these waits."""
    said = []
    runner = SimpleNamespace(
        message_hub=SimpleNamespace(log_scalars={}),
        logger=SimpleNamespace(warning=said.append),
        train_dataloader=SimpleNamespace(num_workers=num_workers),
    )
    for i, wait in enumerate(waits):
        runner.message_hub.log_scalars = {
            'train/time': value_of(1.0),
            'train/data_time': value_of(wait),
        }
        hook.after_train_iter(runner, i % epoch)
    return said


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_watch, '_cores', lambda: 16)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)


def test_a_slow_loader_is_named_once() -> None:
    (text,) = warnings_of(LoaderWatchHook(window=5), [0.5] * 30)
    assert 'of 1.000 s a step, 0.500 s (50%)' in text
    assert 'from 2 workers. Try train_dataloader.num_workers=4.' in text


def test_a_quick_loader_is_not() -> None:
    assert warnings_of(LoaderWatchHook(window=5), [0.1] * 30) == []


def test_batches_in_bursts_count_by_their_mean() -> None:
    # Two workers that end together: every other wait is nothing.
    assert warnings_of(LoaderWatchHook(window=6), [0.9, 0.0] * 10)


def test_the_start_of_workers_does_not_count() -> None:
    waits = ([0.99] + [0.0] * 3) * 10
    assert warnings_of(LoaderWatchHook(window=5), waits, epoch=4) == []
    assert warnings_of(LoaderWatchHook(window=5), waits)  # it would


def test_no_more_workers_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [0.9] * 9
    (text,) = warnings_of(LoaderWatchHook(window=5), waits, num_workers=4)
    assert 'num_workers=16, all the cores' in text and '40 would be needed' in text
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    (text,) = warnings_of(LoaderWatchHook(window=5), waits, num_workers=4)
    assert 'faster storage' in text and 'Try' not in text


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match='max_share is 20'):
        LoaderWatchHook(max_share=20)
    with pytest.raises(ValueError, match='window is 0'):
        LoaderWatchHook(window=0)
