"""Embedders of the kinds that configs name, as tiny random models of the same classes, against what sentence-transformers itself makes of a text."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, Qwen3Config, Qwen3Model, XLMRobertaConfig, XLMRobertaModel

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import ConfigError
from synpref_ray.retrieval.embedder import Embedder, EmbedderConfig

pytestmark = pytest.mark.engine
TEXTS = ["How do I boil an egg?", "user: Explain the rules of chess, all of them.\n\ntask category: advice", "tea"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 600}
CODE = '''
from sentence_transformers.models import Transformer as Base


class Transformer(Base):
    """Turns the vectors of one task about, as an adapter would."""

    def forward(self, features, task=None, **kwargs):
        features = super().forward(features, **kwargs)
        if task == "text-matching":
            features["token_embeddings"] = features["token_embeddings"].flip(-1)
        return features
'''


def save(folder, kind, pooling, *, normalise):
    """Write a model folder as sentence-transformers lays it out."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    source = "sentence-transformers/all-MiniLM-L6-v2" if kind is BertModel else "HuggingFaceTB/SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(source))
    tokenizer.chat_template = None  # sentence-transformers would render texts by it
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.model_max_length = 512
    more = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    configs = {BertModel: BertConfig, XLMRobertaModel: XLMRobertaConfig, Qwen3Model: Qwen3Config}
    torch.manual_seed(0)
    if kind is Qwen3Model:
        more |= {"num_key_value_heads": 1, "head_dim": 16}
    kind(configs[kind](**SIZES, **more)).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    modules = [Transformer(str(folder / "plain")), Pooling(32, pooling_mode=pooling), *([Normalize()] if normalise else [])]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    if kind is Qwen3Model:
        settings = json.loads((folder / "model" / "tokenizer_config.json").read_text())
        (folder / "model" / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))  # as Qwen3-Embedding's
    return folder / "model"


def load(folder, **settings):
    return Embedder.load(EmbedderConfig(**{"model": str(folder), "num_threads": 1, "max_window_tokens": 512, **settings}))


@pytest.mark.parametrize(
    ("kind", "pooling", "normalise"),
    [(Qwen3Model, "lasttoken", True), (XLMRobertaModel, "mean", True), (BertModel, "cls", False)],
    ids=["as Qwen3-Embedding", "as jina-embeddings-v3", "as BGE"],
)
def test_pooling_is_the_model_s_own(tmp_path, kind, pooling, normalise):
    folder = save(tmp_path, kind, pooling, normalise=normalise)
    embedder = load(folder)
    assert embedder.dimension == 32
    assert embedder._model.tokenizer.padding_side == ("left" if kind is Qwen3Model else "right")
    vectors = embedder.embed(TEXTS)
    np.testing.assert_allclose(vectors, embedder._model.encode(TEXTS, normalize_embeddings=True), atol=1e-5)
    np.testing.assert_allclose(vectors, np.concatenate([embedder.embed([text]) for text in TEXTS]), atol=1e-5)  # padding does not matter
    modes = json.loads((folder / "1_Pooling" / "config.json").read_text())
    other = {"cls": "mean", "mean": "cls", "lasttoken": "mean"}[pooling]
    if "pooling_mode" in modes:
        modes["pooling_mode"] = other
    else:
        keys = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}
        modes |= {keys[pooling]: False, keys[other]: True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert np.abs(load(folder).embed(TEXTS) - vectors).max() > 1e-2


def test_prefix_and_dtype(tmp_path):
    folder = save(tmp_path, Qwen3Model, "lasttoken", normalise=True)
    prefix = "Instruct: Find requests of the same kind\nQuery: "
    instructed = load(folder, prefix=prefix).embed(TEXTS)
    np.testing.assert_allclose(instructed, load(folder).embed([prefix + text for text in TEXTS]), atol=1e-6)
    assert np.abs(instructed - load(folder).embed(TEXTS)).max() > 1e-3
    half = load(folder, dtype="bfloat16").embed(TEXTS)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, load(folder).embed(TEXTS), atol=0.05)
    with pytest.raises(ConfigError, match="reads at most 512 tokens"):
        load(folder, max_window_tokens=600)


def test_a_model_s_own_code_is_run_only_if_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save(tmp_path, XLMRobertaModel, "mean", normalise=True)
    plain = shutil.copytree(folder, tmp_path / "without code")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"type": "custom_st.Transformer", "kwargs": ["task"]}
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "custom_st.py").write_text(CODE)
    with pytest.raises(ConfigError, match=r"brings its own code \(custom_st.Transformer\).*trust_remote_code=true"):
        load(folder)
    trusted = load(folder, trust_remote_code=True)
    np.testing.assert_allclose(trusted.embed(TEXTS), load(plain).embed(TEXTS), atol=1e-6)
    matching = load(folder, trust_remote_code=True, task="text-matching").embed(TEXTS)
    np.testing.assert_allclose(matching, load(plain).embed(TEXTS)[:, ::-1], atol=1e-5)
