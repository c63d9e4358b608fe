"""The flat layouts of the GPU benchmark on a CPU: what a kernel is asked to compute equals attention under the dense mask, and separate scoring."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from benchmarks.gpu_attention import FLEX, VARLEN, block_mask, flat_hidden, lay_out, register, use_attention, varlen_reference, visible
from synpref_ray.reward.packing import Group, make_group


def make_groups(seed: int = 0) -> list[Group]:
    """Return shared groups of 2 and 4 replies, one whose reply is the prefix itself, and one that is not shared."""
    chance = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return chance.integers(5, 90, count).astype(np.int32)

    def shared(prefix: int, *rests: int) -> Group:
        common = tokens(prefix)
        branches = [np.concatenate([common, [number], tokens(rest)]).astype(np.int32)[: prefix + rest] for number, rest in enumerate(rests)]
        group = make_group(branches)
        assert group.shared
        return group

    return [shared(11, 4, 7), shared(6, 3, 1, 5, 2), shared(8, 0, 5), make_group([tokens(5), tokens(9)], may_share=False)]


@pytest.mark.parametrize("pad_to", [0, 128])
def test_varlen_equals_dense_mask(pad_to: int) -> None:
    layout = lay_out(make_groups(), pad_to)
    size = len(layout.input_ids)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(size, heads, 8, generator=generator) for heads in (4, 2, 2))
    found = varlen_reference(query, key[layout.key_index], value[layout.key_index], layout.cu_q, layout.cu_k, 0.3)
    batched = (states.transpose(0, 1)[None] for states in (query, key, value))
    expected = functional.scaled_dot_product_attention(*batched, attn_mask=visible(layout), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_visible_pairs_counts_the_dense_mask() -> None:
    layout = lay_out(make_groups())
    assert layout.visible_pairs == int(visible(layout).sum())


def test_keys_are_gathered_only_where_something_is_shared() -> None:
    groups = make_groups()
    assert lay_out(groups).gathers
    assert not lay_out([make_group(group.sequences, may_share=False) for group in groups]).gathers


@pytest.mark.parametrize("attention", [VARLEN, FLEX])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flat_row_equals_separate_scoring(family: str, attention: str) -> None:
    shape = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**shape)) if family == "llama" else Qwen3Model(Qwen3Config(**shape, head_dim=16))
    model.eval()
    groups = make_groups()
    layout = lay_out(groups, 128)
    register()
    with torch.no_grad():
        separate = [model(torch.from_numpy(sequence.astype(np.int64))[None]).last_hidden_state[0, -1] for g in groups for sequence in g.sequences]
        use_attention(model, attention)
        hidden = flat_hidden(model, layout, block_mask(layout) if attention == FLEX else None)
    torch.testing.assert_close(hidden[layout.last], torch.stack(separate), atol=1e-5, rtol=1e-4)
