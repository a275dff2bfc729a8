"""The studio as its users have it: drawing, erasing, inspecting and comparing in a headless Chromium."""

import http.client
import io
import re
import shlex
import shutil
import time
from pathlib import Path
from urllib.parse import urlencode

import commands
import pytest
from PIL import Image
from safetensors.torch import load

from grn.runtime.locks import only_writer

pytestmark = pytest.mark.browser

STEPS = 12

# Notes every step that the page tells, and how many pictures of predictions it has shown.
WATCH = """() => {
    if (window.told) { told.length = 0; pictures.clear(); return; }
    window.told = []; window.pictures = new Set();
    const now = document.querySelector("[data-testid=now]"), shown = document.querySelector("[data-testid=predicted]");
    const note = () => {
        const step = now.textContent.replace(/\\u00a0/g, " ").match(/^step (\\d+) of/);
        if (step && told.at(-1) !== +step[1]) told.push(+step[1]);
        const picture = shown.querySelector("img");
        if (picture) pictures.add(picture.src);
    };
    const all = {childList: true, subtree: true, characterData: true, attributes: true};
    for (const element of [now, shown]) new MutationObserver(note).observe(element, all);
}"""


@pytest.fixture
def page(open_page, studio):
    return open_page(studio.url)


def on(page, testid):
    return page.get_by_test_id(testid)


def set_up(page, *, label=3, steps=STEPS, seed=0):
    """What is to be drawn: `steps` along a line, whose number does not depend on the samples."""
    on(page, f"class-{label}").click()
    choose(page, "schedule", "linear")
    fill(page, "steps", steps)
    fill(page, "seed", seed)


def choose(page, testid, option):
    on(page, testid).click()
    page.get_by_role("option", name=option, exact=True).click()
    page.get_by_role("option").first.wait_for(state="detached")  # else the next menu opens beside the closing one


def fill(page, testid, value):
    field = on(page, testid)
    field.fill(str(value))
    field.blur()


def told(page):
    """The step that is shown, of how many."""
    found = re.match(r"step (\d+) of (\d+)", on(page, "now").inner_text().replace("\xa0", " "))
    return (0, 0) if found is None else tuple(map(int, found.groups()))


def until(page, condition, what):
    for _ in range(400):
        if condition():
            return
        page.wait_for_timeout(50)
    pytest.fail(f"not {what}: {page.locator('body').inner_text()[:3000]}")


def draw(page, steps=STEPS, button="draw"):
    """Draws to the end; `told` and `pictures` of `WATCH` are then those of this drawing."""
    page.evaluate(WATCH)
    on(page, button).click()
    until(page, lambda: page.evaluate("told.includes(1)") and told(page) == (steps, steps), "drawn to its end")


def picture(page, testid="predicted"):
    return on(page, testid).locator("img").get_attribute("src")


def png(size=(32, 32), box=None, colour=255):
    image = Image.new("L", size)
    if box:
        image.paste(colour, box)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_digit_comes_about_step_by_step(page, screenshot):
    set_up(page)
    draw(page)
    assert page.evaluate("told") == list(range(1, STEPS + 1))
    assert page.evaluate("pictures.size") >= 10
    assert "t 1.00" in on(page, "now").inner_text().replace("\xa0", " ")
    screenshot(page, "studio-live-wide-light", full_page=True)


def test_the_same_seed_draws_the_same_picture(page):
    set_up(page, seed=7)
    draw(page)
    first = picture(page)
    fill(page, "seed", 8)
    draw(page)
    assert picture(page) != first
    fill(page, "seed", 7)
    draw(page)
    assert picture(page) == first
    assert "seed=7" in on(page, "command").inner_text()


def test_pause_erase_and_refine_on(page, screenshot, tmp_path):
    """From a step of before on; and the command draws the very picture again, with a file of what was erased."""
    set_up(page, steps=40)
    on(page, "draw").click()
    until(page, lambda: told(page)[0] >= 3, "drawing")
    on(page, "play").click()  # pause
    page.wait_for_timeout(300)
    paused = told(page)[0]
    page.wait_for_timeout(400)
    assert told(page)[0] == paused < 40
    on(page, "tool").get_by_text("Erase").click()
    assert on(page, "refine-on").is_disabled()
    stroke(page, [(0.2, 0.2), (0.8, 0.2), (0.8, 0.6)])
    assert on(page, "refine-on").is_enabled()
    screenshot(page, "studio-erase-wide-light", full_page=True)
    choose(page, "speed", "fastest")
    on(page, "refine-on").click()
    until(page, lambda: told(page) == (40, 40), "refined on")
    assert "erasures=erasures.json" in on(page, "command").inner_text()
    is_drawn_again(page, tmp_path, "erasures.json")


