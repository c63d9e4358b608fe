"""Small tokenizers built like those of Qwen3, Llama 3 and Gemma: the same normaliser, pre-tokenizer, decoder, BOS and added tokens.

Only the vocabulary is ours: a few hundred merges learned here from our own prompts. The chat templates are those of the released trl.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from synpref_ray.llm.prompts import JUDGE_GUIDELINES, JUDGE_REPLY_START, TAG_INSTRUCTIONS, tag_prompt
from tests.reward.family import LLAMA_SPECIAL, QWEN_ADDED, QWEN_SPECIAL, chat_template

GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
GEMMA_ADDED = ("[multimodal]", "<table>", "</table>", "<h1>", "<strong>")  # markup that its vocabulary holds whole; not special
GEMMA_SPACES = ("\n\n", "\n\n\n", "\t\t", "\u2581\u2581", "\u2581\u2581\u2581")

QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")

TEMPLATES = {
    "qwen3": "qwen",
    "qwen3_instruct_2507": "qwen",
    "qwen3_5_think": "qwen",
    "llama3": "llama",
    "llama3_1": "llama",
    "llama3_2": "llama",
    "gemma": "gemma",
    "gemma3": "gemma",
}


@dataclass(frozen=True)
class Family:
    """A tokenizer with a template of trl, the strings that control it, and the id of its BOS if it has one."""

    tokenizer: Any
    control: tuple[str, ...]
    bos: int | None

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that no text of a pair may become."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self.control)))

    def normalised(self, text: str) -> str:
        """Return the text as this tokenizer can give it back: Qwen composes letters, Gemma has one sign for a space and for U+2581."""
        normaliser = self.tokenizer.backend_tokenizer.normalizer
        normalised = text if normaliser is None else str(normaliser.normalize_str(text))
        return normalised.replace("\u2581", " ") if "<start_of_turn>" in self.control else normalised

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, control tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@cache
def family(template: str) -> Family:
    """Return the tokenizer that goes with one of `TEMPLATES`."""
    kind = TEMPLATES[template]
    backend, control, settings = {"qwen": _qwen, "llama": _llama, "gemma": _gemma}[kind]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template(template), **settings)
    return Family(tokenizer, control, tokenizer.bos_token_id)


def _texts() -> list[str]:
    tags = [tag_prompt(instructions, [{"role": "user", "content": "What is 12 plus 7?"}], ()) for instructions in TAG_INSTRUCTIONS.values()]
    return [*tags, *JUDGE_GUIDELINES.values(), JUDGE_REPLY_START, "user\nassistant\nsystem\n\n model\n"]


def _byte_level(words: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(_texts(), trainers.BpeTrainer(vocab_size=800, initial_alphabet=letters, show_progress=False))
    return backend


def _qwen() -> tuple[Tokenizer, tuple[str, ...], dict[str, Any]]:
    backend = _byte_level(QWEN_WORDS)
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN_SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN_ADDED])
    return backend, (*QWEN_SPECIAL, *QWEN_ADDED), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}  # and no BOS


def _llama() -> tuple[Tokenizer, tuple[str, ...], dict[str, Any]]:
    backend = _byte_level(LLAMA_WORDS)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in LLAMA_SPECIAL])
    bos = LLAMA_SPECIAL[0]
    adds_bos = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), adds_bos])
    return backend, LLAMA_SPECIAL, {"bos_token": bos, "eos_token": "<|eot_id|>"}


def _gemma() -> tuple[Tokenizer, tuple[str, ...], dict[str, Any]]:
    """SentencePiece's BPE: spaces as U+2581, unknown letters as bytes, words not split off before merging."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    learner.train_from_iterator(_texts(), trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = learner.get_vocab()
    pieces = [*GEMMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned, key=lambda piece: learned[piece])]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in GEMMA_SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in (*GEMMA_ADDED, *GEMMA_SPACES)])
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))])
    return backend, (*GEMMA_SPECIAL, *GEMMA_ADDED), {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
