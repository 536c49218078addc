"""AdamW on lists that are kept, against torch's: equal to the last bit."""

import copy
import io

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from mmbackbones.engine.listed_adamw import ListedAdamW, list_tensors

OPTIONS = dict(lr=0.1, betas=(0.8, 0.95), weight_decay=0.1, fused=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Conv2d(5, 3, 3))


def grouped(model: nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [
        dict(params=parameters[:2], lr=0.01, name='slow'),
        dict(params=parameters[2:], weight_decay=0.0, name='not decayed'),
    ]


def pair() -> tuple[tuple[nn.Module, ListedAdamW], tuple[nn.Module, AdamW]]:
    ours, theirs = net(), net()
    return (
        (ours, list_tensors(AdamW(grouped(ours), **OPTIONS))),
        (theirs, AdamW(grouped(theirs), **OPTIONS)),
    )


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """With random gradients; every third step leaves out two parameters."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, parameter in enumerate(model.parameters()):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if step % 3 == 2 and i in (1, 4) else gradient
        optimizer.step()


def assert_same(ours: tuple, theirs: tuple) -> None:
    for mine, other in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(mine, other)
    mine, other = ours[1].state_dict(), theirs[1].state_dict()
    assert mine['param_groups'] == other['param_groups']
    torch.testing.assert_close(mine['state'], other['state'], rtol=0, atol=0)


def saved(optimizer: Optimizer) -> dict:
    """Its state, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_steps_as_torch_does() -> None:
    ours, theirs = pair()
    assert isinstance(ours[1], ListedAdamW)
    for pair_ in (ours, theirs):
        train(*pair_, range(2, 9))  # begins with parameters that have no state yet
    assert_same(ours, theirs)
    counts = [entry['step'].item() for entry in ours[1].state.values()]
    assert sorted(set(counts)) == [4, 7]


def test_the_order_of_memory_is_kept() -> None:
    ours, theirs = pair()
    for model, optimizer in (ours, theirs):
        model.to(memory_format=torch.channels_last)
        train(model, optimizer, range(3))
    assert_same(ours, theirs)
    kernel = ours[0][2].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    moment = ours[1].state[kernel]['exp_avg']
    assert moment.is_contiguous(memory_format=torch.channels_last)


def test_states_go_from_one_to_the_other() -> None:
    ours, theirs = pair()
    train(*ours, range(4))
    theirs[0].load_state_dict(ours[0].state_dict())
    theirs[1].load_state_dict(saved(ours[1]))
    for pair_ in (ours, theirs):
        train(*pair_, range(4, 8))
    assert_same(ours, theirs)
    ours[1].load_state_dict(saved(theirs[1]))
    for pair_ in (ours, theirs):
        train(*pair_, range(8, 12))
    assert_same(ours, theirs)


def test_a_copy_has_lists_of_its_own() -> None:
    ours, theirs = pair()
    train(*ours, range(3))
    train(*theirs, range(3))
    model, optimizer = copy.deepcopy(ours)
    train(model, optimizer, range(3, 6))
    assert_same(ours, theirs)
    train(*ours, range(3, 6))
    assert_same(ours, (model, optimizer))


def test_a_new_learning_rate_and_a_new_group_are_seen() -> None:
    ours, theirs = pair()
    for model, optimizer in (ours, theirs):
        train(model, optimizer, range(2))
        optimizer.param_groups[0]['lr'] = 0.5
        model.append(nn.Linear(2, 2))
        model[-1].load_state_dict(dict(weight=torch.eye(2), bias=torch.ones(2)))
        optimizer.add_param_group(dict(params=list(model[-1].parameters())))
        train(model, optimizer, range(2, 6))
    assert_same(ours, theirs)


def test_a_scaler_sees_torchs_optimiser() -> None:
    """Scaled gradients, and a step that an infinity keeps from being taken."""
    ours, theirs = pair()
    for model, optimizer in (ours, theirs):
        assert optimizer._step_supports_amp_scaling
        for step, found in enumerate((0.0, 1.0, 0.0)):
            optimizer.grad_scale = torch.tensor(4.0)
            optimizer.found_inf = torch.tensor(found)
            train(model, optimizer, range(step, step + 1))
    assert_same(ours, theirs)
    assert {entry['step'].item() for entry in ours[1].state.values()} == {1, 2}


def test_a_closure_is_called_first() -> None:
    model = nn.Linear(2, 1)
    optimizer = ListedAdamW(model.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    before = model.weight.clone()
    assert optimizer.step(closure).requires_grad
    assert not torch.equal(model.weight, before)


def stepped() -> AdamW:
    model = net()
    optimizer = AdamW(model.parameters(), fused=True)
    train(model, optimizer, range(1))
    return optimizer


@pytest.mark.parametrize(
    'optimizer',
    [
        AdamW(net().parameters()),
        AdamW(net().parameters(), fused=True, amsgrad=True),
        AdamW(net().parameters(), fused=True, lr=torch.tensor(0.1)),
        AdamW([*net().parameters(), *net().double().parameters()], fused=True),
        SGD(net().parameters(), lr=0.1, fused=True),
        stepped(),
    ],
    ids=['not fused', 'amsgrad', 'rate in a tensor', 'two dtypes', 'sgd', 'stepped'],
)
def test_where_it_is_not_the_same_nothing_changes(optimizer: Optimizer) -> None:
    assert list_tensors(optimizer) is optimizer


def test_a_wrapper_of_mmengine_is_taken_over() -> None:
    """Its group for parameters of nobody is on the CPU and has no gradient."""
    model = net()
    wrapper = OptimWrapper(AdamW(grouped(model), **OPTIONS))
    listed = list_tensors(wrapper.optimizer)
    assert isinstance(listed, ListedAdamW)
    assert listed.param_groups[0] is wrapper.optimizer.param_groups[0]
    assert listed.param_groups[1]['name'] == 'not decayed'


@pytest.mark.parametrize('option', ['amsgrad', 'capturable', 'differentiable'])
def test_variants_are_refused(option: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=option):
        ListedAdamW(net().parameters(), **{option: True})


def test_gradients_are_gathered_for_one_step() -> None:
    """Neither a second step nor one after `zero_grad` takes lists of the past."""
    ours, theirs = pair()
    for forget in (ours[1].step, ours[1].zero_grad):
        for model, _ in (ours, theirs):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        ours[1].gather()
        forget()
        if forget == ours[1].step:
            theirs[1].step()
        train(*ours, range(2))
        train(*theirs, range(2))
        assert_same(ours, theirs)