def download(page, name):
    """The bytes of a file that the page offers."""
    with page.expect_download() as coming:
        on(page, f"download-{name}").click()
    assert coming.value.suggested_filename == name
    return Path(coming.value.path()).read_bytes()


def is_drawn_again(page, folder, *files):
    """Whether the command that the page shows, with the files it offers, draws the picture that it shows."""
    for name in files:
        (folder / name).write_bytes(download(page, name))
    grn, verb, *arguments = shlex.split(on(page, "command").inner_text())
    assert (grn, verb) == ("grn", "sample")
    settings = ("film=false", "wandb=false", f"out={folder}/again", "device=cpu")
    done = commands.run("grn.sample", *arguments, *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    shown, again = (
        Image.open(io.BytesIO(download(page, "samples.png"))),
        Image.open(folder / "again" / "samples.png"),
    )
    assert shown.convert("RGB").tobytes() == again.convert("RGB").tobytes()


def stroke(page, places):
    """Paints through places, as shares of the width and height of the prediction."""
    box = on(page, "predicted").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for x, y in points[1:]:
        page.mouse.move(x, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(200)


def test_a_finished_picture_is_drawn_anew_where_it_is_painted(page, tmp_path):
    set_up(page)
    draw(page)
    finished = picture(page)
    on(page, "tool").get_by_text("Erase").click()
    stroke(page, [(0.1, 0.1), (0.3, 0.3)])
    draw(page, button="refine-on")
    assert picture(page) != finished
    is_drawn_again(page, tmp_path, "start.safetensors")


def test_a_token_tells_its_history(page, screenshot):
    set_up(page)
    draw(page)
    assert on(page, "inspected").inner_text() == "no position is chosen"
    box = on(page, "predicted").bounding_box()
    on(page, "predicted").click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.7})
    until(page, lambda: "row 6, column 4" in on(page, "inspected").inner_text(), "inspected")
    cells = on(page, "history").locator("tr").nth(1).locator("td")
    assert cells.count() == STEPS
    assert re.search(
        r"step \d+: \d+ seen, \d+ predicted, (filled|kept|erased|blank)", cells.nth(3).get_attribute("title")
    )
    screenshot(page, "studio-inspect-wide-light", full_page=True)


def test_the_scrubber_goes_back_through_all_steps(page):
    set_up(page)
    draw(page)
    last = picture(page)
    on(page, "back").click()
    until(page, lambda: told(page) == (STEPS - 1, STEPS), "a step back")
    assert picture(page, "seen") != last
    on(page, "next").click()
    until(page, lambda: told(page) == (STEPS, STEPS), "a step on")
    until(page, lambda: picture(page) == last, "the last picture again")  # which comes by a message of its own


def test_a_picture_and_a_mask_to_start_from(page):
    set_up(page)
    on(page, "start").click()
    give(page, "upload-image", "picture.png", png(box=(8, 8, 24, 24)))
    on(page, "given-picture").wait_for()
    give(page, "upload-mask", "mask.png", png(box=(16, 0, 32, 32)))
    on(page, "given-mask").wait_for()
    draw(page, steps=8)  # of a strength of 0.6


def give(page, testid, name, data, mime="image/png"):
    page.locator(f"[data-testid={testid}] input[type=file]").set_input_files(
        {"name": name, "mimeType": mime, "buffer": data}
    )


def test_downloads_are_what_their_names_say(page):
    set_up(page)
    on(page, "every-class").click()
    draw(page)
    film = Image.open(io.BytesIO(download(page, "refinement.gif")))
    assert film.n_frames == STEPS + 1
    assert download(page, "samples.mp4")[4:8] == b"ftyp"
    assert b"default-src 'none'" in download(page, "refinement.html")
    tokens = load(download(page, "tokens.safetensors"))["tokens"]
    assert tuple(tokens.shape) == (10, 4, 1, 8, 8)
    on(page, "language").get_by_text("Python").click()
    assert "GRNPipeline.from_pretrained(" in on(page, "python").inner_text()


