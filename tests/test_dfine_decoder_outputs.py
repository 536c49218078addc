"""What the D-FINE decoder returns, for images of any size and of any content."""

import math

import pytest
import torch
from dfine_helpers import (
    SIZES,
    TOYS,
    build,
    named_tensors,
    targets,
    toy_decoder,
    toys,
)
from torch.testing import assert_close

from mmbackbones.decoders.query_selection import generate_anchors
from mmbackbones.ops.distribution import (
    distance_to_box,
    integral,
    weighting_function,
)
from mmbackbones.ops.predictions import BoxTargets

# Outputs


@toys
def test_training_returns_all_layers(size):
    decoder, maps = toy_decoder(size)
    num_layers = TOYS[size]['decoder']['num_layers']
    num_queries = TOYS[size]['decoder']['num_queries']
    output = decoder.train()(maps, targets(2, 3, num_classes=5))  # 3 groups of 6
    for part, num in ((output.queries, num_queries), (output.denoising, 18)):
        assert part.logits.shape == (num_layers, 2, num, 5)
        assert part.boxes.shape == (num_layers, 2, num, 4)
        assert part.corners.shape == (num_layers, 2, num, 132)
        assert part.ref_boxes.shape == (2, num, 4)
        assert part.pre_logits.shape == (2, num, 5)
        assert part.pre_boxes.shape == (2, num, 4)
        assert not part.ref_boxes.requires_grad
        assert_close(part.ref_boxes, part.pre_boxes)
        # the first layer's score head, before the quality of its distributions
        assert (part.logits[0] - part.pre_logits).std(-1).max() < 1e-5
    assert output.enc_logits.shape == (2, num_queries, 5)
    assert output.enc_boxes.shape == (2, num_queries, 4)
    assert output.dn_pairs.num_groups == 3


@toys
def test_evaluation_returns_one_layer_of_training(size):
    decoder, maps = toy_decoder(size)
    spec = TOYS[size]['decoder']
    layer = spec.get('eval_layer', spec['num_layers'] - 1)
    with torch.no_grad():
        output = decoder(maps, targets(2, 3, num_classes=5))
        decoder.training = True  # but not the norms of input_proj
        every = decoder(maps)
    assert output.denoising is output.dn_pairs is output.enc_logits is None
    assert output.queries.pre_logits is output.queries.pre_boxes is None
    assert len(output.queries.logits) == 1
    assert_close(output.queries.logits[0], every.queries.logits[layer])
    assert_close(output.queries.boxes[0], every.queries.boxes[layer])


def test_boxes_are_decoded_from_corners():
    decoder, maps = toy_decoder('X')
    queries = decoder.train()(maps).queries
    bins = weighting_function(32, 0.5, 8.0)
    expected = distance_to_box(queries.ref_boxes, integral(queries.corners, bins), 8.0)
    assert_close(queries.boxes, expected)


def test_denoising_leaves_matched_queries_alone():
    decoder, maps = toy_decoder()
    decoder.train()
    with torch.no_grad():
        alone = decoder(maps).queries
        beside = decoder(maps, targets(2, 3, num_classes=5)).queries
    assert_close(vars(beside), vars(alone), atol=1e-5, rtol=1e-5)


def test_gradients_stop_where_published():
    decoder, maps = toy_decoder()
    queries = decoder.train()(maps).queries
    queries.boxes[-1].sum().backward()
    reached = {n for n, p in decoder.named_parameters() if p.grad is not None}
    assert 'dec_bbox_head.0.layers.2.weight' in reached  # corners add up
    assert 'decoder.layers.0.linear1.weight' in reached
    assert not any(
        n.startswith(('enc_', 'pre_bbox_head', 'decoder.lqe')) for n in reached
    )


def test_every_parameter_gets_a_gradient_with_or_without_boxes():
    decoder, maps = toy_decoder()
    decoder.train()
    for sizes in ((0, 0), (0, 2)):
        decoder.zero_grad()
        output = decoder(maps, targets(*sizes, num_classes=5))
        sum(t.sin().sum() for t in named_tensors(output).values()).backward()
        missing = {n for n, p in decoder.named_parameters() if p.grad is None}
        assert missing == {'up', 'reg_scale'}
        assert all(
            p.grad.isfinite().all() for p in decoder.parameters() if p.requires_grad
        )
        grad = decoder.denoising_class_embed.weight.grad
        assert grad.any() == (sum(sizes) > 0)
    assert (output.denoising is None) == (sum(sizes) == 0)


def test_each_score_head_runs_once():
    decoder, maps = toy_decoder()
    calls = []
    for i, head in enumerate(decoder.dec_score_head):
        head.register_forward_hook(lambda *_, i=i: calls.append(i))
    decoder.train()(maps, targets(1, 1, num_classes=5))
    assert calls == [0, 1, 2, 3, 4, 5]
    calls.clear()
    decoder.eval()(maps)
    assert calls == [5]


def test_without_denoising_there_is_no_embedding():
    decoder, maps = toy_decoder(num_denoising=0)
    assert 'denoising_class_embed.weight' not in decoder.state_dict()
    output = decoder.train()(maps, targets(2, 3, num_classes=5))
    assert output.denoising is output.dn_pairs is None
    assert output.enc_logits is not None


# Sizes of images


def test_anchors_by_hand():
    logits, valid = generate_anchors([(1, 2), (1, 1)])
    boxes = torch.tensor([[[0.25, 0.5, 0.05, 0.05], [0.75, 0.5, 0.05, 0.05]]])
    coarse = torch.tensor([[[0.5, 0.5, 0.1, 0.1]]])
    assert_close(logits.sigmoid(), torch.cat((boxes, coarse), 1))
    assert valid.shape == (1, 3, 1)
    assert valid.all()


