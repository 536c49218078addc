"""Published weights for backbones by `init_cfg`, wherever they were published.

Departs from the source: MMEngine's `Pretrained` warns of tensors that do not fit and
goes on; of a backbone, all have to fit.
"""

import re
from collections.abc import Mapping

from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.model.weight_init import update_init_info
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmbackbones.convert.hub import SCHEMES, fetch
from mmbackbones.convert.sources import first_names, to_ours
from mmbackbones.engine.checkpoint_io import load_from_local
from mmbackbones.engine.load_report import LoadReport

__all__ = ['check_fit', 'install', 'load_backbone', 'load_from_hub']

# Output norms, which no published weights have, and what is not learned.
_OPTIONAL = re.compile(r'norm\d+\..*|.*\.num_batches_tracked')
_BACKBONE = 'backbone.'


def check_fit(backbone: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with those of a backbone.

    Args:
        backbone: may be on the meta device.
        state_dict: with our names.

    Raises:
        ValueError: they differ, other than in output norms; names the first tensors.
    """
    own = backbone.state_dict()
    given = {k: tuple(v.shape) for k, v in state_dict.items()}
    shapes = [
        f'{name} {given[name]} instead of {tuple(value.shape)}'
        for name, value in own.items()
        if name in given and given[name] != tuple(value.shape)
    ]
    required = (
        name
        for name in own
        if name.startswith(getattr(backbone, 'must_load', ''))
        and not _OPTIONAL.fullmatch(name)
    )
    missing = [name for name in required if name not in given]
    unknown = [n for n in given if n not in own and not _OPTIONAL.fullmatch(n)]
    found = {'shapes': shapes, 'they lack': missing, 'not in the backbone': unknown}
    differences = '; '.join(f'{k}: {first_names(v)}' for k, v in found.items() if v)
    if differences:
        raise ValueError(
            f'the weights are not those of this {type(backbone).__name__}. '
            f'{differences}'
        )


def load_backbone(
    backbone: nn.Module, state_dict: Mapping[str, Tensor], prefix: str | None = None
) -> LoadReport:
    """Load weights from anywhere.

    Args:
        backbone: with the contract's `out_indices` and `out_strides`.
        state_dict: of a backbone alone or, below `backbone.`, of a whole model.
        prefix: of the backbone's names, if it is another one.

    Raises:
        ValueError: nothing has that prefix; the weights are of another family or
            size.
    """
    report = LoadReport()
    if prefix is None:
        own = backbone.state_dict()
        weights, conversion = to_ours(state_dict)
        below = any(name.startswith(_BACKBONE) for name in weights)
        if below and not any(name in own for name in weights):
            prefix, state_dict = _BACKBONE, weights
    if prefix is not None:
        weights, conversion = to_ours(_take_below(prefix, state_dict, report))
    weights, left = _take_fitting(backbone, weights)
    report.dropped.update(left)
    try:
        check_fit(backbone, weights)
    except ValueError as error:
        origin = f' They are of {conversion.source}.' if conversion else ''
        raise ValueError(f'{error}.{origin}') from None
    if conversion:
        report.notes.append(str(conversion.source))
        report.dropped.update(conversion.dropped)
    report.missing, unknown = backbone.load_state_dict(weights, strict=False)
    report.dropped.update(dict.fromkeys(unknown, 'not in the backbone'))
    report.loaded = [name for name in weights if name not in unknown]
    return report


def _take_fitting(
    backbone: nn.Module, weights: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Where a backbone is another one cut short: what both have, and what is left."""
    if not hasattr(backbone, 'must_load'):
        return weights, {}
    shapes = {name: value.shape for name, value in backbone.state_dict().items()}
    left = {
        name: 'of another shape' if name in shapes else 'not in the backbone'
        for name, value in weights.items()
        if shapes.get(name) != value.shape and not name.startswith(backbone.must_load)
    }
    return {k: v for k, v in weights.items() if k not in left}, left


def _take_below(
    prefix: str, state_dict: Mapping[str, Tensor], report: LoadReport
) -> dict[str, Tensor]:
    below = {n[len(prefix) :]: v for n, v in state_dict.items() if n.startswith(prefix)}
    if not below:
        raise ValueError(
            f'prefix is {prefix!r}, but the weights have {first_names(state_dict)}'
        )
    outside = [name for name in state_dict if not name.startswith(prefix)]
    report.dropped.update(dict.fromkeys(outside, f'not below {prefix}'))
    return below


def load_from_hub(filename: str, map_location=None) -> dict:
    """Fetch a file that is not kept yet, say its licence, read it.

    Args:
        filename: `hf://owner/name` or `timm://name`, see `mmbackbones.convert.hub`.
        map_location: as of `torch.load`.
    """
    path, licence = fetch(filename)
    print_log(f'{filename}: licence {licence}; kept as {path}', 'current')
    return load_from_local(str(path), map_location)


def _initialise(init: PretrainedInit, module: nn.Module) -> None:
    """In the place of `PretrainedInit.__call__`, for backbones with our contract."""
    if not (hasattr(module, 'out_indices') and hasattr(module, 'out_strides')):
        return _initialise_others(init, module)
    checkpoint = CheckpointLoader.load_checkpoint(init.checkpoint, init.map_location)
    try:
        report = load_backbone(module, checkpoint['state_dict'], init.prefix)
    except ValueError as error:
        raise ValueError(f'{init.checkpoint}: {error}') from error
    print_log(f'{init.checkpoint}\n{report}', 'current')
    if hasattr(module, '_params_init_info'):
        update_init_info(module, init_info=init._get_init_info())


_initialise_others = PretrainedInit.__call__


def install() -> None:
    """Teach MMEngine's `Pretrained` and its loader; repeating it is harmless."""
    CheckpointLoader.register_scheme(SCHEMES, load_from_hub, force=True)
    PretrainedInit.__call__ = _initialise
