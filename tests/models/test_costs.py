"""The floor of a time, and the peak rates of known GPUs."""

import pytest
import torch

from engine.models.costs import Cost, HardwarePeak, StepPart, floor_s, peak_of

PEAK = HardwarePeak("paper", {torch.bfloat16: 1e12, torch.float32: 1e11}, 1e10)


def test_the_floor_takes_the_slower_of_flops_and_bytes_for_each_pass():
    parts = {
        "bound by FLOPs": StepPart(Cost(2 * 10**12, 10**6), Cost(4 * 10**12, 10**6)),
        "bound by bytes": StepPart(Cost(10**6, 10**10)),
    }
    assert floor_s(parts, PEAK, torch.bfloat16) == pytest.approx(2 + 4 + 2)
    assert floor_s(parts, PEAK, torch.float32) == pytest.approx(20 + 40 + 4)


def test_peaks_are_known_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_of(torch.device("cuda")).bytes_per_s == pytest.approx(4.8e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce 256")
    with pytest.raises(ValueError, match="'GeForce 256'.*'NVIDIA A100-SXM4-80GB'.*'NVIDIA B200'.*'NVIDIA H100 80GB HBM3'"):
        peak_of(torch.device("cuda"))
    with pytest.raises(ValueError, match="no datasheet for 'cpu'"):
        peak_of(torch.device("cpu"))
