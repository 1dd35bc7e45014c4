"""A wrapper that loses the prompt when it generates with a cache is refused, with the versions and the remedy."""

from typing import Any

import pytest
import torch

from interventions import load_dense, load_hf
from interventions.bundle import generation_check


def test_both_views_of_the_packaged_model_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_check, "_checked", set())
    load_dense("demo")
    load_hf("demo")
    assert len(generation_check._checked) == 2


@pytest.mark.parametrize("option", ["use_past_kv_cache", "use_cache"])
def test_a_lost_prompt_is_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_check, "_checked", set())
    model = load_dense("demo") if option == "use_past_kv_cache" else load_hf("demo")
    monkeypatch.setattr(generation_check, "_checked", set())
    generate = model.generate

    def forgetful(rows: torch.Tensor, **options: Any) -> torch.Tensor:
        if not options[option]:
            return generate(rows, **options)
        options.pop("attention_mask", None)
        new = generate(rows[:, -1:], **options)[:, 1:]
        return torch.cat([rows, new], 1)

    monkeypatch.setattr(model, "generate", forgetful)
    with pytest.raises(
        RuntimeError, match=r"transformers \d.*transformer-lens \d.*loses the prompt.*'transformers[<>=]"
    ):
        generation_check.check_generation(model, option, 512, 128)
    assert not generation_check._checked
