"""Steps that are not finite are skipped, counted, recorded, and end a run of them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from killed_runs import RANKS, in_ranks, noisy_runner
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch.utils._python_dispatch import TorchDispatchMode

from mmbackbones.engine.nan_guard import NanGuardHook


def poisoned_runner(
    work_dir: Path,
    bad: dict[int, str],
    *,
    patience: int = 20,
    clip: dict | None = None,
    states: dict | None = None,
    accumulate: int = 1,
    **overrides: object,
) -> Runner:
    """A runner of 20 iterations; `bad` says what is wrong in which."""

    def at(event: str, runner: Runner) -> None:
        if event != 'before':
            return
        if states is not None:
            states[runner.iter] = snapshot(runner)
        kind = bad.get(runner.iter)
        getattr(runner.model, 'module', runner.model).poison = kind

    wrapper = dict(
        optimizer=dict(type='AdamW', lr=0.05), accumulative_counts=accumulate
    )
    if clip is not None:
        wrapper['clip_grad'] = clip
    runner = noisy_runner(
        work_dir,
        at=at,
        hooks=dict(nan_guard=dict(type=NanGuardHook, patience=patience)),
        optim_wrapper=wrapper,
        **overrides,
    )
    model = getattr(runner.model, 'module', runner.model)
    forward = model.forward

    def poisoned(inputs: torch.Tensor, mode: str = 'tensor') -> object:
        if mode == 'loss' and model.poison == 'input':
            inputs = inputs * math.nan
        result = forward(inputs, mode)
        if mode == 'loss':
            if model.poison == 'constant':  # infinite, and without any gradient
                result['loss'] = result['loss'] + math.inf
            elif model.poison == 'gradient':  # finite, its gradient is not
                zero = (model.weight - model.weight.detach()).sum()
                result['loss'] = result['loss'] + zero.abs().sqrt()
        return result

    model.forward = poisoned
    model.poison = None
    return runner


def snapshot(runner: Runner) -> dict:
    optimizer = runner.optim_wrapper.optimizer
    return dict(
        model={k: v.clone() for k, v in runner.model.state_dict().items()},
        moments=[
            {k: v.clone() for k, v in optimizer.state[p].items()}
            for p in runner.model.parameters()
        ],
    )


CLIPS = {
    'none': None,
    'norm': dict(max_norm=1.0),
    'value': dict(type='value', clip_value=1.0),
}


@pytest.mark.parametrize(
    ('kind', 'clip'),
    [
        ('input', 'norm'),
        ('constant', 'norm'),
        ('gradient', 'norm'),
        ('constant', 'none'),
        ('gradient', 'value'),
    ],
)
def test_a_bad_step_changes_nothing(tmp_path: Path, kind: str, clip: str) -> None:
    states: dict = {}
    runner = poisoned_runner(
        tmp_path, {2: kind, 9: kind}, clip=CLIPS[clip], states=states
    )
    warnings: list[str] = []
    runner.logger.warning = lambda text, *args: warnings.append(text)
    runner.train()
    for bad in (2, 9):
        before, after = states[bad], states[bad + 1]
        for state in (before, after):  # counts batches, good or bad
            del state['model']['norm.num_batches_tracked']
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not torch.equal(states[4]['model']['weight'], states[3]['model']['weight'])
    assert all(v.isfinite().all() for v in runner.model.state_dict().values())
    ema = next(h for h in runner.hooks if hasattr(h, 'ema_model')).ema_model
    assert all(v.isfinite().all() for v in ema.state_dict().values())
    assert runner.message_hub.get_info('nonfinite_steps') == 2
    entries = json.loads((tmp_path / 'nonfinite_steps_rank0.json').read_text())
    assert [entry['iteration'] for entry in entries] == [3, 10]
    finite_loss = kind == 'gradient'
    assert math.isfinite(float(entries[0]['loss'])) is finite_loss
    assert entries[0]['not_finite'] == ([] if finite_loss else ['loss'])
    assert sum('step skipped' in text for text in warnings) == 2
    assert any('2 steps had a non-finite' in text for text in warnings)


def test_a_row_of_them_ends_the_run_with_a_diagnosis(tmp_path: Path) -> None:
    runner = poisoned_runner(
        tmp_path, dict.fromkeys((1, 2, *range(4, 20)), 'input'), patience=3
    )
    with pytest.raises(ValueError, match='up to iteration 7, had') as error:
        runner.train()
    text = str(error.value)
    assert text.startswith('3 steps in a row')
    assert 'these loss terms are not finite: loss' in text
    assert 'nonfinite_steps_rank0.json' in text


def test_a_bad_part_of_a_step_spoils_the_step_and_nothing_else(
    tmp_path: Path,
) -> None:
    """Of two iterations each; the first of a step is bad, and the second of another."""
    states: dict = {}
    runner = poisoned_runner(
        tmp_path,
        {2: 'input', 9: 'input'},
        clip=CLIPS['norm'],
        states=states,
        accumulate=2,
    )
    runner.train()
    for bad in (2, 8):
        assert torch.equal(
            states[bad + 2]['model']['weight'], states[bad]['model']['weight']
        )
        torch.testing.assert_close(
            states[bad + 2]['moments'], states[bad]['moments'], rtol=0, atol=0
        )
    ema = next(h for h in runner.hooks if hasattr(h, 'ema_model')).ema_model
    for model in (*(state['model'] for state in states.values()), ema.state_dict()):
        assert all(value.isfinite().all() for value in model.values())
    assert runner.message_hub.get_info('nonfinite_steps') == 2
    entries = json.loads((tmp_path / 'nonfinite_steps_rank0.json').read_text())
    assert [entry['iteration'] for entry in entries] == [3, 10]
    assert [entry['not_finite'] for entry in entries] == [['loss'], ['loss']]


def test_a_row_of_accumulated_steps_ends_the_run(tmp_path: Path) -> None:
    runner = poisoned_runner(
        tmp_path, dict.fromkeys(range(2, 20, 2), 'input'), patience=3, accumulate=2
    )
    with pytest.raises(
        ValueError, match='3 steps in a row, up to iteration 8'
    ) as error:
        runner.train()
    assert 'these loss terms are not finite: loss' in str(error.value)


def test_a_loss_of_one_rank_skips_the_step_of_all(tmp_path: Path) -> None:
    """The infinite loss has a finite gradient, which would part the ranks."""

    def work(rank: int) -> None:
        bad = {3: 'constant'} if rank else {}
        runner = poisoned_runner(tmp_path, bad, clip=CLIPS['norm'], **RANKS)
        runner.train()
        assert runner.message_hub.get_info('nonfinite_steps') == 1
        torch.save(runner.model.module.weight, tmp_path / f'weight_{rank}.pt')

    assert in_ranks(work) == [0, 0]
    first, second = (torch.load(tmp_path / f'weight_{rank}.pt') for rank in (0, 1))
    assert torch.equal(first, second) and first.isfinite().all()
    for rank, finite in ((0, True), (1, False)):
        text = (tmp_path / f'nonfinite_steps_rank{rank}.json').read_text()
        assert math.isfinite(float(json.loads(text)[0]['loss'])) is finite


def test_images_are_named(tmp_path: Path) -> None:
    from mmengine.structures import BaseDataElement

    from mmbackbones.engine.nan_guard import _names

    samples = [
        BaseDataElement(metainfo=dict(img_path='a/1.jpg', img_id=1)),
        BaseDataElement(metainfo=dict(img_id=2)),
        BaseDataElement(),
    ]
    assert _names(dict(data_samples=samples)) == ['a/1.jpg', 2, 'not known']
    assert _names(dict(inputs=[])) == _names([]) == []


class Reads(TorchDispatchMode):
    """Counts what a device would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(('clip', 'reads'), [('norm', 2), ('none', 1), ('value', 1)])
