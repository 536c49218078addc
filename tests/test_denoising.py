"""Denoising queries: layout, noise, visibility."""

import pytest
import torch
from dfine_helpers import targets
from torch import nn
from torch.testing import assert_close

from mmbackbones.decoders.denoising import (
    denoising_visible_mask,
    make_denoising_queries,
)
from mmbackbones.ops.boxes import cxcywh_to_xyxy
from mmbackbones.ops.predictions import BoxTargets


def one_hot_embedding(num_classes: int) -> nn.Embedding:
    """Content from which the label can be read; all zero where there is none."""
    embed = nn.Embedding(num_classes + 1, num_classes, padding_idx=num_classes)
    embed.weight.data.copy_(torch.eye(num_classes + 1, num_classes))
    return embed


def make(sizes, num_denoising=10, label_noise=0.0, box_noise=0.0, num_classes=5):
    truth = targets(*sizes, num_classes=num_classes)
    embed = one_hot_embedding(num_classes)
    torch.manual_seed(0)
    return truth, make_denoising_queries(
        truth, embed, num_denoising, label_noise, box_noise
    )


@pytest.mark.parametrize('sizes', [(), (0,), (0, 0, 0)])
def test_no_boxes_make_no_queries(sizes):
    assert make(sizes)[1] is None


@pytest.mark.parametrize(
    ('sizes', 'num_denoising', 'num_groups', 'num_queries'),
    [
        ((1,), 1, 1, 2),
        ((0, 7), 100, 14, 196),
        ((3, 2), 100, 33, 198),
        ((100,), 100, 1, 200),
        ((101, 4), 100, 1, 202),  # more boxes than asked for: each once
        ((350,), 100, 1, 700),
    ],
)
def test_groups_fill_the_number_asked_for(
    sizes, num_denoising, num_groups, num_queries
):
    _, queries = make(sizes, num_denoising)
    assert queries.content.shape == (len(sizes), num_queries, 5)
    assert queries.box_logits.shape == (len(sizes), num_queries, 4)
    assert queries.pairs.num_groups == num_groups
    assert len(queries.pairs.image) == sum(sizes) * num_groups


def test_without_noise_queries_are_the_ground_truth():
    truth, queries = make((2, 0, 3), num_denoising=6)  # two groups of 2 x 3
    pairs = queries.pairs
    assert pairs.image.tolist() == [0] * 4 + [2] * 6
    assert pairs.query.tolist() == [0, 1, 6, 7, 0, 1, 2, 6, 7, 8]
    assert pairs.target.tolist() == [0, 1, 0, 1, 2, 3, 4, 2, 3, 4]
    for shift in (0, 3):  # positives, and the negatives behind them
        query = pairs.query + shift
        content = queries.content[pairs.image, query]
        assert torch.equal(content.argmax(-1), truth.labels[pairs.target])
        assert torch.equal(content.sum(-1), torch.ones(10))
        boxes = queries.box_logits[pairs.image, query].sigmoid()
        assert_close(boxes, truth.boxes[pairs.target], atol=1e-5, rtol=0)
    # All other queries fill up.
    assert queries.content.sum() == 20
    assert not queries.content[1].any()
    assert not queries.content[0, [2, 5, 8, 11]].any()


def test_labels_change_as_often_as_asked():
    truth, queries = make((50,), 5000, label_noise=0.5, num_classes=4)
    labels = queries.content.argmax(-1).view(200, 50)
    # a quarter is redrawn, a quarter of those to the same of four classes
    changed = (labels != truth.labels).float().mean()
    assert changed == pytest.approx(0.25 * 3 / 4, abs=0.01)
    counts = labels[labels != truth.labels].bincount(minlength=4)
    assert counts.min() > 0


def test_filled_up_queries_stay_empty_under_noise():
    _, queries = make((1, 4), 400, label_noise=2.0, box_noise=1.0)
    content = queries.content[0].view(200, 4, 5)
    assert content[:, 0].any(-1).all()
    assert not content[:, 1:].any()


