"""One flag sends the log to further services; packages that lack are named."""

import importlib.util
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import VISBACKENDS, VISUALIZERS

import mmbackbones  # noqa: F401
from mmbackbones.apis.config import LOG_BACKENDS, load_config, log_to

CONFIG = Path(__file__).parent.parent / 'configs' / 'dfine_demo.py'


def config(folder: Path) -> Config:
    return load_config(str(CONFIG), work_dir=str(folder / 'run'))


def visualizer(cfg: Config, folder: Path) -> object:
    """As the Runner builds it, in a folder of the run."""
    return VISUALIZERS.build(
        dict(
            type='Visualizer',
            name=str(folder),
            save_dir=str(folder / 'run' / 'start'),
            vis_backends=cfg.visualizer.vis_backends,
        )
    )


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f'{package} is not installed'
    )


def test_unknown_service_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'--log-to comet: choose from tensorboard, '):
        log_to(config(tmp_path), ['comet'])


def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='wandb mlflow needs: pip install wandb mlf'):
        log_to(config(tmp_path), ['wandb', 'mlflow'])


def test_services_come_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: True)
    cfg = config(tmp_path)
    before = len(cfg.visualizer.vis_backends)
    log_to(cfg, list(LOG_BACKENDS))
    backends = cfg.visualizer.vis_backends
    assert [b.type for b in backends[before:]] == list(LOG_BACKENDS.values())
    assert all(VISBACKENDS.get(b.type) is not None for b in backends[before:])
    assert cfg.pretty_text  # it can still be dumped


@needs('tensorboard')
def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(tmp_path)
    log_to(cfg, ['tensorboard'])
    board = visualizer(cfg, tmp_path)
    board.add_scalars({'loss': 1.5, 'coco/bbox_AR@100': 0.25}, step=7)
    board.close()
    events = EventAccumulator(str(tmp_path / 'run' / 'start' / 'vis_data'))
    events.Reload()
    (point,) = events.Scalars('coco/bbox_AR@100')
    assert (point.step, point.value) == (7, 0.25)


@needs('wandb')
def test_wandb_writes_a_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('WANDB_MODE', 'offline')
    cfg = config(tmp_path)
    log_to(cfg, ['wandb'])
    board = visualizer(cfg, tmp_path)
    board.add_scalars({'loss': 1.5, 'coco/bbox_AR@100': 0.25}, step=7)
    board.close()
    assert list(tmp_path.glob('run/start/vis_data/wandb/offline-run-*/*.wandb'))


@needs('mlflow')
@needs('sqlalchemy')
def test_mlflow_has_the_scalars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    cfg = config(tmp_path)
    log_to(cfg, ['mlflow'])
    board = visualizer(cfg, tmp_path)
    board.add_config(cfg)
    board.add_scalars({'loss': 1.5, 'coco/bbox_AR@100': 0.25}, step=7)
    board.close()
    (run,) = mlflow.search_runs(experiment_names=['mmbackbones'], output_format='list')
    assert run.info.run_name == 'run'
    assert run.data.metrics == {'loss': 1.5, 'coco/bbox_AR_at_100': 0.25}
