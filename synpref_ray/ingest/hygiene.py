"""Hygiene of pairs: language, lengths, cycles of preference and near-duplicate prompts, found and marked; nothing is dropped here.

Paper: Sec. 3 (languages of the data) and App. D.4 (cycles are expected among subjective comparisons; the pipeline is said to correct or down-weight
them, without saying how). Our choice: what is marked, and by which means; cycles are marked and neither removed nor weighted, since judges and gate
decide.

- Language: py3langid (its model comes with the package) over a prompt's user turns; null where there is no letter. Short prompts are guesses, which
  is what `language_probability` says.
- Cycles: replies of one prompt group are nodes, each pair an edge from its chosen to its rejected reply. A pair is `in_cycle` exactly if its edge
  lies on some directed cycle: both replies are in one strongly connected component. A contradicted comparison is a cycle of two.
- Near-duplicates: MinHash (datasketch) over 3-word shingles of all turns but the system's. Prompts that share a band of hashes are candidates; those
  whose estimated Jaccard similarity reaches a threshold are linked, and linked prompts are one cluster. A cluster is named by its smallest group.

What is compared across pairs is hashed to 64 bits: at 40M groups the chance of any collision is 1 in 20,000. P pairs, G groups, H hashes.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasketch import MinHash
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from synpref_ray.ingest.benchmark_prompts import split_words
from synpref_ray.schema import HYGIENE_SCHEMA, Message, Role

NUM_HASHES = 120  # ours: an estimate's standard error is at most 0.046
NUM_BANDS = 20  # ours: bands of 6 hashes make candidates of 99.8% of the prompt pairs with similarity 0.8, of 8% of those with 0.4
SHINGLE_WORDS = 3  # ours
MINHASH_SEED = 1
MAX_LANGUAGE_CHARACTERS = 2_000  # ours: more text does not change the answer
MAX_CENTRES = 16  # ours: how many unlike prompts a bucket is compared with; they also meet in other bands

_LETTER = re.compile(r"[^\W\d_]")

Keys = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint8]

BAND_COLUMNS = tuple(f"band_{number:02d}" for number in range(NUM_BANDS))
PAIR_FACTS = tuple(HYGIENE_SCHEMA)[1:6]  # what a pair's own text says
TEXT_KEYS_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        *PAIR_FACTS,
        pa.field("group_key", pa.uint64(), nullable=False),
        pa.field("chosen_key", pa.uint64(), nullable=False),
        pa.field("rejected_key", pa.uint64(), nullable=False),
        pa.field("signature", pa.binary(NUM_HASHES)),
        *(pa.field(name, pa.uint64()) for name in BAND_COLUMNS),
    ]
)
"""What a pair's own text says of it. `signature` (a byte of each hash) and the bands are null for a prompt without words."""


def text_keys(pairs: pa.Table) -> pa.Table:
    """Return the facts and keys of P pairs (columns pair_id, prompt_group, prompt, chosen, rejected), shape `TEXT_KEYS_SCHEMA`."""
    prompts, chosen, rejected = (pairs[name].to_pylist() for name in ("prompt", "chosen", "rejected"))
    languages = [find_language(_user_text(prompt)) for prompt in prompts]
    hashes = [minhash(shingles(prompt)) for prompt in prompts]
    bands = [[None] * NUM_BANDS if values is None else band_keys(values) for values in hashes]
    columns: dict[str, Sequence[object] | pa.ChunkedArray] = {
        "pair_id": pairs["pair_id"],
        "language": [language for language, _ in languages],
        "language_probability": [probability for _, probability in languages],
        "prompt_characters": [sum(len(message["content"]) for message in prompt) for prompt in prompts],
        "chosen_characters": [len(text) for text in chosen],
        "rejected_characters": [len(text) for text in rejected],
        "group_key": [group_key(group) for group in pairs["prompt_group"].to_pylist()],
        "chosen_key": [_hash64(text.encode("utf-8", "surrogatepass")) for text in chosen],
        "rejected_key": [_hash64(text.encode("utf-8", "surrogatepass")) for text in rejected],
        "signature": [None if values is None else values.astype(np.uint8).tobytes() for values in hashes],
    }
    columns |= {name: [keys[number] for keys in bands] for number, name in enumerate(BAND_COLUMNS)}
    return pa.table(
        [
            values if isinstance(values, pa.ChunkedArray) else pa.array(values, field.type)
            for field in TEXT_KEYS_SCHEMA
            for values in [columns[field.name]]
        ],
        schema=TEXT_KEYS_SCHEMA,
    )


def find_language(text: str) -> tuple[str | None, float | None]:
    """Return a text's language (ISO 639-1) and its probability, or None twice for a text without letters."""
    if not _LETTER.search(text):
        return None, None
    language, probability = _identifier().classify(text[:MAX_LANGUAGE_CHARACTERS])
    return str(language), float(probability)


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _user_text(prompt: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in prompt if message["role"] == Role.USER)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def group_key(prompt_group: str) -> int:
    """Return the first 64 bits of a prompt group's name."""
    return int(prompt_group[:16], 16)


