"""Curves: what is read from the logs of one or several runs, and the picture."""

import json
from pathlib import Path

import pytest
from mmengine.hooks import CheckpointHook
from toy_runner import METRIC, toy_runner

import mmbackbones  # noqa: F401
from mmbackbones.engine.curves import CurveHook, Curves, draw_curves, read_curves

PNG = b'\x89PNG\r\n\x1a\n'


def write_log(work_dir: Path, start: str, *lines: dict | str) -> None:
    folder = work_dir / start / 'vis_data'
    folder.mkdir(parents=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / 'scalars.json').write_text('\n'.join(text))


def train(iteration: int, loss: float) -> dict:
    return dict(lr=0.1, loss=loss, iter=iteration, epoch=1, step=iteration)


def val(epoch: int, score: float) -> dict:
    return {METRIC: score, 'time': 0.1, 'step': epoch}


def test_nothing_logged(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == Curves()
    draw_curves(Curves(), tmp_path / 'empty.png', metrics=[METRIC])
    assert (tmp_path / 'empty.png').read_bytes().startswith(PNG)


def test_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    """Two iterations an epoch; killed in epoch 3, resumed from epoch 1."""
    write_log(
        tmp_path, '20240101_000000',
        train(1, 9.0), train(2, 8.0), val(1, 0.1),
        train(3, 7.0), train(4, 6.0), val(2, 0.2),
        train(5, 5.0), '{"loss": 4.',
    )  # fmt: skip
    write_log(tmp_path, '20240102_000000', train(3, 7.5), train(4, 6.5), val(2, 0.25))
    curves = read_curves(tmp_path, iters_per_step=2)
    assert curves.loss == [(1, 9.0), (2, 8.0), (3, 7.5), (4, 6.5)]
    assert curves.metrics[METRIC] == [(1, 0.1), (2, 0.25)]


def test_run_from_scratch_replaces_the_former(tmp_path: Path) -> None:
    write_log(tmp_path, '20240101_000000', train(1, 9.0), train(2, 8.0), val(1, 0.1))
    write_log(tmp_path, '20240102_000000', train(1, 3.0))
    curves = read_curves(tmp_path, iters_per_step=2)
    assert curves.loss == [(1, 3.0)] and curves.metrics[METRIC] == []


def test_picture_shows_finite_points(tmp_path: Path) -> None:
    curves = Curves(
        loss=[(1, 5.0), (2, float('nan')), (3, 4.0)],
        metrics={METRIC: [(1, -1.0), (2, 0.5)], 'coco/bbox_mAP_50': [(1, 0.7)]},
    )
    drawn = tmp_path / 'curves.png'
    draw_curves(curves, drawn, metrics=[METRIC, 'absent'], iters_per_step=2)
    assert drawn.read_bytes().startswith(PNG)
    without = tmp_path / 'without.png'
    draw_curves(Curves(loss=curves.loss), without, metrics=[METRIC], iters_per_step=2)
    assert without.read_bytes() != drawn.read_bytes()


def test_hook_draws_beside_the_log_and_survives_resuming(tmp_path: Path) -> None:
    def hooks() -> dict:
        return dict(
            curves=dict(type=CurveHook),
            checkpoint=dict(type=CheckpointHook, interval=1),
        )

    toy_runner(tmp_path, hooks(), max_epochs=2, scores=[0.1, 0.2]).train()
    runner = toy_runner(tmp_path, hooks(), max_epochs=3, scores=[0.3], resume=True)
    runner.train()
    log_dir = Path(runner.log_dir)
    assert (log_dir / 'curves.png').read_bytes().startswith(PNG)
    assert list(log_dir.glob('*.log'))
    curves = read_curves(tmp_path, iters_per_step=2)
    assert [iteration for iteration, _ in curves.loss] == [1, 2, 3, 4, 5, 6]
    assert curves.metrics[METRIC] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_hook_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('mmbackbones.engine.curves.draw_curves', full)
    runner = toy_runner(tmp_path, dict(curves=dict(type=CurveHook)), max_epochs=1)
    messages = []
    runner.logger.warning = lambda message, *args: messages.append(message)
    runner.train()
    assert any('No space left' in message for message in messages)


def test_validation_alone_draws_nothing(tmp_path: Path) -> None:
    hooks = dict(curves=dict(type=CurveHook))
    runner = toy_runner(tmp_path, hooks, max_epochs=1, scores=[0.5])
    runner.val()
    assert not list(tmp_path.rglob('*.png'))
