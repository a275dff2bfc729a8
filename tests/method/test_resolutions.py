import pytest

from grn.method.resolutions import BUDGETS, RESOLUTIONS, TEMPLATES, nearest_template, resolution, rotary_span
from grn.runtime.errors import UserError


def test_golden(golden_meta):
    golden = golden_meta["resolution_buckets"]
    assert [str(template) for template in TEMPLATES] == list(golden)
    for template in TEMPLATES:
        assert {budget: list(resolution(template, budget)) for budget in BUDGETS} == golden[str(template)]


def test_a_size_is_nearest_to_its_own_template():
    for template, sizes in RESOLUTIONS.items():
        for height, width in sizes:
            assert nearest_template(height, width) == template
            assert nearest_template(height // 16, width // 16) == template  # in tokens, as refiners ask
    assert nearest_template(4000, 100) == 3.0
    assert nearest_template(100, 4000) == 0.333


def test_every_template_spans_about_the_same_area():
    assert rotary_span(3.0) == (225, 75)
    assert rotary_span(0.562) == (97, 173)
    assert rotary_span(1.0) == (129, 129)
    for template in TEMPLATES:
        height, width = rotary_span(template)
        assert max(height, width) <= 225
        assert abs(height * width / (225 * 75) - 1) < 0.02
        assert abs(height / width / template - 1) < 0.02


def test_an_unknown_budget_names_its_key():
    with pytest.raises(UserError, match=r"data\.pixels=3M is not one of 0\.06M, 0\.25M, 0\.41M, 0\.92M, 1M, 2M"):
        resolution(1.0, "3M")
