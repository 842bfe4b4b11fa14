"""What a run cost is read from the machine."""

from __future__ import annotations

import pytest

from stillroom.provenance import Meter


def test_gpu_energy_is_read_where_there_is_a_counter(monkeypatch):
    """Joules between two readings of NVML's millijoule counters; None where there is no NVML."""
    import sys
    import types

    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Meter().read()["gpu_joules"] is None
    counters = iter([1000, 2000, 4000, 9000])
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counters),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert Meter().read()["gpu_joules"] == pytest.approx(10.0)
