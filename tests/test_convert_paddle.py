"""Files of PaddlePaddle: real ones, and what is refused."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_helpers import fill
from convert_helpers import meta_net
from helpers import TOY_ARCH
from torch import nn
from torch.testing import assert_close

import mmbackbones  # noqa: F401  registers the loaders
from mmbackbones.backbones import HGNetV2
from mmbackbones.convert import from_ours, paddle_reader, to_ours
from mmbackbones.convert.paddle_reader import is_plain_pickle, read_pdparams
from mmbackbones.engine.checkpoint_io import load_from_local

GOLDEN = Path(__file__).parent / 'golden'

# Written by paddle.save of PaddlePaddle 3.3.1 from a Linear(2, 3) called fc and a
# BatchNorm2D(2) called bn, each tensor filled with 0, 1, 2, ...
REAL_SHAPES = {
    'fc.weight': (2, 3),
    'fc.bias': (3,),
    'bn.weight': (2,),
    'bn.bias': (2,),
    'bn._mean': (2,),
    'bn._variance': (2,),
}


@pytest.mark.parametrize(
    ('file', 'dtype'),
    [
        ('paddle_protocol2.pdparams', torch.float32),
        ('paddle_protocol4.pdparams', torch.float32),
        ('paddle_bfloat16.pdparams', torch.bfloat16),
        ('paddle_nested.pdparams', torch.float32),
    ],
)
def test_real_files_are_read(file, dtype):
    content = read_pdparams(GOLDEN / file)
    if 'nested' in file:
        assert set(content) == {'model', 'epoch'} and content['epoch'] == 3
        content = content['model']
    assert {k: tuple(v.shape) for k, v in content.items()} == REAL_SHAPES
    for value in content.values():
        expected = torch.arange(value.numel(), dtype=dtype).reshape(value.shape)
        assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    'file', ['paddle_protocol2.pdparams', 'paddle_nested.pdparams']
)
def test_the_loader_reads_them_under_any_name(tmp_path, file):
    (tmp_path / 'w.bin').write_bytes((GOLDEN / file).read_bytes())
    assert set(load_from_local(tmp_path / 'w.bin')['state_dict']) == set(REAL_SHAPES)


def pickled(tmp_path: Path, content: object, protocol: int = 4) -> Path:
    path = tmp_path / 'weights.pdparams'
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize(
    'array',
    [
        np.zeros((0, 3), np.float32),
        np.array(2.5),
        np.array(7),
        np.array([True, False]),
        np.arange(6, dtype=np.float16).reshape(2, 3),
        np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
        np.arange(3, dtype=np.uint8),
        np.arange(-3, 3, dtype=np.int8),
        np.arange(3, dtype=np.int16),
        np.arange(3, dtype=np.int32),
    ],
    ids=lambda a: f'{a.dtype}{a.shape}',
)
def test_arrays_are_read(tmp_path, array, protocol):
    path = pickled(tmp_path, OrderedDict(a=array), protocol)
    assert_close(read_pdparams(path)['a'], torch.from_numpy(array), rtol=0, atol=0)


class Payload:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize(
    ('make', 'name'),
    [
        (lambda mark: Payload(os.system, f'touch {mark}'), r'(posix|nt)\.system'),
        (lambda mark: Payload(eval, f'open({str(mark)!r}, "w")'), r'\w+\.eval'),
        (lambda mark: Payload(getattr, 'x', 'upper'), r'\w+\.getattr'),
        (lambda mark: nn.Linear, r'torch\.nn\.modules\.linear\.Linear'),
        (lambda mark: torch.zeros(2), r'torch\._utils\._rebuild_tensor_v2'),
    ],
)
def test_whatever_is_not_an_array_is_refused_by_name(tmp_path, make, name, protocol):
    mark = tmp_path / 'mark'
    path = pickled(tmp_path, {'a': make(mark)}, protocol)
    with pytest.raises(pickle.UnpicklingError, match=f'GLOBAL {name}, and may name'):
        read_pdparams(path)
    with pytest.raises(ValueError, match=rf"refused: it names '{name}'.*Nothing"):
        load_from_local(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ('array', 'message'),
    [
        (np.array(['a']), 'numpy type'),
        (np.array([object()], dtype=object), 'GLOBAL'),
        (np.zeros(2, '>f4'), '>f4'),
        (np.zeros(2, np.complex64), 'c8'),
    ],
)
def test_arrays_of_something_else_are_refused(tmp_path, array, message):
    with pytest.raises(pickle.UnpicklingError, match=message):
        read_pdparams(pickled(tmp_path, {'a': array}))


def test_arrays_with_too_few_bytes_are_refused(tmp_path):
    data = pickle.dumps({'a': np.arange(3, dtype=np.uint8)}, protocol=3)
    shape = b'K\x03\x85'  # the tuple (3,)
    assert data.count(shape) == 1
    path = tmp_path / 'weights.pdparams'
    path.write_bytes(data.replace(shape, b'K\x04\x85'))
    with pytest.raises(pickle.UnpicklingError, match=r'shape \(4,\).* in 3 bytes'):
        read_pdparams(path)


def test_torch_files_are_not_taken_for_these(tmp_path):
    for new in (True, False):
        torch.save(
            {'a': torch.ones(1)}, tmp_path / 'w', _use_new_zipfile_serialization=new
        )
        assert not is_plain_pickle(tmp_path / 'w')
        assert load_from_local(tmp_path / 'w')['state_dict']['a'].tolist() == [1]
    (tmp_path / 'empty').write_bytes(b'')
    assert not is_plain_pickle(tmp_path / 'empty')


@pytest.mark.parametrize('affine', [True, False])
def test_weights_written_and_read_give_the_same_maps(tmp_path, affine):
    arch = dict(TOY_ARCH, use_learnable_affine_block=affine)
    source = fill(HGNetV2(arch, stem_pool_pad='inf').eval())
    theirs, _ = from_ours(source.state_dict(), 'paddle')
    arrays = {name: value.numpy() for name, value in theirs.items()}
    arrays['fc.weight'] = np.zeros((2048, 1000), np.float32)
    arrays['StructuredToParameterName@@'] = {name: f'{name}_0' for name in theirs}
    weights, report = to_ours(read_pdparams(pickled(tmp_path, arrays)))
    assert set(report.dropped) == {'fc.weight'}
    net = HGNetV2(arch, stem_pool_pad='inf').eval()
    net.load_state_dict(weights)  # batch norms put up with a missing counter
    x = torch.rand(1, 3, 33, 64)
    for found, expected in zip(net(x), source(x), strict=True):
        assert_close(found, expected, rtol=0, atol=0)


def test_b4_has_403_tensors_there():  # 400 and the classifier
    theirs, _ = from_ours(meta_net('HGNetV2', 'b4').state_dict(), 'paddle')
    assert len(theirs) == 400


NOT_ARRAYS = {
    'a list of numbers for bytes': ((2, 2), [1] * 16),
    'a text for bytes': ((2, 2), 'x' * 16),
    'a negative shape': ((-2, -2), bytes(16)),
    'no shape': ('ab', bytes(16)),
}


@pytest.mark.parametrize('kind', NOT_ARRAYS)
def test_arrays_of_another_make_are_refused(tmp_path, kind):
    shape, raw = NOT_ARRAYS[kind]
    make = np.zeros(1).__reduce__()[0]

    class Array:
        def __reduce__(self):
            state = (1, shape, np.dtype('f4'), False, raw)
            return make, (np.ndarray, (0,), b'b'), state

    with pytest.raises(pickle.UnpicklingError):
        read_pdparams(pickled(tmp_path, {'a': Array()}))


def test_arrays_are_found_at_any_depth(tmp_path):
    one = np.ones(1, np.float32)
    content = read_pdparams(
        pickled(tmp_path, {'a': [one, {'b': one}], 'c': (1, one, 2)})
    )
    assert isinstance(content['a'][0], torch.Tensor)
    assert isinstance(content['a'][1]['b'], torch.Tensor)
    assert isinstance(content['c'][1], torch.Tensor)


def test_a_file_that_holds_itself_is_refused(tmp_path):
    content = {}
    content['a'] = content
    with pytest.raises(pickle.UnpicklingError, match=r'broken pickle .RecursionError'):
        read_pdparams(pickled(tmp_path, content))


@pytest.mark.parametrize('data', [b'', b'\x80\x04', b'\x80\x04\x82\x01.', b'\x80\x04.'])
def test_broken_files_have_one_kind_of_error(tmp_path, data):
    (tmp_path / 'w').write_bytes(data)
    with pytest.raises(pickle.UnpicklingError):
        read_pdparams(tmp_path / 'w')


# Of `_codecs.encode`: the state ({'evil': 1}, {'__defaults__': ('latin1',)}).
_CHANGES = (
    b'\x80\x04\x8c\x07_codecs\x8c\x06encode\x93}\x8c\x04evilK\x01s'
    b'}\x8c\x0c__defaults__\x8c\x06latin1\x85s\x86b.'
)


def test_a_file_cannot_change_what_reads_it(tmp_path):
    """The next file would be read by what this one left behind."""
    (tmp_path / 'w').write_bytes(_CHANGES)
    with pytest.raises(pickle.UnpicklingError, match='it changes'):
        read_pdparams(tmp_path / 'w')
    assert paddle_reader._encode.__defaults__ is None
    assert not hasattr(paddle_reader._encode, 'evil')
