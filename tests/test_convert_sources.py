"""Names of weights elsewhere: bijections for every network, and whose they are."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from backbone_helpers import fill
from convert_helpers import (
    ABSWIN_HIERA,
    FAMILIES,
    IMAGE_HIERA,
    SAM2_HIERA,
    Shapes,
    beside,
    meta_net,
    meta_tensors,
    shapes_of,
)
from helpers import TOY_ARCH
from torch import nn

from mmbackbones.convert import SOURCES, from_ours, recognise, to_ours

GOLDEN = Path(__file__).parent / 'golden' / 'foreign_keys.json'

NETWORKS = [
    *(('HGNetV2', arch, {}) for arch in FAMILIES['HGNetV2'].arch_settings),
    *(('Hiera', arch, {}) for arch in FAMILIES['Hiera'].arch_settings),
    *(('Hiera', arch, dict(num_frames=16)) for arch in ('base', 'huge')),
    *(('ConvNeXtV2', arch, {}) for arch in FAMILIES['ConvNeXtV2'].arch_settings),
    *(('ResNetVD', arch, {}) for arch in FAMILIES['ResNetVD'].arch_settings),
    *((family, arch, dict(with_out_norm=True))
      for family, arch in (('Hiera', 'tiny'), ('ConvNeXtV2', 'atto'))),
]  # fmt: skip


def makers_of(family: str, arch: str, kwargs: dict) -> set[str]:
    """Who has a form of a network."""
    if family == 'HGNetV2':
        return {'ours', 'dfine', 'timm', 'paddle', 'hf', 'rtdetrv2'}
    if family == 'ResNetVD':
        return {'ours', 'rtdetr', 'rtdetrv2', 'paddle', 'hf'}
    if family == 'ConvNeXtV2':
        has_norms = {'ours', 'official', 'hf', 'mmpretrain'}
        return has_norms if kwargs else has_norms | {'timm', 'fcmae'}
    if arch in ABSWIN_HIERA or 'num_frames' in kwargs:
        return {'ours', 'official', 'timm'}
    return {'ours', 'official', 'timm', 'sam2' if arch in SAM2_HIERA else '', 'hf'}


def network_id(value: object) -> str:
    return '+'.join(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(('family', 'arch', 'kwargs'), NETWORKS, ids=network_id)
def test_there_and_back_is_the_identity(family, arch, kwargs):
    state = meta_net(family, arch, **kwargs).state_dict()
    for maker in makers_of(family, arch, kwargs) - {''}:
        theirs, report = from_ours(state, maker)
        assert maker in report.source.makers
        assert recognise(theirs) is report.source
        counters = {n for n in state if n.endswith('num_batches_tracked')}
        assert set(report.dropped) == (counters if maker == 'paddle' else set())
        back, report = to_ours(theirs)
        assert report.dropped == {}
        expected = shapes_of(state)
        for name in counters if maker == 'paddle' else ():
            del expected[name]
        assert shapes_of(back) == expected
        assert shapes_of(from_ours(back, maker)[0]) == shapes_of(theirs)


TOYS = {
    'HGNetV2': FAMILIES['HGNetV2'](TOY_ARCH),
    'Hiera': FAMILIES['Hiera'](
        dict(embed_dims=8, num_heads=1, depths=(1, 2, 1, 1)), with_out_norm=True
    ),
    'Hiera of SAM 2': FAMILIES['Hiera'](
        dict(
            embed_dims=8,
            num_heads=1,
            depths=(1, 2, 1, 1),
            pos_embed='window',
            pos_embed_size=(7, 7),
        )
    ),
    'ConvNeXtV2': FAMILIES['ConvNeXtV2'](
        dict(channels=(8, 12, 16, 20), depths=(1, 2, 1, 1))
    ),
    'ResNetVD': FAMILIES['ResNetVD']('r18'),
    # as wide as atto, which timm writes with convolutions
    'ConvNeXtV2 of timm': FAMILIES['ConvNeXtV2'](
        dict(channels=(40, 12, 16, 20), depths=(1, 1, 1, 1))
    ),
}


@pytest.mark.parametrize('name', TOYS)
def test_values_come_back_as_they_were(name):
    state = fill(TOYS[name]).state_dict()
    family = name.split()[0]
    forms = 0
    for maker in {m for s in SOURCES if s.family == family for m in s.makers}:
        try:
            theirs, _ = from_ours(state, maker)
        except ValueError:  # not a network of theirs
            continue
        forms += 1
        back, _ = to_ours(theirs)
        for key, value in back.items():
            assert torch.equal(value, state[key]), (maker, key)
    assert forms >= 3


def test_the_cells_of_a_sparse_kernel_go_down_columns_first():
    dense = torch.arange(9.0).reshape(1, 1, 3, 3)  # [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    state = TOYS['ConvNeXtV2'].state_dict()
    state['stages.0.0.dwconv.weight'] = dense
    state['downsample_layers.1.1.weight'] = torch.arange(16.0).reshape(2, 2, 2, 2)
    theirs, _ = from_ours(state, 'fcmae')
    kernel = theirs['encoder.stages.0.0.dwconv.kernel']
    assert kernel.tolist() == [[0], [3], [6], [1], [4], [7], [2], [5], [8]]
    # (cell, in, out): the second cell is row 1 of column 0
    kernel = theirs['encoder.downsample_layers.1.1.kernel']
    assert kernel[1].tolist() == [[2, 10], [6, 14]]


# -- what others publish, from their own networks -----------------------------------


def _full(family: str, source: str, net: nn.Module, maker: str) -> tuple[Shapes, set]:
    extra = beside(family, source, net)
    return {**shapes_of(from_ours(net.state_dict(), maker)[0]), **extra}, set(extra)


def _network_of(key: str) -> tuple[str, str, dict, str, str]:
    """Family, arch, arguments, source and maker of an entry of the golden file."""
    family, arch, source = key.split()
    family = {f.lower(): f for f in FAMILIES}[family]
    arch, kwargs = arch.lower().removesuffix('_256'), {}
    if arch == 'base_16x224':
        arch, kwargs = 'base', dict(num_frames=16)
    if source == 'sam2_trunk':
        arch = f'sam2_{arch}'
    if source == 'mmpretrain_ConvNeXt_out0123':
        kwargs = dict(with_out_norm=True)
    makers = {
        'paddleclas_pdparams': 'paddle',
        'dfine_backbone': 'dfine',
        'sam2_trunk': 'sam2',
        'mmpretrain_ConvNeXt_out0123': 'mmpretrain',
        'mmpretrain_ConvNeXt': 'mmpretrain',
        'official_fcmae_sparse_training_ckpt': 'fcmae',
    }
    return family, arch, kwargs, source, makers.get(source, source.split('_')[0])


@pytest.mark.parametrize('key', json.loads(GOLDEN.read_text()))
def test_names_and_shapes_are_those_of_the_published_files(key):
    family, arch, kwargs, source, maker = _network_of(key)
    net = meta_net(family, arch, **kwargs)
    theirs, extra = _full(family, source, net, maker)
    if source == 'mmpretrain_ConvNeXt':  # its last output norm is its classifier's
        last = net.out_channels[-1]
        theirs |= {'norm3.weight': (last,), 'norm3.bias': (last,)}
    lines = sorted(f'{name} {list(shape)}' for name, shape in theirs.items())
    assert json.loads(GOLDEN.read_text())[key] == {
        'num_keys': len(lines),
        'sha256': hashlib.sha256('\n'.join(lines).encode()).hexdigest(),
    }
    ours, report = to_ours(meta_tensors(theirs))
    assert set(report.dropped) == extra
    uncounted = shapes_of(ours).items() - shapes_of(net.state_dict()).items()
    assert {name for name, _ in uncounted} <= {'norm3.weight', 'norm3.bias'}
    assert {n for n in net.state_dict() if n not in ours} == {
        n for n in net.state_dict() if maker == 'paddle' and 'num_batches' in n
    }


def test_no_rule_is_unused():
    """Over all networks and all that is published beside them."""
    published = [_network_of(key) for key in json.loads(GOLDEN.read_text())]
    published += [
        (family, arch, kwargs, 'export', maker)
        for family, arch, kwargs in NETWORKS
        for maker in makers_of(family, arch, kwargs) - {''}
        if kwargs
        or family == 'ResNetVD'
        or arch in ('b0', 'tiny', 'sam2_tiny', 'small_abswin', 'atto')
    ]
    heads = {
        'HGNetV2': {'fc.weight': (1000, 1024)},
        'Hiera': {'pooler.layernorm.weight': (768,)},
        'ConvNeXtV2': {'layernorm.weight': (320,)},
        'ResNetVD': {},
    }
    unused = {source: None for source in SOURCES if source.family in FAMILIES}
    for family, arch, kwargs, source, maker in published:
        net = meta_net(family, arch, **kwargs)
        shapes, _ = _full(family, source, net, maker)
        if maker == 'hf' and not arch.startswith('sam2'):
            shapes |= heads[family]
        form = recognise(shapes)
        prefix = form.prefixes[0]
        theirs = {k.removeprefix(prefix): v for k, v in meta_tensors(shapes).items()}
        table = form.table_for(theirs)
        back = table.inverse().convert(net.state_dict())[1].unused
        left = set(table.convert(theirs)[1].unused) | {
            rule
            for rule in table.rules
            if rule.sources is None and rule.inverse() in back
        }
        # A table that is made for the network has no rules for others.
        seen = unused[form]
        unused[form] = left if seen is None else {r for r in seen if r in left}
    assert unused == {source: set() for source in unused}


# -- prefixes, and names that are nobody's -------------------------------------------


@pytest.mark.parametrize(
    ('family', 'arch', 'maker', 'prefix'),
    [
        ('HGNetV2', 'b0', 'timm', 'module.'),
        ('HGNetV2', 'b0', 'hf', 'module.'),
        ('Hiera', 'tiny', 'hf', 'hiera.'),
        ('Hiera', 'tiny', 'hf', 'module.hiera.'),
        ('Hiera', 'sam2_tiny', 'sam2', 'image_encoder.trunk.'),
        ('Hiera', 'sam2_tiny', 'hf', 'vision_encoder.backbone.'),
        ('ConvNeXtV2', 'atto', 'hf', 'convnextv2.'),
    ],
)
def test_prefixes_are_taken_off_and_what_is_beside_is_dropped(
    family, arch, maker, prefix
):
    state = meta_net(family, arch).state_dict()
    theirs = {prefix + k: v for k, v in from_ours(state, maker)[0].items()}
    outside = 'module.other.weight' if 'module.' in prefix else 'other.weight'
    if prefix != 'module.':
        theirs[outside] = torch.empty(2, device='meta')
    ours, report = to_ours(theirs)
    assert shapes_of(ours) == shapes_of(state)
    assert set(report.dropped) == ({'other.weight'} if prefix != 'module.' else set())


@pytest.mark.parametrize(
    'names',
    [
        [],
        ['a.weight', 'b.bias'],
        ['stages.0.0.dwconv.weight'],  # ConvNeXt, the first
        ['patch_embed.proj.weight', 'blocks.0.attn.qkv.weight',
         'blocks.0.mlp.fc1.weight', 'pos_embed', 'cls_token'],  # a plain transformer
        ['backbone.stages.0.0.grn.gamma', 'backbone.stages.0.0.depthwise_conv.weight'],
    ],
)  # fmt: skip
def test_what_is_nobodys_stays_as_it_is(names):
    state = {name: torch.zeros(2) for name in names}
    converted, report = to_ours(state)
    assert (converted, report) == (state, None)
    with pytest.raises(ValueError, match='not under our names'):
        from_ours(state, 'timm')


def test_names_that_a_known_source_does_not_have_are_an_error():
    state = meta_net('HGNetV2', 'b0').state_dict()
    state = from_ours(state, 'hf')[0] | {'encoder.stages.9.new.gate': torch.zeros(2)}
    with pytest.raises(
        ValueError,
        match=r'look like HGNetV2 \(names: hf\), but 1 keys .*stages\.9\.new\.gate',
    ):
        to_ours(state)


@pytest.mark.parametrize(
    ('family', 'arch', 'kwargs', 'maker', 'message'),
    [
        ('HGNetV2', 'b0', {}, 'sam2', r"HGNetV2 has no form of 'sam2'.*'paddle'"),
        ('Hiera', 'tiny', {}, 'sam2', r"'sam2' has no Hiera like this.*lack pos_embed"),
        ('Hiera', 'base', dict(num_frames=16), 'hf', 'no name for pos_embed_spatial'),
        ('ConvNeXtV2', 'atto', dict(with_out_norm=True), 'timm', 'no name for norm0.w'),
    ],
)
def test_forms_that_do_not_exist_are_refused(family, arch, kwargs, maker, message):
    state = meta_net(family, arch, **kwargs).state_dict()
    with pytest.raises(ValueError, match=message):
        from_ours(state, maker)


def test_the_report_names_source_licence_and_what_is_dropped():
    net = meta_net('Hiera', 'tiny')
    theirs, _ = _full('Hiera', 'official_cls', net, 'official')
    text = str(to_ours(meta_tensors(theirs))[1])
    assert '153 tensors of Hiera' in text
    assert 'CC BY-NC 4.0' in text
    assert 'dropped, the classifier or its norm' in text
    assert 'head.projection.weight' in text
    theirs, _ = from_ours(meta_net('HGNetV2', 'b0').state_dict(), 'paddle')
    assert "stem_pool_pad='inf'" in str(to_ours(theirs)[1])


# -- Hugging Face --------------------------------------------------------------------


def _hugging_face(family: str, arch: str) -> nn.Module:
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    settings = FAMILIES[family].arch_settings[arch]
    if family == 'HGNetV2':
        stages = settings.stages
        config = transformers.HGNetV2Config(
            stem_channels=[3, *settings.stem_channels],
            embedding_size=settings.stem_channels[1],
            hidden_sizes=[s.out_channels for s in stages],
            depths=[s.num_blocks for s in stages],
            stage_in_channels=[s.in_channels for s in stages],
            stage_mid_channels=[s.mid_channels for s in stages],
            stage_out_channels=[s.out_channels for s in stages],
            stage_num_blocks=[s.num_blocks for s in stages],
            stage_downsample=[s.downsample for s in stages],
            stage_light_block=[s.light for s in stages],
            stage_kernel_size=[s.kernel_size for s in stages],
            stage_numb_of_layers=[s.num_layers for s in stages],
            use_learnable_affine_block=settings.use_lab,
            num_labels=1000,
        )
        return transformers.HGNetV2ForImageClassification(config)
    if family == 'ConvNeXtV2':
        config = transformers.ConvNextV2Config(
            hidden_sizes=list(settings.channels), depths=list(settings.depths)
        )
        return transformers.ConvNextV2ForImageClassification(config)
    if family == 'ResNetVD':
        config = transformers.RTDetrResNetConfig(
            hidden_sizes=list(meta_net(family, arch).out_channels),
            depths=list(settings.depths),
            layer_type='bottleneck' if settings.bottleneck else 'basic',
        )
        return transformers.RTDetrResNetBackbone(config)
    config = transformers.HieraConfig(
        embed_dim=settings['embed_dims'],
        depths=list(settings['depths']),
        num_heads=[settings['num_heads'] * 2**i for i in range(4)],
    )
    return transformers.HieraForImageClassification(config)


@pytest.mark.parametrize(
    ('family', 'arch'),
    [
        *(('HGNetV2', arch) for arch in FAMILIES['HGNetV2'].arch_settings),
        *(('Hiera', arch) for arch in IMAGE_HIERA),
        *(('ConvNeXtV2', arch) for arch in FAMILIES['ConvNeXtV2'].arch_settings),
        *(('ResNetVD', arch) for arch in FAMILIES['ResNetVD'].arch_settings),
    ],
)
def test_names_and_shapes_are_those_of_transformers(family, arch):
    with torch.device('meta'):
        theirs = _hugging_face(family, arch).state_dict()
    state = meta_net(family, arch).state_dict()
    ours, report = to_ours(theirs)
    assert shapes_of(ours) == shapes_of(state)
    heads = {'HGNetV2': {'fc'}, 'Hiera': {'pooler', 'classifier'},
             'ConvNeXtV2': {'layernorm', 'classifier'},
             'ResNetVD': set()}  # fmt: skip
    assert {name.split('.')[0] for name in report.dropped} == heads[family]
    back, _ = from_ours(state, 'hf')
    prefix = report.source.find_prefix(theirs)
    assert shapes_of(back) == {
        short: tuple(value.shape)
        for name, value in theirs.items()
        if (short := name.removeprefix(prefix)) not in report.dropped
    }


def test_masked_autoencoders_and_sam2_of_transformers_are_taken():
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

    with torch.device('meta'):
        config = transformers.HieraConfig(
            num_query_pool=2,
            decoder_hidden_size=512,
            decoder_depth=8,
            decoder_num_heads=16,
        )
        mae = transformers.HieraForPreTraining(config)
        sam2 = Sam2HieraDetModel(transformers.Sam2HieraDetConfig())
    ours, report = to_ours(mae.state_dict())
    assert shapes_of(ours) == shapes_of(meta_net('Hiera', 'base').state_dict())
    assert len(report.dropped) == 110
    ours, report = to_ours(sam2.state_dict())
    assert report.dropped == {}
    assert shapes_of(ours) == shapes_of(meta_net('Hiera', 'sam2_tiny').state_dict())