def test_reads_of_a_step(tmp_path: Path, clip: str, reads: int) -> None:
    """One of the device; with clipping another one, of a number on the CPU."""
    runner = poisoned_runner(tmp_path, {}, clip=CLIPS[clip])
    seen: list[int] = []
    hook = next(h for h in runner.hooks if isinstance(h, NanGuardHook))
    prepare = hook.before_train

    def before_train(runner: Runner) -> None:
        prepare(runner)
        update = runner.optim_wrapper.update_params

        def counted(loss: torch.Tensor) -> None:
            with Reads() as counter:
                update(loss)
            seen.append(counter.count)

        runner.optim_wrapper.update_params = counted

    hook.before_train = before_train
    runner.train()
    optimizer_own = 0  # `step` of AdamW is on the CPU, and read there
    with Reads() as counter:
        runner.optim_wrapper.optimizer.zero_grad()
        for parameter in runner.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for hook_id in list(runner.optim_wrapper.optimizer._optimizer_step_pre_hooks):
            del runner.optim_wrapper.optimizer._optimizer_step_pre_hooks[hook_id]
        runner.optim_wrapper.optimizer.step()
    optimizer_own = counter.count
    assert {count - optimizer_own for count in seen[1:]} == {reads}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match='patience is 0'):
        NanGuardHook(patience=0)
    runner = SimpleNamespace(optim_wrapper=OptimWrapperDict())
    with pytest.raises(ValueError, match='not OptimWrapperDict; leave out'):
        NanGuardHook().before_train(runner)


@pytest.mark.gpu
def test_overflow_in_mixed_precision_is_no_fault(tmp_path: Path) -> None:
    runner = poisoned_runner(tmp_path, {})
    cfg = dict(
        type='AmpOptimWrapper',
        loss_scale=dict(init_scale=2.0**40),
        optimizer=dict(type='AdamW', lr=0.05, fused=True),
    )
    runner.optim_wrapper = cfg
    runner.train()
    assert 'nonfinite_steps' not in runner.message_hub.runtime_info
    assert runner.optim_wrapper.loss_scaler.get_scale() < 2.0**40
