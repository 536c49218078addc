"""D-FINE's criterion on no boxes, too many, degenerate ones, half precision and NaN."""

import pytest
import torch
from criterion_helpers import SMALL, benchmark, map_tensors, with_gradients

from mmbackbones.losses import DFINECriterion


@pytest.mark.parametrize(
    ('sizes', 'num_queries'),
    [
        ((0,), 20),
        ((0, 0, 0), 20),
        ((1,), 1),
        ((0, 3), 20),
        ((4, 0, 2, 0), 20),
        ((30, 2), 20),  # more boxes than queries
        ((6,), 6),  # every query is matched
    ],
)
def test_any_spread_of_boxes_gives_finite_losses_and_all_gradients(sizes, num_queries):
    output, targets = benchmark.random_batch(
        sizes, **{**SMALL, 'num_queries': num_queries}
    )
    leaves = with_gradients(output)
    losses = DFINECriterion()(output, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
    zero = {name for name, loss in losses.items() if loss == 0}
    if sum(sizes) == 0:
        # scores of unmatched queries and their distillation remain
        kept = {'loss_vfl', 'loss_vfl_aux_0', 'loss_vfl_aux_1', 'loss_vfl_pre'}
        kept |= {'loss_vfl_enc_0', 'loss_ddf_aux_0', 'loss_ddf_aux_1'}
        assert set(losses) - zero == kept
    else:
        # a pair without overlap has no distribution loss
        assert 'loss_ddf_dn_2' in zero
        assert all('fgl' in name or 'ddf' in name for name in zero)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_judged_in_float32(dtype):
    output, targets = benchmark.random_batch((3, 2), **SMALL)
    half = map_tensors(output, lambda tensor: tensor.to(dtype))
    expected = DFINECriterion()(map_tensors(half, torch.Tensor.float), targets)
    with torch.autocast('cpu', torch.bfloat16):
        losses = DFINECriterion()(half, targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    'box',
    [(0.5, 0.5, 0.0, 0.0), (0.5, 0.5, -0.1, -0.3), (5.0, -4.0, 1e-9, 1e9)],
)
@pytest.mark.parametrize('of', ['predictions', 'targets', 'both'])
def test_degenerate_boxes_have_finite_losses_and_gradients(box, of):
    output, targets = benchmark.random_batch((3, 2), **SMALL)
    box = torch.tensor(box)
    if of != 'targets':
        for queries in (output.queries, output.denoising):
            queries.boxes[:, :, ::2] = box
            queries.ref_boxes[:, ::2] = box
            queries.pre_boxes[:, ::2] = box
    if of != 'predictions':
        targets.boxes[::2] = box
    leaves = with_gradients(output)
    losses = DFINECriterion()(output, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.parametrize('name', ['logits', 'boxes', 'corners'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_broken_predictions_neither_raise_nor_vanish(name, value):
    output, targets = benchmark.random_batch((3, 2), **SMALL)
    getattr(output.queries, name)[1] = value
    losses = DFINECriterion()(output, targets)
    assert not sum(losses.values()).isfinite()
    hit = {
        'logits': 'loss_vfl_aux_1',
        'boxes': 'loss_bbox_aux_1',
        'corners': 'loss_fgl_aux_1',
    }
    assert not losses[hit[name]].isfinite()
    assert losses['loss_bbox'].isfinite()  # the layers before and after are judged
