"""Repairs of MMEngine: present after import, harmless when repeated."""

import pkgutil

import pytest
from mmengine.runner.checkpoint import CheckpointLoader

from mmbackbones.engine import checkpoint_io, compat


def test_loaders_are_registered_and_a_second_time_changes_nothing():
    compat.apply()
    for path, loader in (
        ('weights.pth', checkpoint_io.load_from_local),
        ('/some/where.safetensors', checkpoint_io.load_from_local),
        ('http://host/weights.pth', checkpoint_io.load_from_http),
        ('https://host/weights.pth', checkpoint_io.load_from_http),
    ):
        assert CheckpointLoader._get_checkpoint_loader(path) is loader


def test_find_loader_is_restored_where_python_lacks_it(monkeypatch):
    # Python 3.14, where the attribute is missing.
    monkeypatch.delattr(pkgutil, 'find_loader', raising=False)
    compat.apply()
    assert pkgutil.find_loader('json') is not None
    assert pkgutil.find_loader('no_such_module_anywhere') is None
    with pytest.raises(ModuleNotFoundError):
        pkgutil.find_loader('no_such_module_anywhere.part')

    from mmengine.utils.dl_utils import mmcv_full_available

    assert isinstance(mmcv_full_available(), bool)


def test_find_loader_of_python_is_left_alone(monkeypatch):
    monkeypatch.setattr(pkgutil, 'find_loader', original := object(), raising=False)
    compat.apply()
    assert pkgutil.find_loader is original
