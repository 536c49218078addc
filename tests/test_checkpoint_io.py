"""Checkpoint files: what is read, in which form, and what is refused."""

import functools
import http.server
import pickle
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch.serialization import get_safe_globals
from toy_runner import toy_runner

import mmbackbones  # noqa: F401  registers the loaders
from mmbackbones.engine.checkpoint_io import load_from_http, load_from_local

WEIGHTS = {'layer.weight': torch.arange(4.0), 'layer.bias': torch.zeros(1)}
AVERAGED = {'layer.weight': torch.ones(4)}


class Payload:
    """A pickle that writes a file when it is run."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


class ForeignClass:
    """Harmless, but code all the same."""


# -- forms --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('content', 'weights'),
    [
        (WEIGHTS, WEIGHTS),
        (OrderedDict(WEIGHTS), WEIGHTS),
        ({'model': WEIGHTS}, WEIGHTS),
        ({'model': WEIGHTS, 'optimizer': {}, 'last_epoch': 7}, WEIGHTS),
        ({'ema': {'module': AVERAGED, 'updates': 3}}, AVERAGED),
        ({'model': WEIGHTS, 'ema': {'module': AVERAGED}}, AVERAGED),
        ({'model': WEIGHTS, 'ema': None}, WEIGHTS),
    ],
)
def test_forms_become_one(tmp_path, content, weights):
    torch.save(content, tmp_path / 'w.pth')
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'w.pth'), 'cpu')
    assert set(loaded) == {'state_dict', 'meta'} and loaded['meta'] == {}
    torch.testing.assert_close(dict(loaded['state_dict']), weights)


def test_own_form_passes_as_it_is(tmp_path):
    content = {'state_dict': WEIGHTS, 'meta': {'epoch': 3}, 'optimizer': {'state': {}}}
    torch.save(content, tmp_path / 'w.pth')
    loaded = load_from_local(tmp_path / 'w.pth')
    assert loaded['meta'] == {'epoch': 3} and loaded['optimizer'] == {'state': {}}


def test_safetensors(tmp_path):
    save_file = pytest.importorskip('safetensors.torch').save_file
    save_file(WEIGHTS, tmp_path / 'w.safetensors')
    loaded = load_from_local(tmp_path / 'w.safetensors', 'cpu')
    torch.testing.assert_close(loaded['state_dict'], WEIGHTS)


def test_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(WEIGHTS, tmp_path / 'w.pth')
    assert load_from_local('~/w.pth')['state_dict'].keys() == WEIGHTS.keys()


# -- refusals -----------------------------------------------------------------------


def truncated(path):
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_legacy(path):
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20])


def scripted(path):
    torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)).save(path)


BROKEN = {
    'missing': (lambda path: None, 'does not exist'),
    'folder': (lambda path: path.mkdir(), 'does not exist'),
    'empty': (lambda path: path.touch(), 'cannot be read'),
    'truncated': (truncated, 'cannot be read'),
    'truncated, old format': (truncated_legacy, 'cannot be read'),
    'text': (lambda path: path.write_text('<html>404</html>'), 'cannot be read'),
    'TorchScript': (scripted, 'TorchScript program'),
    'no mapping': (lambda path: torch.save(torch.ones(2), path), 'no weights.*Tensor'),
    'nothing': (lambda path: torch.save({}, path), 'no weights'),
    'no tensors': (
        lambda path: torch.save({'epoch': 1, 'config': {'lr': 0.1}}, path),
        r"no weights.*\['config', 'epoch'\]",
    ),
    'empty state_dict': (
        lambda path: torch.save({'state_dict': {}, 'meta': {}}, path),
        'no weights',
    ),
}


@pytest.mark.parametrize('case', BROKEN)
@pytest.mark.filterwarnings('ignore')  # torch, before it refuses
def test_broken_files_give_one_clear_error(tmp_path, case):
    write, message = BROKEN[case]
    write(path := tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=message) as error:
        load_from_local(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_broken_safetensors(tmp_path):
    save_file = pytest.importorskip('safetensors.torch').save_file
    save_file(WEIGHTS, path := tmp_path / 'w.safetensors')
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match='cannot be read'):
        load_from_local(path)


@pytest.mark.parametrize('new_format', [True, False])
@pytest.mark.parametrize('place', ['state_dict', 'message_hub'])
def test_pickle_payload_is_refused_and_not_run(tmp_path, new_format, place):
    target, path = tmp_path / 'was_run', tmp_path / 'w.pth'
    content = {'state_dict': dict(WEIGHTS), 'message_hub': {}}
    content[place]['extra'] = Payload(target)
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(
        ValueError,
        match=r"'pathlib\.[\w.]*Path.*Nothing.* was run|"
        r"'builtins.getattr'.*Nothing.* was run",
    ):
        load_from_local(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the payload does work
    assert target.exists()


@pytest.mark.filterwarnings('ignore')  # torch, before it refuses
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_bare_pickle_payload_is_refused_and_not_run(tmp_path, protocol):
    target, path = tmp_path / 'was_run', tmp_path / 'w.pth'
    path.write_bytes(pickle.dumps(Payload(target), protocol))
    with pytest.raises(ValueError, match=r'was refused|cannot be read'):
        load_from_local(path)
    assert not target.exists()


class AttributeOf:
    """Uses `getattr`, which logs need, for something else."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize(
    'arguments',
    [
        (HistoryBuffer, '__init__'),
        (HistoryBuffer, '__subclasses__'),
        (np.ndarray, 'tofile'),
        (np.dtype, 'mean'),
    ],
)
def test_getattr_serves_the_log_only(tmp_path, arguments):
    content = {'state_dict': WEIGHTS, 'extra': AttributeOf(*arguments)}
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=r"'builtins\.getattr'"):
        load_from_local(tmp_path / 'w.pth')


