"""What a round of Stage 1 reads of pools that may grow: pinned when the round begins, so that a rerun reads the same, and a later round the new.

Paper: Sec. 3.2, Step 4 (newly gathered pairs join the unverified pool between iterations). Our choice: `rounds/NN/inputs.json` is written before
anything of a round is computed. A round that has one reads those versions whatever has been ingested since; a round that has none takes the newest.
The seed is read by round 0 alone: pairs that join it later are not read, and the log says so. Decisions about overlaps with benchmarks are pinned
likewise: a round keeps those that it began with, and a later round takes what was decided since.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

from synpref_ray.pipeline.clusters import AUTO, OFF, choose_clusters
from synpref_ray.pipeline.leak_marks import find_leaks, list_leaks, no_such_leaks, open_leaks
from synpref_ray.rules.leaks import LEAKS
from synpref_ray.tables.parts import pool_parts
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.sidecars import Sidecar, open_sidecar
from synpref_ray.tables.storage import Storage

SEED, UNVERIFIED = "seed", "unverified"
INPUTS = "inputs.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeakPins:
    """The decisions about overlaps with benchmarks that a round goes by: fingerprints, of the seed and by version of the unverified pool."""

    seed: str = ""
    unverified: tuple[tuple[int, str], ...] = ()

    def record(self) -> dict[str, Any]:
        """Return them as records hold them."""
        return {SEED: self.seed or None, UNVERIFIED: {str(version): name for version, name in self.unverified}}


@dataclass(frozen=True)
class RoundInputs:
    """The versions of the pools that a round reads, and the decisions about leaks that it goes by."""

    seed: int
    unverified: int
    leaks: LeakPins = LeakPins()


def inputs_path(number: int) -> str:
    """Return where round `number` keeps what it reads."""
    return f"rounds/{number:02d}/{INPUTS}"


def peek_inputs(storage: Storage, number: int) -> RoundInputs:
    """Return the versions that round `number` reads, or would read if it began now; nothing is written.

    Raises:
        InputError: a pool is not there.
    """
    newest = RoundInputs(open_pool(storage, SEED).version, open_pool(storage, UNVERIFIED).version)
    path = inputs_path(number)
    if storage.exists(path):
        pinned = storage.read_json(path)["pools"]
        return RoundInputs(pinned[SEED], pinned[UNVERIFIED])
    if number:
        before = peek_inputs(storage, number - 1)
        return RoundInputs(before.seed, max(before.unverified, newest.unverified))
    return newest


def peek_leaks(storage: Storage, number: int, wanted: str) -> LeakPins:
    """Return the decisions about leaks that round `number` goes by, or would go by if it began now; nothing is written.

    A round that begins goes on from those of the round before: a version that had decisions keeps them, unless the setting names others.

    Args:
        wanted: the setting `decontamination` (see `open_leaks`).

    Raises:
        ConfigError: `auto` finds several.
        InputError: the named ones are not there, for the seed or for any version of the unverified pool that the round reads.
    """
    path = inputs_path(number)
    pinned = storage.read_json(path).get("decontamination") if storage.exists(path) else None
    if pinned is not None:
        return LeakPins(pinned[SEED] or "", tuple((int(version), name) for version, name in pinned[UNVERIFIED].items()))
    inputs = peek_inputs(storage, number)
    if number:
        before = peek_leaks(storage, number - 1, wanted)
    else:
        of_seed = open_leaks(open_seed(storage, inputs), wanted)
        before = LeakPins(of_seed.fingerprint if of_seed else "")
    if wanted == OFF:
        return LeakPins(before.seed)
    earlier = dict(before.unverified)
    looked_for = [version for version in range(inputs.unverified + 1) if wanted != AUTO or version not in earlier]
    found = {version: leaks.fingerprint for version in looked_for if (leaks := find_leaks(open_pool(storage, UNVERIFIED, version), wanted))}
    if wanted != AUTO and not found:
        raise no_such_leaks(open_pool(storage, UNVERIFIED, inputs.unverified), wanted)
    return LeakPins(before.seed, tuple(sorted({**earlier, **found}.items())))


def check_leak_pins(storage: Storage, wanted: str, max_rounds: int) -> None:
    """Refuse a setting `decontamination` by which the next round could not begin (errors: `peek_leaks`)."""
    number = 0
    while storage.exists(inputs_path(number)):
        number += 1
    if number <= max_rounds:
        peek_leaks(storage, number, wanted)


def pin_inputs(storage: Storage, number: int, decontamination: str) -> RoundInputs:
    """Return what round `number` reads, from now on for good.

    Raises:
        ConfigError, InputError: as `peek_leaks`.
    """
    inputs = replace(peek_inputs(storage, number), leaks=peek_leaks(storage, number, decontamination))
    record = {"round": number, "pools": {SEED: inputs.seed, UNVERIFIED: inputs.unverified}, "decontamination": inputs.leaks.record()}
    if not storage.exists(inputs_path(number)) or storage.read_json(inputs_path(number)) != record:  # one of an earlier version pins no decisions
        storage.write_json(inputs_path(number), record)
    if number:
        return inputs
    if {leaks.fingerprint for leaks in list_leaks(open_seed(storage, inputs), decontamination)} != {inputs.leaks.seed} - {""}:
        logger.warning(
            "decisions about overlaps with benchmarks have been made, or are asked for (decontamination=%s), that are not those which round 0 began "
            "with (of the seed: %s): rounds that have begun keep theirs; without the folder rounds/ Stage 1 begins anew",
            decontamination,
            inputs.leaks.seed[:8] or "none",
        )
    newest = open_pool(storage, SEED).version
    if newest > inputs.seed:
        logger.warning(
            "the pool seed has grown since round 0 read version %d of it (now %d): pairs that joined are not read; pairs for later rounds belong to "
            "the pool unverified, and without the folder rounds/ Stage 1 begins anew",
            inputs.seed,
            newest,
        )
    return inputs


def open_seed(storage: Storage, inputs: RoundInputs) -> Pool:
    """Return the seed as round 0 reads it."""
    return open_pool(storage, SEED, inputs.seed)


def choose_round_clusters(storage: Storage, wanted: str, inputs: RoundInputs) -> str:
    """Return the near-duplicate clusters that all rounds go by: those that cover the pools as round 0 read them (see `choose_clusters`).

    Pairs that join later keep their prompts' own groups where the comparison did not look at them: what gold is must not change under finished
    rounds.
    """
    return choose_clusters([open_seed(storage, inputs), open_pool(storage, UNVERIFIED, inputs.unverified)], wanted)


def pinned_leaks(storage: Storage) -> frozenset[str]:
    """Return the decisions about leaks that the last round goes by that has begun, by fingerprint; none where Stage 1 has not begun."""
    number = 0
    while storage.exists(inputs_path(number)):
        number += 1
    pins = storage.read_json(inputs_path(number - 1)).get("decontamination") if number else None
    return frozenset(filter(None, [pins[SEED], *pins[UNVERIFIED].values()])) if pins else frozenset()


def seed_leaks(seed: Pool, inputs: RoundInputs) -> Sidecar | None:
    """Return the decisions about the seed that round 0 pinned."""
    return open_sidecar(seed, LEAKS, inputs.leaks.seed) if inputs.leaks.seed else None


def leaks_so_far(storage: Storage, inputs: RoundInputs) -> list[Sidecar]:
    """Return the decisions that the round goes by, whichever version of the unverified pool they are about."""
    return [open_sidecar(open_pool(storage, UNVERIFIED, version), LEAKS, name) for version, name in inputs.leaks.unverified]


def unverified_parts(storage: Storage, inputs: RoundInputs) -> list[Pool]:
    """Return the parts of the unverified pool that a round reads."""
    return pool_parts(storage, UNVERIFIED, inputs.unverified)
