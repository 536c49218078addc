import itertools
import math

import numpy as np
import pytest
import torch

from mmbackbones.losses.matching import (
    HungarianMatcher,
    Pairs,
    ScoreIoUMatcher,
    assign,
    indices_to_device,
    union_of_matches,
)
from mmbackbones.ops.predictions import BoxTargets


def make_targets(sizes, num_classes=3):
    total = sum(sizes)
    boxes = torch.cat(
        (torch.rand(total, 2) * 0.6 + 0.2, torch.rand(total, 2) * 0.2 + 0.1), 1
    )
    return BoxTargets(torch.randint(num_classes, (total,)), boxes, tuple(sizes))


def make_predictions(num_sets, num_images, num_queries, num_classes=3):
    shape = (num_sets, num_images, num_queries)
    boxes = torch.cat(
        (torch.rand(*shape, 2) * 0.6 + 0.2, torch.rand(*shape, 2) * 0.2 + 0.1), -1
    )
    return torch.randn(*shape, num_classes), boxes


def cheapest(block):
    """Lowest total of a one-to-one pairing of `(boxes, queries)`, by trying all."""
    if block.shape[0] > block.shape[1]:
        block = block.T
    rows = range(len(block))
    return min(
        sum(block[row, column] for row, column in zip(rows, columns, strict=True))
        for columns in itertools.permutations(range(block.shape[1]), len(block))
    )


@pytest.mark.parametrize(
    ('sizes', 'num_queries'),
    [
        ((), 3),
        ((0,), 3),
        ((0, 0), 1),
        ((1,), 1),
        ((2, 0, 3), 4),
        ((4,), 4),
        ((5, 1), 3),  # more boxes than queries
        ((0, 6), 1),
    ],
)
@pytest.mark.parametrize('levels', [None, 3, 1])  # few levels: many ties
def test_assign_is_cheapest_one_to_one_pairing(sizes, num_queries, levels):
    rng = np.random.default_rng(0)
    costs = rng.random((2, sum(sizes), num_queries))
    if levels:
        costs = np.round(costs * (levels - 1))
    query, target = assign(costs.astype(np.float32), sizes)

    num_pairs = sum(min(size, num_queries) for size in sizes)
    assert query.shape == target.shape == (2, num_pairs)
    assert query.dtype == target.dtype == np.int64
    first_box = 0
    for image, size in enumerate(sizes):
        for row in range(2):
            mine = query[row] // num_queries == image
            queries, boxes = query[row, mine] % num_queries, target[row, mine]
            assert len(set(queries)) == len(set(boxes)) == min(size, num_queries)
            assert all(first_box <= box < first_box + size for box in boxes)
            block = costs[row, first_box : first_box + size]
            if size:
                total = block[boxes - first_box, queries].sum()
                assert total == pytest.approx(cheapest(block))
        first_box += size


def test_cost_by_hand():
    # One image, one box (.5 .5 .4 .4) of class 1, one query (.5 .5 .2 .4).
    # logit 0 -> p = 1/2; class: -.25 * 1/4 * ln(1/2) + .75 * 1/4 * ln(1/2)
    #                          = .125 * ln(1/2)
    # L1: .2; corners (.3 .3 .7 .7) and (.4 .3 .6 .7): IoU = .08 / .16 = .5 and the
    # hull is the box itself, so GIoU = .5
    targets = BoxTargets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]), (1,))
    logits = torch.tensor([5.0, 0.0]).view(1, 1, 1, 2)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).view(1, 1, 1, 4)
    cost = HungarianMatcher().costs(logits, boxes, targets)
    expected = 2 * 0.125 * math.log(0.5) + 5 * 0.2 - 2 * 0.5
    torch.testing.assert_close(cost, torch.tensor([[[expected]]]))


