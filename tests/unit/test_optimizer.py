"""Adam's moments in the CPU's memory: the same weights, one weight's moments at a time where the weights are."""

import copy

import pytest
import torch

from alignkit.stages.optimizer import OffloadedAdamW, adamw

SETTINGS = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7,), (2, 2, 2), ()]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def groups(parameters: list[torch.nn.Parameter]) -> list[dict]:
    """Two groups with settings of their own."""
    return [
        {"params": parameters[:2]},
        {"params": parameters[2:], "lr": 0.03, "betas": (0.5, 0.9), "weight_decay": 0.0},
    ]


def run(optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """Steps with random gradients, another learning rate in each, and now and then a weight that has no gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        for place, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if (number + place) % 3 == 0 else gradient
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Weights, moments and step counts, to the last bit."""
    pairs = [
        (mine, other)
        for one, two in zip(ours.param_groups, theirs.param_groups, strict=True)
        for mine, other in zip(one["params"], two["params"], strict=True)
    ]
    for mine, other in pairs:
        assert torch.equal(mine, other)
        held, expected = ours.state[mine], theirs.state[other]
        assert held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in expected)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_offloaded_moments_give_the_same_weights(foreach):
    plain = torch.optim.AdamW(groups(weights()), lr=0.1, foreach=foreach, **SETTINGS)
    ours = OffloadedAdamW(groups(weights()), lr=0.1, foreach=foreach, **SETTINGS)
    for number in range(6):
        run(plain, 1, number)
        run(ours, 1, number)
        assert_same(ours, plain)
    assert [len(group["params"]) for group in ours.param_groups] == [2, 2], "the groups are as they were"


def test_moments_are_where_the_weights_are_for_one_weight_at_a_time(monkeypatch):
    """There is no second device here: what moves is written down instead."""
    ours, moved = OffloadedAdamW(groups(weights()), lr=0.1, **SETTINGS), []
    step, move = torch.optim.AdamW.step, OffloadedAdamW._move

    def stepping(self, closure=None):
        moved.append([id(p) for group in self.param_groups for p in group["params"]])
        return step(self, closure)

    def moving(self, parameter, device):
        moved.append((id(parameter), device.type))
        move(self, parameter, device)
        kept = self.state[parameter]
        assert all(kept[name].device == device for name in ("exp_avg", "exp_avg_sq") if name in kept)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    monkeypatch.setattr(OffloadedAdamW, "_move", moving)
    run(ours, 1)
    numbers = [id(p) for group in ours.param_groups for p in group["params"]]
    assert moved == [entry for number in numbers for entry in ((number, "cpu"), [number], (number, "cpu"))]


def test_a_step_that_fails_leaves_the_groups_whole(monkeypatch):
    ours = OffloadedAdamW(groups(weights()), lr=0.1, **SETTINGS)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(ours, 1)
    assert [len(group["params"]) for group in ours.param_groups] == [2, 2]


@pytest.mark.parametrize("after", [OffloadedAdamW, torch.optim.AdamW], ids=["offloaded", "plain"])
@pytest.mark.parametrize("before", [OffloadedAdamW, torch.optim.AdamW], ids=["offloaded", "plain"])
def test_the_state_is_that_of_adamw_and_goes_on_in_either(before, after):
    whole, first = (kind(groups(weights()), lr=0.1, **SETTINGS) for kind in (torch.optim.AdamW, before))
    run(whole, 5)
    run(first, 3)
    parameters = [copy.deepcopy(p) for group in first.param_groups for p in group["params"]]
    second = after(groups(parameters), lr=0.1, **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, 2, first=3)
    assert_same(second, whole)


def test_settings_choose_the_optimizer():
    for offload, kind in ((True, OffloadedAdamW), (False, torch.optim.AdamW)):
        made = adamw(weights(), 0.1, offload=offload, **SETTINGS)
        assert type(made) is kind
        assert {name: made.defaults[name] for name in ("lr", *SETTINGS)} == {"lr": 0.1, **SETTINGS}
