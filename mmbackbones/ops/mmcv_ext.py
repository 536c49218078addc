"""A stand-in for `mmcv._ext`, found by the import system when there is none.

mmcv-lite ships `mmcv/ops/*.py` without the compiled module that they import, so
`mmdet.models` and `mmseg.models` fail. `install` adds a finder *behind* those of
Python: it is asked only for `mmcv._ext`, and only when no compiled one was found.

The module has plain-torch kernels for the names in `KERNELS`. mmcv's wrappers ask
at import that every other name exists, so each of those is a function that raises
when called. MMEngine takes the spec as a sign of the full mmcv; all it then does
is import `mmcv.ops` and test layers against its classes.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from mmbackbones.ops import mmcv_box_kernels as boxes
from mmbackbones.ops import mmcv_conv_kernels as conv
from mmbackbones.ops import mmcv_kernels as other

__all__ = ['KERNELS', 'install']

MODULE = 'mmcv._ext'

KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        boxes.nms,
        boxes.roi_align_backward,
        boxes.roi_align_forward,
        boxes.softnms,
        conv.deform_conv_backward_input,
        conv.deform_conv_backward_parameters,
        conv.deform_conv_forward,
        conv.modulated_deform_conv_backward,
        conv.modulated_deform_conv_forward,
        other.ms_deform_attn_backward,
        other.ms_deform_attn_forward,
        other.sigmoid_focal_loss_backward,
        other.sigmoid_focal_loss_forward,
    )
}
"""Names that work, out of some 120 that mmcv's wrappers ask for."""


def _absent(name: str) -> Callable:
    """What the stand-in answers for an op that it has no kernel for."""
    if name.startswith('__'):  # the import system and `inspect` ask for these
        raise AttributeError(f'module {MODULE!r} has no attribute {name!r}')

    def refuse(*args, **kwargs):
        raise NotImplementedError(
            f'the mmcv op {name!r} has no plain-torch form here; the compiled mmcv '
            f'has it (install `mmcv` in place of `mmcv-lite`). Available: '
            f'{", ".join(KERNELS)}'
        )

    refuse.__name__ = name
    return refuse


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder and loader of the one module."""

    provides = MODULE

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer for `mmcv._ext`, for nothing else."""
        if fullname != MODULE:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=__name__)

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module."""
        module.__doc__ = __doc__
        module.__dict__.update(KERNELS)
        # mmcv's environment report calls these two.
        module.get_compiler_version = lambda: 'none (plain torch, mmbackbones)'
        module.get_compiling_cuda_version = lambda: 'none'
        module.__getattr__ = _absent


def install() -> None:
    """Make `mmcv._ext` importable; a second call changes nothing.

    Safe without mmcv: the import system asks for the submodule only once the
    package itself was found.
    """
    # By attribute, not by class: a reloaded module has a new class.
    if not any(getattr(f, 'provides', None) == MODULE for f in sys.meta_path):
        sys.meta_path.append(_StandIn())