def test_cost_of_score_and_iou_by_hand():
    # Boxes of side .2, the second shifted by half: IoU 1/3, to the fourth 1/81.
    # The third does not touch the target: 0 whatever its score.
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.2], [0.1] * 4])
    logits = torch.tensor([[0.0, -9.0], [math.log(3), -9.0], [9.0, 9.0]])
    targets = BoxTargets(torch.tensor([0]), boxes[:1], (1,))
    costs = ScoreIoUMatcher(iou_power=4.0).costs(
        logits[None, None], boxes[None, None], targets
    )
    expected = torch.tensor([[[-0.5, -0.75 / 81, 0.0]]])
    torch.testing.assert_close(costs, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('sizes', [(0, 0), (3, 0, 2), (7,)])
def test_score_and_iou_match_in_any_chunks_and_survive_broken_boxes(sizes):
    logits, boxes = make_predictions(2, len(sizes), 5)
    boxes[0, 0, 0] = math.nan
    boxes[1, 0, 1, 2:] = -1
    targets = make_targets(sizes)
    whole = ScoreIoUMatcher().costs(logits, boxes, targets)
    assert whole.isfinite().all()
    single = ScoreIoUMatcher(max_entries=1).costs(logits, boxes, targets)
    torch.testing.assert_close(single, whole)
    pairs = ScoreIoUMatcher()(logits, boxes, targets)
    assert pairs.query.shape == (2, sum(min(size, 5) for size in sizes))


def test_costs_see_only_the_image_of_the_box():
    torch.manual_seed(0)
    logits, boxes = make_predictions(2, 3, 4)
    targets = make_targets((2, 0, 3))
    costs = HungarianMatcher().costs(logits, boxes, targets)
    assert costs.shape == (2, 5, 4)
    for row, image in enumerate([0, 0, 2, 2, 2]):
        alone = BoxTargets(
            targets.labels[row : row + 1], targets.boxes[row : row + 1], (1,)
        )
        expected = HungarianMatcher().costs(
            logits[:, image : image + 1], boxes[:, image : image + 1], alone
        )
        torch.testing.assert_close(costs[:, row : row + 1], expected)


@pytest.mark.parametrize('max_entries', [1, 8, 17, 10**6])
def test_chunks_change_nothing(max_entries):
    torch.manual_seed(0)
    logits, boxes = make_predictions(2, 3, 4)
    targets = make_targets((3, 0, 6))
    costs = HungarianMatcher(max_entries=max_entries).costs(logits, boxes, targets)
    assert torch.equal(costs, HungarianMatcher().costs(logits, boxes, targets))


@pytest.mark.parametrize(
    'box',
    [
        (float('nan'),) * 4,
        (float('inf'), 0.5, 0.1, 0.1),
        (0.5, 0.5, float('inf'), float('inf')),
        (0.5, 0.5, 0.0, 0.0),
        (0.5, 0.5, -0.2, -0.1),
    ],
)
@pytest.mark.parametrize('logit', [0.0, float('nan'), float('-inf'), float('inf')])
def test_broken_predictions_are_matched(box, logit):
    torch.manual_seed(0)
    logits, boxes = make_predictions(1, 1, 2)
    boxes[...] = torch.tensor(box)
    logits[...] = logit
    targets = make_targets((2,))
    assert HungarianMatcher().costs(logits, boxes, targets).isfinite().all()
    query, target = HungarianMatcher()(logits, boxes, targets)
    assert sorted(query[0]) == sorted(target[0]) == [0, 1]


def test_nan_costs_count_as_one():
    targets = make_targets((1,))
    logits, boxes = make_predictions(1, 1, 1)
    cost = HungarianMatcher().costs(logits.fill_(torch.nan), boxes, targets)
    assert cost.item() == 1


@pytest.mark.parametrize(
    ('query', 'target', 'expected'),
    [
        ([[]], [[]], []),
        ([[], []], [[], []], []),
        ([[4]], [[0]], [(4, 0)]),
        # the same in all sets
        ([[1, 2], [1, 2]], [[0, 1], [0, 1]], [(1, 0), (2, 1)]),
        # a box owns several queries
        ([[1], [2], [3]], [[0], [0], [0]], [(1, 0), (2, 0), (3, 0)]),
        # two of three sets give query 1 to box 1
        (
            [[1, 2], [1, 2], [1, 2]],
            [[0, 1], [1, 0], [1, 0]],
            [(1, 1), (2, 0)],
        ),
        # one set each: the box of the smaller index
        ([[3], [3]], [[1], [0]], [(3, 0)]),
        # images apart: queries 0..1 and 2..3, boxes 0 and 1
        ([[0, 2], [1, 2]], [[0, 1], [0, 1]], [(0, 0), (1, 0), (2, 1)]),
    ],
)
def test_union_by_hand(query, target, expected):
    pairs = Pairs(np.array(query, np.int64), np.array(target, np.int64))
    union = union_of_matches(pairs)
    assert list(zip(*union, strict=True)) == expected
    assert union.query.dtype == union.target.dtype == np.int64


def test_union_equals_walk_by_count():
    rng = np.random.default_rng(0)
    query = np.stack([rng.permutation(12)[:9] for _ in range(6)])
    target = np.stack([rng.permutation(9) for _ in range(6)])
    pairs = list(zip(query.ravel(), target.ravel(), strict=True))
    owner = {}
    for pair in sorted(set(pairs), key=lambda pair: (-pairs.count(pair), pair)):
        owner.setdefault(*pair)
    union = union_of_matches(Pairs(query, target))
    assert dict(zip(*union, strict=True)) == owner
    assert 9 <= len(union.query) == len(owner)


def test_indices_survive_the_copy():
    arrays = [np.arange(6).reshape(2, 3), np.empty((2, 0), np.int64), np.array([7])]
    tensors = indices_to_device(arrays, torch.device('cpu'))
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), array)
