"""RT-DETR's encoder and decoders: names, initial values, choices, deploy, bad input.

The golden file holds a digest of all state-dict names and shapes of encoder and
decoder; it is rewritten with `ACCEPT_GOLDEN=1`.
"""

import copy

import pytest
import torch
from dfine_helpers import features, named_tensors, randomise, targets
from golden_helpers import assert_golden_names
from rtdetr_helpers import DECODERS, STRIDES, TOYS, build
from torch import Tensor, nn
from torch.testing import assert_close

from mmbackbones.decoders import RTDETRDecoder, RTDETRv2Decoder
from mmbackbones.decoders.denoising import make_denoising_queries
from mmbackbones.decoders.detr_decoder import DETRDecoder
from mmbackbones.layers.rtdetr_layer import ProjectedDeformableAttention
from mmbackbones.necks import RTDETRHybridEncoder
from mmbackbones.ops.deformable_attention import discrete_sample
from mmbackbones.ops.predictions import BoxTargets
from mmbackbones.registry import MODELS

versions = pytest.mark.parametrize('version', DECODERS)
CHOICES = (
    dict(),
    dict(num_points=(2, 4, 1)),
    dict(cross_attn_method='discrete'),
    dict(query_select_method='one2many'),
    dict(query_select_method='agnostic'),
)


def toy(
    version: str, size: str = 'R18', height: int = 128, width: int = 128, **changes
):
    """A randomised decoder in evaluation, and maps for it."""
    encoder, decoder = build(version, TOYS[size], 5, **changes)
    spec = dict(TOYS[size], in_channels=encoder.out_channels)
    return randomise(decoder).eval(), features(spec, height, width)


# Names and initial values


@versions
@pytest.mark.parametrize('size', TOYS)
def test_names_and_shapes_match_the_golden_file(version, size):
    with torch.device('meta'):
        network = nn.ModuleDict(
            dict(zip(('encoder', 'decoder'), build(version, TOYS[size]), strict=True))
        )
    assert_golden_names('rtdetr_state_dict.json', f'{version} {size}', network)


def bound_of(weight: Tensor) -> float:
    """Of Xavier's uniform distribution."""
    return (6 / sum(weight.shape[:2])) ** 0.5


@versions
def test_initial_values_are_the_published_ones(version):
    _, decoder = build(version, TOYS['R18'])
    for head in (decoder.enc_score_head, *decoder.dec_score_head):
        assert_close(head.bias, torch.full((80,), -4.59512), atol=1e-5, rtol=0)
    for head in (decoder.enc_bbox_head, *decoder.dec_bbox_head):
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()
    uniform = [decoder.enc_output.proj.weight]
    uniform += [linear.weight for linear in decoder.query_pos_head.layers]
    second = [proj.conv.weight for proj in decoder.input_proj]
    for layer in decoder.decoder.layers:
        second += [layer.linear1.weight, layer.linear2.weight]
        attention = layer.cross_attn
        uniform += [attention.value_proj.weight, attention.output_proj.weight]
        assert not attention.value_proj.bias.any()
        assert not attention.output_proj.bias.any()
        assert not attention.sampling_offsets.weight.any()
        # the first head looks to the right, one to four steps
        steps = attention.sampling_offsets.bias.view(8, 3, 4, 2)[0]
        assert_close(steps[..., 0], torch.arange(1.0, 5).expand(3, 4))
        assert not steps[..., 1].any()
    for weight in [*uniform, *(second if version == 'v2' else ())]:
        assert 0.95 * bound_of(weight) < weight.abs().max() <= bound_of(weight)
    if version == 'v1':  # torch's own: 1 / sqrt(inputs)
        for weight in second:
            bound = weight.shape[1] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound


# Outputs and gradients


@versions
@pytest.mark.parametrize(('height', 'width'), [(128, 128), (96, 160), (33, 65)])
@pytest.mark.parametrize('size', TOYS)
def test_any_shape_of_image_works(version, size, height, width):
    decoder, maps = toy(version, size, height, width)
    truth = targets(2, 3, num_classes=5)  # 3 groups of 6
    num_layers = TOYS[size]['decoder']['num_layers']
    num_tokens = sum(x.shape[-2] * x.shape[-1] for x in maps)
    output = decoder.train()(maps, truth)
    for part, num in ((output.queries, min(30, num_tokens)), (output.denoising, 18)):
        assert part.logits.shape == (num_layers, 2, num, 5)
        assert part.boxes.shape == (num_layers, 2, num, 4)
        assert part.corners is None
    with torch.no_grad():
        evaluated = decoder.eval()(maps)
    assert evaluated.denoising is None
    assert evaluated.queries.boxes.shape == (1, 2, min(30, num_tokens), 4)


