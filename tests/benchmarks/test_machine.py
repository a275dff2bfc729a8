import pytest
import torch

from grn.benchmarks import machine

CPU = torch.device("cpu")


def test_live_tensors_are_counted_until_they_die():
    held = torch.zeros(100)
    with machine.LiveTensors([held, held[:50]]) as live:
        assert live.bytes == 400
        doubled = held * 2
        view = doubled.view(10, 10)
        del doubled
        assert live.bytes == 800  # the view keeps it
        del view
        assert live.bytes == 400
        for _ in range(5):
            held = held + 1  # a result beside its input, and then alone
    assert live.peak == 800


def test_peak_memory_returns_what_the_call_does():
    weight = torch.ones(256)
    result, peak = machine.peak_memory(lambda: (weight + 1).sum(), CPU, held=[weight])
    assert result == 512
    assert peak == 1024 + 1024 + 4


def test_storages_that_tensors_share_count_once():
    x = torch.zeros(10, dtype=torch.float64)
    assert machine.storage_bytes([x, x[2:], x.view(2, 5), torch.zeros(3)]) == 80 + 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul(dtype):
    precision = torch.get_float32_matmul_precision()
    product, flop = machine.matmul(CPU, dtype, size=64)
    assert flop == 2 * 64**3
    assert product().shape == (64, 64)
    assert product().dtype == dtype
    assert torch.get_float32_matmul_precision() == precision  # the process's, as it was


def test_calls_take_turns():
    order = []
    times = machine.median_seconds([lambda: order.append("a"), lambda: order.append("b")], CPU, 3)
    assert order == ["a", "b"] * 3
    assert all(time > 0 for time in times)


def test_description_names_the_machine():
    found = machine.describe(CPU)
    assert found["device"] == "cpu"
    assert found["name"]
    assert found["torch"] == torch.__version__
