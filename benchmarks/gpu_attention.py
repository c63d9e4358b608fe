"""Attention over prefix-shared conversations on a GPU without a dense mask, in one flat row without padding; needs torch and transformers.

Layout: the groups of a micro-batch follow each other in one row, each as `[prefix | rest of reply 1 | rest of reply 2 | ...]`, positions restarting
after the prefix. Two ways to let a branch see the prefix and itself, and nothing else:

- variable length: every prefix and every branch is a *segment* of queries. The keys of a prefix are its own tokens; the keys of a branch are
  the prefix's tokens followed by its own, gathered by an index, so that key/value rows of a prefix are read once per branch while queries,
  and everything outside attention, exist once. Causal masks of unequal lengths must be aligned to the *bottom right*: query i of a branch
  behind a prefix of P tokens sees the keys up to P + i. That is what FlashAttention has done since 2.1 and what PyTorch's `varlen_attn`,
  built on it, does (its documentation does not say so; `check_kernel` tests it on the machine at hand before anything is timed).
- FlexAttention: a `BlockMask` made from group, branch and position.

`varlen_reference` is variable-length attention in plain torch: the meaning of the kernel, for tests and for machines without it.

Shape legend: T tokens of the row, K gathered keys, N segments, H query heads, G key heads, D head size, S sequences.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from benchmarks import _standalone  # noqa: F401
from synpref_ray.reward.packing import PREFIX, Group

VARLEN, FLEX = "shared_varlen", "shared_flex"
PADDING_GROUP = -1


@dataclass(frozen=True)
class FlatLayout:
    """One flat row of groups. Segment n holds the queries cu_q[n] to cu_q[n + 1] and the gathered keys cu_k[n] to cu_k[n + 1]."""

    input_ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64
    groups: torch.Tensor  # (T,) int32
    branches: torch.Tensor  # (T,) int32, PREFIX or 1, 2, ...
    last: torch.Tensor  # (S,) int64, the last token of every sequence
    key_index: torch.Tensor  # (K,) int64, tokens of the row
    cu_q: torch.Tensor  # (N + 1,) int32
    cu_k: torch.Tensor  # (N + 1,) int32
    max_q: int
    max_k: int
    gathers: bool  # false: the keys are the row itself

    def to(self, device: torch.device | str) -> "FlatLayout":
        """Return the layout on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        return FlatLayout(**moved)

    @property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs attention has to compute."""
        queries, keys = self.cu_q.diff().long(), self.cu_k.diff().long()
        return int((queries * (keys - queries) + queries * (queries + 1) // 2).sum())


def lay_out(groups: Sequence[Group], pad_to: int = 0) -> FlatLayout:
    """Lay groups out in one row; with `pad_to`, filled up to that many tokens (a shape that never changes) by a segment nothing else sees."""
    row = _Row()
    for number, group in enumerate(groups):
        prefix = group.prefix_tokens if group.shared else 0
        shared = row.add(group.sequences[0][:prefix], 0, number, PREFIX, [])
        for branch, sequence in enumerate(group.sequences, start=1):
            own = row.add(sequence[prefix:], prefix, number, branch, shared)
            row.last.append((own or shared)[-1])
    if pad_to > row.tokens:
        row.add(np.zeros(pad_to - row.tokens, dtype=np.int32), 0, PADDING_GROUP, PREFIX, [])
    cu_q, cu_k = np.cumsum([0, *row.num_queries]), np.cumsum([0, *row.num_keys])
    return FlatLayout(
        input_ids=_tensor(np.concatenate(row.ids), torch.int64),
        positions=_tensor(np.concatenate(row.positions), torch.int64),
        groups=_tensor(np.concatenate(row.groups), torch.int32),
        branches=_tensor(np.concatenate(row.branches), torch.int32),
        last=torch.tensor(row.last, dtype=torch.int64),
        key_index=_tensor(np.concatenate(row.keys), torch.int64),
        cu_q=_tensor(cu_q, torch.int32),
        cu_k=_tensor(cu_k, torch.int32),
        max_q=max(row.num_queries),
        max_k=max(row.num_keys),
        gathers=row.num_keys != row.num_queries,
    )


class _Row:
    """A flat row as it grows."""

    def __init__(self) -> None:
        self.tokens = 0
        self.ids: list[Any] = []
        self.positions: list[Any] = []
        self.groups: list[Any] = []
        self.branches: list[Any] = []
        self.keys: list[Any] = []
        self.num_queries: list[int] = []
        self.num_keys: list[int] = []
        self.last: list[int] = []

    def add(self, ids: Any, first_position: int, group: int, branch: int, shared: range | list[int]) -> range | list[int]:
        """Append a segment, unless it is empty, and return the places of its tokens in the row."""
        count = len(ids)
        if count == 0:
            return []
        own = range(self.tokens, self.tokens + count)
        self.tokens += count
        self.ids.append(ids)
        self.positions.append(np.arange(first_position, first_position + count))
        self.groups.append(np.full(count, group))
        self.branches.append(np.full(count, branch))
        self.keys += [np.asarray(shared, dtype=np.int64), np.asarray(own, dtype=np.int64)]
        self.num_queries.append(count)
        self.num_keys.append(len(shared) + count)
        return own


def _tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(values)).to(dtype)


def visible(layout: FlatLayout) -> torch.Tensor:
    """Return the dense mask that both ways stand for, shape (T, T): [query, key]."""
    same_group = layout.groups[:, None] == layout.groups[None, :]
    same_branch = (layout.branches[:, None] == layout.branches[None, :]) | (layout.branches[None, :] == PREFIX)
    return same_group & same_branch & (layout.positions[:, None] >= layout.positions[None, :])


def varlen_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend segment by segment, causal and aligned to the bottom right: query (T, H, D), key and value (K, G, D); returns (T, H, D)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    pieces = []
    for q0, q1, k0, k1 in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]).float() * scale
        ahead = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=query.device).triu(1 + (k1 - k0) - (q1 - q0))
        weights = scores.masked_fill(ahead, float("-inf")).softmax(dim=-1).to(value.dtype)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, value[k0:k1]))
    return torch.cat(pieces)


Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, FlatLayout, float], torch.Tensor]


@cache
def varlen_kernel() -> Varlen | None:
    """Return torch's variable-length kernel behind one signature; None where torch has none (before 2.10)."""
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: FlatLayout, scale: float) -> torch.Tensor:
        options = dict(causal)
        if key.shape[1] != query.shape[1]:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        if "scale" in known:
            options["scale"] = scale
        elif scale != query.shape[-1] ** -0.5:
            raise ValueError(f"this torch's varlen_attn has no scale, and {scale} is not 1/sqrt({query.shape[-1]})")
        result: torch.Tensor = varlen_attn(query, key, value, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, **options)
        return result

    return attend


