"""Every test here is skipped where there is no GPU; each begins with exact products in float32."""

import pytest
import torch
from on_device import IS_THERE


def pytest_runtest_setup(item):
    if not IS_THERE:
        pytest.skip("no GPU of NVIDIA here (GRN_TEST_DEVICE=cpu runs the test on the CPU)")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """No TF32, whatever a command that ran in this process has set; nothing compiled is left over."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.set_float32_matmul_precision(precision)
    torch._dynamo.reset()