def test_anchors_at_the_border_are_finite_and_full():
    logits, valid = generate_anchors([(1, 100)])
    assert [i for i in range(100) if not valid[0, i]] == [0, 99]  # 0.005 and 0.995
    assert logits.isfinite().all()
    assert logits.half().isfinite().all()
    assert (logits[0, 0].sigmoid() == 1).all()


@pytest.mark.parametrize(
    ('size', 'num_tokens', 'num_valid'), [('N', 2000, 2000), ('L', 8400, 8084)]
)
def test_anchors_are_as_many_as_published(size, num_tokens, num_valid):
    _, decoder = build(SIZES[size], hidden_dim=8, num_layers=1)
    assert decoder.anchors.shape == (1, num_tokens, 4)
    assert decoder.valid_mask.sum() == num_valid


@toys
@pytest.mark.parametrize(('height', 'width'), [(128, 128), (64, 160), (97, 131)])
def test_kept_anchors_change_nothing(size, height, width):
    decoder, maps = toy_decoder(size, height, width)
    other, _ = toy_decoder(size, eval_size_hw=(height, width))
    with torch.no_grad():
        found, expected = decoder(maps).queries, other(maps).queries
    assert_close(vars(found), vars(expected))


def test_checkpoints_of_other_image_sizes_load():
    decoder, maps = toy_decoder()
    state = build(TOYS['L'], 5, eval_size_hw=(64, 96))[1].state_dict()
    state['anchors'][0, 0] = torch.inf  # as released
    state['reg_scale'] = state['reg_scale'].long()
    kept = decoder.anchors.clone()
    report = decoder.load_state_dict(state)
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(decoder.anchors, kept)
    assert state['anchors'].shape == (1, 96 + 24 + 6, 4)  # left as it was
    assert decoder.reg_scale.dtype == torch.float32
    assert decoder(maps).queries.boxes.isfinite().all()


def test_small_images_use_all_their_positions():
    decoder, maps = toy_decoder('L', 32, 32)  # 16 + 4 + 1 of 30 queries
    assert decoder(maps).queries.boxes.shape == (1, 2, 21, 4)
    output = decoder.train()(maps, targets(1, 2, num_classes=5))
    assert output.queries.logits.shape == (6, 2, 21, 5)
    assert output.denoising.logits.shape == (6, 2, 20, 5)


# Numerics


@pytest.mark.parametrize('value', [math.nan, math.inf, 1e30, 0.0])
def test_degenerate_maps_do_not_raise_or_spread(value):
    decoder, maps = toy_decoder()
    with torch.no_grad():
        expected = decoder(maps).queries.boxes[:, 1]
        for x in maps:
            x[0] = value
        boxes = decoder(maps).queries.boxes
    assert_close(boxes[:, 1], expected)
    output = decoder.train()(maps, targets(2, 2, num_classes=5))
    assert output.denoising is not None


def test_nan_at_the_border_of_a_map_is_masked():
    decoder, maps = toy_decoder('L', 32, 416, eval_size_hw=(32, 416))
    assert not decoder.valid_mask[0, 0]  # 0.5 / 52 < 0.01
    with torch.no_grad():
        before = decoder.select_queries(maps)
        maps[0][:, :, 0, 0] = math.nan
        assert_close(decoder.select_queries(maps), before)


@pytest.mark.parametrize('training', [False, True])
def test_boxes_stay_in_float32_under_autocast(training):
    decoder, maps = toy_decoder()
    decoder.train(training)
    with torch.autocast('cpu', torch.bfloat16):
        output = decoder(maps, targets(2, 3, num_classes=5))
    for name, tensor in named_tensors(output).items():
        assert tensor.dtype == torch.float32, name
        assert tensor.isfinite().all(), name
    queries = output.queries
    bins = weighting_function(32, 0.5, 4.0)
    expected = distance_to_box(queries.ref_boxes, integral(queries.corners, bins), 4.0)
    assert_close(queries.boxes, expected)


def test_location_quality_is_exact_under_autocast():
    decoder, maps = toy_decoder()
    quality = decoder.decoder.lqe_layers[0]
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        queries = decoder.train()(maps).queries
    difference = queries.logits[0] - queries.pre_logits
    expected = quality(queries.corners[0]).expand_as(difference)
    assert_close(difference, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_a_model_can_be_cast_as_a_whole(dtype):
    decoder, maps = toy_decoder()
    decoder.to(dtype)
    with torch.no_grad():
        output = decoder([x.to(dtype) for x in maps])
    assert output.queries.boxes.dtype == dtype
    assert output.queries.logits.isfinite().all()


def test_nothing_is_read_back_from_the_device():
    """Tensors of the meta device have no values to read."""
    with torch.device('meta'):
        encoder, decoder = build(SIZES['N'])
        truth = BoxTargets(torch.zeros(3).long(), torch.zeros(3, 4), (1, 2))
        maps = [torch.zeros(2, 512, 40, 40), torch.zeros(2, 1024, 20, 20)]
    output = decoder(encoder(maps), truth)
    assert output.queries.boxes.shape == (3, 2, 300, 4)
    assert output.denoising.boxes.shape == (3, 2, 200, 4)
    assert decoder.eval()(encoder(maps)).queries.logits.shape == (1, 2, 300, 80)


def test_compilation_meets_no_graph_break():
    decoder, maps = toy_decoder('N')
    compiled = torch.compile(decoder, backend='eager', fullgraph=True)
    with torch.no_grad():
        assert_close(vars(compiled(maps).queries), vars(decoder(maps).queries))