@pytest.mark.parametrize('scale', [0.4, 1.0])
def test_edges_move_less_in_positives_than_in_negatives(scale):
    box = torch.tensor([[0.5, 0.5, 0.1, 0.2]])
    truth = BoxTargets(torch.tensor([1]), box, (1,))
    torch.manual_seed(0)
    queries = make_denoising_queries(truth, one_hot_embedding(3), 4000, 0.0, scale)
    edges = cxcywh_to_xyxy(queries.box_logits.sigmoid())[0].view(4000, 2, 4)
    moves = (edges - cxcywh_to_xyxy(box)) / (box[:, 2:].repeat(1, 2) * 0.5 * scale)
    positives, negatives = moves.unbind(1)
    for moves, low, high in ((positives, 0, 1), (negatives, 1, 2)):
        if scale < 0.5:  # else edges cross, and are put in order
            assert low - 1e-3 <= moves.abs().min() < low + 0.01
            assert high - 0.01 < moves.abs().max() <= high + 1e-3
            assert moves.mean(0).abs().max() < 0.1  # four sigma
            assert moves.abs().mean() == pytest.approx(low + 0.5, abs=0.01)
        assert moves.abs().max() <= high + 1e-3


def test_boxes_stay_in_the_image_and_finite():
    border = torch.tensor([[0.0, 1.0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.3, 0.3, 0, 0]])
    truth = BoxTargets(torch.tensor([0, 1, 2]), border, (3,))
    queries = make_denoising_queries(truth, one_hot_embedding(3), 300, 0.5, 1.0)
    assert queries.box_logits.isfinite().all()
    edges = cxcywh_to_xyxy(queries.box_logits.sigmoid())
    assert edges.min() > -1e-4
    assert edges.max() < 1 + 1e-4


def test_who_sees_whom():
    visible = denoising_visible_mask(8, 2, 3, torch.device('cpu'))
    expected = [
        *['11110000111'] * 4,
        *['00001111111'] * 4,
        *['00000000111'] * 3,
    ]
    assert visible.tolist() == [[c == '1' for c in row] for row in expected]


def test_of_a_crowd_some_are_drawn():
    sizes, most = (1200, 3, 0, 501), 500
    truth, queries = make(sizes)
    assert queries.content.shape[1] == 2 * most
    pairs = queries.pairs
    assert pairs.num_groups == 1
    assert pairs.image.bincount(minlength=4).tolist() == [most, 3, 0, most]
    assert len(set(pairs.target.tolist())) == 2 * most + 3
    start = torch.tensor([0, 1200, 1203, 1203])[pairs.image]
    inside = (pairs.target >= start) & (
        pairs.target < start + torch.tensor(sizes)[pairs.image]
    )
    assert inside.all()
    # Not the first 500, and each query is made of the box that it is paired with.
    assert pairs.target[:most].max() > 600
    made = queries.box_logits[pairs.image, pairs.query].sigmoid()
    assert_close(made, truth.boxes[pairs.target], atol=1e-4, rtol=0)
    label = queries.content[pairs.image, pairs.query].argmax(-1)
    assert torch.equal(label, truth.labels[pairs.target])


def test_a_single_group_takes_no_mask():
    assert denoising_visible_mask(8, 1, 3, torch.device('cpu')) == 8


def test_nothing_is_read_back_from_the_device():
    """Tensors of the meta device have no values to read."""
    truth = BoxTargets(
        torch.empty(5, dtype=torch.int64, device='meta'),
        torch.empty(5, 4, device='meta'),
        (2, 0, 3),
    )
    embed = nn.Embedding(6, 8, padding_idx=5, device='meta')
    queries = make_denoising_queries(truth, embed, 10, 0.5, 1.0)
    assert queries.content.shape == (3, 18, 8)
    assert queries.content.device.type == 'meta'
