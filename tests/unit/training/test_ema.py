"""The average: its recursion, its warm-up, what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dihal.errors import UsageError
from dihal.training.ema import Ema, ema_decay


def module() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net[0].bias.requires_grad_(False)
    return net


def test_decay_warms_up() -> None:
    assert ema_decay(0.999, 0) == pytest.approx(0.1)
    assert ema_decay(0.999, 90) == pytest.approx(0.91)
    assert ema_decay(0.999, 10**6) == 0.999
    assert ema_decay(0.05, 0) == 0.05


def test_recursion() -> None:
    net = module()
    ema = Ema(net, 0.5)
    expected = {name: p.detach().double().clone() for name, p in net.named_parameters() if p.requires_grad}
    for update in range(20):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        decay = ema_decay(0.5, update)
        for name, p in net.named_parameters():
            if name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    assert ema.updates == 20
    assert ema.state_dict().keys() == expected.keys() == {"0.weight", "1.weight", "1.bias"}
    for name, value in ema.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_half_precision_weights_have_a_full_precision_average() -> None:
    net = nn.Linear(64, 64, bias=False).bfloat16()
    start = net.weight.detach().float().clone()
    ema = Ema(net, 0.9999)
    ema.updates = 10**6
    with torch.no_grad():
        net.weight.add_(0.5)
    ema.update()
    moved = ema.state_dict()["weight"] - start
    assert 4e-5 < moved.mean().item() < 6e-5  # bf16 would have rounded it away


def test_swap_is_undone_exactly_even_by_an_error() -> None:
    net = module()
    ema = Ema(net, 0.5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]

    def fails() -> None:
        with ema.swapped():
            assert all(torch.equal(net.get_parameter(name), value) for name, value in ema.state_dict().items())
            assert torch.equal(net[0].bias, own["0.bias"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
    assert pointers == [p.data_ptr() for p in net.parameters()]


def test_state_round_trip_and_misfits() -> None:
    net = module()
    ema = Ema(net, 0.5)
    ema.update()
    other = Ema(module(), 0.5)
    other.load_state_dict({**net.state_dict(), **ema.state_dict()}, updates=ema.updates)
    assert other.updates == 1
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ema.state_dict().items())
    with pytest.raises(UsageError, match=r"1\.bias"):
        other.load_state_dict({k: v for k, v in ema.state_dict().items() if k != "1.bias"}, updates=1)
