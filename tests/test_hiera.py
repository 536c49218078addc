"""Hiera: published sizes, parity, any image size, video, position tables."""

import pytest
import torch
import torch.nn.functional as F
from backbone_helpers import fill, image, relative_errors
from torch import Tensor, nn
from torch.testing import assert_close

from mmbackbones.backbones import Hiera
from mmbackbones.layers.drop import DropPath
from mmbackbones.layers.hiera_block import HieraBlock

ALL = (0, 1, 2, 3)
TINY = dict(embed_dims=96, num_heads=1, depths=[1, 2, 7, 2])
# Two blocks in the first two stages, so that none is only the one that pools.
TOY = dict(embed_dims=16, num_heads=1, depths=[2, 2, 3, 2], pos_embed_size=[16, 24])
TOY_WINDOW = dict(
    embed_dims=16,
    num_heads=1,
    depths=[2, 2, 3, 2],
    window_spec=[8, 4, 6, 3],
    global_att_blocks=[5],
    pos_embed='window',
    pos_embed_size=[7, 7],
)


def fill_hiera(net: Hiera) -> Hiera:
    """As `fill`, with position tables as large as what they are added to."""
    fill(net)
    with torch.no_grad():
        for name, param in net.named_parameters():
            if name.startswith('pos_embed'):
                param.copy_(image(*param.shape) - 0.5)
    return net


@pytest.mark.parametrize(
    ('arch', 'num_params'),  # without the classifier, with the norm before it
    [
        ('tiny', 27_141_216),
        ('small', 34_239_072),
        ('base', 50_755_968),
        ('base_plus', 68_999_616),
        ('large', 212_586_912),
        ('huge', 670_730_752),
    ],
)
def test_counts_are_the_published_ones_less_the_norm_of_the_head(arch, num_params):
    with torch.device('meta'):
        net = Hiera(arch)
    head_norm = 2 * net.out_channels[-1]
    assert sum(p.numel() for p in net.parameters()) == num_params - head_norm


@pytest.mark.parametrize(
    ('arch', 'num_params'),  # with a classifier of 400 classes
    [
        ('base', 51_092_560),
        ('base_plus', 69_392_240),
        ('large', 213_091_600),
        ('huge', 671_627_664),
    ],
)
def test_video_counts_are_the_published_ones_less_the_head(arch, num_params):
    with torch.device('meta'):
        net = Hiera(arch, num_frames=16)
    head = 2 * net.out_channels[-1] + 400 * (net.out_channels[-1] + 1)
    assert sum(p.numel() for p in net.parameters()) == num_params - head


def _to_hugging_face(state: dict[str, Tensor], depths: list[int]) -> dict[str, Tensor]:
    """The names of `HieraModel`; a Hugging Face layer is counted within its stage."""
    places = [f'stages.{i}.layers.{j}' for i, n in enumerate(depths) for j in range(n)]
    renamed = {}
    for name, value in state.items():
        part, *path = name.split('.')
        if part == 'blocks':
            name = '.'.join(['encoder', places[int(path[0])], *path[1:]])
            name = name.replace('norm1', 'layernorm_before')
            name = name.replace('norm2', 'layernorm_after')
        name = name.replace(
            'patch_embed.proj', 'embeddings.patch_embeddings.projection'
        )
        name = name.replace('pos_embed', 'embeddings.position_embeddings')
        renamed[name] = value
    return renamed


def _hugging_face(ours: Hiera, spec: dict, size: tuple[int, int]) -> nn.Module:
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    heads = spec['num_heads']
    config = transformers.HieraConfig(
        embed_dim=spec['embed_dims'],
        num_heads=[heads, 2 * heads, 4 * heads, 8 * heads],
        depths=spec['depths'],
        image_size=list(size),
    )
    theirs = transformers.HieraModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(_to_hugging_face(ours.state_dict(), spec['depths']))
    return theirs


