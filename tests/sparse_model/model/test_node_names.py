"""Node names: OpenAI's published ones are read, printed and found in the cache."""

import pytest
import torch

from sparse_model.config import SparseConfig
from sparse_model.model.node_names import Node, parse_node
from sparse_model.model.transformer import SparseTransformer

CFG = SparseConfig(n_layers=11, d_model=512, d_mlp=64, n_heads=90, d_head=4, d_vocab=20, n_ctx=8)


@pytest.mark.parametrize(
    "name",
    ["0.mlp.resid_delta.460", "10.attn.qk.head82.ch1", "3.attn.v.head0.ch3", "2.mlp.post_act.63", "1.resid_in.5"],
)
def test_published_names_are_read_and_printed(name: str) -> None:
    assert str(parse_node(name, CFG)) == name


def test_short_reads() -> None:
    assert parse_node("attn.1.read.146", CFG) == Node(1, "attn.act_in", 146)
    assert str(parse_node("mlp.0.read.7", CFG)) == "0.mlp.act_in.7"


def test_nodes_are_found_in_the_cache() -> None:
    cfg = SparseConfig(d_model=32, d_mlp=48, n_heads=4, d_head=8, n_ctx=8, d_vocab=20)
    model = SparseTransformer(cfg)
    _, cache = model.run_with_cache(torch.randint(20, (1, 6)))
    for name in (
        "0.mlp.resid_delta.31",
        "1.attn.qk.head3.ch7",
        "1.attn.y.head0.ch0",
        "0.resid_mid.9",
        "1.mlp.act_in.4",
    ):
        node = parse_node(name, cfg)
        for hook in node.hooks:
            assert cache[hook][(..., *node.channel_index)].shape == (1, 6)
    assert len(parse_node("1.attn.qk.head3.ch7", cfg).hooks) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "is no node name"),
        ("0.mlp.banana.3", "unknown place 'mlp.banana'"),
        ("0.attn.q.3", "takes head and channel"),
        ("0.mlp.post_act.head1.ch2", "takes one index"),
        ("11.resid_in.0", "layer 11 is out of range, the model has 11"),
        ("0.attn.k.head90.ch0", "head 90 is out of range, the model has 90"),
        ("0.mlp.post_act.64", "index 64 is out of range, the model has 64"),
    ],
)
def test_bad_names_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_node(name, CFG)
