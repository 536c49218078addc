"""Checkpoints of other class lists, sizes and makers, and what is said of them."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from torch import Tensor, nn
from toy_runner import ToyModel, toy_runner

import mmbackbones  # noqa: F401
from mmbackbones.convert.objects365 import (
    COCO_CLASSES,
    OBJECTS365_CLASSES,
    match_classes,
)
from mmbackbones.engine import load_report
from mmbackbones.engine.ema import RampEMAHook
from mmbackbones.engine.load_report import LoadReportHook, fit_state_dict

# D-FINE src/solver/_solver.py, the 0-based Objects365 class of each COCO class.
OFFICIAL = [
    0, 46, 5, 58, 114, 55, 116, 65, 21, 40, 176, 127, 249, 24, 56, 139, 92, 78, 99, 96,
    144, 295, 178, 180, 38, 39, 13, 43, 120, 219, 148, 173, 165, 154, 137, 113, 145,
    146, 204, 8, 35, 10, 88, 84, 93, 26, 112, 82, 265, 104, 141, 152, 234, 143, 150, 97,
    2, 50, 25, 75, 98, 153, 37, 73, 115, 132, 106, 61, 163, 134, 277, 81, 133, 18, 94,
    30, 169, 70, 328, 226,
]  # fmt: skip


class Decoder(nn.Module):
    def __init__(
        self, num_classes: int, num_tokens: int, agnostic: bool = False
    ) -> None:
        super().__init__()
        self.enc_score_head = nn.Linear(2, 1 if agnostic else num_classes)
        self.dec_score_head = nn.ModuleList([nn.Linear(2, num_classes)])
        self.denoising_class_embed = nn.Embedding(num_classes + 1, 2)
        self.register_buffer('anchors', torch.zeros(1, num_tokens, 4))


class Net(nn.Module):
    """The keys that matter, random values."""

    def __init__(
        self,
        num_classes: int = 3,
        width: int = 4,
        tokens: int = 9,
        *,
        agnostic: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Conv2d(3, width, 1)
        self.backbone.stages = nn.Sequential(nn.Conv2d(width, 4, 1), nn.BatchNorm2d(4))
        self.encoder = nn.Linear(4, 2)
        self.decoder = Decoder(num_classes, tokens, agnostic)


HEADS = ['enc_score_head.weight', 'enc_score_head.bias', 'dec_score_head.0.weight',
         'dec_score_head.0.bias', 'denoising_class_embed.weight']  # fmt: skip


def checkpoint_of(model: nn.Module, classes: tuple | None = None) -> dict:
    meta = {} if classes is None else dict(dataset_meta=dict(classes=classes))
    return dict(state_dict=model.state_dict(), meta=meta)


def rows_of(state: dict) -> list[Tensor]:
    return [state[f'decoder.{head}'] for head in HEADS]


def test_match_classes() -> None:
    assert match_classes((), ()) == []
    assert match_classes((), ('a',)) == [None]
    assert match_classes(('Hot-Dog', 'b'), ('hot_dog', 'c', 'B ')) == [0, None, 1]
    assert match_classes(OBJECTS365_CLASSES, COCO_CLASSES) == OFFICIAL
    back = match_classes(COCO_CLASSES, OBJECTS365_CLASSES)
    assert [back[i] for i in OFFICIAL] == list(range(80))
    assert sum(row is not None for row in back) == 80
    # A name of its own beats one that merely means the same.
    assert match_classes(('Wild Bird', 'bird'), ('bird', 'Wild Bird')) == [1, 0]


def test_same_classes_load_as_they_are() -> None:
    source, model = Net(), Net()
    state, report = fit_state_dict(
        model, checkpoint_of(source, ('a', 'b', 'c')), classes=('a', 'b', 'c')
    )
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(model.state_dict(), source.state_dict())
    assert report.complete and not report.by_class and not report.notes
    total = len(model.state_dict())
    assert str(report) == (
        f'Checkpoint: {total} of {total} tensors loaded, 0 dropped, 0 missing'
    )


def test_other_classes_keep_the_rows_of_shared_names() -> None:
    source, model = Net(3), Net(4)
    before = [head.clone() for head in rows_of(model.state_dict())]
    state, report = fit_state_dict(
        model,
        checkpoint_of(source, ('cat', 'dog', 'bird')),
        classes=('Dog', 'horse', 'wild bird', 'fish'),
    )
    for old, new, kept in zip(
        rows_of(source.state_dict()), rows_of(state), before, strict=True
    ):
        torch.testing.assert_close(new[0], old[1])
        torch.testing.assert_close(new[1], kept[1])
        torch.testing.assert_close(new[2], old[2])
        torch.testing.assert_close(new[3], kept[3])
        if len(new) == 5:  # the embedding's "no class"
            torch.testing.assert_close(new[4], old[3])
    assert report.by_class == [f'decoder.{head}' for head in HEADS]
    assert not report.missing
    assert 'rows of 2 of 4 classes' in str(report)
    assert 'as initialised: horse, fish' in str(report)
    # Neither argument was changed.
    torch.testing.assert_close(rows_of(model.state_dict()), before)


def test_a_permutation_is_undone() -> None:
    source, model = Net(2), Net(2)
    state, _ = fit_state_dict(
        model, checkpoint_of(source, ('a', 'b')), classes=('b', 'a')
    )
    old, new = source.state_dict(), state
    key = 'decoder.enc_score_head.weight'
    torch.testing.assert_close(new[key], old[key].flip(0))


@pytest.mark.parametrize('classes', [('b', 'a'), ('b', 'x', 'a')])
def test_tokens_without_classes_do_not_count_them(classes: tuple) -> None:
    """RT-DETRv2's encoder may have one row for all, whatever the classes are."""
    source, model = Net(2, agnostic=True), Net(len(classes), agnostic=True)
    state, report = fit_state_dict(
        model, checkpoint_of(source, ('a', 'b')), classes=classes
    )
    key = 'decoder.dec_score_head.0.weight'
    old, new = source.state_dict()[key], state[key]
    torch.testing.assert_close(new[[0, -1]], old.flip(0))
    assert report.complete and 'decoder.enc_score_head.weight' in report.loaded
    # Into a model whose encoder tells classes apart, there is nothing to take.
    _, report = fit_state_dict(
        Net(2), checkpoint_of(source, ('a', 'b')), classes=classes[:2]
    )
    assert report.missing[:1] == ['decoder.enc_score_head.weight']