@pytest.mark.parametrize(
    ('arch', 'spec', 'size'),
    [('tiny', TINY, (224, 224)), (TOY, TOY, (64, 96))],
)
def test_maps_equal_those_of_transformers(arch, spec, size):
    ours = fill_hiera(Hiera(arch, out_indices=ALL).eval())
    theirs = _hugging_face(ours, spec, size)
    x = image(2, 3, *size)
    with torch.no_grad():
        maps = ours(x)
        # Not HieraBackbone, which never puts the tokens back in order.
        expected = theirs(x, output_hidden_states=True).reshaped_hidden_states[1:]
    expected = [e.permute(0, 3, 1, 2) for e in expected]
    assert max(relative_errors(maps, expected)) < 1e-5


@pytest.mark.parametrize('size', [(32, 32), (96, 64), (128, 160)])
def test_another_size_equals_the_interpolation_of_transformers(size):
    spec = {**TOY, 'pos_embed_size': [16, 16]}
    ours = fill_hiera(Hiera(spec, out_indices=-1).eval())
    theirs = _hugging_face(ours, spec, (64, 64))
    with torch.no_grad():
        (found,) = ours(image(1, 3, *size))
        expected = theirs(image(1, 3, *size), interpolate_pos_encoding=True)
    expected = expected.last_hidden_state.mT.unflatten(-1, found.shape[-2:])
    assert max(relative_errors((found,), (expected,))) < 1e-5


