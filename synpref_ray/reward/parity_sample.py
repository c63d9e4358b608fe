"""The conversations on which engines are compared: some of the model's own training pairs, spread over lengths, and a few fixed ones.

Our choice: the shortest and the longest are always among them, because batching, padding and rotary scaling show there; the same pairs give
the same sample in any order.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.schema import PROMPT, Role, stable_hash

SAMPLE_SCHEMA = pa.schema([("pair_id", pa.string()), ("prompt", PROMPT), ("chosen", pa.string()), ("rejected", pa.string())])


def choose_pairs(pairs: pa.Table, num_pairs: int, seed: int) -> pa.Table:
    """Return at most `num_pairs` pairs of SAMPLE_SCHEMA, shortest first: one by stable chance from each of `num_pairs` equal parts by length.

    The first part gives its shortest pair and the last one its longest. Length is counted in characters, which needs no tokenizer.
    """
    lengths = _characters(pairs)
    by_length = np.sort(lengths)
    rows: list[int] = []
    for number, part in enumerate(np.array_split(np.arange(len(lengths)), min(num_pairs, len(lengths)) or 1)):
        if len(part) == 0:
            continue
        place = part[stable_hash(seed, f"part {number}", "parity sample") % len(part)]
        place = 0 if number == 0 else len(lengths) - 1 if part[-1] == len(lengths) - 1 else place
        equally_long = [int(row) for row in np.flatnonzero(lengths == by_length[place]) if row not in rows]
        rows.append(min(equally_long, key=lambda row: stable_hash(seed, pairs["pair_id"][row].as_py(), "parity sample")))
    return pairs.select(SAMPLE_SCHEMA.names).take(pa.array(rows, pa.int64())).cast(SAMPLE_SCHEMA)


def fixed_pairs() -> pa.Table:
    """Return the hand-written pairs: very short, several turns, a system message, other scripts, white space, one reply the other's beginning."""
    user, assistant, system = (role.value for role in (Role.USER, Role.ASSISTANT, Role.SYSTEM))
    written = [
        ([(user, "Hi")], "Hello!", "."),
        ([(user, "Name a colour."), (assistant, "Red."), (user, "Another one."), (assistant, "Red.")], "Blue, then.", "Red."),
        ([(system, "Answer in one word."), (user, "Capital of France?")], "Paris", "The capital of France is the city of Paris."),
        ([(user, "¿Qué hora es? 🙂 今何時ですか")], "Son las dos. 二時です。 🕑", "לא יודע — e\u0301"),
        ([(user, "Write a loop in C.\n\n\tIndent it.")], "for (;;) {\n\t\twork();\n}\n", "  \n  while"),
    ]
    written.append(([(user, "Is water wet?")], "Yes", "Yes, it is"))
    rows = [
        {"pair_id": f"fixed-{number}", "prompt": [{"role": r, "content": c} for r, c in prompt], "chosen": chosen, "rejected": rejected}
        for number, (prompt, chosen, rejected) in enumerate(written)
    ]
    return pa.Table.from_pylist(rows, SAMPLE_SCHEMA)


def _characters(pairs: pa.Table) -> npt.NDArray[np.int64]:
    """Return the characters of each pair's prompt and longer reply, shape (P,)."""
    counts = [np.zeros(0, dtype=np.int64)]
    for batch in pairs.select(["prompt", "chosen", "rejected"]).to_batches():
        prompt = batch.column(0)
        content = pc.utf8_length(pc.list_flatten(prompt).field("content")).to_numpy(zero_copy_only=False)
        in_prompt = np.bincount(pc.list_parent_indices(prompt).to_numpy(zero_copy_only=False), weights=content, minlength=batch.num_rows)
        replies = [pc.utf8_length(batch.column(i)).to_numpy(zero_copy_only=False) for i in (1, 2)]
        counts.append(in_prompt.astype(np.int64) + np.maximum(*replies))
    return np.concatenate(counts)
