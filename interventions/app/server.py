"""The page as a server: on this machine's own address alone unless asked otherwise, and asking no other machine."""

import errno
import ipaddress
import logging
import os
import socket
from typing import Any

from interventions.app.page import CSS, make_page
from interventions.bundle.bundle import load_dense

logger = logging.getLogger(__name__)

# Whatever gradio or a hole in it may try, the browser asks no other machine. Its templates need eval.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)

# gradio takes empty files whatever the largest size is, and keeps them.
_UNSERVED = frozenset({"upload", "upload_progress", "openapi.json", "info", "monitoring"})


def serve(run: str, device: str = "cpu", *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page of a run, or of a packaged bundle, until Ctrl-C; port 0 takes a free one.

    Raises ValueError without gradio and for a port that cannot be, OSError for an address or port that cannot be had,
    and what `load_dense` raises.
    """
    gr, fastapi, uvicorn = load_gradio()
    with listen(host, port) as listener:
        dense = load_dense(run, device)
        app = make_app(gr, fastapi, dense, run, loopback=is_loopback(listener))
        logger.info("%s is served at %s; Ctrl-C ends it", run, address(host, listener))
        # The page keeps a stream open, for which a graceful end would wait.
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


def load_gradio() -> tuple[Any, Any, Any]:
    """gradio and the server that it brings, with its reports to its makers off.

    Raises ValueError where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import fastapi
        import gradio
        import uvicorn
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'sparse-bridges[serve]'") from error
    return gradio, fastapi, uvicorn


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; warns where other machines can reach it.

    Raises ValueError for a port that cannot be, OSError for an address or port that cannot be had.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port}: use 0 to {2**16 - 1}")
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(where[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {host} is in use: choose another, or 0 for a free one") from error
        raise OSError(f"cannot serve on port {port} of {host}: {error.strerror}") from error
    if not is_loopback(listener):
        logger.warning("%s is no loopback address: whoever reaches this machine can use the page, unencrypted", host)
    return listener


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def address(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"


def make_app(gr: Any, fastapi: Any, dense: Any, run: str, *, loopback: bool = True) -> Any:
    """The page as a FastAPI application that lets no browser ask elsewhere."""
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        make_page(gr, dense, run),
        path="/",
        root_path="",
        theme=gr.themes.Default(
            primary_hue="orange",
            font=("system-ui", "sans-serif"),  # of the reader's system: nothing to fetch
            font_mono=("ui-monospace", "monospace"),
        ).set(body_text_color_subdued="*neutral_600"),  # gradio's is too faint on white
        css=CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=0,
    )
    if loopback:
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        # A foreign page must not reach this one by a name of its own that leads here.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    return _Guarded(app)


class _Guarded:
    """An ASGI application whose answers carry the policy. (Starlette's own helper would hold back streams.)

    It takes no files, describes itself to nobody, and is asked by its own page alone: pages that other programs serve
    on this machine have another port, and so another origin.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = message | {"headers": [*message.get("headers", ()), policy]}
            await send(message)

        refusal = _refusal(scope)
        await (refusal or self.app)(scope, receive, guarded)


def _refusal(scope: Any) -> Any:
    """The answer to a request that the page's own browser never sends; None for the others."""
    if scope["type"] != "http":
        return None
    from starlette.responses import PlainTextResponse

    if _UNSERVED.intersection(scope["path"].split("/")):
        return PlainTextResponse("not served", status_code=404)
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
        return PlainTextResponse("only this page itself may ask", status_code=403)
    return None
