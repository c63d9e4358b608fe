"""What is embedded, how a shard is embedded, and the bundled MiniLM on a few real texts."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from synpref_ray.errors import ConfigError, InputError, SchemaError
from synpref_ray.retrieval.embedder import (
    Embedder,
    EmbedderConfig,
    add_embeddings,
    embedding_matrix,
    embeddings_schema,
    serialise_for_embedding,
)
from synpref_ray.schema import ATTRIBUTES_SCHEMA
from tests.builders import make_pairs


class HashingEmbedder:
    """Unit vectors of four numbers from a hash of the text."""

    dimension = 4

    def embed(self, texts):
        hashes = [hashlib.sha256(text.encode()).digest()[:4] for text in texts]
        vectors = np.array([list(digest) for digest in hashes], dtype=np.float32).reshape(-1, 4) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def tagged(count, missing=()):
    pairs = make_pairs(count)
    attributes = [
        None if row in missing else {"task_category": "advice", "desired_attributes": "brief", "annotation_guideline": f"prefer {row}"}
        for row in range(count)
    ]
    for name in ATTRIBUTES_SCHEMA.names[1:6]:
        pairs = pairs.append_column(name, pa.array([row.get(name) if row else None for row in attributes], pa.string()))
    return pairs


def test_the_text_by_hand():
    prompt = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Name a tea."}]
    attributes = {"task_category": "other", "objectivity": None, "desired_attributes": "brief"}
    expected = "user: Hello\nassistant: Hi\nuser: Name a tea.\n\ntask category: other\ndesired attributes: brief"
    assert serialise_for_embedding(prompt, attributes) == expected
    assert serialise_for_embedding(prompt[2:], {}) == "user: Name a tea."


def test_a_shard_keeps_its_rows():
    shard = tagged(5, missing={1, 4})
    table = add_embeddings(shard, HashingEmbedder())
    assert table.schema.equals(embeddings_schema(4))
    assert table["pair_id"].equals(shard["pair_id"])
    assert table["drop_reason"].to_pylist() == [None, "no_attributes", None, None, "no_attributes"]
    assert [row is None for row in table["embedding"].to_pylist()] == [False, True, False, False, True]
    attributes = {"task_category": "advice", "desired_attributes": "brief", "annotation_guideline": "prefer 2"}
    text = serialise_for_embedding(shard["prompt"][2].as_py(), attributes)
    np.testing.assert_array_equal(np.float32(table["embedding"][2].as_py()), HashingEmbedder().embed([text])[0])
    one_by_one = pa.concat_tables([add_embeddings(shard.slice(row, 1), HashingEmbedder()) for row in range(5)])
    assert one_by_one.combine_chunks().equals(table.combine_chunks())
    assert add_embeddings(shard.slice(0, 0), HashingEmbedder()).schema.equals(embeddings_schema(4))
    with pytest.raises(SchemaError, match="objectivity"):
        add_embeddings(shard.drop_columns(["objectivity"]), HashingEmbedder())


def test_a_column_becomes_a_matrix():
    table = add_embeddings(tagged(6, missing={0}), HashingEmbedder())
    whole = np.float32(table["embedding"].to_pylist()[2:])
    pieces = pa.concat_tables([table.slice(2, 1), table.slice(3)])["embedding"]
    np.testing.assert_array_equal(embedding_matrix(pieces), whole)
    np.testing.assert_array_equal(embedding_matrix(table["embedding"].drop_null())[1:], whole)
    assert embedding_matrix(table["embedding"].slice(0, 0)).shape == (0, 4)
    assert embedding_matrix(pa.chunked_array([], pa.list_(pa.float32(), 4))).shape == (0, 4)
    with pytest.raises(SchemaError, match="1 nulls"):
        embedding_matrix(table["embedding"])
    with pytest.raises(SchemaError, match="found string"):
        embedding_matrix(table["pair_id"])


@pytest.fixture(scope="module")
def minilm():
    return Embedder.load(EmbedderConfig())


@pytest.mark.engine
def test_minilm_on_real_texts(minilm):
    texts = ["How do I boil an egg?", "What is the best way to cook eggs?", "Explain the rules of chess.", ""]
    vectors = minilm.embed(texts)
    assert vectors.shape == (4, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.6 > similar[0, 2]
    alone = np.concatenate([minilm.embed([text]) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert minilm.embed([]).shape == (0, 384)
    # what sentence-transformers itself says, on texts of one window
    np.testing.assert_allclose(vectors, minilm._model.encode(texts, normalize_embeddings=True), atol=1e-5)


@pytest.mark.engine
def test_long_texts_are_read_to_the_end(minilm):
    filler = "The weather was mild and nothing happened for a while. " * 60  # over 600 tokens
    eggs, chess = minilm.embed([f"{filler}How do I boil an egg?", f"{filler}Explain the rules of chess."])
    assert np.abs(eggs - chess).max() > 1e-3  # sentence-transformers alone would give both the same vector
    same = minilm._model.encode([f"{filler}How do I boil an egg?", f"{filler}Explain the rules of chess."])
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)
    short = Embedder(minilm._model, EmbedderConfig(max_window_tokens=16))
    # 10 words of one token each in windows of 14 tokens and two special ones: one window; 20 words: windows of 14 and 6 tokens
    one, two = "tea " * 10, "tea " * 20
    parts = np.stack([minilm._model.encode(part) for part in ("tea " * 14, "tea " * 6)])
    mean = parts[0] * 16 + parts[1] * 8
    np.testing.assert_allclose(short.embed([two, one]), [mean / np.linalg.norm(mean), minilm.embed([one])[0]], atol=1e-5)


@pytest.mark.engine
def test_models_that_cannot_be_used(minilm, tmp_path):
    with pytest.raises(ConfigError, match="max_window_tokens is 100000"):
        Embedder.load(EmbedderConfig(max_window_tokens=100_000))
    with pytest.raises(InputError, match="not a model folder"):
        Embedder.load(EmbedderConfig(model=str(tmp_path)))
