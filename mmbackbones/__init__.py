"""Backbones, detectors and their training for OpenMMLab's stack.

Importing the package needs torch and MMEngine only. It registers the backbones and
necks, makes `mmcv.ops` importable where mmcv has no compiled part, and repairs
what MMEngine 0.10 lacks on current torch and Python.
"""

from mmbackbones.engine import compat
from mmbackbones.ops import mmcv_ext

__version__ = '0.1.0'

# Before the registering imports: these may pull in what needs the repairs.
compat.apply()
mmcv_ext.install()

from mmbackbones import backbones, classifiers, necks  # noqa: E402

__all__ = ['__version__', 'backbones', 'classifiers', 'necks']
