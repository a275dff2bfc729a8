"""The page that `grn.sample html=true` writes, in a browser: its scrubber, and that it needs nothing else."""

import re

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def url(runs):
    return (runs / "digits_c2i" / "samples" / "refinement.html").as_uri()


def shown(page):
    """(The step that is told, of how many; the pictures of the page)."""
    step, steps = re.match(r"step (\d+) of (\d+) ", page.text_content("#now").replace("\xa0", " ")).groups()
    return int(step), int(steps), [page.get_attribute(f"#{name}", "src") for name in ("seen", "predicted", "states")]


def test_the_scrubber_shows_every_step(open_page, url):
    page = open_page(url)
    step, steps, last = shown(page)
    assert step == steps >= 12
    slider = page.get_by_role("slider", name="step")
    slider.fill("0")
    assert shown(page)[0] == 1
    slider.press("ArrowRight")
    step, _, second = shown(page)
    assert step == 2
    assert all(one != other for one, other in zip(second, last))
    assert all(page.evaluate("[...document.images].map(it => it.complete && it.naturalWidth > 0)"))
    page.keyboard.press("End")
    assert shown(page)[2] == last
    box = page.locator("#curves").bounding_box()
    page.mouse.click(box["x"] + 1, box["y"] + box["height"] / 2)  # a click on the curves goes there
    assert shown(page)[0] == 1


def test_it_plays_and_pauses(open_page, url):
    page = open_page(url)
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => seen.push(parseInt(document.getElementById("now").textContent.match(/\\d+/)[0])))
            .observe(document.getElementById("now"), {childList: true});
    }""")
    page.get_by_role("button", name="Play").click()
    while (
        page.evaluate("seen.length") < 4
    ):  # the page's policy lets no text be evaluated in it, as wait_for_function does
        page.wait_for_timeout(50)
    page.get_by_role("button", name="Pause").click()
    assert page.text_content("#play") == "Play"
    seen = page.evaluate("seen")
    assert seen == list(range(1, len(seen) + 1))  # from the start, one by one


@pytest.mark.parametrize("viewport", ["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_window(open_page, url, viewport, scheme, screenshot, overflow):
    page = open_page(url, viewport=viewport, scheme=scheme)
    screenshot(page, f"player-{viewport}-{scheme}")
    assert overflow(page) <= 0
    assert page.get_by_role("slider", name="step").is_visible()
    box = page.locator("#play").bounding_box()
    assert box["y"] + box["height"] <= page.viewport_size["height"]  # at hand without scrolling