@pytest.mark.parametrize('choices', CHOICES, ids=str)
@pytest.mark.parametrize('sizes', [(2, 3), (0, 0)])
def test_every_parameter_gets_a_gradient(choices, sizes):
    decoder, maps = toy('v2', **choices)
    output = decoder.train()(maps, targets(*sizes, num_classes=5))
    sum(x.sin().sum() for x in named_tensors(output).values()).backward()
    without = {n for n, p in decoder.named_parameters() if p.grad is None}
    frozen = {n for n, _ in decoder.named_parameters() if 'sampling_offsets' in n}
    is_discrete = 'cross_attn_method' in choices
    assert without == (frozen if is_discrete else set())


@versions
def test_a_layer_learns_from_the_next_box_but_not_from_where_it_is_sampled(version):
    decoder, maps = toy(version)
    heads = decoder.train().dec_bbox_head
    boxes = decoder(maps).queries.boxes
    boxes[1].sum().backward()
    assert heads[0].layers[-1].bias.grad.any()  # the box is counted from
    assert not heads[2].layers[-1].bias.grad.any()
    decoder.zero_grad()
    boxes = decoder(maps).queries.boxes
    boxes[2].sum().backward()
    assert heads[1].layers[-1].bias.grad.any()
    assert not heads[0].layers[-1].bias.grad.any()  # one step back, not two


def test_agnostic_selection_scores_by_one_number():
    decoder, maps = toy('v2', query_select_method='agnostic')
    output = decoder.train()(maps)
    assert output.enc_logits.shape == (2, 30, 1)
    assert output.queries.logits.shape == (3, 2, 30, 5)
    assert (output.enc_logits.diff(dim=1) <= 0).all()


def test_one_to_many_selection_takes_pairs_of_token_and_class():
    decoder = build('v2', TOYS['R18'], 3, query_select_method='one2many')[1]
    logits = torch.tensor([[[9.0, 8.0, 1.0], [2.0, 7.0, 0.0], [6.0, 3.0, 4.0]]])
    assert decoder._best_tokens(logits, 5).tolist() == [[0, 0, 1, 2, 2]]
    default = build('v2', TOYS['R18'], 3)[1]
    assert default._best_tokens(logits, 3).tolist() == [[0, 1, 2]]


MAPS = list(zip(TOYS['H']['in_channels'], STRIDES, strict=True))