def test_the_gallery_is_sorted_from_easy_to_hard(page):
    set_up(page)
    on(page, "every-class").click()
    draw(page)
    on(page, "tab-gallery").click()
    tiles = on(page, "gallery").locator("button")
    until(page, lambda: tiles.count() == 10, "shown")
    said = [re.match(r"H (\d+\.\d+) · (\d+) steps", text).groups() for text in tiles.all_inner_texts()]
    assert [float(entropy) for entropy, _ in said] == sorted(float(entropy) for entropy, _ in said)
    assert {int(steps) for _, steps in said} == {STEPS}
    tiles.nth(4).click()  # one of them, alone
    on(page, "draw").wait_for()
    assert re.search(r"sample \d+", on(page, "focus").inner_text())


def test_two_settings_side_by_side(page, screenshot):
    on(page, "tab-compare").click()
    on(page, "class-5").click()
    for side, steps in (("A", 12), ("B", 16)):
        choose(page, f"{side}-schedule", "linear")
        fill(page, f"{side}-steps", steps)
    on(page, "draw-both").click()
    until(page, lambda: on(page, "compare-now").inner_text().replace("\xa0", " ").count("step 16 of 16"), "drawn")
    for side in "AB":
        assert picture(page, f"{side}-predicted").startswith("data:image/")
    assert picture(page, "A-predicted") != picture(page, "B-predicted")
    screenshot(page, "studio-compared-wide-light", full_page=True)


@pytest.mark.parametrize(
    ("name", "data"),
    [("broken.png", b"\x89PNG\r\n\x1a\nno picture"), ("none.png", b""), ("pickle.png", b"\x80\x04cos\nsystem\n.")],
)
def test_a_broken_upload_is_a_line(page, name, data):
    on(page, "start").click()
    give(page, "upload-image", name, data)
    line = page.get_by_role("alert").filter(has_text=name)
    line.wait_for()
    assert on(page, "given-picture").count() == 0
    set_up(page)
    draw(page)  # it goes on as if nothing had been


def test_two_windows_draw_at_once(open_page, studio):
    pages = [open_page(studio.url) for _ in range(2)]
    for number, page in enumerate(pages):
        set_up(page, label=number, steps=20)
    for page in pages:
        on(page, "draw").click()
    for page in pages:
        until(page, lambda page=page: told(page) == (20, 20), "drawn")
    for number, page in enumerate(pages):
        assert f"labels=[{number}]" in on(page, "command").inner_text()


def test_runs_are_listed_with_curves_pictures_and_scores(page, screenshot):
    on(page, "tab-runs").click()
    entries = on(page, "run")
    until(page, lambda: entries.count() == 2, "listed")
    page.locator("[data-run=digits_tokenizer]").click()
    until(page, lambda: "tokenizer · step 12 of 12" in on(page, "run-told").inner_text(), "chosen")
    on(page, "chart").first.wait_for()
    assert "train/loss" in on(page, "curves").inner_text()
    pictures = on(page, "run-pictures").locator("img")
    pictures.first.wait_for()
    pictures.first.scroll_into_view_if_needed()
    until(page, lambda: pictures.first.evaluate("it => it.complete && it.naturalWidth > 0"), "a picture")
    assert "val/psnr" in on(page, "scores").inner_text()
    screenshot(page, "studio-runs-wide-light", full_page=True)
    on(page, "open-run").click()  # of a tokenizer, in the tab of tokenizers
    until(page, lambda: "Tokenizer of digits_tokenizer" in on(page, "tokenizer-whose").inner_text(), "opened")
    on(page, "tab-runs").click()
    page.locator("[data-run=digits_c2i]").click()
    until(page, lambda: "refiner · step 12 of 12" in on(page, "run-told").inner_text(), "chosen")
    on(page, "open-run").click()
    on(page, "draw").wait_for()


def test_a_running_training_is_seen_to_go_on(open_page, studio, runs):
    folder = runs / "late"
    (folder / "csv" / "version_0").mkdir(parents=True)
    (folder / "config.yaml").write_text("training: {_target_: grn.training.RefinerModule}\ntrainer: {max_steps: 100}\n")
    curve = folder / "csv" / "version_0" / "metrics.csv"
    curve.write_text("step,train/loss\n0,2.0\n9,1.5\n")
    writer = commands.Command.calling(hold, str(folder))
    try:
        page = open_page(studio.url)
        on(page, "tab-runs").click()
        entry = page.locator("[data-run=late]")
        entry.get_by_test_id("running").wait_for()
        entry.click()
        until(page, lambda: "step 10 of 100 · running: process" in on(page, "run-told").inner_text(), "running")
        until(page, lambda: on(page, "open-run").is_disabled(), "told that there is no checkpoint yet")
        with curve.open("a") as file:
            file.write("19,1.25\n")
        until(page, lambda: "step 20 of 100" in on(page, "run-told").inner_text(), "read again")
    finally:
        writer.kill()
        writer.wait(30)
    until(page, lambda: "last written" in on(page, "run-told").inner_text(), "ended")
    shutil.rmtree(folder)
    until(page, lambda: entry.count() == 0, "gone")