def test_classes_are_named_and_the_list_is_not_widened(tmp_path):
    torch.save({'state_dict': WEIGHTS, 'extra': ForeignClass()}, tmp_path / 'w.pth')
    before = set(get_safe_globals())
    with pytest.raises(ValueError, match='ForeignClass'):
        load_from_local(tmp_path / 'w.pth')
    torch.save(
        {'state_dict': WEIGHTS, 'log': HistoryBuffer([1.0], [1])}, tmp_path / 'l'
    )
    load_from_local(tmp_path / 'l')
    assert set(get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'l', weights_only=True)


# -- what the Runner saves ----------------------------------------------------------


@pytest.mark.parametrize(
    'values', [[], [1.5, 2.5], [1, 2], [np.float32(1)], [np.float64(2)], [True]]
)
def test_log_values_survive(tmp_path, values):
    log = HistoryBuffer(values, [1] * len(values))
    last = values[-1] if values else 0
    content = {'state_dict': WEIGHTS, 'message_hub': {'loss': log, 'last': last}}
    torch.save(content, tmp_path / 'w.pth')
    hub = load_from_local(tmp_path / 'w.pth')['message_hub']
    np.testing.assert_array_equal(hub['loss'].data[0], log.data[0])
    assert hub['last'] == last
    if values:
        assert hub['loss'].statistics('mean') == log.mean()


def trained(work_dir, max_epochs, **overrides):
    """A run with all that writes into a checkpoint; twice the same numbers."""
    runner = toy_runner(
        work_dir,
        dict(
            checkpoint=dict(
                type='CheckpointHook', interval=1, save_best='coco/bbox_mAP'
            )
        ),
        max_epochs=max_epochs,
        scores=[0.1, 0.2, 0.3, 0.4][-max_epochs:],
        custom_hooks=[dict(type='EMAHook', momentum=0.1)],
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.05), clip_grad=dict(max_norm=1.0)
        ),
        **overrides,
    )
    runner.train()
    return runner


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = trained(tmp_path / 'whole', 4)
    trained(tmp_path / 'parts', 2)
    resumed = trained(tmp_path / 'parts', 4, resume=True)
    assert resumed.epoch == 4 and resumed.iter == whole.iter
    torch.testing.assert_close(
        resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0
    )
    for name in ('train/loss', 'train/lr', 'val/coco/bbox_mAP'):
        logs = [r.message_hub.get_scalar(name).data for r in (resumed, whole)]
        np.testing.assert_array_equal(logs[0][1], logs[1][1])
        if name != 'val/coco/bbox_mAP':  # scripted by the number of the validation
            np.testing.assert_array_equal(logs[0][0], logs[1][0])
    assert resumed.message_hub.get_info('best_score') == 0.4


# -- over the network ---------------------------------------------------------------


def test_download_is_read_as_data_and_kept(tmp_path, monkeypatch):
    served = tmp_path / 'served'
    served.mkdir()
    torch.save({'model': WEIGHTS}, served / 'good.pth')
    torch.save({'model': Payload(tmp_path / 'was_run')}, served / 'bad.pth')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(served)
    )
    monkeypatch.setattr(handler.func, 'log_message', lambda *args: None)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/'
        for _ in range(2):  # the second time from the cache
            loaded = CheckpointLoader.load_checkpoint(url + 'good.pth?x=1', 'cpu')
            torch.testing.assert_close(loaded['state_dict'], WEIGHTS)
            (served / 'good.pth').unlink(missing_ok=True)
        with pytest.raises(ValueError, match='Nothing of it was run'):
            load_from_http(url + 'bad.pth')
        server.shutdown()
    assert not (tmp_path / 'was_run').exists()


@pytest.mark.parametrize(
    ('config', 'kept'),
    [
        ('', True),
        ("a = 1\nb = dict(type='X', c=[1, -2.5, None, (True,)])\n", True),
        ('import os\n', False),
        ("a = __import__('os').system('true')\n", False),
        ('a = dict(b=print(1))\n', False),
        ('a = (\n', False),
    ],
)
@pytest.mark.parametrize('key', ['cfg', 'config'])
def test_a_config_that_is_a_program_is_left_out(tmp_path, key, config, kept):
    path = tmp_path / 'x.pth'
    weights = {'w': torch.zeros(1)}
    torch.save({'state_dict': weights, 'meta': {key: config, 'epoch': 3}}, path)
    meta = load_from_local(str(path))['meta']
    assert (key in meta) is kept and meta['epoch'] == 3
