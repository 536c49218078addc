"""From a config file to a config that runs on this machine and this data.

The tools call `load_config`, then `prepare`. Neither touches what a config
states unless the machine or the data demands it, and each change is said.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.fileio import exists
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from mmbackbones.apis.command_line import check_keys
from mmbackbones.apis.cpu_processes import check_launcher, init_cpu_processes
from mmbackbones.apis.named_files import find_config
from mmbackbones.data.classes import resolve_classes
from mmbackbones.data.seg_classes import resolve_seg_classes
from mmbackbones.engine import mlflow_names, shared_buffers  # noqa: F401  (register)
from mmbackbones.engine.atomic_files import resumable

__all__ = [
    'LOG_BACKENDS',
    'is_segmentor',
    'load_config',
    'log_to',
    'prepare',
    'set_amp',
]

# Their classes in the registry; the name is also that of module and pip package.
LOG_BACKENDS = dict(
    tensorboard='TensorboardVisBackend',
    wandb='WandbVisBackend',
    mlflow='MLflowNamesBackend',
)


def _say(message: str, level: int = 20) -> None:
    print_log(message, logger='current', level=level)


def load_config(
    path: str,
    *,
    data_root: str | None = None,
    work_dir: str | None = None,
    cfg_options: dict | None = None,
) -> Config:
    """Read a config and apply what the command line says.

    A new `data_root` (argument, or key of `cfg_options`) replaces the config's in
    every path below it: data sets, evaluators.

    Args:
        path: config file, pure Python or text style, or the name of one in
            `configs/`.
        data_root: folder of the data set.
        work_dir: folder for logs and checkpoints; by default the config's, else
            `work_dirs/<name of the config>`.
        cfg_options: dotted keys to values.

    Raises:
        ValueError: the file does not exist, the work dir cannot be written, or an
            option has a key at its top that nothing reads.
    """
    cfg = Config.fromfile(find_config(path))
    options = dict(cfg_options or {})
    new_root = data_root or options.pop('data_root', None)
    if new_root is not None:
        _rebase(cfg, str(new_root))
    if options:
        check_keys(cfg, options)
        cfg.merge_from_dict(options)
    _settle_workers(cfg)
    default = cfg.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    cfg.work_dir = work_dir or default
    _check_writable(cfg.work_dir)
    return cfg


def _rebase(cfg: Config, new_root: str) -> None:
    """Put `new_root` wherever the config's `data_root` begins a path."""
    old_root = cfg.get('data_root')
    if old_root is None:
        raise ValueError(
            'data_root is given but the config has no data_root to replace'
        )
    new_root = os.path.join(new_root, '')

    def replace(table: dict) -> None:
        # Only what changes is written: reading a lazy type gives its class, which
        # must not be stored, or the config cannot be dumped.
        for key in list(table):
            value = table[key]
            if isinstance(value, str) and value.startswith(old_root):
                table[key] = new_root + value[len(old_root) :]
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, dict):
                    replace(item)

    cfg.data_root = new_root
    for key in cfg:
        if key.endswith(('_dataloader', '_evaluator')) and isinstance(cfg[key], dict):
            replace(cfg[key])


def _settle_workers(cfg: Config) -> None:
    """`num_workers=0` is enough to load without workers; PyTorch wants more said."""
    for key in cfg:
        loader = cfg[key]
        is_loader = key.endswith('_dataloader') and isinstance(loader, dict)
        if is_loader and not loader.get('num_workers', 0):
            for of_workers in ('persistent_workers', 'prefetch_factor'):
                loader.pop(of_workers, None)


def _check_writable(work_dir: str) -> None:
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        probe = Path(work_dir) / f'.write_test_{os.getpid()}'
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f'work dir {work_dir!r} cannot be written: {error}; choose another with '
            '--work-dir'
        ) from error


def is_segmentor(cfg: Config) -> bool:
    """Whether a config is one of semantic segmentation with heads of mmseg."""
    return 'decode_head' in (cfg.get('model') or ())


def set_amp(cfg: Config, enabled: bool) -> None:
    """Switch automatic mixed precision on or off, keeping all other options."""
    wrapper = cfg.optim_wrapper
    wrapper.type = 'AmpOptimWrapper' if enabled else 'OptimWrapper'
    if enabled:
        wrapper.setdefault('loss_scale', 'dynamic')
    else:
        for key in ('loss_scale', 'dtype', 'use_fp64'):
            wrapper.pop(key, None)


