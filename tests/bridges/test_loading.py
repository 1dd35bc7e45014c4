"""What loads is the model in the files, and everything that would be another one is refused by name."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import tiny_lm
from support.helpers import tiny_tokenizer
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from bridges.dense import cast_parameters
from bridges.lens_view import boot
from bridges.loading import load_lm
from sparse_model.data.tokenizer import load_tokenizer, save_tokenizer

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("models") / "good"
    tiny_lm("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path) -> None:
    lm = load_lm(folder)
    (folder / "model.safetensors").unlink()
    lm.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


WORKING: dict[str, Callable[[Path], None]] = {
    "as it is": lambda folder: None,
    "sharded": shard,
    "a base model's names, without the head": lambda folder: rewrite(
        folder, lambda t: {name.removeprefix("transformer."): value for name, value in t.items()}
    ),
    "a pickle alone": lambda folder: (
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"),
        (folder / "model.safetensors").unlink(),
    )[1],
    "constants of earlier versions": lambda folder: rewrite(
        folder, lambda t: t | {"transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    ),
}


@pytest.mark.parametrize("change", WORKING.values(), ids=WORKING)
def test_every_form_of_the_files_is_the_same_model(
    good: Path, model: Path, tokens: torch.Tensor, change: Callable[[Path], None]
) -> None:
    change(model)
    assert torch.equal(load_lm(model).eval()(tokens).logits, tiny_lm("gpt2")(tokens).logits)


def test_an_untied_head_and_bfloat16_stay_what_they_are(tmp_path: Path, tokens: torch.Tensor) -> None:
    lm = tiny_lm("llama", tie_word_embeddings=False)
    cast_parameters(lm, torch.bfloat16)
    lm.save_pretrained(tmp_path)
    assert torch.equal(load_lm(tmp_path, torch.bfloat16)(tokens).logits, lm(tokens).logits)
    assert torch.equal(load_lm(tmp_path)(tokens).logits, lm.float()(tokens).logits)


def test_a_head_of_its_own_under_a_config_that_ties_it_is_kept(model: Path, tokens: torch.Tensor) -> None:
    head = torch.randn(384, 16)
    rewrite(model, lambda t: t | {"lm_head.weight": head})
    loaded = load_lm(model)
    assert torch.equal(loaded.lm_head.weight, head)
    loaded.save_pretrained(model.parent / "copy")
    assert torch.equal(load_lm(model.parent / "copy")(tokens).logits, loaded(tokens).logits)


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("went off"),))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Bomb()}))


def lose_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def set_nan(tensors: Tensors) -> Tensors:
    tensors["transformer.h.1.mlp.c_fc.weight"][2, 3] = torch.nan
    return tensors


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty: copy it again"),
    "pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a Git LFS pointer, not the file itself: run git lfs pull in ",
    ),
    "pointer for a config": (lambda f: (f / "config.json").write_text(POINTER), r"config\.json is a Git LFS pointer"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]),
        r"model\.safetensors is damaged or truncated",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"model holds no weights: it needs model\.safetensors",
    ),
    "missing shard": (lose_shard, r"model-00002-of-\d+\.safetensors does not exist, but .*index\.json lists it"),
    "torch.compile's prefix": (
        lambda f: rewrite(f, lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}),
        r"model\.safetensors: the names of its tensors begin with '_orig_mod\.', which torch\.compile puts before them",
    ),
    "a parallel wrapper's prefix": (
        lambda f: rewrite(f, lambda t: {f"module.{n}": v for n, v in t.items()}),
        r"begin with 'module\.'.*take the prefix off",
    ),
    "a training framework's prefix": (
        lambda f: rewrite(f, lambda t: {f"net.lm.{n}": v for n, v in t.items()}),
        r"begin with 'net\.lm\.', which a wrapper puts before them",
    ),
    "missing tensors": (
        lambda f: rewrite(f, lambda t: {n: v for n, v in t.items() if ".h.1.mlp." not in n}),
        r"lacks 4 of the tensors of a GPT2LMHeadModel \(transformer\.h\.1\.mlp\.c_fc\.bias, .*, \.\.\.\), which ",
    ),
    "no tensor": (lambda f: rewrite(f, lambda t: {}), r"lacks \d\d of the tensors"),
    "an untied head that is not there": (
        lambda f: set_config(f, tie_word_embeddings=False),
        r"lacks 1 of the tensors of a GPT2LMHeadModel \(lm_head\.weight\)",
    ),
    "too many tensors": (
        lambda f: rewrite(f, lambda t: t | {"transformer.h.2.ln_1.weight": torch.ones(16)}),
        r"holds 1 tensors that a GPT2LMHeadModel of this config has no place for \(transformer\.h\.2\.ln_1\.weight\)",
    ),
    "another config": (
        lambda f: set_config(f, n_embd=32),
        r"does not fit config\.json: transformer\.h\.0\.attn\.c_attn\.bias has shape \(48,\) instead of \(96,\)",
    ),
    "a billion layers": (lambda f: set_config(f, n_layer=10**9), r"1000000000 layers, but .* holds \d\d tensors"),
    "a width that no memory holds": (lambda f: set_config(f, n_embd=2**22), r"does not fit config\.json"),
    "a number that is none": (
        lambda f: rewrite(f, set_nan),
        r"model\.safetensors: 1 of the 1024 values of transformer\.h\.1\.mlp\.c_fc\.weight are not finite",
    ),
    "a pickle that runs code": (pickled, r"could not load a language model from .*pytorch_model\.bin"),
    "an encoder": (lambda f: set_config(f, model_type="bert", architectures=["BertModel"]), r"is a 'bert' model \(its"),
    "quantised": (
        lambda f: set_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"is quantised, and gradients have to pass",
    ),
    "code of its own": (
        lambda f: set_config(f, model_type="mine", auto_map={"AutoConfig": "mine.C"}),
        r"could not load a language model",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_another_model_is_refused_in_one_sentence(
    model: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], message: str
) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (model / "mine.py").write_text("open('went off', 'w')")
    change(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        load_lm(model)
    assert "\n" not in str(refused.value)
    assert not Path("went off").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_attn_weights": False}, r"TransformerLens' view of this GPT2LMHeadModel.* differ by up to \d\S* where"),
        ({"add_cross_attention": True}, r"TransformerLens' view of this GPT2LMHeadModel does not run"),
    ],
)
def test_a_view_that_is_another_model_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    save_tokenizer(tiny_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=message):
        boot(tiny_lm("gpt2", **settings), load_tokenizer(tmp_path))


def test_transformers_bar_is_hidden_and_put_back(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[dict] = []

    def of_the_caller(bar: Callable, args: tuple, options: dict) -> object:
        seen.append(options)
        return bar(*args, **options)

    logging.enable_progress_bar()
    before = logging.set_tqdm_hook(of_the_caller)
    try:
        load_lm(good)
        assert (seen, capsys.readouterr().err) == ([], "")
        GPT2LMHeadModel.from_pretrained(good)
        assert [options["desc"] for options in seen] == ["Loading weights"]
        assert "Loading weights: 100%" in capsys.readouterr().err
    finally:
        logging.set_tqdm_hook(before)
