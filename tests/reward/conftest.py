"""Tiny reward models with random weights, and a tokenizer trained on a few words: nothing is downloaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def byte_tokenizer(template: str = TEMPLATE, **special: str) -> Any:
    """A byte-level tokenizer of 261 tokens with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=SPECIAL[1:], **special, chat_template=template
    )
    return tokenizer


def tiny_config(kind: str) -> Any:
    """A 2-layer config of a real class; sliding windows are far shorter than the test sequences."""
    if kind == "llama":
        return LlamaConfig(**SMALL)
    if kind == "llama3-rope":
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return LlamaConfig(**SMALL, rope_parameters={**rope, "original_max_position_embeddings": 32})
    if kind == "qwen2":
        return Qwen2Config(**SMALL)
    if kind == "qwen3":
        return Qwen3Config(**SMALL, head_dim=16)
    if kind == "qwen3-sliding":
        return Qwen3Config(**SMALL, head_dim=16, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    if kind == "mistral-sliding":
        return MistralConfig(**SMALL, sliding_window=7)
    if kind == "gemma2":
        return Gemma2Config(**SMALL, head_dim=16, sliding_window=7)
    if kind == "gemma3":
        return Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=7)
    raise ValueError(kind)


def save_tiny_backbone(folder: Path, kind: str = "llama", *, head: bool, seed: int = 0) -> str:
    """Write a random model and the byte tokenizer: a causal LM, or a reward model with a head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = tiny_config(kind)
    config.num_labels = 1
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    config.pad_token_id = tokenizer.pad_token_id
    model = (AutoModelForSequenceClassification if head else AutoModelForCausalLM).from_config(config)
    if head:
        torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_tiny_reward_model_for_vllm(folder: Path) -> str:
    """Write a random reward model of a size that vLLM's attention takes on a CPU (heads of 32), in float32."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "hidden_size": 128, "intermediate_size": 192}, num_labels=1)
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_pairs(num_pairs: int, seed: int = 0) -> pa.Table:
    """Pairs of random letters with prompts and replies of 1 to about 60 letters, some with several turns."""
    rng = np.random.default_rng(seed)

    def text(longest: int) -> str:
        return "".join(rng.choice(list("abcdefgh ,.é")) for _ in range(int(rng.integers(1, longest))))

    rows = []
    for i in range(num_pairs):
        prompt = [{"role": "user", "content": text(60)}]
        if i % 3 == 0:
            prompt += [{"role": "assistant", "content": text(20)}, {"role": "user", "content": text(20)}]
        rows.append({"pair_id": f"{i:032x}", "prompt": prompt, "chosen": text(60), "rejected": text(40)})
    return pa.Table.from_pylist(rows)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much when other processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_backbone(tmp_path: Path) -> str:
    return save_tiny_backbone(tmp_path / "backbone", head=False)


@pytest.fixture
def tiny_reward_model(tmp_path: Path) -> str:
    return save_tiny_backbone(tmp_path / "reward-model", head=True)
