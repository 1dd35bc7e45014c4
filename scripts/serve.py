"""A local page on which one types a prompt, drags a channel's delta, and watches the dense model follow.

It is served to this machine alone and asks nothing of any other. Needs gradio: pip install 'sparse-bridges[serve]'

Examples:
    python scripts/serve.py                              # the bundle that comes with the package
    python scripts/serve.py --run runs/mine --port 8000
"""

import errno
import ipaddress
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import tyro
from markupsafe import Markup

from bridges.sites import Site
from interventions import load_dense
from interventions.app.live import (
    Comparison,
    Generation,
    Sampling,
    channel_named,
    compare,
    delta_range,
    example_prompts,
)
from interventions.bundle.bundle import get_bundle
from interventions.cli.options import report_errors
from interventions.report.generations import NEW_TOKENS

TITLE = "sparse-bridges"
LARGEST_NEW_TOKENS = 128
# Whatever gradio or a hole in it may try, the browser asks no other machine. Its templates need eval.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto}
.sb {color: var(--body-text-color); line-height: 1.45}
.sb h1 {font-size: 1.5rem; font-weight: 650; margin: 0}
.sb h2 {font-size: .95rem; font-weight: 650; margin: 1.4rem 0 .5rem}
.sb p {margin: .2rem 0}
.sb .quiet {color: var(--body-text-color-subdued); font-size: .85rem}
.sb code, .sb pre {font-family: var(--font-mono); font-size: .85rem}
.sb code {background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  border-radius: 4px; padding: .05rem .3rem; white-space: pre-wrap; overflow-wrap: anywhere}
.sb .verdict {font-size: 1.05rem}
.sb .error {border-left: 4px solid var(--error-icon-color, #dc2626); background: var(--background-fill-secondary);
  border-radius: 4px; padding: .7rem .9rem; overflow-wrap: anywhere}
.sb table {border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums}
.sb th, .sb td {padding: .28rem .5rem; border: none; border-bottom: 1px solid var(--border-color-primary);
  text-align: left; font-weight: 400; vertical-align: middle}
.sb thead th {font-size: .8rem; color: var(--body-text-color-subdued)}
.sb .number {text-align: right; width: 6.2rem}
.sb .bars {width: 48%}
.sb .bar {display: block; height: .5rem; margin: .1rem 0; border-radius: 2px; min-width: 1px;
  width: calc(100% * var(--p))}
.sb .plain {background: var(--neutral-400)}
.sb .moved {background: var(--primary-500)}
.sb .key {display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .35rem}
.sb .two {display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem}
.sb pre {margin: 0; padding: .7rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 6px;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary)}
.sb h3 {font-size: .85rem; font-weight: 600; margin: 0 0 .3rem}
.sb pre .prompt {color: var(--body-text-color-subdued)}
.sb pre .new {font-weight: 600}
.sb pre .other {background: color-mix(in srgb, var(--primary-500) 28%, transparent); border-radius: 2px}
#examples button {font-family: var(--font-mono); font-size: .8rem; max-width: 100%; overflow: hidden;
  text-overflow: ellipsis; white-space: pre}
