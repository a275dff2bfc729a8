import pytest
import torch

from grn.data.contract import check_batch
from grn.runtime.errors import UserError

PIXELS, LABEL = torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 3])


def test_what_will_do():
    check_batch({"pixels": PIXELS, "label": LABEL, "more": None}, num_labels=4)
    check_batch({"bits": b"", "label": LABEL}, num_labels=4)
    check_batch({"pixels": PIXELS}, num_labels=None)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([PIXELS, LABEL], "these are of type list"),
        ({"image": PIXELS}, "pixels is not there"),
        ({"pixels": PIXELS.float(), "label": LABEL}, r"pixels is float32 \[2, 3, 1, 8, 8\]"),
        ({"pixels": PIXELS[:, :, 0], "label": LABEL}, r"pixels is uint8 \[2, 3, 8, 8\]"),
        ({"pixels": PIXELS}, "label is not there"),
        ({"pixels": PIXELS, "label": ["a", "b"]}, "label is of type list"),
        ({"pixels": PIXELS, "label": LABEL.float()}, r"label is float32 \[2\]"),
        ({"pixels": PIXELS, "label": LABEL + 1}, "labels are 1 to 4, and model.num_labels=4"),
    ],
)
def test_what_will_not(batch, said):
    with pytest.raises(UserError, match=f"^data: .*{said}") as error:
        check_batch(batch, num_labels=4)
    assert "\n" not in str(error.value)
