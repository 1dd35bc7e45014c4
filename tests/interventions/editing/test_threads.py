"""One model, several threads: each call gives what it gives alone, under a handle of its own or none."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from interventions import intervene, load_hf

CALLS = 160
"""A thousand take no other path, only longer."""


@pytest.fixture(scope="module")
def hf(folder):
    return load_hf(folder)


def jobs(model, *, generating: bool) -> list[Callable[[], torch.Tensor]]:
    """Calls of many kinds; each makes its own handle, or none."""
    generator, made = torch.Generator().manual_seed(0), []
    options = {"max_new_tokens": 3, "do_sample": False}
    if hasattr(model, "to_tokens"):
        options |= {"verbose": False, "stop_at_eos": False}
    else:
        options |= {"eos_token_id": None, "pad_token_id": 0}
    shared = intervene(model, "unembed.read.3", delta=2)
    for i, (batch, length) in enumerate([(1, 7), (3, 9), (2, 12), (4, 5)]):
        tokens = torch.randint(1, 384, (batch, length), generator=generator)
        mask = torch.ones_like(tokens)
        mask[-1, : i % 3] = 0
        edits: list[dict[str, Any] | None] = [
            None,
            {"delta": 3 + i},
            {"delta": torch.arange(batch) * 1.0, "positions": [0, -1], "where": "stream"},
            {"set_to": 2.0, "positions": -2},
            {"toward": tokens.flip(1), "strength": 2.0},
        ]
        for edit in edits:

            def forward(tokens=tokens, mask=mask, edit=edit) -> torch.Tensor:
                with nullcontext() if edit is None else intervene(model, ["pair", "mlp.0.read.2"], **edit):
                    out = model(tokens, attention_mask=mask)
                return getattr(out, "logits", out)

            def generate(tokens=tokens, mask=mask, edit=edit) -> torch.Tensor:
                with nullcontext() if edit is None else intervene(model, "pair", **edit):
                    return model.generate(tokens, attention_mask=mask, **options)

            made.append(generate if generating else forward)

        def use_shared(tokens=tokens, mask=mask) -> torch.Tensor:
            with shared:
                out = model(tokens, attention_mask=mask)
            return getattr(out, "logits", out)

        made.append(use_shared)
    return made


@pytest.mark.parametrize("generating", [False, True])
@pytest.mark.parametrize("kind", ["dense", "hf"])
@torch.no_grad()
def test_calls_in_eight_threads_are_those_of_one(request, kind: str, generating: bool) -> None:
    model = request.getfixturevalue(kind)
    work = jobs(model, generating=generating)
    alone = [job() for job in work]
    order = [random.Random(0).randrange(len(work)) for _ in range(CALLS // (2 if generating else 1))]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: work[i](), order))
    for i, answer in zip(order, answers, strict=True):
        assert torch.equal(answer, alone[i]), i
    # And nothing is left behind.
    for job, expected in zip(work, alone, strict=True):
        assert torch.equal(job(), expected)


def test_a_hook_may_call_the_model_inside_its_own_pass(dense, hf, tokens: torch.Tensor) -> None:
    other = torch.randint(1, 384, (3, 5))
    for model, module in ((dense, dense.blocks[0].ln2.hook_out), (hf, hf.transformer.h[0].ln_2)):
        edits: list[dict[str, Any]] = [
            {},
            {"delta": 4, "positions": -1},
            {"delta": 4, "where": "stream", "steps": "prompt"},
            {"toward": tokens.flip(1)},
        ]
        for edit in edits:
            nested: list[torch.Tensor] = []
            inner_tokens = tokens + 0 if "toward" in edit else other

            def call(module, inputs, output, model=model, nested=nested, inner=inner_tokens) -> None:
                if len(nested) % 2 == 0:  # not inside the inner pass
                    nested.append(torch.empty(0))
                    out = model(inner)
                    nested.append(getattr(out, "logits", out))

            handle = intervene(model, ["pair", "mlp.1.read.4"], **edit) if edit else nullcontext()
            with handle:
                expected, alone = (getattr(out := model(t), "logits", out) for t in (tokens, inner_tokens))
                hook = module.register_forward_hook(call)
                try:
                    out = model(tokens)
                finally:
                    hook.remove()
            assert torch.equal(getattr(out, "logits", out), expected), edit
            assert torch.equal(nested[1], alone), edit
