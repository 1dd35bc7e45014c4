"""An edit that did not run is an error: compiled models, switches, hooks that were taken off, layers computed twice."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from interventions import Intervention, intervene, intervene_vector, load_hf


@pytest.fixture
def hf(folder):
    return load_hf(folder)


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    out = model(tokens)
    return getattr(out, "logits", out)


COMPILED = """
import sys
import torch
from torch._dynamo.utils import counters
from interventions import intervene, load_hf

torch.manual_seed(0)
tokens = torch.randint(384, (2, 12))
hf = load_hf(sys.argv[1])
handle = intervene(hf, ["pair", "unembed.read.3"], delta=5)
plain = hf(tokens).logits
with handle:
    steered = hf(tokens).logits
for first in ("without", "under"):
    torch.compiler.reset()
    counters.clear()
    call = torch.compile(hf, backend="eager")
    if first == "under":
        with handle:
            call(tokens)
    for _ in range(2):
        assert torch.allclose(call(tokens).logits, plain, atol=1e-5), first
        with handle:
            assert torch.allclose(call(tokens).logits, steered, atol=1e-5), first
        with intervene(call, ["pair", "unembed.read.3"], delta=5, where="stream"):  # another one, on what is compiled
            other = call(tokens).logits
        assert (other - steered).abs().max() > 1e-2 and (other - plain).abs().max() > 1e-2, first
    assert counters["stats"]["calls_captured"] > 50, "nothing was compiled"
"""


def test_a_compiled_model_is_edited_under_a_handle_and_only_there(dense, folder) -> None:
    """In a process of its own: the compiler would trace the tests' run-time checks of types."""
    command = [sys.executable, "-c", COMPILED, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["block", "block in place", "norm", "forward"])
def test_a_part_that_is_compiled_by_itself_is_refused(hf, tokens: torch.Tensor, part: str) -> None:
    handle, block = intervene(hf, "pair", delta=5), hf.transformer.h[1]

    def compile_part() -> None:
        if part == "block":
            hf.transformer.h[1] = torch.compile(block, backend="eager")
        if part == "block in place":
            block.compile(backend="eager")
        if part == "norm":
            block.ln_1 = torch.compile(block.ln_1, backend="eager")
        if part == "forward":
            block.forward = torch.compile(block.forward, backend="eager")

    compile_part()
    with pytest.raises(ValueError, match="was compiled by itself"):
        handle.__enter__()


def test_hooks_that_are_taken_off_or_passed_by_are_named(dense, hf, tokens: torch.Tensor) -> None:
    for where in ("read", "stream"):
        missing = pytest.raises(RuntimeError, match=rf"did not run in this pass: attn\.1 \(where='{where}'\), mlp\.0")
        with intervene(dense, ["pair", "mlp.0.read.2"], delta=3, where=where):
            dense.reset_hooks(including_permanent=True)
            with missing:
                dense(tokens)
    with intervene(hf, "pair", delta=3):
        old, hf.transformer.h[1].ln_1 = hf.transformer.h[1].ln_1, torch.nn.LayerNorm(16)
        with pytest.raises(RuntimeError, match="did not run in this pass"):
            hf(tokens)
        hf.transformer.h[1].ln_1 = old
        hf(tokens)
    with intervene(dense, "mlp.1.read.2", delta=3):  # stopped by the caller before the edit: no pass, no error
        dense(tokens, stop_at_layer=1)


SWITCHES = ["use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_attn_result"]


@pytest.mark.parametrize("where", ["read", "stream"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_transformer_lens_switches_are_handled_or_refused(dense, tokens, switch: str, where: str) -> None:
    setter = getattr(dense, f"set_{switch}")
    for site in ("attn.1", "mlp.1", "unembed"):
        handle = intervene(dense, f"{site}.read.5", delta=4, where=where)
        with handle:
            expected = dense(tokens)
        setter(True)
        try:
            if switch in ("use_split_qkv_input", "use_attn_in") and (site, where) == ("attn.1", "read"):
                for use in (handle.__enter__, handle.hooks):
                    with pytest.raises(ValueError, match=rf"with {switch} attention reads past.*set_{switch}\(False\)"):
                        use()
                setter(False)
                with handle:
                    setter(True)
                    with pytest.raises(ValueError, match=f"with {switch}"):
                        dense(tokens)
                continue
            with handle:
                assert torch.allclose(dense(tokens), expected, atol=1e-5)
            assert torch.allclose(dense.run_with_hooks(tokens, fwd_hooks=handle.hooks()), expected, atol=1e-5)
        finally:
            setter(False)


def test_layers_that_are_computed_twice_are_refused(hf, tokens: torch.Tensor) -> None:
    vector = torch.randn(16, requires_grad=True)
    handle = intervene_vector(hf, 2, vector)
    hf.gradient_checkpointing_enable()
    with handle:  # in eval mode nothing is computed again
        expected = torch.autograd.grad(hf(tokens).logits.square().mean(), vector)[0]
    assert expected.abs().max() > 0
    hf.train()
    with pytest.raises(ValueError, match="gradient checkpointing computes layers again"):
        handle.__enter__()
    hf.eval()
    with handle:
        hf.train()
        with pytest.raises(ValueError, match="gradient checkpointing computes layers again"):
            hf(tokens)
    hf.gradient_checkpointing_disable()
    hf.eval()
    for reentrant in (True, False):
        with pytest.raises(ValueError, match=r"no torch\.utils\.checkpoint around it"), handle:
            checkpoint(lambda ids: hf(ids).logits, tokens, use_reentrant=reentrant)
    hf.train()
    hf(tokens).logits.sum()  # without a handle nothing is refused


def test_a_model_that_runs_only_in_other_threads_is_named(dense, hf, tokens: torch.Tensor) -> None:
    for model in (dense, hf):
        plain, answers = logits_of(model, tokens), []

        def run(model=model, answers=answers) -> None:
            answers.append(logits_of(model, tokens))

        handle = intervene(model, "pair", delta=5)
        handle.__enter__()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="ran 1 times during the block, but in other threads"):
            handle.__exit__(None, None, None)
        with intervene(model, "pair", delta=5):
            thread = threading.Thread(target=copy_context().run, args=(run,))
            thread.start()
            thread.join()
            steered = logits_of(model, tokens)
        assert torch.equal(answers[0], plain)
        assert torch.equal(answers[1], steered)
        with intervene(model, "pair", delta=5):
            pass  # nothing ran, so nothing was missed


def test_a_handle_is_left_by_another_thread_than_it_was_entered_by(hf, tokens: torch.Tensor) -> None:
    plain, handle = hf(tokens).logits, intervene(hf, "pair", delta=5)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(handle.__enter__).result()
        assert not torch.equal(pool.submit(lambda: hf(tokens).logits).result(), plain)
        handle.__exit__(None, None, None)
        assert torch.equal(pool.submit(lambda: hf(tokens).logits).result(), plain)
    assert isinstance(handle, Intervention)
