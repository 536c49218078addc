"""Making a checkpoint fit the model, and saying how far it does.

Upstream of the class rows: https://github.com/Peterande/D-FINE
src/solver/_solver.py (Apache-2.0).
Departs from the source:
- rows of a classifier are carried over by class name between any two lists of
  classes, not by one list from Objects365 to COCO (which gives the same rows);
- the class embedding of the denoising queries is carried over likewise (upstream
  starts it anew);
- a checkpoint that hardly fits is an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmbackbones.convert.objects365 import (
    COCO_CLASSES,
    OBJECTS365_CLASSES,
    match_classes,
)
from mmbackbones.convert.sources import to_ours
from mmbackbones.registry import HOOKS

__all__ = ['LoadReport', 'LoadReportHook', 'fit_state_dict']

_CLASS_ROWS = re.compile(
    r'(^|\.)(enc_score_head|dec_score_head\.\d+|denoising_class_embed)\.(weight|bias)$'
)
# Not of the encoder, which may score its tokens without classes.
_CLASS_COUNT = re.compile(r'(^|\.)dec_score_head\.\d+\.bias$')
# Follow from the size of the input, which the model may have another idea of.
_COMPUTED = re.compile(r'(^|\.)(anchors|valid_mask|num_batches_tracked)$')
_ENOUGH = 0.5


@dataclass
class LoadReport:
    """What became of a checkpoint's tensors.

    Attributes:
        loaded: keys that were taken as they are.
        by_class: keys of which the rows of shared classes were taken.
        dropped: keys of the checkpoint that were not used, and why.
        missing: keys of the model that the checkpoint did not give.
        notes: what was recognised, in words.
    """

    loaded: list[str] = field(default_factory=list)
    by_class: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all that is learned came from the checkpoint, and all was used."""
        return not any(
            not _COMPUTED.search(key) for key in (*self.dropped, *self.missing)
        )

    def __str__(self) -> str:
        """A few lines; of each list the first names."""
        total = len(self.loaded) + len(self.by_class) + len(self.missing)
        lines = [f'Checkpoint: {len(self.loaded)} of {total} tensors loaded']
        if self.by_class:
            lines[0] += f', {len(self.by_class)} by class'
        lines[0] += f', {len(self.dropped)} dropped, {len(self.missing)} missing'
        lines += self.notes
        reasons: dict[str, list[str]] = {}
        for key, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(key)
        lines += [
            f'dropped, {reason}: {_some(keys)}' for reason, keys in reasons.items()
        ]
        if self.missing:
            lines.append(f'missing, stay as initialised: {_some(self.missing)}')
        return '\n  '.join(lines)