@media (max-width: 640px) {
  .sb .number {width: auto}
  .sb .bars {width: 25%}
}
#prompt textarea {font-family: var(--font-mono)}
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A local page: type a prompt, drag a channel's delta, and see the dense model's next token and text change.

    Everything runs on this machine's CPU, and the page asks nothing of any other machine. Ctrl-C ends it.
    """

    run: str = "demo"
    """Run folder, or the name of a packaged bundle."""
    host: str = "127.0.0.1"
    """Address to serve on. Whoever reaches one that is not a loopback address can use the page."""
    port: int = 7860
    """Port to serve on; 0 takes a free one."""


def main(options: Options) -> None:
    gr, fastapi, uvicorn = load_gradio()
    with listen(options.host, options.port) as listener:
        dense = load_dense(options.run)
        app = make_app(gr, fastapi, dense, options.run, loopback=is_loopback(listener))
        url = address(options.host, listener)
        print(f"{options.run} is served at {url}; Ctrl-C ends it", flush=True)
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
        raise ValueError(f"--port {port}: use 0 to {2**16 - 1}")
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(where[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {host} is in use: choose another with --port, or --port 0") from error
        raise OSError(f"cannot serve on --host {host} --port {port}: {error.strerror}") from error
    if not is_loopback(listener):
        print(
            f"warning: {host} is no loopback address: whoever reaches this machine can use the page, unencrypted",
            file=sys.stderr,
        )
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
    """An ASGI application whose answers carry the policy. (Starlette's own helper would hold back streams.)"""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = message | {"headers": [*message.get("headers", ()), policy]}
            await send(message)

        await self.app(scope, receive, guarded)


def make_page(gr: Any, dense: Any, run: str) -> Any:
    """The page itself, as `gradio.Blocks`. Every text that is not ours is escaped (see `shown`)."""
    bundle = get_bundle(dense)
    n_ctx = bundle.hf.config.n_positions
    names = list(bundle.channels)
    first = names[0] if names else "attn.0.read.0"
    channel = channel_named(dense, first)
    span, examples = delta_range(channel), example_prompts(dense, channel)
    most = min(LARGEST_NEW_TOKENS, n_ctx - 1)
    quiet = {"api_visibility": "private", "show_progress": "hidden"}

    def choose(name: str) -> list[Any]:
        try:
            channel = channel_named(dense, name or "")
        except (ValueError, LookupError):
            return [gr.skip(), "", gr.skip()]  # `show` says why
        span = delta_range(channel)
        return [
            gr.Slider(minimum=-span.largest, maximum=span.largest, step=span.largest / 100, value=span.suggested),
            about(dense, name),
            gr.Dataset(**samples_of(example_prompts(dense, channel))),
        ]

    with gr.Blocks(title=f"{run} – {TITLE}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(heading(run), apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                prompt = gr.Textbox(examples[0] if examples else "", label="Prompt", lines=4, elem_id="prompt")
                samples = gr.Dataset(
                    components=[gr.Textbox(visible=False)],
                    **samples_of(examples),
                    label="Prompts to try",
                    type="values",
                    elem_id="examples",
                )
                name = gr.Dropdown(
                    names,
                    value=first,
                    allow_custom_value=True,
                    label="Channel",
                    info="A name, or an address such as mlp.1.read.107",
                    elem_id="channel",
                )
                facts = gr.HTML(about(dense, first), apply_default_css=False)
                delta = gr.Slider(
                    -span.largest,
                    span.largest,
                    span.suggested,
                    step=span.largest / 100,
                    label="delta",
                    info="Added to the channel at every token, in units of its activation",
                    elem_id="delta",
                )
                where = gr.Radio(
                    [("read: only the next sublayer's input", "read"), ("stream: everything downstream", "stream")],
                    value="read",
                    label="where",
                )
                tokens = gr.Slider(0, most, min(NEW_TOKENS, most), step=1, precision=0, label="New tokens")
                with gr.Accordion("Sampling", open=False):
                    sample = gr.Checkbox(False, label="Draw tokens instead of taking the most likely")
                    temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed, of both continuations")
            with gr.Column(scale=7, min_width=340):
                result = gr.HTML(elem_id="result", apply_default_css=False)

        def show(*values: Any) -> str:
            # What was asked goes with its answer: whoever drives the page by program can tell it from the one before.
            _, channel, delta, *_ = values
            return Markup('<div data-channel="{}" data-delta="{}">{}</div>').format(
                channel, delta, Markup(answer(dense, *values))
            )

        values = [prompt, name, delta, where, tokens, sample, temperature, seed]
        # The last change counts: while an answer is being made, the slider moves on.
        now = {"fn": show, "inputs": values, "outputs": result, "trigger_mode": "always_last", **quiet}
        gr.on([page.load, *(value.change for value in values if value is not name)], **now)
        name.change(choose, name, [delta, facts, samples], **quiet).then(**now)
        samples.click(lambda chosen: chosen[0], samples, prompt, **quiet)
    return page


def answer(
    dense: Any,
    prompt: str,
    channel: str,
    delta: int | float | None,
    where: Any,
    new_tokens: int | None,
    sample: bool,
    temperature: int | float | None,
    seed: int | None,
) -> str:
    """What the page shows for its controls: a comparison, or one sentence on what is wrong with them."""
    try:
        if delta is None or new_tokens is None or temperature is None or seed is None:
            raise ValueError("a number is missing: fill in delta, the new tokens, the temperature and the seed")
        sampling = Sampling(temperature=temperature, seed=seed) if sample else None
        return shown(
            compare(dense, prompt, channel or "", delta, where=where, new_tokens=new_tokens, sampling=sampling)
        )
    except (ValueError, LookupError) as error:
        message = error.args[0] if isinstance(error, LookupError) and error.args else error
        return Markup('<div class="sb"><p class="error" role="alert">{}</p></div>').format(str(message))


def heading(run: str) -> str:
    return Markup(
        '<div class="sb"><h1>{}</h1><p class="quiet">The dense model of <code>{}</code>, moved along a channel of its '
        "sparse model, beside itself.</p></div>"
    ).format(TITLE, run)


def samples_of(prompts: list[str]) -> dict[str, Any]:
    """Prompts for `gradio.Dataset`, shown by their last lines: there they differ."""
    labels = [prompt.strip().split("\n")[-1].strip() for prompt in prompts]
    return {"samples": [[prompt] for prompt in prompts], "sample_labels": labels}


def about(dense: Any, name: str) -> str:
    """What is known of a channel."""
    channel = channel_named(dense, name)
    means = delta_range(channel).means
    site = Site(channel.site, get_bundle(dense).shape.n_layers).label
    indices = ", ".join(f"{i} ({signed(w)})" for i, w in zip(channel.indices, channel.weights, strict=True))
    parts = [f"{site}.read: {indices}"]
    if channel.description:
        parts.append(channel.description)
    if means:
        parts.append(f"mean in class 0: {signed(means[0])}, in class 1: {signed(means[1])}")
    lines = Markup("<br>").join(parts)
    return Markup('<div class="sb"><p class="quiet">{}</p></div>').format(lines)


def shown(found: Comparison) -> str:
    """A comparison as HTML. Prompts, tokens and names are untrusted: Markup.format escapes whatever it is given."""
    rows = found.top()
    before, after = (max(rows, key=lambda row: row[side]) for side in (2, 3))
    verdict = Markup("The most likely next token is {} ({}), steered {} ({}).").format(
        token(before.text), number(before.unsteered), token(after.text), number(after.steered)
    )
    table = Markup("").join(
        Markup(
            '<tr><th scope="row">{}</th><td class="bars" aria-hidden="true"><span class="bar plain" '
            'style="--p:{}"></span><span class="bar moved" style="--p:{}"></span></td>'
            '<td class="number">{}</td><td class="number">{}</td></tr>'
        ).format(
            token(row.text), f"{row.unsteered:.4f}", f"{row.steered:.4f}", number(row.unsteered), number(row.steered)
        )
        for row in rows
    )
    plain, moved = found.unsteered_generation, found.steered_generation
    pairs = zip(plain.text, moved.text, strict=False)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(plain.text), len(moved.text)))
    return Markup(
        '<div class="sb"><p class="verdict" role="status">{}</p><p class="quiet">KL(unsteered ‖ steered) of the next '
        "token: {} nats</p><h2>Next token</h2><table><thead><tr><th>token</th><th>probability</th>"
        '<th class="number"><span class="key plain"></span>unsteered</th>'
        '<th class="number"><span class="key moved"></span>steered</th></tr></thead><tbody>{}</tbody></table>'
        '<h2>Continuation</h2><div class="two">{}{}</div></div>'
    ).format(
        verdict,
        f"{found.kl:.3f}",
        table,
        continuation("Unsteered", found.prompt_text, plain, len(plain.text)),
        continuation("Steered", found.prompt_text, moved, same),
    )


def continuation(title: str, prompt: str, generation: Generation, same: int) -> Markup:
    """A prompt and what follows it; from character `same` of that on, marked."""
    ends = {"length": "", "end of text": "ended its text", "context": "stopped at the context's end"}
    return Markup(
        '<section><h3>{}</h3><pre><span class="prompt">{}</span><span class="new">{}</span>'
        '<span class="new other">{}</span></pre><p class="quiet">{}</p></section>'
    ).format(title, prompt, generation.text[:same], generation.text[same:], ends[generation.ended])


def token(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def number(p: float) -> str:
    """A probability."""
    return "<0.001" if 0 < p < 0.0005 else f"{p:.3f}"


def signed(x: float) -> str:
    return f"{x:+.2f}".replace("-", "−")


if __name__ == "__main__":
    with report_errors(), suppress(KeyboardInterrupt):
        main(tyro.cli(Options))
