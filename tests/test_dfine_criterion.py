"""D-FINE's criterion: its terms by hand, what they depend on, and several processes."""

import dataclasses
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from criterion_helpers import SMALL, benchmark, with_gradients

from mmbackbones.losses import DFINECriterion, matching
from mmbackbones.ops.boxes import cxcywh_to_xyxy, elementwise_iou
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput
from mmbackbones.registry import MODELS


def expected_keys(num_layers):
    boxes = ['loss_vfl', 'loss_bbox', 'loss_giou']
    layer = [*boxes, 'loss_fgl']
    keys = set(layer)
    for i in range(num_layers - 1):
        keys |= {f'{name}_aux_{i}' for name in [*layer, 'loss_ddf']}
    for i in range(num_layers):
        keys |= {f'{name}_dn_{i}' for name in [*layer, 'loss_ddf']}
    return keys | {f'{n}{s}' for n in boxes for s in ('_pre', '_enc_0', '_dn_pre')}


@pytest.mark.parametrize(('num_layers', 'num_terms'), [(3, 38), (4, 48), (6, 68)])
@pytest.mark.parametrize('sizes', [(0, 0), (3, 0)])
def test_terms_are_the_published_ones(sizes, num_layers, num_terms):
    output, targets = benchmark.random_batch(
        sizes, **{**SMALL, 'num_layers': num_layers}
    )
    losses = DFINECriterion()(output, targets)
    assert set(losses) == expected_keys(num_layers)
    assert len(losses) == num_terms
    assert all(loss.shape == () for loss in losses.values())


def test_batch_of_nothing_normalises_by_one():
    output, targets = benchmark.random_batch((0,), **SMALL)
    loss = DFINECriterion()(output, targets)['loss_vfl']
    logits = output.queries.logits[-1]
    # alpha p^gamma * -ln(1 - p), summed
    expected = (0.75 * logits.sigmoid() ** 2 * -(-logits).sigmoid().log()).sum()
    torch.testing.assert_close(loss, expected)


def test_matched_layer_by_hand():
    # One image, one box, one query, one class, one layer, no further heads, not in
    # training. IoU = .5 (widths .2 and .4), logit 0 -> VFL = .5 * ln 2; L1 = .2 * 5;
    # GIoU = .5 * 2. FGL: all bins equal, 4 edges * ln 33 * IoU * .15
    output, _ = benchmark.random_batch((0,), num_layers=1, num_queries=1, num_classes=1)
    queries = dataclasses.replace(
        output.queries,
        logits=torch.zeros(1, 1, 1, 1),
        boxes=torch.tensor([0.5, 0.5, 0.2, 0.4]).view(1, 1, 1, 4),
        corners=torch.zeros(1, 1, 1, 132),
        pre_logits=None,
        pre_boxes=None,
    )
    targets = BoxTargets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]), (1,))
    losses = DFINECriterion().eval()(DecoderOutput(queries), targets)
    expected = {
        'loss_vfl': 0.5 * torch.tensor(2.0).log(),
        'loss_bbox': torch.tensor(1.0),
        'loss_giou': torch.tensor(1.0),
        'loss_fgl': 0.15 * 4 * 0.5 * torch.tensor(33.0).log(),
    }
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)


def test_denoising_queries_are_judged_by_the_boxes_they_were_made_from():
    output, targets = benchmark.random_batch((3, 0, 2), **SMALL)
    pairs, boxes = output.dn_pairs, output.denoising.boxes
    assert pairs.num_groups == 3  # 10 // 3, so 15 pairs
    losses = DFINECriterion()(output, targets)
    for layer in range(3):
        found = boxes[layer, pairs.image, pairs.query]
        expected = 5 * (found - targets.boxes[pairs.target]).abs().sum() / 15
        torch.testing.assert_close(losses[f'loss_bbox_dn_{layer}'], expected)


def test_boxes_are_judged_by_the_union_and_scores_by_their_own_matches():
    output, targets = benchmark.random_batch((3, 0, 2), **SMALL)
    criterion = DFINECriterion()
    losses = criterion(output, targets)
    queries = output.queries
    heads = [
        (queries.pre_logits, queries.pre_boxes),
        (output.enc_logits, output.enc_boxes),
    ]
    own = criterion.matcher(
        torch.cat((queries.logits, *(logits[None] for logits, _ in heads))),
        torch.cat((queries.boxes, *(boxes[None] for _, boxes in heads))),
        targets,
    )
    union = matching.union_of_matches(own)
    assert len(union.query) > 5
    enc_boxes = output.enc_boxes.flatten(0, 1)
    difference = (enc_boxes[union.query] - targets.boxes[union.target]).abs().sum()
    expected = 5 * difference / len(union.query)
    torch.testing.assert_close(losses['loss_bbox_enc_0'], expected)
    enc_logits = output.enc_logits.flatten(0, 1)
    scores = torch.zeros_like(enc_logits)
    weights = 0.75 * enc_logits.sigmoid() ** 2
    for query, target in zip(own.query[-1], own.target[-1], strict=True):
        quality = elementwise_iou(
            cxcywh_to_xyxy(enc_boxes[query]), cxcywh_to_xyxy(targets.boxes[target])
        )
        scores[query, targets.labels[target]] = quality
        weights[query, targets.labels[target]] = quality
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        enc_logits, scores, weights, reduction='sum'
    )
    torch.testing.assert_close(losses['loss_vfl_enc_0'], expected / 5)