def fit_state_dict(
    model: nn.Module,
    checkpoint: Mapping,
    *,
    classes: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Make a checkpoint's weights fit a model; neither is changed.

    - Names of other makers become ours, see `mmbackbones.convert`.
    - A file with the backbone's weights alone (`stem...`, `stages...`) goes into
      `model.backbone`.
    - Class rows (score heads, denoising embedding) of another list of classes are
      taken for the classes that both know; the others stay as initialised. The
      checkpoint's names are in its `meta`; a file without names is COCO if it has
      80 rows, Objects365 if it has 366 (row = category id) or 365.
    - Tensors of another shape or unknown name are dropped.

    Args:
        model: not wrapped.
        checkpoint: has `state_dict` and perhaps `meta`.
        classes: names of the model's classes by label; None takes rows as they are
            where their number fits.

    Returns:
        Every key of the model, and the report. What the checkpoint did not give is
        the model's own tensor.

    Raises:
        ValueError: less than half of the model (or of its backbone, for a backbone
            file) would be loaded: the checkpoint is of something else.
    """
    report = LoadReport()
    target = model.state_dict()
    source = {
        key.removeprefix('module.'): value
        for key, value in checkpoint['state_dict'].items()
    }
    if not all(key in target for key in source):
        source, conversion = to_ours(source)
        if conversion is not None:
            report.notes.append(str(conversion.source))
            report.dropped.update(conversion.dropped)
    scope = list(target)
    if _is_backbone(source, target):
        report.notes.append('it holds a backbone, which goes into model.backbone')
        source = {f'backbone.{key}': value for key, value in source.items()}
        scope = [key for key in target if key.startswith('backbone.')]
    rows = _class_rows(source, target, checkpoint.get('meta') or {}, classes, report)
    fitted = dict(target)
    for key, value in source.items():
        if key not in target:
            report.dropped[key] = 'not in the model'
        elif (
            rows is not None
            and _CLASS_ROWS.search(key)
            and _has_rows(value, target[key], rows)
        ):
            fitted[key] = _take_rows(value, target[key], rows)
            report.by_class.append(key)
        elif value.shape != target[key].shape:
            report.dropped[key] = (
                f'shape {tuple(value.shape)} where the model has '
                f'{tuple(target[key].shape)}'
            )
        else:
            fitted[key] = value
            report.loaded.append(key)
    used = {*report.loaded, *report.by_class}
    report.missing = [key for key in target if key not in used]
    if len(used) < _ENOUGH * len(scope):
        raise ValueError(
            f'the checkpoint does not fit the model: {len(used)} of {len(scope)} '
            f'tensors match by name and shape. It has {_some(list(source))}; the '
            f'model has {_some(scope)}'
        )
    return fitted, report


def _some(keys: Sequence[str], limit: int = 4) -> str:
    shown = ', '.join(keys[:limit])
    return shown + (f', and {len(keys) - limit} more' if len(keys) > limit else '')


def _is_backbone(source: Mapping, target: Mapping) -> bool:
    direct = sum(key in target for key in source)
    return sum(f'backbone.{key}' in target for key in source) > direct


def _class_rows(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    meta: Mapping,
    classes: Sequence[str] | None,
    report: LoadReport,
) -> list[int | None] | None:
    """For each class of the model its row in the checkpoint.

    None: the rows can be taken as they are, or there are none.
    """
    key = next((key for key in source if _CLASS_COUNT.search(key)), None)
    if key is None or key not in target:
        return None
    num_source, num_target = len(source[key]), len(target[key])
    named = (meta.get('dataset_meta') or {}).get('classes')
    known = {
        80: COCO_CLASSES,
        365: OBJECTS365_CLASSES,
        366: ('unused 0', *OBJECTS365_CLASSES),
    }
    names = named if named and len(named) == num_source else known.get(num_source)
    if names is None or classes is None or len(classes) != num_target:
        if num_source == num_target:
            return None
        report.notes.append(
            f'its {num_source} classes are not those of the model ({num_target}) and '
            'the names are not known: all class rows stay as initialised'
        )
        return [None] * num_target
    rows = match_classes(names, classes)
    in_place = sum(row == i for i, row in enumerate(rows))
    # Without names in the file, a few differences are differences of spelling.
    if num_source == num_target and in_place >= (1 if named else 0.5) * num_target:
        return None
    new = [name for name, row in zip(classes, rows, strict=True) if row is None]
    origin = f'the {num_source} classes of the file'
    if not named:
        origin += f', taken for {"COCO" if num_source == 80 else "Objects365"}'
    report.notes.append(
        f'rows of {num_target - len(new)} of {num_target} classes found by name among '
        f'{origin}' + (f'; as initialised: {_some(new)}' if new else '')
    )
    return rows


def _has_rows(value: Tensor, current: Tensor, rows: Sequence[int | None]) -> bool:
    """Whether both have a row for each class, and not one for all."""
    last = max((row for row in rows if row is not None), default=0)
    return len(value) > last and len(current) >= len(rows)


def _take_rows(value: Tensor, current: Tensor, rows: Sequence[int | None]) -> Tensor:
    """Rows of `value` where there is one, else those of `current`.

    The embedding has one row more than there are classes: "no class", the last.
    """
    if len(current) > len(rows):
        rows = [*rows, len(value) - 1]
    pairs = [(i, row) for i, row in enumerate(rows) if row is not None]
    result = current.clone()
    if pairs:
        here, there = map(list, zip(*pairs, strict=True))
        result[here] = value[there].to(result)
    return result


@HOOKS.register_module()
class LoadReportHook(Hook):
    """Fits `load_from` checkpoints with `fit_state_dict` and logs the report.

    Fires after a checkpoint was read and before it is loaded. Resuming is left
    alone: there everything has to fit. Class names are those of the data set that
    is trained or tested on.

    Priority HIGH: before `EMAHook` (NORMAL), which loads the same weights into its
    average.
    """

    priority = 'HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Replace `checkpoint['state_dict']` by one that fits."""
        if runner._resume:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        data = runner.visualizer.dataset_meta or {}
        fitted, report = fit_state_dict(model, checkpoint, classes=data.get('classes'))
        checkpoint['state_dict'] = fitted
        log = runner.logger.info if report.complete else runner.logger.warning
        log(str(report))
