"""Where a model folder comes from: named folders, the cache of bundled models, the hub; and what a folder's digest depends on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling

from synpref_ray import bundled
from synpref_ray.bundled import (
    BundledModel,
    bundled_folder,
    convert_bundled,
    digest_folder,
    digest_model,
    find_model,
    pin_model,
    plain_name,
    resolve_model,
)
from synpref_ray.errors import InputError

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def write_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Give an empty cache and one bundled model, `a/tiny`, of an installed package; return the list that each conversion adds to."""
    calls: list[Path] = []

    def convert(source: Path, output: Path) -> None:
        calls.append(source)
        write_model(output)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "BUNDLED", {"a/tiny": BundledModel("a/tiny", "numpy", "numpy", convert)})
    return calls


def test_an_existing_folder_is_itself(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert resolve_model(str(folder)) == str(folder)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/model", "./none", "~/no-such-model", "some/deep/path", "not a name", "nobody/no-such-model"])
def test_an_unknown_model_is_one_line_that_names_it(name: str) -> None:
    for look in (resolve_model, find_model):
        with pytest.raises(InputError) as caught:
            look(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_finding_a_model_of_the_hub_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", asked.append)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloads"))
    find_model("nobody/no-such-model")
    assert [url.rsplit("/", 4)[1:] for url in asked] == [["no-such-model", "resolve", "main", "config.json"]]


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a hub's cache with one commit of `a/llm`, config and weights, and no way to the hub; return the commit's folder."""
    cache = tmp_path / "hub"
    repository = cache / "models--a--llm"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    bundled._hub_model.cache_clear()
    return write_model(repository / "snapshots" / COMMIT)


@pytest.mark.usefixtures("hub_copy")
def test_off_the_hub_the_node_s_own_copy_says_which_commit_it_is() -> None:
    assert pin_model("a/llm") == f"a/llm@{COMMIT}"
    assert pin_model(f"a/llm@{COMMIT}") == f"a/llm@{COMMIT}"
    with pytest.raises(InputError, match="no model b/llm"):
        pin_model("b/llm")


def test_a_pinned_model_is_that_commit_and_its_name_the_plain_one(hub_copy: Path) -> None:
    assert Path(resolve_model(f"a/llm@{COMMIT}")) == hub_copy
    with pytest.raises(InputError, match="no model a/llm"):
        resolve_model(f"a/llm@{COMMIT[::-1]}")
    assert [plain_name(name) for name in (f"a/llm@{COMMIT}", "a/llm", "a/llm@v2", "/some/folder")] == ["a/llm", "a/llm", "a/llm@v2", "/some/folder"]


def hub_file(name: str, content: str, *, large: bool = False) -> RepoSibling:
    """Return what the hub tells of a file: a large one is known by its SHA-256, any other by git's id."""
    lfs = BlobLfsInfo(size=1, sha256=f"sha256-{content}", pointer_size=1) if large else None
    return RepoSibling(rfilename=name, size=1, blob_id=f"git-{content}", lfs=lfs)


def test_a_model_of_the_hub_is_digested_by_the_ids_of_its_files_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = hub_file("config.json", "c"), hub_file("model.safetensors", "w", large=True)
    repositories = {
        ("a/llm", None): ("0" * 40, [config, weights, hub_file("README.md", "first")]),
        ("a/llm", "0" * 40): ("0" * 40, [config, weights, hub_file("README.md", "first")]),
        ("a/llm", "refs/pr/1"): ("1" * 40, [weights, config, hub_file("README.md", "second"), hub_file(".git/config.json", "x")]),
        ("a/llm", "v2"): ("2" * 40, [config, hub_file("model.safetensors", "other", large=True)]),
        ("b/llm", None): ("3" * 40, [config]),
    }
    asked: list[tuple[str, str | None]] = []

    def model_info(_: object, name: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        asked.append((name, revision))
        commit, files = repositories[name, revision]
        return SimpleNamespace(sha=commit, siblings=files)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloads"))
    bundled._hub_model.cache_clear()
    digest = digest_model("a/llm")
    assert len(digest) == 32
    assert digest == digest_model("a/llm") == digest_model(pin_model("a/llm"))
    assert digest == digest_model("a/llm@refs/pr/1"), "another README is no other model"
    assert digest != digest_model("a/llm@v2")
    assert pin_model("a/llm@v2") == f"a/llm@{'2' * 40}"
    with pytest.raises(InputError, match="no weights"):
        digest_model("b/llm")
    assert len(asked) == len(set(asked)), "once for each revision of a repository"
    bundled._hub_model.cache_clear()


def test_off_the_hub_the_digest_is_that_of_the_same_commit_on_the_hub(hub_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = hub_copy.parents[1] / "blobs"
    blobs.mkdir()
    told = []
    for file in sorted(path for path in hub_copy.rglob("*") if path.is_file()):
        large = file.suffix == ".safetensors"
        found = hub_file(file.relative_to(hub_copy).as_posix(), file.name, large=large)
        told.append(found)
        blob = blobs / (found.lfs.sha256 if found.lfs else str(found.blob_id))
        file.rename(blob)
        file.symlink_to(blob)
    here = digest_model("a/llm")
    bundled._hub_model.cache_clear()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha=COMMIT, siblings=told))
    assert digest_model("a/llm") == here
    bundled._hub_model.cache_clear()