def group_name(key: int) -> str:
    """Return the 16 hex digits that a prompt group's name begins with."""
    return f"{key:016x}"


def shingles(prompt: Sequence[Message]) -> set[str]:
    """Return the runs of 3 words of every turn but the system's; a shorter turn is one shingle."""
    found = set()
    for message in prompt:
        if message["role"] != Role.SYSTEM:
            words = split_words(message["content"])
            found |= {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1)) if words}
    return found


def minhash(shingle_set: set[str]) -> npt.NDArray[np.uint32] | None:
    """Return the H hashes of a set of shingles, None for the empty set."""
    if not shingle_set:
        return None
    sketch = _empty_sketch().copy()
    sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingle_set])
    values: npt.NDArray[np.uint32] = sketch.hashvalues
    return values


@lru_cache(maxsize=1)
def _empty_sketch() -> MinHash:
    return MinHash(num_perm=NUM_HASHES, seed=MINHASH_SEED)


def band_keys(hashes: npt.NDArray[np.uint32]) -> list[int]:
    """Return the name of each band of H hashes; prompts that share one may be near-duplicates."""
    return [_hash64(band.astype("<u4").tobytes()) for band in hashes.reshape(NUM_BANDS, -1)]


def in_cycle(groups: Keys, chosen: Keys, rejected: Keys) -> npt.NDArray[np.bool_]:
    """Say for P pairs, which must hold whole prompt groups, whether the pair lies on a cycle of preferences."""
    if not len(groups):
        return np.zeros(0, np.bool_)
    ends = np.concatenate([np.stack([groups, chosen], axis=1), np.stack([groups, rejected], axis=1)])
    nodes, places = np.unique(ends, axis=0, return_inverse=True)
    winners, losers = places.reshape(2, -1)
    component = _components(winners, losers, len(nodes), directed=True)
    same: npt.NDArray[np.bool_] = component[winners] == component[losers]
    return same


def _components(start: npt.NDArray[np.int64], end: npt.NDArray[np.int64], num_nodes: int, *, directed: bool) -> npt.NDArray[np.int32]:
    graph = coo_array((np.ones(len(start), np.int8), (start, end)), shape=(num_nodes, num_nodes)).tocsr()
    labels: npt.NDArray[np.int32] = connected_components(graph, directed=directed, connection="strong")[1]
    return labels


def shared_buckets(bands: Keys, groups: Keys) -> npt.NDArray[np.int64]:
    """Return the places (P pairs) of one pair per (bucket, group), of the buckets of one band that hold several groups."""
    order = np.lexsort((groups, bands))
    bands, groups = bands[order], groups[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (bands[1:] != bands[:-1]) | (groups[1:] != groups[:-1])
    order, bands = order[first], bands[first]
    _, bucket, sizes = np.unique(bands, return_inverse=True, return_counts=True)
    kept: npt.NDArray[np.int64] = order[sizes[bucket] > 1]
    return kept


class Links(NamedTuple):
    """Pairs of prompt groups that are near-duplicates."""

    first: Keys
    second: Keys


def find_links(bands: Keys, groups: Keys, signatures: Signatures, min_similarity: float) -> Links:
    """Link near-duplicate groups in each bucket of one band: to the first group, the others left over to the first of them, and so on.

    Args:
        bands: (N,) the buckets, several groups in each, as `shared_buckets` chose them.
        signatures: (N, H) a byte of each hash.
    """
    order = np.lexsort((groups, bands))
    starts = np.flatnonzero(np.r_[True, np.diff(bands[order]) != 0]) if len(order) else np.zeros(0, np.int64)
    firsts, seconds = [], []
    for members in np.split(order, starts[1:]):
        left = members
        for _ in range(MAX_CENTRES):
            if len(left) < 2:
                break
            alike = (signatures[left[1:]] == signatures[left[0]]).mean(axis=1) >= min_similarity
            near = left[1:][alike]
            firsts.append(np.repeat(groups[left[0]], len(near)))
            seconds.append(groups[near])
            left = left[1:][~alike]
    if not firsts:
        return Links(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    return Links(np.concatenate(firsts), np.concatenate(seconds))


class Clusters(NamedTuple):
    """Groups that are near-duplicates of another, ascending, and the smallest group of each one's cluster."""

    groups: Keys
    names: Keys

    def name_groups(self, groups: Keys) -> Keys:
        """Return the cluster of each of P groups; a group without near-duplicates is its own."""
        if not len(self.groups):
            return groups
        places = np.minimum(np.searchsorted(self.groups, groups), len(self.groups) - 1)
        return np.where(self.groups[places] == groups, self.names[places], groups)


def find_clusters(links: Links) -> Clusters:
    """Return the connected groups, whatever the order of the links."""
    groups, places = np.unique(np.concatenate([links.first, links.second]), return_inverse=True)
    if not len(groups):
        return Clusters(groups, groups)
    first, second = places.reshape(2, -1)
    component = _components(first, second, len(groups), directed=False)
    smallest = np.full(component.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, component, groups)
    return Clusters(groups, smallest[component])