def test_equal_layers_have_equal_losses_and_nothing_to_distil():
    # as at initialisation, where all heads give the same
    output, targets = benchmark.random_batch((3, 1), **SMALL)
    benchmark.bring_together(output, 0)
    losses = DFINECriterion()(output, targets)
    assert all(loss == 0 for name, loss in losses.items() if 'ddf' in name)
    for name in ('loss_vfl', 'loss_bbox', 'loss_giou', 'loss_fgl'):
        torch.testing.assert_close(losses[f'{name}_aux_0'], losses[name])
        torch.testing.assert_close(losses[f'{name}_dn_0'], losses[f'{name}_dn_2'])


def test_two_calls_give_the_same_numbers():
    output, targets = benchmark.random_batch((3, 0, 5), **SMALL)
    other = benchmark.random_batch((1, 2, 2), **SMALL, seed=1)
    criterion = DFINECriterion()
    first = criterion(output, targets)
    criterion(*other)
    again = criterion(output, targets)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_weights_multiply_their_terms():
    output, targets = benchmark.random_batch((3, 2), **SMALL)
    once = DFINECriterion()(output, targets)
    defaults = dict(vfl=1.0, bbox=5.0, giou=2.0, fgl=0.15, ddf=1.5)
    for name, default in defaults.items():
        argument = 'class_weight' if name == 'vfl' else f'{name}_weight'
        twice = DFINECriterion(**{argument: 2 * default})(output, targets)
        for key, value in once.items():
            factor = 2 if key.startswith(f'loss_{name}') else 1
            torch.testing.assert_close(twice[key], factor * value)


def test_criterion_is_registered_and_adds_nothing_to_a_checkpoint():
    criterion = MODELS.build(dict(type='DFINECriterion', reg_scale=8.0))
    assert criterion.bins[-1] == 8
    assert not criterion.state_dict()
    assert not list(criterion.parameters())
    with pytest.raises(TypeError):
        DFINECriterion(weight_dict={})


def test_teacher_learns_nothing_from_its_students():
    output, targets = benchmark.random_batch((3,), **SMALL)
    leaves = with_gradients(output)
    DFINECriterion()(output, targets)['loss_ddf_aux_0'].backward()
    grad = leaves['queries.corners'].grad
    assert grad[0].abs().sum() > 0
    assert grad[1:].abs().sum() == 0
    assert leaves['queries.logits'].grad is None


# -- several processes ------------------------------------------------------------

RANK_SIZES = ((3, 0, 5), (0, 0))  # the second rank has no boxes


def _run_rank(rank, port, folder):
    dist.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', world_size=len(RANK_SIZES), rank=rank
    )
    batch = benchmark.random_batch(RANK_SIZES[rank], **SMALL, seed=rank)
    losses = DFINECriterion()(*batch)
    torch.save(losses, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_ranks_together_normalise_as_one_batch(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(_run_rank, (port, str(tmp_path)), nprocs=len(RANK_SIZES))
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(len(RANK_SIZES))]
    assert len({frozenset(losses) for losses in ranks}) == 1

    # one process with all images: sums add up, divided by the same number
    batches = [
        benchmark.random_batch(sizes, **SMALL, seed=rank)
        for rank, sizes in enumerate(RANK_SIZES)
    ]
    queries = [output.queries for output, _ in batches]
    joined = {
        field.name: torch.cat(
            [getattr(query, field.name) for query in queries],
            dim=1 if field.name in ('logits', 'boxes', 'corners') else 0,
        )
        for field in dataclasses.fields(queries[0])
    }
    output = DecoderOutput(
        type(queries[0])(**joined),
        enc_logits=torch.cat([output.enc_logits for output, _ in batches]),
        enc_boxes=torch.cat([output.enc_boxes for output, _ in batches]),
    )
    targets = BoxTargets(
        torch.cat([targets.labels for _, targets in batches]),
        torch.cat([targets.boxes for _, targets in batches]),
        sum(RANK_SIZES, ()),
    )
    together = DFINECriterion()(output, targets)
    for name, loss in together.items():
        if '_dn_' not in name and 'ddf' not in name:  # ddf averages per rank
            mean = sum(losses[name] for losses in ranks) / len(ranks)
            torch.testing.assert_close(mean, loss, msg=name)
