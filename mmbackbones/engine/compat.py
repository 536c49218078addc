"""Repairs of MMEngine 0.10 that it needs on current torch and Python.

Each is small, does nothing where it is not needed, and may run twice.
"""

import importlib.util
import pkgutil

from mmbackbones.engine import pretrained
from mmbackbones.engine.checkpoint_io import register_loaders

__all__ = ['apply']


def _restore_find_loader() -> None:
    """Python 3.14 dropped `pkgutil.find_loader`, which MMEngine and mmcv call."""
    if hasattr(pkgutil, 'find_loader'):
        return

    def find_loader(fullname: str):
        spec = importlib.util.find_spec(fullname)
        return spec and spec.loader

    pkgutil.find_loader = find_loader


def apply() -> None:
    """Apply all repairs; called once by `import mmbackbones`."""
    _restore_find_loader()
    register_loaders()
    pretrained.install()
