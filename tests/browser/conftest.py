"""A headless Chromium (Debian: chromium), driven by Playwright; pages that fail where they call out or log an error."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import commands
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Kept for people to look at: a run's screenshots, by test.
SCREENSHOTS = Path(os.environ.get("GRN_SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots"))
VIEWPORTS = {"wide": (1280, 800), "narrow": (390, 844)}


@pytest.fixture(scope="session")
def browser():
    reason = None
    if not (path := next(filter(None, map(shutil.which, BROWSERS)), None)):
        reason = f"no browser is installed (Debian: chromium), of {', '.join(BROWSERS)}"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        reason = "the package playwright is not installed (pip install -e '.[dev]')"
    if reason:
        (pytest.fail if os.environ.get("GRN_BROWSER") == "required" else pytest.skip)(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, viewport="wide", scheme="light") -> a page, in a profile of its own.

    Afterwards the test fails for errors in a page's console, and for requests to anywhere but where it came from.
    """
    contexts, wrong = [], []

    def opened(url, *, viewport="wide", scheme="light"):
        width, height = VIEWPORTS[viewport]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        origin = re.match(r"(\w+://[^/]*)", url)[1]
        page.on(
            "console",
            lambda it: wrong.append(f"console: {it.text} ({it.location['url'][:200]})") if is_error(it) else None,
        )
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda it: wrong.append(f"asks for {it.url[:200]}") if is_foreign(it.url, origin) else None)
        page.goto(url)
        return page

    yield opened
    told = list(wrong)  # of the page; what closing breaks off is not its fault
    for context in contexts:
        context.close()
    assert told == []


def is_error(message):
    # NiceGUI's charts say that where they are removed before they were drawn, and mean nothing by it.
    return message.type == "error" and "reading 'dispose'" not in message.text


def is_foreign(url, origin):
    return not url.startswith((origin, "data:", "blob:", origin.replace("http", "ws", 1)))


@pytest.fixture(scope="session")
def screenshot():
    """screenshot(page, name) keeps a picture of the page."""

    def taken(page, name, **options):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}.png", **options)

    return taken


class Studio:
    """`grn studio`, running; `url` is its page."""

    def __init__(self, runs, *arguments):
        environment = os.environ | {"GRN_RUNS": str(runs), "GRN_DATA": str(runs.parent / "data")}
        settings = ("port=0", "show=false", "device=cpu", *arguments)
        self.process = commands.Command("grn.studio", *settings, cwd=runs.parent, env=environment)
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", "".join(self.process.output()))):
            assert self.process.poll() is None, self.process.output()
            assert time.monotonic() < deadline, self.process.output()
            time.sleep(0.05)
        self.url = found[0]

    def interrupt(self):
        """Ctrl-C; returns (exit status, stdout and stderr)."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30), "".join(self.process.output())


@pytest.fixture(scope="session")
def start_studio(runs):
    """start_studio("ckpt=...", ...) -> a running `Studio` of the runs; what is left running is ended."""
    started = []

    def start(*arguments):
        started.append(Studio(runs, *arguments))
        return started[-1]

    yield start
    for it in started:
        it.process.kill()


@pytest.fixture(scope="session")
def studio(start_studio, runs):
    return start_studio(f"ckpt={runs}/digits_c2i")


@pytest.fixture(scope="session")
def overflow():
    """overflow(page): pixels by which it is wider than its window; what scrolls within itself does not count."""
    return lambda page: page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


TOKENIZER = "+experiment=digits_tokenizer model.dim=8 model.decoder_dim=8 trainer.max_steps=12"
TOKENIZER += " trainer.val_check_interval=6 trainer.log_every_n_steps=3 training.warmup_steps=2 data.batch_size=20"
REFINER = "+experiment=digits_c2i model.depth=2 model.width=32 model.heads=2 model.bottleneck=16 model.context_start=1"
REFINER += " trainer.max_steps=12 trainer.val_check_interval=6 trainer.log_every_n_steps=3 training.warmup_steps=2"
REFINER += " callbacks.grid.num=10 data.batch_size=20 scores=none"
REFINER += " sampler.schedule.min_steps=12 sampler.schedule.max_steps=12"


@pytest.fixture(scope="session")
def runs(built_once):
    """A folder of runs: digits_tokenizer and digits_c2i, trained for a few steps, and samples of these."""

    def build(folder):
        environment = os.environ | {"GRN_DATA": str(folder / "data"), "GRN_RUNS": str(folder / "runs")}
        for verb, arguments in (
            ("prepare", "data=digits num_workers=0"),
            ("train", f"{TOKENIZER} logger=csv"),
            ("train", f"{REFINER} logger=csv"),
            ("sample", f"ckpt={folder}/runs/digits_c2i num=10 html=true wandb=false film=false"),
        ):
            done = commands.run(f"grn.{verb}", *arguments.split(), cwd=folder, env=environment)
            assert done.returncode == 0, done.stdout + done.stderr

    return built_once("browsed", build) / "runs"
