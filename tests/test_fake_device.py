"""The fake device computes as a CPU does, and notices what CUDA refuses or waits for."""

import pytest
import torch

from tests.device_tensors import DEVICE, MixedDevices, OnDevice, values_of
from tests.fake_device import FakeDevice


@pytest.fixture
def fake():
    with FakeDevice() as device:
        yield device


def on_device(values) -> torch.Tensor:
    return torch.as_tensor(values).pin_memory().to(DEVICE, non_blocking=True)


def test_a_module_trains_there_as_on_a_cpu():
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    rows = torch.randn(4, 3)
    module(rows).square().sum().backward()
    expected = module.weight.grad.clone()
    module.zero_grad()
    with FakeDevice():
        moved = module.to(DEVICE)
        moved(rows.to(DEVICE)).square().sum().backward()
        grad = moved.weight.grad
        assert isinstance(grad, OnDevice) and grad.device == DEVICE
    assert torch.equal(values_of(grad), expected)


MIXED = {
    "a sum": lambda x, host: x + host,
    "a product": lambda x, host: x @ host,
    "a concatenation": lambda x, host: torch.cat((x, host)),
    "a choice": lambda x, host: torch.where(host > 0, x, x),
    "an embedding": lambda x, host: torch.nn.functional.embedding(torch.arange(2), x),
    "rows of the host": lambda x, host: host[torch.arange(2, device=DEVICE)],
    "a scatter": lambda x, host: x.scatter_(0, torch.zeros(2, 2, dtype=torch.long), x),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_mix(name, fake):
    with pytest.raises(MixedDevices, match="host|several devices"):
        MIXED[name](torch.ones(2, 2, device=DEVICE), torch.ones(2, 2))


def test_numbers_of_the_host_mix_with_tensors_of_the_device(fake):
    x = torch.ones(2, 2, device=DEVICE)
    x[0] = 3.0
    x = x * torch.tensor(2.0) + 1
    assert not fake.waits
    assert x.tolist() == [[7.0, 7.0], [3.0, 3.0]]


WAITS = {
    "item": lambda x: x.sum().item(),
    "item, by float()": lambda x: float(x[0, 0]),
    "item, by a condition": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "nonzero, by where()": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean index, by assignment": lambda x: x.__setitem__(x > 0, torch.zeros(4, device=DEVICE)),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave without output_size": lambda x: torch.repeat_interleave(x[0].long()),
    "copy to the host": lambda x: x.cpu(),
    "copy to the host, by to()": lambda x: x.to("cpu"),
    "copy to the host, by copy_()": lambda x: torch.empty(2, 2).copy_(x, non_blocking=True),
    "pageable copy to the device": lambda x: torch.ones(2).to(DEVICE, non_blocking=True),
    "pageable copy to the device, by tensor()": lambda x: torch.tensor([1, 2], device=DEVICE),
    "pageable copy to the device, of an index": lambda x: x[torch.tensor([0, 1])],
    "blocking copy to the device": lambda x: torch.ones(2).pin_memory().to(DEVICE),
    "device": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_the_host_waits_for_is_recorded_with_its_line(name, fake):
    x = torch.ones(2, 2, device=DEVICE)
    WAITS[name](x)
    (wait,) = fake.waits
    assert wait.kind == name.split(",")[0]
    assert wait.file == "tests/test_fake_device.py" and wait.function == "<lambda>"


def test_what_the_host_does_not_wait_for_is_not_recorded(fake):
    x = on_device([[1.0, 2.0], [3.0, 4.0]])
    counts = on_device([1, 2])
    torch.repeat_interleave(x, counts, dim=0, output_size=3)
    torch.nonzero_static(x > 1, size=3)
    x[x > 3] = 0.0
    torch.empty(2, 2, pin_memory=True).copy_(x, non_blocking=True)
    x.to(torch.bfloat16)
    assert not fake.waits


def test_views_launch_nothing_and_a_kernel_launches_once(fake):
    x = torch.ones(4, 4, device=DEVICE)
    with fake.counting() as found:
        x.view(2, 8)[1].t().detach()
    assert found.launches == 0
    with fake.counting() as found:
        torch.relu(x @ x)
    assert found.launches == 2