@pytest.mark.parametrize('spec', [TOY, TOY_WINDOW])
@pytest.mark.parametrize('size', [(1, 1), (32, 64), (33, 65), (97, 131)])
def test_any_size_equals_padding_by_hand_and_cropping(spec, size):
    net = fill_hiera(Hiera(spec, out_indices=ALL).eval())
    x = image(2, 3, *size)
    padded = x.new_zeros(2, 3, *(-(-side // 32) * 32 for side in size))
    padded[..., : size[0], : size[1]] = x
    with torch.no_grad():
        for found, whole, stride in zip(
            net(x), net(padded), (4, 8, 16, 32), strict=True
        ):
            rows, columns = (-(-side // stride) for side in size)
            assert found.shape[-2:] == (rows, columns)
            assert_close(found, whole[..., :rows, :columns])


@pytest.mark.parametrize('antialias', [False, True])
def test_windows_as_large_as_the_grid_are_global_attention(antialias):
    # On 64 pixels the grids are 16, 8, 4 and 2 tokens wide.
    spec = {
        **TOY_WINDOW,
        'window_spec': [8, 4, 4, 2],
        'global_att_blocks': [],
        'pos_embed_antialias': antialias,
    }
    trunk = fill_hiera(Hiera(spec, out_indices=ALL).eval())
    plain = Hiera({**TOY, 'pos_embed_size': [16, 16]}, out_indices=ALL).eval()
    state = trunk.state_dict()
    table = F.interpolate(
        state['pos_embed'], size=(16, 16), mode='bicubic', antialias=antialias
    )
    table = table + state.pop('pos_embed_window').tile(2, 2)
    plain.load_state_dict({**state, 'pos_embed': table.flatten(2).mT})
    with torch.no_grad():
        errors = relative_errors(plain(image(1, 3, 64, 64)), trunk(image(1, 3, 64, 64)))
    assert max(errors) < 1e-5


@pytest.mark.parametrize(
    ('arch', 'windows'),
    [
        ('tiny', [8, 8, 4, 4] + [0] * 8),
        ('small', [8, 8, 4, 4] + [0] * 12),
        ('base', [8] * 3 + [4] * 3 + [0] * 18),
        ('large', [8] * 3 + [4] * 6 + [0] * 39),
        ('sam2_tiny', [8, 8, 4, 4, 14, 0, 14, 0, 14, 0, 14, 7]),
    ],
)
def test_the_first_block_of_a_stage_has_the_windows_of_the_one_before(arch, windows):
    with torch.device('meta'):
        net = Hiera(arch)
    assert [block.attn.window for block in net.blocks] == windows


def test_video_frames_meet_in_global_attention_only():
    net = fill_hiera(Hiera(TOY, num_frames=16, out_indices=ALL).eval())
    assert net.pos_embed_temporal.shape == (1, 8, 16)
    x = image(1, 3, 16, 64, 96)
    changed = x.clone()
    changed[:, :, -1] += 1
    with torch.no_grad():
        maps, others = net(x), net(changed)
    assert [m.shape for m in maps] == [
        (1, 16 * 2**i, 8, 64 // 2 ** (i + 2), 96 // 2 ** (i + 2)) for i in range(4)
    ]
    for stage, (a, b) in enumerate(zip(maps, others, strict=True)):
        assert not torch.allclose(a[:, :, -1], b[:, :, -1])
        assert torch.allclose(a[:, :, 0], b[:, :, 0]) == (stage < 2)


@pytest.mark.parametrize(('frames', 'slots'), [(1, 1), (7, 4), (16, 8), (24, 12)])
def test_clips_of_any_length_and_size(frames, slots):
    net = fill_hiera(Hiera(TOY, num_frames=16, out_indices=(0, 3)).eval())
    with torch.no_grad():
        fine, coarse = net(image(2, 3, frames, 40, 70))
    assert fine.shape == (2, 16, slots, 10, 18)
    assert coarse.shape == (2, 128, slots, 2, 3)
    assert fine.isfinite().all()
    assert coarse.isfinite().all()


def test_output_norms_normalise_each_map():
    plain = fill_hiera(Hiera(TOY, out_indices=(1, 3)).eval())
    net = Hiera(TOY, out_indices=(1, 3), with_out_norm=True).eval()
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    assert missing == [f'norm{i}.{k}' for i in (1, 3) for k in ('weight', 'bias')]
    assert not unexpected
    x = image(1, 3, 40, 70)
    with torch.no_grad():
        for found, raw in zip(net(x), plain(x), strict=True):
            last = raw.movedim(1, -1)
            expected = F.layer_norm(last, last.shape[-1:], eps=1e-6)
            assert_close(found, expected.movedim(-1, 1))


def test_maps_lie_channels_last_in_memory():
    for found in Hiera(TOY, out_indices=ALL).eval()(image(2, 3, 64, 96)):
        assert found.is_contiguous(memory_format=torch.channels_last)


SMALL_ABSWIN = {
    **TOY_WINDOW,
    'window_spec': [8, 4, 0, 0],
    'pos_embed_antialias': True,
    'layer_scale': True,
    'expand_proj': False,
}


@pytest.mark.parametrize(
    ('spec', 'kwargs'),
    [
        (TOY, dict(with_cp=True, with_out_norm=True)),
        (TOY, dict(num_frames=4)),
        (TOY_WINDOW, {}),
        (SMALL_ABSWIN, dict(drop_path_rate=0.1)),
    ],
)
def test_every_parameter_learns(spec, kwargs):
    torch.manual_seed(0)
    net = fill_hiera(Hiera(spec, **kwargs)).train()
    frames = [4] if 'num_frames' in kwargs else []
    maps = net(image(4, 3, *frames, 40, 70))
    sum(m[..., ::2].square().mean() for m in maps).backward()
    for name, param in net.named_parameters():
        assert param.grad is not None, name
        assert param.grad.abs().max() > 0, name


def test_expanding_without_weights_puts_maximum_and_mean_side_by_side():
    block = fill(HieraBlock(4, 8, 2, window=0, layer_scale=True, expand_proj=False))
    with torch.no_grad():
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    x = image(1, 1, 2, 4, 4)
    cells = x.view(1, 1, 1, 2, 2, 2, 4)
    assert_close(block(x), torch.cat((cells.amax((3, 5)), cells.mean((3, 5))), dim=-1))


def test_layers_drop_more_from_block_to_block():
    with torch.device('meta'):
        net = Hiera('tiny', drop_path_rate=0.22)
    rates = [m.rate for m in net.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.02 * i for i in range(12)])


@pytest.mark.parametrize(
    ('kwargs', 'tables'),
    [
        (dict(arch='tiny'), ['pos_embed']),
        (dict(arch='sam2_tiny'), ['pos_embed', 'pos_embed_window']),
        (
            dict(arch='tiny', num_frames=16),
            ['pos_embed_spatial', 'pos_embed_temporal'],
        ),
    ],
)
def test_position_tables_freeze_with_the_patches(kwargs, tables):
    with torch.device('meta'):
        net = Hiera(**kwargs, frozen_stages=0)
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == [*tables, 'patch_embed.proj.weight', 'patch_embed.proj.bias']


def test_layer_depths_count_blocks_and_put_tables_with_the_stem():
    with torch.device('meta'):
        net = Hiera('sam2_tiny', with_out_norm=True)
    assert net.num_layers == 14
    table = {
        'pos_embed': 0,
        'pos_embed_window': 0,
        'patch_embed.proj.weight': 0,
        'blocks.0.attn.qkv.weight': 1,
        'blocks.11.mlp.fc2.bias': 12,
        'norm3.weight': 13,
    }
    names = dict(net.named_parameters())
    for name, depth in table.items():
        assert name in names
        assert net.get_layer_depth(name) == (depth, 14)
    with torch.device('meta'):
        video = Hiera('tiny', num_frames=16)
    assert video.get_layer_depth('pos_embed_temporal') == (0, 14)


def test_init_weights_draws_from_a_truncated_normal():
    net = Hiera(dict(TINY, depths=[1, 1, 1, 1]))
    net.init_weights()
    fc = net.blocks[3].mlp.fc1
    assert fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert fc.bias.eq(0.02).all()
    assert net.blocks[0].norm1.bias.eq(0.02).all()
    assert net.blocks[0].norm1.weight.eq(1).all()


@pytest.mark.parametrize(
    ('arch', 'kwargs', 'message'),
    [
        ({}, {}, r"lacks the fields \['embed_dims', 'num_heads', 'depths'\]"),
        ({**TOY, 'stages': 4}, {}, r"unknown fields \['stages'\]"),
        ({**TOY, 'depths': []}, {}, 'one entry per stage'),
        ({**TOY, 'depths': 4}, {}, 'arch.depths is 4'),
        ({**TOY, 'depths': [1, 0, 1, 1]}, {}, 'arch.depths is .* at least 1'),
        (
            {**TOY, 'window_spec': [-8, 4, 0, 0]},
            {},
            'arch.window_spec is .* at least 0',
        ),
        ({**TOY, 'pos_embed_size': 16}, {}, 'arch.pos_embed_size is 16.* 2 integers'),
        ({**TOY, 'global_att_blocks': 1}, {}, 'arch.global_att_blocks is 1'),
        ({**TOY, 'num_heads': 0}, {}, 'arch.num_heads is'),
        ({**TOY, 'depths': [1, 1]}, {}, 'one entry per stage'),
        ({**TOY, 'num_heads': 3}, {}, 'num_heads divides embed_dims'),
        ({**TOY_WINDOW, 'window_spec': [8, 4, 7, 7]}, {}, 'windows are even'),
        ({**TOY_WINDOW, 'window_spec': [0, 4, 6, 3]}, {}, 'first stage has windows'),
        ({**TOY_WINDOW, 'global_att_blocks': [9]}, {}, r'global_att_blocks .*0\.\.8'),
        ({**TOY, 'pos_embed': 'sine'}, {}, "'absolute', or 'window'"),
        (TOY_WINDOW, dict(num_frames=16), "num_frames is 16.*'window'"),
        (TOY, dict(num_frames=0), 'num_frames is 0'),
        (TOY, dict(num_frames='16'), "num_frames is '16'"),
    ],
)
def test_a_bad_specification_is_named(arch, kwargs, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        Hiera(arch, **kwargs)


@pytest.mark.parametrize('shape', [(1, 3, 32, 32), (1, 4, 2, 32, 32), (1, 3, 0, 8, 8)])
def test_a_video_network_refuses_other_input(shape):
    with torch.device('meta'), pytest.raises(ValueError, match='num_frames is 16'):
        Hiera(TOY, num_frames=16)(torch.zeros(shape))


def test_an_arch_may_have_three_stages():
    spec = dict(embed_dims=8, num_heads=1, depths=[1, 1, 1], window_spec=[8, 4, 0])
    net = Hiera(spec, out_indices=(-2, -1)).eval()
    assert net.out_channels == (16, 32)
    assert net.out_strides == (8, 16)
    assert [m.shape[-2:] for m in net(image(1, 3, 40, 70))] == [(5, 9), (3, 5)]
