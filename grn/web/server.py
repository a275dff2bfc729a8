"""Serves the studio's page on this machine."""

import ipaddress
import logging
import socket
import threading
import webbrowser

from omegaconf import DictConfig

from grn.runtime.errors import UserError

try:
    import uvicorn
    from fastapi import FastAPI
    from nicegui import ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise UserError(f"the studio needs NiceGUI ({error.name} is missing): pip install 'grn[studio]'") from None

from grn.sampling.generation import best_device
from grn.web import page, uploads
from grn.web.engine import Engine
from grn.web.models import Models, newest
from grn.web.session import Studio

log = logging.getLogger(__name__)

ENVELOPE = 2**16  # bytes of a request around an uploaded file


def serve(config: DictConfig) -> None:
    """Opens the checkpoint, and serves the page until a signal ends it.

    Raises:
        UserError: no checkpoint, or an address that cannot be listened to.
    """
    listening = _listen(config.host, config.port)
    engine = Engine()
    try:
        ckpt = newest(config.paths.runs) if config.ckpt is None else config.ckpt
        models = Models(best_device(config.device), ema=config.ema)
        first = engine.call(lambda: models.open(ckpt)).result()
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        hosts = ["localhost", "127.0.0.1", "[::1]", config.host] if _is_loopback(config.host) else ["*"]
        app.add_middleware(BoundedBody, most=uploads.MAX_BYTES + ENVELOPE)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
        page.add(Studio(engine, models, str(config.paths.runs), first))
        ui.run_with(app, title="GRN studio", dark=None, show_welcome_message=False, favicon=page.ICON)
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("studio of %s: %s (Ctrl-C ends it)", ckpt, url)
        if not _is_loopback(config.host):
            log.warning("host=%s: whoever reaches this machine can use the studio", config.host)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, ws_max_size=2**20)
        )
        if config.show:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        server.run(sockets=[listening])
    finally:
        listening.close()
        engine.close()


class BoundedBody:
    """Refuses requests whose body is larger than `most` bytes, whatever they say of its length."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most:
            await _refuse(send)
            return
        come = 0

        async def bounded() -> Message:
            nonlocal come
            message = await receive()
            come += len(message.get("body", b""))
            if come > self._most:
                return {"type": "http.disconnect"}
            return message

        await self._app(scope, bounded, send)


async def _refuse(send: Send) -> None:
    await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"too large"})


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any free one."""
    if type(port) is not int or not 0 <= port < 2**16:
        raise UserError(f"port={port}: a number from 0 (any free one) to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(found[0], found[1])
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(found[4])
        listening.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"host={host} port={port} cannot be listened to ({reason}): give another port=...") from None
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
