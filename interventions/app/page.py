"""The page: a prompt, a channel and its delta beside what the dense model makes of them, in gradio."""

from typing import Any, NamedTuple

from markupsafe import Markup

from interventions.app.html import NEW, OTHER, TITLE, about, answer, heading
from interventions.app.live import channel_named, example_prompts
from interventions.app.start import delta_range, start_of
from interventions.bundle.bundle import get_bundle
from interventions.report.generations import NEW_TOKENS

LARGEST_NEW_TOKENS = 128
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto}
#page {display: grid; grid-template: "edit answers" auto "settings answers" 1fr / 5fr 7fr; align-items: start}
#edit {grid-area: edit} #answers {grid-area: answers} #settings {grid-area: settings}
#page > * {min-width: 0}
.sb {color: var(--body-text-color); line-height: 1.45}
.sb h1 {font-size: 1.5rem; font-weight: 650; margin: 0}
.sb h2 {font-size: .95rem; font-weight: 650; margin: 1.4rem 0 .5rem}
.sb p {margin: .2rem 0}
.sb .quiet {color: var(--body-text-color-subdued); font-size: .85rem}
.sb code {font-family: var(--font-mono); font-size: .85rem}
.sb code {background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  border-radius: 4px; padding: .05rem .3rem; white-space: pre-wrap; overflow-wrap: anywhere}
.sb .verdict {font-size: 1.05rem}
.sb .error {border-left: 4px solid var(--error-icon-color, #dc2626); background: var(--background-fill-secondary);
  border-radius: 4px; padding: .7rem .9rem; overflow-wrap: anywhere}
.sb table {border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums}
.sb th, .sb td {padding: .28rem .5rem; border: none; border-bottom: 1px solid var(--border-color-primary);
  text-align: left; font-weight: 400; vertical-align: middle}
.sb thead th {font-size: .8rem; color: var(--body-text-color-subdued)}
.sb .number {text-align: right; width: 5.8rem; white-space: nowrap}
.sb .bars {width: 40%}
.sb .bar {display: block; height: .5rem; margin: .1rem 0; border-radius: 2px; min-width: 1px;
  width: calc(100% * var(--p))}
.sb .plain {background: var(--neutral-400)}
.sb .moved {background: var(--primary-500)}
.sb .chance {background: repeating-linear-gradient(45deg, var(--neutral-500) 0 2px, transparent 2px 4px)}
.sb .key {display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .35rem}
#examples button {font-family: var(--font-mono); font-size: .8rem; max-width: 100%; overflow: hidden;
  text-overflow: ellipsis; white-space: pre}
