"""The page of a refinement: whole in one file, without any network."""

import base64
import io
import json
import re

import torch
from PIL import Image
from test_pictures import gray, step

from grn.sampling.player import save_page
from grn.sampling.recording import Recording


def page_of(tmp_path, **facts):
    recording = Recording()
    for index in range(3):
        predicted, tokens = torch.full((2, 1, 1, 2, 2), 10 + index), torch.full((2, 1, 1, 2, 2), 5)
        recording(step(index, [0, 1], predicted, tokens, predicted > 0, shape=(1, 2, 2)))
    return save_page(recording, gray, tmp_path / "deep" / "page.html", title='a <b> & "c"', facts=facts).read_text()


def test_a_page_has_every_step(tmp_path):
    page = page_of(tmp_path, command="grn sample ckpt=x")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert [(step["step"], step["t"], step["filled"]) for step in data["steps"]] == [
        (1, 0.25, 1),
        (2, 0.5, 1),
        (3, 0.75, 1),
    ]
    for number, shown in enumerate(data["steps"]):
        for name, level in (("seen", 50), ("predicted", 100 + 10 * number)):
            head, _, content = shown[name].partition(",")
            assert head == "data:image/webp;base64"
            assert Image.open(io.BytesIO(base64.b64decode(content))).getpixel((40, 40))[0] == level
    assert data["facts"] == {"command": "grn sample ckpt=x"}


def test_a_page_needs_nothing_else_and_runs_nothing_that_is_shown(tmp_path):
    hostile = "</script><script>alert(1)</script>"
    page = page_of(tmp_path, prompts=hostile)
    assert not re.search(r'(src|href)\s*=\s*["\']', page)  # pictures are set from the data
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    assert "default-src 'none'" in page
    assert page.count("</script>") == 2
    assert "a &lt;b&gt; &amp;" in page
