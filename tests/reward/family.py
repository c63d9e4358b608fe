"""Stand-ins for the eight backbones of the family: the real config classes at tiny widths, random weights, the real chat templates.

The templates are those that the released package trl carries (`trl/chat_templates`); the special tokens are those of the published tokenizers,
over a byte-level vocabulary. What makes the architectures differ is kept: whether input and output embeddings are tied, a head dimension that
is not hidden size / heads (Qwen3-0.6B and 4B), grouped keys and values, and Llama 3's rotary scaling by 8 or by 32.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ADDED = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<tool_response>", "</tool_response>", "<think>", "</think>")  # not special


@dataclass(frozen=True)
class Shape:
    """What a backbone's config says, as published, and the chat template's name in trl."""

    template: str
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    tied: bool
    rope_factor: float | None = None


SHAPES = {
    "Qwen/Qwen3-0.6B": Shape("qwen3", 1024, 16, 8, 128, tied=True),
    "Qwen/Qwen3-1.7B": Shape("qwen3", 2048, 16, 8, 128, tied=True),
    "Qwen/Qwen3-4B": Shape("qwen3", 2560, 32, 8, 128, tied=True),
    "Qwen/Qwen3-8B": Shape("qwen3", 4096, 32, 8, 128, tied=False),
    "meta-llama/Llama-3.2-1B-Instruct": Shape("llama3_2", 2048, 32, 8, 64, tied=True, rope_factor=32.0),
    "meta-llama/Llama-3.2-3B-Instruct": Shape("llama3_2", 3072, 24, 8, 128, tied=True, rope_factor=32.0),
    "meta-llama/Llama-3.1-8B-Instruct": Shape("llama3_1", 4096, 32, 8, 128, tied=False, rope_factor=8.0),
}


def chat_template(name: str) -> str:
    """Read a template out of the installed trl, without importing it."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None, "trl, of the dev extra, is not installed"
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def family_tokenizer(template: str, **changes: Any) -> Any:
    """A byte-level tokenizer with the special tokens, the post-processor and the padding of the published one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    settings: dict[str, Any]
    if template.startswith("llama"):
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in LLAMA_SPECIAL])
        bos = LLAMA_SPECIAL[0]
        adds_bos = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), adds_bos])
        settings = {"bos_token": bos, "eos_token": "<|eot_id|>"}  # and no pad token
    else:
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN_SPECIAL])
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN_ADDED])
        settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}  # and no BOS
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template(template), **{**settings, **changes})


def stand_in_config(backbone: str, vocabulary: int) -> Any:
    """The config class of a backbone with 2 layers, 1/64 of its width, 1/8 of its heads, and heads of 1/8."""
    shape = SHAPES[backbone]
    common = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden // 64,
        "intermediate_size": shape.hidden // 32,
        "num_hidden_layers": 2,
        "num_attention_heads": shape.heads // 8,
        "num_key_value_heads": shape.key_value_heads // 8,
        "head_dim": shape.head_dim // 8,
        "tie_word_embeddings": shape.tied,
    }
    if shape.rope_factor is None:
        return Qwen3Config(**common, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=40_960)
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": shape.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32  # published: 8,192; short, so that scaled frequencies decide rewards here
    return LlamaConfig(**common, rope_parameters=rope, max_position_embeddings=131_072)


def save_stand_in(folder: Path, backbone: str, **tokenizer_changes: Any) -> str:
    """Write a random causal LM of the backbone's kind, in bfloat16 as published, with its tokenizer and template."""
    tokenizer = family_tokenizer(SHAPES[backbone].template, **tokenizer_changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(stand_in_config(backbone, len(tokenizer)), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