def log_to(cfg: Config, backends: Sequence[str]) -> None:
    """Send scalars and pictures to these services, too.

    The files in the work dir are written as before. TensorBoard's lie beside them, and
    so do MLflow's (`mlflow.db`, `mlflow_artifacts`) unless MLFLOW_TRACKING_URI names a
    server. Accounts and offline use are up to the packages' own variables
    (WANDB_MODE=offline, ...). Runs are named after the work dir.

    Args:
        cfg: of a run.
        backends: of `LOG_BACKENDS`.

    Raises:
        ValueError: an unknown one, or a package that is not installed.
    """
    unknown = set(backends) - set(LOG_BACKENDS)
    if unknown:
        raise ValueError(
            f'--log-to {" ".join(sorted(unknown))}: choose from '
            f'{", ".join(LOG_BACKENDS)}'
        )
    missing = [name for name in backends if importlib.util.find_spec(name) is None]
    if missing:
        names = ' '.join(missing)
        raise ValueError(f'--log-to {names} needs: pip install {names}')
    work_dir = Path(cfg.work_dir).absolute()
    run, server = work_dir.name, os.environ.get('MLFLOW_TRACKING_URI')
    options = dict(
        tensorboard={},
        wandb=dict(init_kwargs=dict(project='mmbackbones', name=run)),
        mlflow=dict(
            exp_name='mmbackbones',
            run_name=run,
            tracking_uri=server or f'sqlite:///{work_dir}/mlflow.db',
            artifact_location=None if server else f'{work_dir}/mlflow_artifacts',
        ),
    )
    cfg.visualizer.vis_backends = [
        *cfg.visualizer.vis_backends,
        *(dict(type=LOG_BACKENDS[name], **options[name]) for name in backends),
    ]


def prepare(cfg: Config, *, training: bool = True) -> Config:
    """Fit the config to this machine and to its data, in place.

    - the number of classes, their names and the evaluator's ground truth follow from
      the annotation files, of a segmentor from the class file;
    - pre-trained backbone weights that are not on disk are left out, with a
      warning (nothing is ever downloaded);
    - without a GPU: no AMP, no SyncBN; the processes of a launcher are joined here,
      over gloo.

    Args:
        cfg: from `load_config`.
        training: False where weights come from a checkpoint anyway, so that the
            backbone's own initialisation is skipped without a word.

    Returns:
        The same config.

    Raises:
        ValueError: the data do not fit; several processes without a launcher.
    """
    check_launcher(cfg.get('launcher', 'none'))
    if is_segmentor(cfg):
        resolve_seg_classes(cfg)
    elif 'model' in cfg and 'decoder' in cfg.model:
        resolve_classes(cfg)
    _follow_annotation_files(cfg)
    _check_pretrained(cfg, training)
    if not torch.cuda.is_available():
        _fit_to_cpu(cfg)
    return cfg


def _follow_annotation_files(cfg: Config) -> None:
    """An evaluator without `ann_file` takes that of its data set."""
    for split in ('val', 'test'):
        evaluator = cfg.get(f'{split}_evaluator')
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
        if isinstance(evaluator, dict) and evaluator.get('ann_file', '') is None:
            root = dataset.get('data_root') or ''
            evaluator.ann_file = os.path.join(root, dataset.get('ann_file') or '')


def _check_pretrained(cfg: Config, training: bool) -> None:
    backbone = cfg.model.get('backbone') or ConfigDict()
    init_cfg = backbone.get('init_cfg')
    checkpoint = init_cfg.get('checkpoint') if isinstance(init_cfg, dict) else None
    if checkpoint is None:
        return
    # A run that looks for a checkpoint to resume, and has none yet, is a first start.
    resumes = cfg.get('resume') and any(resumable(cfg.work_dir))
    if not training or cfg.get('load_from') or resumes:
        backbone.init_cfg = None
    elif '://' not in checkpoint and not exists(checkpoint):
        backbone.init_cfg = None
        frozen = backbone.get('frozen_stages', -1) >= 0 or backbone.get('frozen_norm')
        _say(
            f'model.backbone.init_cfg.checkpoint {checkpoint!r} is not on disk: the '
            'backbone starts from RANDOM weights, the published recipe does not. See '
            '"Weights" in the README for where the file is published.'
            + (
                ' Parts of this backbone are frozen, random as they are; to train '
                'from scratch set model.backbone.frozen_stages=-1 '
                'model.backbone.frozen_norm=False.'
                if frozen
                else ''
            ),
            level=30,
        )


def _is_amp(wrapper: ConfigDict) -> bool:
    kind = wrapper.get('type')
    kind = OPTIM_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, AmpOptimWrapper)


def _fit_to_cpu(cfg: Config) -> None:
    if 'optim_wrapper' in cfg and _is_amp(cfg.optim_wrapper):
        set_amp(cfg, False)
        _say('no GPU: mixed precision is off')
    cfg.sync_bn = None
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if isinstance(cfg.get(key), dict):
            cfg[key].pin_memory = False
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none':
        return
    dist_cfg = cfg.setdefault('env_cfg', ConfigDict()).setdefault('dist_cfg', {})
    dist_cfg['backend'] = 'gloo'
    init_cpu_processes(launcher, timeout=dist_cfg.get('timeout'))
    # DDP takes no device ids on the CPU; mmengine gives them unless they are stated.
    wrapper = cfg.get('model_wrapper_cfg') or ConfigDict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**wrapper, 'device_ids': None}
    cfg.custom_hooks = [
        *(cfg.get('custom_hooks') or ()),
        dict(type='SharedBuffersHook'),
    ]
