import socket
import urllib.request

import pytest

from grn.runtime.downloads import impatient


def test_a_server_that_never_answers_is_given_up():
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth"
        with pytest.raises(OSError, match="timed out"), impatient(0.2):
            urllib.request.urlopen(url)
    assert socket.getdefaulttimeout() == before