def test_without_weights_little_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, allow_patterns, **__: fetched.extend(allow_patterns) or "folder")
    assert resolve_model(f"a/llm@{COMMIT}", weights=False) == "folder"
    assert not any(pattern.endswith((".safetensors", ".bin")) for pattern in fetched)
    assert "*.json" in fetched


def test_a_folder_and_a_bundled_model_are_digested_by_content(tmp_path: Path, calls: list[Path]) -> None:
    folder = str(write_model(tmp_path / "model"))
    assert (digest_model(folder), pin_model(folder)) == (digest_folder(folder), folder)
    convert_bundled("a/tiny")
    assert digest_model("a/tiny") == digest_folder(str(bundled_folder("a/tiny")))
    assert pin_model("a/tiny") == "a/tiny"
    assert len(calls) == 1


def test_a_local_model_is_found_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: pytest.fail("asks the hub"))
    find_model(str(write_model(tmp_path / "model")))
    with pytest.raises(InputError, match=r"no config\.json"):
        find_model(str(tmp_path))


def test_a_bundled_model_is_converted_once(calls: list[Path]) -> None:
    with pytest.raises(InputError, match="make setup"):
        resolve_model("a/tiny")
    assert convert_bundled("a/tiny")
    assert not convert_bundled("a/tiny")
    assert len(calls) == 1
    assert resolve_model("a/tiny") == str(bundled_folder("a/tiny"))


def test_a_killed_conversion_leaves_nothing_that_resolves(calls: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(source: Path, output: Path) -> None:
        write_model(output)
        raise KeyboardInterrupt

    whole = bundled.BUNDLED["a/tiny"]
    monkeypatch.setitem(bundled.BUNDLED, "a/tiny", BundledModel("a/tiny", "numpy", "numpy", dies))
    with pytest.raises(KeyboardInterrupt):
        convert_bundled("a/tiny")
    with pytest.raises(InputError, match="make setup"):
        resolve_model("a/tiny")
    monkeypatch.setitem(bundled.BUNDLED, "a/tiny", whole)
    assert convert_bundled("a/tiny")
    assert [path.name for path in bundled_folder("a/tiny").parent.iterdir() if path.is_dir()] == ["tiny"]


@pytest.mark.parametrize("stale", [{"recipe": 0}, {"source": "numpy==0.1"}])
def test_another_recipe_or_package_version_converts_again(calls: list[Path], stale: dict[str, object]) -> None:
    convert_bundled("a/tiny")
    record = bundled_folder("a/tiny") / "bundled.json"
    record.write_text(json.dumps(json.loads(record.read_text(encoding="utf-8")) | stale), encoding="utf-8")
    with pytest.raises(InputError, match="make setup"):
        resolve_model("a/tiny")
    assert convert_bundled("a/tiny")
    assert len(calls) == 2


def test_a_missing_package_is_named(calls: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    convert = bundled.BUNDLED["a/tiny"].convert
    monkeypatch.setitem(bundled.BUNDLED, "a/tiny", BundledModel("a/tiny", "no_such_package", "no-such-package", convert))
    with pytest.raises(InputError, match="no-such-package"):
        convert_bundled("a/tiny")


def test_the_digest_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "one")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}', encoding="utf-8")
    digest = digest_folder(str(folder))
    assert len(digest) == 32
    assert digest == digest_folder(str(shutil.copytree(folder, tmp_path / "two")))


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "modeling.py", "2_Dense/model.safetensors"]
)
def test_the_digest_changes_with_every_file_that_makes_the_model(tmp_path: Path, file: str) -> None:
    folder = write_model(tmp_path / "model")
    before = digest_folder(str(folder))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"changed")
    assert digest_folder(str(folder)) != before


@pytest.mark.parametrize("file", ["README.md", "training_record.json", "bundled.json", "optimizer.pt", ".cache/config.json"])
def test_the_digest_ignores_notes_and_records(tmp_path: Path, file: str) -> None:
    folder = write_model(tmp_path / "model")
    before = digest_folder(str(folder))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"noted")
    assert digest_folder(str(folder)) == before


def test_the_digest_tells_where_one_file_ends_and_the_next_begins(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one", b"ab"), write_model(tmp_path / "other", b"a")
    (one / "tokenizer.json").write_bytes(b"c")
    (other / "tokenizer.json").write_bytes(b"bc")
    assert digest_folder(str(one)) != digest_folder(str(other))


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", b"first")
    before = digest_folder(str(folder))
    weights = folder / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"other")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_folder(str(folder)) == before, "same size and time: not read again"
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert digest_folder(str(folder)) != before


@pytest.mark.engine
def test_the_bundled_llm_answers_and_its_tokenizer_is_the_original_one() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids == [1, 4093, 198, 6004, 2]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    # A list's blank line is one token and each digit its own, as in the tokenizer that the model was trained with.
    assert tokenizer.tokenize("a\n\n12.") == ["a", "ĊĊ", "1", "2", "."]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id, "it ends by itself"


@pytest.mark.engine
def test_the_bundled_embedder_puts_like_beside_like() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(resolve_model(MINILM), device="cpu")
    cat, kitten, stocks = model.encode(["a cat sits on the mat", "a kitten rests on a rug", "stock prices fell today"])
    assert cat @ kitten > 0.5 > 0.2 > cat @ stocks


@pytest.mark.engine
def test_a_bundled_model_converts_into_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    existing = digest_folder(resolve_model(MINILM))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert convert_bundled(MINILM)
    assert digest_folder(resolve_model(MINILM)) == existing