def check_kernel(device: torch.device) -> float | None:
    """Compare the kernel with the reference on a small shared layout, outputs and gradients, in bfloat16.

    Returns:
        The greatest difference over the greatest value (below 0.03 is bfloat16 rounding; a mask aligned otherwise gives far more), None
        where there is no kernel.
    """
    kernel = varlen_kernel()
    if kernel is None or device.type != "cuda":
        return None
    sequences = [np.arange(150, dtype=np.int32), np.concatenate([np.arange(90), np.arange(200, 231)]).astype(np.int32)]
    layout = lay_out([Group(tuple(sequences), 90, shared=True)] * 3).to(device)
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((len(layout.input_ids), 8, 64), (len(layout.input_ids), 2, 64), (len(layout.input_ids), 2, 64))
    inputs = [torch.randn(shape, device=device, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    found = []
    for attend in (kernel, lambda q, k, v, layout, scale: varlen_reference(q, k, v, layout.cu_q, layout.cu_k, scale)):
        query, key, value = inputs
        output = attend(query, key[layout.key_index], value[layout.key_index], layout, 0.125)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    return max(float((one.float() - other.float()).abs().max() / other.float().abs().max()) for one, other in zip(*found, strict=True))


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    layout: FlatLayout,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query (1, H, T, D), key and value (1, G, T, D); returns (1, T, H, D)."""
    flat_query, flat_key, flat_value = (states[0].transpose(0, 1) for states in (query, key, value))
    if layout.gathers:
        flat_key, flat_value = flat_key[layout.key_index], flat_value[layout.key_index]
    kernel = varlen_kernel() if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else None
    if kernel is not None:
        output = kernel(flat_query.contiguous(), flat_key.contiguous(), flat_value.contiguous(), layout, scaling)
    else:
        output = varlen_reference(flat_query, flat_key, flat_value, layout.cu_q, layout.cu_k, scaling)
    return output[None], None


def block_mask(layout: FlatLayout) -> Any:
    """Return FlexAttention's mask of a layout."""
    from torch.nn.attention.flex_attention import create_block_mask

    groups, branches, positions = layout.groups, layout.branches, layout.positions

    def seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same_branch = (branches[key] == branches[query]) | (branches[key] == PREFIX)
        return (groups[key] == groups[query]) & same_branch & (positions[query] >= positions[key])

    size = len(layout.input_ids)
    return create_block_mask(seen, 1, None, size, size, device=str(groups.device), _compile=groups.is_cuda)


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def flex_attention_over(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *, scaling: float, blocks: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface with `blocks`, a BlockMask; shapes as in `varlen_attention`. Compiled on a GPU only."""
    output = _flex(query.is_cuda)(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return output.transpose(1, 2), None


def register() -> None:
    """Make both known to transformers, which then leaves masks to them."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionInterface.register(FLEX, flex_attention_over)


def use_attention(model: Any, name: str) -> None:
    """Let every layer of a model attend by the implementation `name` from now on."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = name


def flat_hidden(backbone: Any, layout: FlatLayout, blocks: Any = None) -> torch.Tensor:
    """Return the backbone's last hidden states over a flat row, shape (T, H); the model must attend by VARLEN, or by FLEX with `blocks`."""
    hidden: torch.Tensor = backbone(
        input_ids=layout.input_ids[None], position_ids=layout.positions[None], use_cache=False, layout=layout, blocks=blocks
    ).last_hidden_state[0]
    return hidden