def hold(folder):
    with only_writer(Path(folder), inside=True, remedy="-"):
        time.sleep(1000)


def test_the_tokenizer_by_rounds(page, screenshot):
    on(page, "tab-tokenizer").click()
    give(page, "tokenizer-upload", "square.png", png(box=(8, 8, 24, 24)))
    line = on(page, "tokenizer-told")
    until(page, lambda: line.inner_text().startswith("4 of 4 rounds · PSNR"), "reconstructed")
    screenshot(page, "studio-tokenizer-wide-light", full_page=True)
    last = on(page, "tokenizer-reconstruction").get_attribute("src")
    width = on(page, "rounds").bounding_box()["width"]
    on(page, "rounds").click(position={"x": width * 2 / 3, "y": 8})
    until(page, lambda: line.inner_text().startswith("3 of 4 rounds"), "a round less")
    assert on(page, "tokenizer-reconstruction").get_attribute("src") != last
    choose(page, "tokenizer-size", "its own, 1024 pixels a side at most")
    give(page, "tokenizer-upload", "wide.png", png(size=(50, 20)))
    until(page, lambda: on(page, "tokenizer-picture").evaluate("it => it.naturalWidth") == 50, "in its own size")
    give(page, "tokenizer-upload", "broken.png", b"no picture")
    until(page, lambda: "broken.png: image cannot be decoded" in on(page, "tokenizer-problem").inner_text(), "refused")
    draw_in_live(page)
    on(page, "tokenizer-live").click()
    until(page, lambda: on(page, "tokenizer-picture").evaluate("it => it.naturalWidth") == 32, "taken from Live")
    assert on(page, "tokenizer-problem").inner_text() == ""


def draw_in_live(page):
    on(page, "tab-live").click()
    set_up(page)
    draw(page)
    on(page, "tab-tokenizer").click()


@pytest.mark.parametrize("viewport", ["wide", "narrow"])
def test_every_tab_fits_the_window_in_light_and_in_dark(open_page, studio, viewport, screenshot, overflow):
    page = open_page(studio.url, viewport=viewport)
    set_up(page)
    draw(page)
    grounds = set()
    for name in ("live", "gallery", "compare", "tokenizer", "runs"):
        on(page, f"tab-{name}").click()
        if name == "runs":
            on(page, "chart").first.wait_for()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(100)
            assert overflow(page) <= 0, (name, scheme)
            screenshot(page, f"studio-{name}-{viewport}-{scheme}", full_page=True)
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_the_server_lets_in_what_it_should_alone(studio):
    def status(path, method="GET", **headers):
        connection = http.client.HTTPConnection(studio.url.removeprefix("http://"), timeout=20)
        connection.request(method, path, headers=headers)
        return connection.getresponse().status

    picture = "/grn/runs/picture?name=digits_tokenizer&file=pictures/reconstructions-step0000012.png"
    assert status(picture) == 200
    for name, file in (
        ("digits_tokenizer", "config.yaml"),
        ("digits_tokenizer", "checkpoints/last.ckpt"),
        ("digits_tokenizer", "../digits_c2i/config.yaml"),
        ("../runs/digits_tokenizer", "pictures/reconstructions-step0000012.png"),
        ("..", "data/digits/manifest.json"),
        ("/etc", "passwd"),
        ("digits_tokenizer", "/etc/passwd"),
    ):
        assert status(f"/grn/runs/picture?{urlencode({'name': name, 'file': file})}") == 404, (name, file)
    assert status("/") == 200
    assert status("/", method="POST", **{"Content-Length": str(10**12)}) == 413
    assert status("/", Host="elsewhere.example") == 400  # a name of somebody else's that leads here


def test_ctrl_c_ends_it(start_studio, open_page):
    studio = start_studio()  # without ckpt: the newest run
    page = open_page(studio.url)
    assert "digits_c2i" in on(page, "model").inner_text()
    page.context.close()
    status, said = studio.interrupt()
    assert status in (0, 130)
    assert "Traceback" not in said
