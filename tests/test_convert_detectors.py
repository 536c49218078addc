"""Names of whole detectors in transformers, of any version, read and written."""

import hashlib
import re

import pytest
import torch
from deimv2_helpers import build_ours, load_model_config
from dfine_helpers import TOYS as DFINE_TOYS
from dfine_helpers import build as build_dfine
from dfine_helpers import randomise
from helpers import TOY_ARCH
from rtdetr_helpers import TOYS as RTDETR_TOYS
from rtdetr_helpers import build as build_rtdetr
from torch import nn

from mmbackbones.backbones import HGNetV2, ResNetVD
from mmbackbones.convert import from_ours, to_ours

# Of all names and shapes in Deimv2ForObjectDetection.state_dict(), transformers 5.23.
DEIMV2_DIGESTS = dict(
    atto='52a3c72e4fdec807f6ab5abfa6a99bd88b43a2b0016bc6a265425cfe2d03aa73',
    n='246fc87a2eb29ca8d343b566833bd0d665ffb214cae693eff750a80f07c11e65',
)


@pytest.mark.parametrize('size', DEIMV2_DIGESTS)
def test_deimv2_is_written_and_read_as_in_transformers(size):
    state = randomise(build_ours(load_model_config(size))).state_dict()
    theirs, conversion = from_ours(state, 'hf')
    anchors = {'decoder.anchors', 'decoder.valid_mask'}
    assert set(conversion.dropped) == anchors
    lines = sorted(f'{name} {list(v.shape)}' for name, v in theirs.items())
    digest = hashlib.sha256('\n'.join(lines).encode()).hexdigest()
    assert digest == DEIMV2_DIGESTS[size]
    back, conversion = to_ours(theirs)
    assert (conversion.source.family, conversion.dropped) == ('DEIMv2', {})
    assert 'transformers computes otherwise' in str(conversion)
    assert state.keys() - back.keys() == anchors
    assert all(torch.equal(state[name], value) for name, value in back.items())
    width = len(state['decoder.enc_bbox_head.layers.0.weight'])
    assert torch.equal(theirs['model.enc_output.0.weight'], torch.eye(width))


def test_one_number_of_a_shared_box_head_is_enough():
    state = randomise(build_ours(load_model_config('atto'))).state_dict()
    theirs, _ = from_ours(state, 'hf')
    lone = {n: v for n, v in theirs.items() if not n.startswith('bbox_embed')}
    lone = {n: v for n, v in lone.items() if not re.search(r'bbox_embed\.[01]', n)}
    assert len(theirs) - len(lone) == 5 * 6
    back, full = to_ours(lone)[0], to_ours(theirs)[0]
    assert back.keys() == full.keys()
    assert all(torch.equal(full[name], value) for name, value in back.items())
    lone['bbox_embed.0.layers.0.bias'] = torch.zeros(64)
    with pytest.raises(ValueError, match=r'bbox_embed\.0\.layers\.0\.bias .* differ'):
        to_ours(lone)


@pytest.mark.parametrize('family', ['DFINE', 'RTDETR'])
def test_names_that_transformers_5_has_in_memory_are_read(family):
    state = toy_detector(family).state_dict()
    old, _ = from_ours(state, 'hf')
    mlp = {'DFINE': r'.mlp.layers.0.', 'RTDETR': r'.mlp.fc1.'}[family]
    renames = (
        (r'\.encoder\.encoder\.', '.encoder.aifi.'),
        (r'\.out_proj\.', '.o_proj.'),
        (r'\.fc1\.', mlp),
        (r'\.fc2\.', mlp.replace('1', '2').replace('0', '1')),
    )
    new = {}
    for name, value in old.items():
        for before, after in renames:
            name = re.sub(before, after, name)
        new[name] = value
    assert len(old.keys() - new.keys()) >= 30
    expected, _ = to_ours(old)
    found, conversion = to_ours(new)
    assert conversion.dropped == {}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    # Neither name of a tensor is lost where both are there.
    assert to_ours(old | new)[0].keys() == expected.keys()
    changed = next(iter(new.keys() - old.keys()))
    with pytest.raises(ValueError, match='names of one tensor, but their values'):
        to_ours(old | new | {changed: new[changed] + 1})


def toy_detector(family: str) -> nn.Module:
    if family == 'DFINE':
        encoder, decoder = build_dfine(DFINE_TOYS['L'])
        backbone = HGNetV2(TOY_ARCH)
    else:
        encoder, decoder = build_rtdetr('v1', RTDETR_TOYS['R18'])
        backbone = ResNetVD('r18')
    parts = dict(backbone=backbone, encoder=encoder, decoder=decoder)
    return randomise(nn.ModuleDict(parts))