def test_tensors_of_a_run_fit_into_memory_of_any_device():
    """Tensors of the meta device have no values to read."""
    with torch.device('meta'):
        encoder, decoder = build('v2', TOYS['H'])
        truth = BoxTargets(torch.zeros(3).long(), torch.zeros(3, 4), (1, 2))
        maps = [torch.zeros(2, c, 128 // s, 128 // s) for c, s in MAPS]
    output = decoder(encoder(maps), truth)
    assert output.queries.boxes.shape == (4, 2, 30, 4)


def test_compilation_meets_no_graph_break():
    decoder, maps = toy(
        'v2', cross_attn_method='discrete', query_select_method='one2many', num_layers=1
    )
    compiled = torch.compile(decoder, backend='eager', fullgraph=True)
    with torch.no_grad():
        assert_close(vars(compiled(maps).queries), vars(decoder(maps).queries))


@versions
def test_autocast_keeps_boxes_in_full_precision(version):
    decoder, maps = toy(version)
    truth = targets(2, 3, num_classes=5)
    with torch.autocast('cpu', torch.bfloat16):
        output = decoder.train()(maps, truth)
    dtypes = {name: t.dtype for name, t in named_tensors(output).items()}
    assert set(dtypes.values()) == {torch.float32}, dtypes
    sum(x.sum() for x in named_tensors(output).values()).backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_a_copy_samples_as_its_origin():
    decoder, maps = toy('v2', cross_attn_method='discrete')
    with torch.no_grad():
        expected = decoder(maps).queries
        assert_close(vars(copy.deepcopy(decoder)(maps).queries), vars(expected))


@pytest.mark.parametrize('flip_crossed', [True, False])
def test_crossed_edges_of_denoising_boxes(flip_crossed):
    truth = targets(8, num_classes=5)
    embed = nn.Embedding(6, 8, padding_idx=5)
    torch.manual_seed(0)
    queries = make_denoising_queries(
        truth, embed, 40, 0.5, 1.0, flip_crossed=flip_crossed
    )
    sizes = queries.box_logits.sigmoid()[..., 2:]
    # negatives move by up to the whole box: some cross
    assert bool((sizes < 2e-5).any()) is not flip_crossed
    assert DETRDecoder.flip_crossed is True
    assert RTDETRDecoder.flip_crossed is RTDETRv2Decoder.flip_crossed is False


# Sampling


@pytest.mark.parametrize(('height', 'width'), [(4, 4), (2, 7), (7, 2)])
def test_discrete_samples_are_those_of_a_slow_loop(height, width):
    torch.manual_seed(0)
    num_points = (2, 1)
    sizes = ((height, width), (1, 3))
    values = [torch.randn(2 * 2, 3, *size) for size in sizes]  # 2 images, 2 heads
    locations = torch.rand(2, 5, 2, 3, 2) * 1.6 - 0.3
    weights = torch.rand(2, 5, 2, 3, requires_grad=True)
    found = discrete_sample(values, locations, weights, num_points)
    expected = torch.zeros(2, 5, 2, 3)
    for n, q, head, p in torch.cartesian_prod(
        *(torch.arange(k) for k in (2, 5, 2, 3))
    ).tolist():
        level = 0 if p < num_points[0] else 1
        rows, columns = sizes[level]
        x, y = locations[n, q, head, p].tolist()
        column = min(max(int(x * columns + 0.5), 0), columns - 1)
        row = min(max(int(y * rows + 0.5), 0), rows - 1)
        pixel = values[level][2 * n + head, :, row, column]
        expected[n, q, head] += weights[n, q, head, p].detach() * pixel
    assert_close(found, expected.flatten(2))
    found.sum().backward()
    assert weights.grad.any()


def test_freezing_to_pixels_stops_the_offsets_alone():
    attention = ProjectedDeformableAttention(16, 2, (2, 2))
    attention.freeze_to_pixels()
    frozen = {n for n, p in attention.named_parameters() if not p.requires_grad}
    assert frozen == {'sampling_offsets.weight', 'sampling_offsets.bias'}


# Encoder


@pytest.mark.parametrize('size', TOYS)
@pytest.mark.parametrize(('height', 'width'), [(32, 32), (96, 160), (97, 131)])
def test_maps_of_the_encoder_keep_their_sizes(size, height, width):
    encoder, _ = build('v2', TOYS[size])
    maps = features(TOYS[size], height, width)
    outs = encoder(maps)
    assert encoder.out_strides == STRIDES
    assert [x.shape for x in outs] == [
        (2, c, *x.shape[2:]) for c, x in zip(encoder.out_channels, maps, strict=True)
    ]
    sum(x.sin().sum() for x in outs).backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is None} == set()


# Deploy


@versions
@pytest.mark.parametrize('size', TOYS)
def test_a_deployed_network_gives_the_same(version, size):
    encoder, decoder = (randomise(m).eval() for m in build(version, TOYS[size]))
    maps = features(TOYS[size], 96, 160)
    with torch.no_grad():
        before = decoder(encoder(maps)).queries
        encoder.switch_to_deploy()
        encoder.switch_to_deploy()  # nothing left to do
        decoder.switch_to_deploy()
        after = decoder(encoder(maps)).queries
    assert_close(vars(after), vars(before), atol=1e-4, rtol=1e-4)
    names = [n for n, _ in encoder.named_parameters() if '.bottlenecks.' in n]
    assert {n.split('.bottlenecks.')[1][2:] for n in names} == {
        'conv.weight',
        'conv.bias',
    }


# Bad arguments


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(in_strides=(8, 16)), r'in_strides is \(8, 16\).*in_channels'),
        (dict(num_points=(3, 6)), r'num_points is \(3, 6\).*3 maps'),
        (dict(hidden_dim=36), r'hidden_dim is 36.*num_heads, 8'),
        (dict(eval_layer=6), r'eval_layer is 6.*-6 to 5'),
        (dict(cross_attn_method='nearest'), "'nearest'.*'default', 'discrete'"),
        (dict(query_select_method='all'), "'all'.*'default', 'one2many', 'agnostic'"),
    ],
)
def test_contradictions_are_named(changes, message):
    valid = dict(
        num_classes=5, in_channels=(16,) * 3, in_strides=(8, 16, 32), hidden_dim=16
    )
    with pytest.raises(ValueError, match=message):
        RTDETRv2Decoder(**{**valid, **changes})


@pytest.mark.parametrize(
    'cls',
    [RTDETRDecoder, RTDETRv2Decoder, RTDETRHybridEncoder],
    ids=lambda c: c.__name__,
)
def test_parts_are_registered(cls):
    assert MODELS.get(cls.__name__) is cls