@media (max-width: 760px) {
  #page {grid-template: "edit" "answers" "settings" / 1fr}
}
@media (max-width: 640px) {
  .sb .number {width: auto; white-space: normal; padding: .28rem .2rem}
  .sb th code {overflow-wrap: normal}
  .sb .bars {width: 25%}
}
#prompt textarea, #continuations .textfield {font-family: var(--font-mono); font-size: .85rem}
"""


class Controls(NamedTuple):
    """The components that a reader sets, and those that follow the channel."""

    prompt: Any
    name: Any
    delta: Any
    where: Any
    tokens: Any
    sample: Any
    temperature: Any
    seed: Any
    samples: Any
    facts: Any

    @property
    def values(self) -> list[Any]:
        """What `answer` takes, in its order."""
        return list(self[:8])


def make_page(gr: Any, dense: Any, run: str) -> Any:
    """The page itself, as `gradio.Blocks`. Every text that is not ours is escaped (see `shown`)."""
    quiet = {"api_visibility": "private", "show_progress": "hidden"}

    def choose(name: str, prompt: str) -> list[Any]:
        try:
            channel = channel_named(dense, name or "")
        except (ValueError, LookupError):
            return [gr.skip(), "", gr.skip(), gr.skip()]  # `show` says why
        span, start, prompts = delta_range(channel), start_of(dense, channel), example_prompts(dense, channel)
        keep = prompt not in offered or not prompts  # what the reader typed stays
        offered.update(prompts)
        return [
            gr.Slider(minimum=-span.largest, maximum=span.largest, step=span.largest / 100, value=start.delta),
            about(dense, name, start),
            gr.Dataset(**samples_of(prompts)),
            gr.skip() if keep else prompts[0],
        ]

    def show(*values: Any) -> list[Any]:
        # What was asked goes with its answer: whoever drives the page by program can tell it from the one before.
        _, channel, delta, *_ = values
        html, *both = answer(dense, *values)
        asked = Markup('<div data-channel="{}" data-delta="{}">{}</div>').format(channel, delta, Markup(html))
        return [asked, *(gr.HighlightedText(c.parts, label=c.label, visible=bool(c.parts)) for c in both)]

    offered: set[str] = set()
    """Prompts that the page itself put into the prompt's field, or offered for it."""

    with gr.Blocks(title=f"{run} – {TITLE}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(heading(run), apply_default_css=False)
        with gr.Row(elem_id="page"):
            controls = _controls(gr, dense, offered)
            with gr.Column(elem_id="answers"):
                outputs = _answers(gr)
        # The last change counts: while an answer is being made, the slider moves on.
        now = {"fn": show, "inputs": controls.values, "outputs": outputs, "trigger_mode": "always_last", **quiet}
        gr.on([page.load, *(value.change for value in controls.values if value is not controls.name)], **now)
        follows = [controls.delta, controls.facts, controls.samples, controls.prompt]
        controls.name.change(choose, [controls.name, controls.prompt], follows, **quiet).then(**now)
        controls.samples.click(lambda chosen: chosen[0], controls.samples, controls.prompt, **quiet)
    return page


def _controls(gr: Any, dense: Any, offered: set[str]) -> Controls:
    """Everything that can be set, delta on top: it is what one drags."""
    bundle = get_bundle(dense)
    names = list(bundle.channels)
    first = names[0] if names else "attn.0.read.0"
    channel = channel_named(dense, first)
    span, start, examples = delta_range(channel), start_of(dense, channel), example_prompts(dense, channel)
    offered.update(examples)
    most = min(LARGEST_NEW_TOKENS, bundle.anatomy.n_ctx - 1)
    with gr.Column(elem_id="edit"):
        delta = gr.Slider(
            -span.largest,
            span.largest,
            start.delta,
            step=span.largest / 100,
            label="delta",
            info="Added to the channel at every token: the delta of intervene, in units of the channel's activation",
            elem_id="delta",
        )
        prompt = gr.Textbox(examples[0] if examples else "", label="Prompt", lines=4, elem_id="prompt")
    with gr.Column(elem_id="settings"):
        name = gr.Dropdown(
            names,
            value=first,
            allow_custom_value=True,
            label="Channel",
            info="A name, or an address such as mlp.1.read.107",
            elem_id="channel",
        )
        facts = gr.HTML(about(dense, first, start), apply_default_css=False)
        samples = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            **samples_of(examples),
            label="Prompts to try",
            type="values",
            elem_id="examples",
        )
        wheres = [("read: only the next sublayer's input", "read"), ("stream: everything downstream", "stream")]
        where = gr.Radio(wheres, value="read", label="where")
        tokens = gr.Slider(0, most, min(NEW_TOKENS, most), step=1, precision=0, label="New tokens")
        sampling = _sampling(gr)
    return Controls(prompt, name, delta, where, tokens, *sampling, samples, facts)


def _sampling(gr: Any) -> tuple[Any, Any, Any]:
    with gr.Accordion("Sampling", open=False):
        sample = gr.Checkbox(False, label="Draw tokens instead of taking the most likely")
        temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed, of both continuations")
    return sample, temperature, seed


def _answers(gr: Any) -> list[Any]:
    """The distributions, and the three continuations."""
    result = gr.HTML(elem_id="result", apply_default_css=False)
    colours = {NEW: "gray", OTHER: "orange"}
    with gr.Row(elem_id="continuations"):
        sides = [gr.HighlightedText(color_map=colours, show_inline_category=False, visible=False) for _ in range(3)]
    return [result, *sides]


def samples_of(prompts: list[str]) -> dict[str, Any]:
    """Prompts for `gradio.Dataset`, shown by their last lines: there they differ."""
    labels = [prompt.strip().split("\n")[-1].strip() for prompt in prompts]
    return {"samples": [[prompt] for prompt in prompts], "sample_labels": labels}
