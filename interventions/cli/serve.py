"""A local page on which one types a prompt, drags a channel's delta, and watches the dense model follow.

It is served to this machine alone and asks nothing of any other. Needs gradio: pip install 'sparse-bridges[serve]'

Examples:
    sparse-bridges serve                              # the bundle that comes with the package
    sparse-bridges serve --run runs/mine --port 8000
"""

from contextlib import suppress
from dataclasses import dataclass

from interventions.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """A local page: type a prompt, drag a channel's delta, and see the dense model's next token and text change."""

    run: str = "demo"
    """Run folder, or the name of a packaged bundle."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or cuda:N."""
    host: str = "127.0.0.1"
    """Address to serve on. Whoever reaches one that is not a loopback address can use the page."""
    port: int = 7860
    """Port to serve on; 0 takes a free one."""


def command(arguments: list[str]) -> None:
    options = parse(Options, "serve", arguments, __doc__)
    from interventions.app.server import serve

    with suppress(KeyboardInterrupt):
        serve(options.run, options.device, host=options.host, port=options.port)
