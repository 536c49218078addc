"""What necks, heads and optimisers may rely on in every backbone.

Upstream: the argument names and the layer-depth hook are those of OpenMMLab
(https://github.com/open-mmlab/mmpretrain mmpretrain/models/backbones, Apache-2.0).
Departs from the source:
- channels and strides are data on the instance, so nothing is typed twice;
- `train` returns the module, frozen or not;
- activation checkpointing leaves batch-norm statistics alone on the second pass.
"""

from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ['BaseBackbone', 'integers']


def integers(
    name: str, values: Any, *, length: int | None = None, least: int = 1
) -> tuple[int, ...]:
    """Numbers of an arch, checked.

    Args:
        name: where the user wrote them.
        values: a list or tuple.
        length: how many there have to be; None takes any number.
        least: the smallest that is possible.

    Raises:
        ValueError: they are no integers, too few, too many, or too small.
    """
    numbers = tuple(values) if isinstance(values, Iterable) else (None,)
    if length not in (None, len(numbers)) or not all(
        isinstance(number, int) and number >= least for number in numbers
    ):
        wanted = 'integers' if length is None else f'{length} integers'
        raise ValueError(f'{name} is {values!r}; it takes {wanted} of at least {least}')
    return numbers


def _resolve_out_indices(
    out_indices: int | Sequence[int], num_stages: int
) -> tuple[int, ...]:
    """Stage indices in rising order, each once, none negative.

    Raises:
        ValueError: nothing, something else than integers, an index out of range,
            or a stage named twice.
    """
    is_list = isinstance(out_indices, Iterable)
    given = tuple(out_indices) if is_list else (out_indices,)
    valid = all(isinstance(i, int) and -num_stages <= i < num_stages for i in given)
    resolved = sorted({i % num_stages for i in given}) if valid else []
    if not given or len(resolved) != len(given):
        raise ValueError(
            f'out_indices is {out_indices!r}; it takes one or more different stages '
            f'out of {-num_stages}..{num_stages - 1}'
        )
    return tuple(resolved)


@contextmanager
def _still_statistics(block: nn.Module) -> Iterator[None]:
    """Within it, batch norms in training use the batch but remember nothing."""
    # Momentum 0 writes the running statistics back as they are. Taking them away
    # would change which tensors autograd saves, which checkpointing refuses.
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    state = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, momentum, counter in state:
            norm.momentum, norm.num_batches_tracked = momentum, counter


class BaseBackbone(BaseModule, metaclass=ABCMeta):
    """A stem and stages of falling resolution; some stages' maps come out.

    A subclass hands the constants of its stages to this constructor, makes its
    modules, and ends its own constructor with `self._freeze()`.

    Attributes:
        out_indices: the stages whose maps come out, in rising order.
        out_channels: channels of these maps.
        out_strides: strides of these maps: the map of an image of height H has
            `ceil(H / stride)` rows.

    Args:
        in_channels: channels of the image.
        stage_channels: channels of every stage's map.
        stage_strides: stride of every stage's map.
        out_indices: one stage or several, 0-based, negative counts from the end.
            Stages behind the last one are kept, so that checkpoints fit, but
            neither run nor trained.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the
            first k stages: no gradient, and evaluation mode.
        norm_eval: whether batch norms always use their running statistics. Without
            effect where there are none.
        with_cp: recompute each block in the backward pass instead of keeping its
            activations. Changes no number.
        init_cfg: mmengine's.

    Raises:
        ValueError: `out_indices` or `frozen_stages` name stages that do not exist;
            `in_channels` is not positive.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        stage_channels: Sequence[int],
        stage_strides: Sequence[int],
        out_indices: int | Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg)
        num_stages = len(stage_channels)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(
                f'in_channels is {in_channels!r}; give the number of channels of the '
                'image, at least 1'
            )
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= num_stages:
            raise ValueError(
                f'frozen_stages is {frozen_stages!r}; it is -1 (none), 0 (the stem) or '
                f'the number of frozen stages, at most {num_stages}'
            )
        self.in_channels = in_channels
        self.out_indices = _resolve_out_indices(out_indices, num_stages)
        self.out_channels = tuple(stage_channels[i] for i in self.out_indices)
        self.out_strides = tuple(stage_strides[i] for i in self.out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

    @abstractmethod
    def _parts(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem and then the stages, as lists of what they are made of."""

    @abstractmethod
    def _layer_id(self, param_name: str) -> int | None:
        """Depth of a parameter; None for what follows all blocks."""

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Number of depths, the stem's and that of everything behind included."""

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Where a parameter stands, for layer-wise learning-rate decay.

        Args:
            param_name: as in `named_parameters` of the whole model.
            prefix: of this backbone's parameters, say `'backbone.'`.

        Returns:
            The depth and the number of depths n. Depths start at 0 or 1 in the stem;
            what follows the backbone has n - 1, which learns at the full rate.
        """
        last = self.num_layers - 1
        if not param_name.startswith(prefix):
            return last, last + 1
        layer_id = self._layer_id(param_name[len(prefix) :])
        return last if layer_id is None else layer_id, last + 1

    def train(self, mode: bool = True) -> 'BaseBackbone':
        """Set the mode; what is frozen or `norm_eval` stays in evaluation."""
        super().train(mode)
        if mode:
            for part in self._parts()[: self.frozen_stages + 1]:
                for module in part:
                    if isinstance(module, nn.Module):
                        module.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _freeze(self) -> None:
        """Take gradients from the frozen parts and from those that never run."""
        parts = self._parts()
        for part in parts[: self.frozen_stages + 1] + parts[self.out_indices[-1] + 2 :]:
            for member in part:
                member.requires_grad_(False)
        self.train(self.training)

    def _run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a block, checkpointed if the user asked for it."""
        if not (self.with_cp and torch.is_grad_enabled()):
            return block(x)
        if torch.compiler.is_compiling():  # it writes statistics once by itself
            return checkpoint(block, x, use_reentrant=False)
        return checkpoint(
            block,
            x,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _still_statistics(block)),
        )

    def _check_input(self, x: Tensor) -> None:
        """Refuse what is not a batch of images with `in_channels` channels.

        Raises:
            ValueError: the shape does not fit.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f'{type(self).__name__} takes images (N, {self.in_channels}, H, W) '
                f'since in_channels is {self.in_channels}; the input has shape '
                f'{tuple(x.shape)}'
            )
