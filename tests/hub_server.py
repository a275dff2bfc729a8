"""A Hugging Face Hub of our own on this machine, as far as huggingface_hub asks one for files."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


@contextmanager
def serving(repositories, *, listed=()):
    """(Its endpoint, the files that it has sent, as `owner/name/path`) while it serves folders by `owner/name`.

    Args:
        repositories: a dict, which may change meanwhile.
        listed: names that every repository lists and none has.
    """
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = parts[0] == "api"
            name = "/".join(parts[2:4] if is_api else parts[:2])
            status, headers, content, folder = 200, {"X-Repo-Commit": COMMIT}, b"", repositories.get(name)
            if folder is None:
                status, headers["X-Error-Code"] = 404, "RepoNotFound"
            elif is_api:
                paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
                paths += listed
                tree = [{"type": "file", "path": path, "size": 1, "oid": path} for path in paths]
                info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in paths]}
                content = json.dumps(tree if parts[4] == "tree" else info).encode()
            elif (file := folder.joinpath(*parts[4:])).is_file():
                content = file.read_bytes()
                headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                if body:
                    sent.append("/".join([name, *parts[4:]]))
            else:
                status, headers["X-Error-Code"] = 404, "EntryNotFound"
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