@pytest.mark.parametrize(
    ('num_source', 'classes', 'expected'),
    [
        (80, ('dog', 'zebra', 'snail'), [16, 22, None]),
        (366, COCO_CLASSES, [i + 1 for i in OFFICIAL]),
        (365, ('Sushi', 'dog'), [279, 92]),
        (80, COCO_CLASSES, list(range(80))),
        # Same number, other things: by name.
        (80, tuple(f'thing {i}' for i in range(80)), [None] * 80),
        # Same things, some spelt otherwise: as they are.
        (
            366,
            ('unused 0', *OBJECTS365_CLASSES[:364], 'Ping-pong'),
            list(range(366)),
        ),
        # Neither side is known.
        (5, ('a', 'b', 'c', 'd'), [None] * 4),
    ],
)
def test_files_without_names(num_source: int, classes: tuple, expected: list) -> None:
    source, model = Net(num_source), Net(len(classes))
    state, report = fit_state_dict(model, checkpoint_of(source), classes=classes)
    old, kept, new = (
        x['decoder.enc_score_head.weight']
        for x in (source.state_dict(), model.state_dict(), state)
    )
    for i, row in enumerate(expected):
        torch.testing.assert_close(new[i], kept[i] if row is None else old[row])
    assert bool(report.notes) == (expected != list(range(len(classes))))


def test_unknown_target_names() -> None:
    source = Net(3)
    state, report = fit_state_dict(Net(3), checkpoint_of(source))
    torch.testing.assert_close(rows_of(state), rows_of(source.state_dict()))
    model = Net(4)
    state, report = fit_state_dict(model, checkpoint_of(source))
    for new, kept in zip(rows_of(state), rows_of(model.state_dict()), strict=True):
        torch.testing.assert_close(new[:4], kept[:4])
    assert 'names are not known' in str(report)


def test_other_input_size_and_other_parts_are_dropped_and_said() -> None:
    source, model = Net(tokens=9), Net(tokens=16)
    checkpoint = checkpoint_of(source)
    state, report = fit_state_dict(model, checkpoint)
    assert report.complete and state['decoder.anchors'].shape == (1, 16, 4)
    assert report.dropped == {
        'decoder.anchors': 'shape (1, 9, 4) where the model has (1, 16, 4)'
    }
    checkpoint['state_dict'] = {
        **checkpoint['state_dict'],
        'head.weight': torch.zeros(1),
        'encoder.bias': torch.zeros(7),
    }
    _, report = fit_state_dict(model, checkpoint)
    assert not report.complete and report.missing == ['encoder.bias', 'decoder.anchors']
    assert 'dropped, not in the model: head.weight' in str(report)
    assert 'missing, stay as initialised: encoder.bias' in str(report)


def test_module_prefix_is_removed() -> None:
    source = Net()
    checkpoint = checkpoint_of(source)
    checkpoint['state_dict'] = {
        f'module.{k}': v for k, v in checkpoint['state_dict'].items()
    }
    _, report = fit_state_dict(Net(), checkpoint)
    assert report.complete


def test_backbone_file_goes_into_the_backbone() -> None:
    source, model = Net(), Net()
    checkpoint = dict(
        state_dict={**source.backbone.state_dict(), 'fc.weight': torch.zeros(2)}
    )
    state, report = fit_state_dict(model, checkpoint, classes=('a', 'b', 'c'))
    model.load_state_dict(state)
    torch.testing.assert_close(
        model.backbone.state_dict(), source.backbone.state_dict()
    )
    assert 'it holds a backbone' in str(report)
    assert list(report.dropped) == ['backbone.fc.weight']


@pytest.mark.parametrize('kind', ['empty', 'foreign', 'other width', 'other backbone'])
def test_foreign_checkpoints_are_refused(kind: str) -> None:
    model = Net(width=4)
    state = {
        'empty': {},
        'foreign': {f'layer{i}.conv.weight': torch.zeros(2) for i in range(9)},
        'other width': {k: torch.zeros(99) for k in model.state_dict()},
        'other backbone': {k: torch.zeros(9) for k in model.backbone.state_dict()},
    }[kind]
    with pytest.raises(ValueError, match='does not fit the model') as error:
        fit_state_dict(model, dict(state_dict=state))
    if state:
        assert next(iter(state)) in str(error.value)
    assert 'backbone.stem.weight' in str(error.value)


class HeadedModel(BaseModel):
    """Trains like the toy, and has the heads of three classes."""

    def __init__(self) -> None:
        super().__init__(data_preprocessor=ToyModel().data_preprocessor)
        self.net = ToyModel()
        self.decoder = Decoder(2, 4)

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> object:
        return self.net(inputs, mode)


def test_hook_fits_model_and_average_and_leaves_resuming_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HeadedModel()
    source.decoder = Decoder(3, 9)
    path = tmp_path / 'start.pth'
    # The toy data set has the classes a and b.
    torch.save(checkpoint_of(source, ('b', 'c', 'a')), path)

    def run(**kwargs: object):
        hooks = dict(
            ema=dict(type=RampEMAHook, momentum=0.1, warmup_iters=0),
            load_report=dict(type=LoadReportHook),
            checkpoint=dict(type=CheckpointHook, interval=1),
        )
        runner = toy_runner(
            tmp_path / 'run',
            hooks,
            model=HeadedModel(),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
            **kwargs,
        )
        runner.train()
        return runner

    runner = run(max_epochs=1, load_from=str(path))
    average = next(h for h in runner.hooks if isinstance(h, RampEMAHook)).ema_model
    for decoder in (runner.model.decoder, average.module.decoder):
        expected = source.decoder.enc_score_head.weight[[2, 0]]
        torch.testing.assert_close(decoder.enc_score_head.weight, expected)
    torch.testing.assert_close(runner.model.net.weight, source.net.weight)

    def unwanted(*args: object, **kwargs: object) -> None:
        raise AssertionError('called while resuming')

    monkeypatch.setattr(load_report, 'fit_state_dict', unwanted)
    run(max_epochs=2, resume=True)


def test_hook_refuses_a_foreign_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / 'foreign.pth'
    torch.save(dict(state_dict={'fc.weight': torch.zeros(2)}), path)
    hooks = dict(load_report=dict(type=LoadReportHook))
    runner = toy_runner(tmp_path, hooks, max_epochs=1, load_from=str(path))
    with pytest.raises(ValueError, match=r'does not fit the model.*fc\.weight'):
        runner.train()
