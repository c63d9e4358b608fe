"""From rows as published to preference pairs: five kinds of adapter, each a pure function from a row (or the rows of a prompt) to proposals.

Paper: App. C names pools of public sets and says nothing of their formats. Our choice, all of it. A proposal is a pair, which still has to pass the
structural filter, or a refusal with a reason; no row gives no proposal, so that counts add up. What a tie is, and which pairs several rated replies
make, is written at each kind.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from synpref_ray.config import Settings
from synpref_ray.ingest.fields import PromptFields, TextForm, Value, dig, has_path, is_blank, read_form, read_number, read_prompt, read_turn_texts
from synpref_ray.ingest.pairing import Better, Candidate, PairRule, Proposal, Refusal, pair_up
from synpref_ray.schema import DropReason, Role

Row = Mapping[str, Value]

Path = Annotated[str, StringConstraints(min_length=1)]


class PairScores(Settings):
    """Scores published with a pair: equal ones are a tie, and a chosen reply with the lower one is refused, not exchanged."""

    chosen: Path
    """Path of the chosen reply's score."""
    rejected: Path
    """Path of the rejected reply's score."""


class PairAdapter(Settings):
    """Paired columns: one is preferred, the other not; with a prompt of their own, or as two whole conversations."""

    kind: Literal["pair"] = "pair"
    prompt: PromptFields | None = PromptFields()
    """None: chosen and rejected are whole conversations."""
    chosen: Path = "chosen"
    """Path of the preferred reply, or of the whole conversation that ends with it."""
    rejected: Path = "rejected"
    """Path of the other reply, in the same form."""
    replies: TextForm = TextForm.PLAIN
    """How replies are written."""
    lead: str = ""
    """Path of a text that both replies begin with; absent means none. A blank reply stays blank, so that it is refused."""
    strip: bool = False
    """White space around a reply belongs to the format, as after a transcript's last marker."""
    scores: PairScores | None = None
    tie: dict[str, str] = Field(default={})
    """Values (by path, compared as text without case), any of which says that the row is a tie."""


class LabelVerdict(Settings):
    """A column names the better reply; values are compared as text without case."""

    by: Literal["label"] = "label"
    label: Path
    """Path of the label."""
    a: tuple[str, ...]
    """Labels by which the first reply is better."""
    b: tuple[str, ...]
    """Labels by which the second reply is better."""
    tie: tuple[str, ...] = ()
    """Labels by which neither is."""


class StrengthVerdict(Settings):
    """A signed number: below zero the first reply is better, above zero the second, zero is a tie."""

    by: Literal["strength"] = "strength"
    strength: Path
    """Path of the signed number: below zero the first reply is better, above zero the second."""


class ScoreVerdict(Settings):
    """Each reply has a score; the higher one is better, equal ones are a tie."""

    by: Literal["scores"] = "scores"
    score_a: Path
    """Path of the first reply's score."""
    score_b: Path
    """Path of the second reply's score."""


class FlagVerdict(Settings):
    """Columns of 0 and 1, of which exactly one is set."""

    by: Literal["flags"] = "flags"
    a: Path
    """Path of the flag that is 1 where the first reply is better."""
    b: Path
    """Path of the flag that is 1 where the second reply is better."""
    tie: Path
    """Path of the flag that is 1 where neither is."""


Verdict = Annotated[LabelVerdict | StrengthVerdict | ScoreVerdict | FlagVerdict, Field(discriminator="by")]


class ComparisonAdapter(Settings):
    """Two replies and who won: a tie is refused with that reason."""

    kind: Literal["comparison"] = "comparison"
    prompt: PromptFields | None = PromptFields()
    """None: both sides are whole conversations."""
    a: Path
    """Path of the first reply."""
    b: Path
    """Path of the second reply."""
    replies: TextForm = TextForm.PLAIN
    """How replies are written."""
    verdict: Verdict
    """How a row says which reply is better."""


class RatingsAdapter(Settings):
    """A row holds a prompt and several replies with ratings (the mean of several scores) or ranks (`pairs.better: lower`)."""

    kind: Literal["ratings"] = "ratings"
    prompt: PromptFields = PromptFields()
    replies: Path
    """Path of the list of replies; the paths below start at one of them."""
    text: Path
    """Path of a reply's text."""
    scores: tuple[Path, ...] = Field(min_length=1)
    """Paths of a reply's scores, of which the mean counts."""
    pairs: PairRule = PairRule()


class Span(StrEnum):
    """Where the rows of one prompt stand."""

    RUN = "run"
    """In a row: a file is read once, and only one prompt's rows are held."""
    FILE = "file"
    """Anywhere in the file, which is held in memory."""


class RatedRowsAdapter(Settings):
    """A row holds one reply and its scores; the rows with an equal prompt make pairs.

    Rows whose reply is null or blank, and prompts with a single one, are refused as `no_comparison`; rows that only pairs over `max_pairs` would use
    as `beyond_max_pairs`, rows that differ from no other by the margin as `tied`.
    """

    kind: Literal["rated_rows"] = "rated_rows"
    prompt: PromptFields = PromptFields()
    reply: Path
    """Path of the reply."""
    scores: tuple[Path, ...] = Field(min_length=1)
    """Paths of the reply's scores, of which the mean counts."""
    values: dict[str, float] = Field(default={})
    """What labels are worth, where a score is a label; empty: scores are numbers."""
    span: Span = Span.RUN
    """Whether the rows of one prompt follow each other (run), or stand anywhere in the file (file)."""
    max_rows: int = Field(default=1_000_000, ge=1)  # ours: what a worker holds of a `file` source, some GB; more is an error, not a swap
    pairs: PairRule = PairRule()


class TreeAdapter(Settings):
    """A row holds a tree of messages (OpenAssistant): assistant siblings with ranks make pairs, after the path that leads to them.

    Ranks count from the best, 0. Our choice: unranked siblings make no pair and are not counted as refused; a tree without any pair is.
    """

    kind: Literal["tree"] = "tree"
    root: Path = "prompt"
    """Path of the tree's first message."""
    children: Path = "replies"
    """Path of the list of answers to a message."""
    text: Path = "text"
    """Path of a message's text."""
    role: Path = "role"
    """Path of a message's role."""
    rank: Path = "rank"
    """Path of a message's rank among its siblings."""
    pairs: PairRule = PairRule(better=Better.LOWER)


Adapter = Annotated[PairAdapter | ComparisonAdapter | RatingsAdapter | RatedRowsAdapter | TreeAdapter, Field(discriminator="kind")]
RowAdapter = PairAdapter | ComparisonAdapter | RatingsAdapter | TreeAdapter


def propose_pairs(row: Row, adapter: RowAdapter) -> list[Proposal]:
    """Read one row; the list is never empty."""
    if isinstance(adapter, PairAdapter):
        return [_propose_pair(row, adapter)]
    if isinstance(adapter, ComparisonAdapter):
        return [_propose_comparison(row, adapter)]
    if isinstance(adapter, RatingsAdapter):
        return _propose_ratings(row, adapter)
    return _propose_tree(row, adapter)


def _propose_pair(row: Row, adapter: PairAdapter) -> Proposal:
    unsure = _doubt_pair(row, adapter)
    if unsure is not None:
        return Refusal(unsure)
    lead = dig(row, adapter.lead) if adapter.lead else None
    replies = []
    for path in (adapter.chosen, adapter.rejected):
        reply = read_form(dig(row, path), adapter.replies)
        if isinstance(reply, DropReason):
            return Refusal(reply)
        if isinstance(lead, str) and isinstance(reply, str) and not is_blank(reply):
            reply = lead + reply
        replies.append(reply.strip() if adapter.strip and isinstance(reply, str) else reply)
    return _with_prompt(row, adapter.prompt, replies[0], replies[1])


def _doubt_pair(row: Row, adapter: PairAdapter) -> DropReason | None:
    """Return why the row's own scores or labels speak against its order, if they do."""
    if any(label_text(dig(row, path)) == value.strip().casefold() for path, value in adapter.tie.items()):
        return DropReason.TIED
    if adapter.scores is None:
        return None
    better = decide(row, ScoreVerdict(score_a=adapter.scores.chosen, score_b=adapter.scores.rejected))
    if isinstance(better, DropReason):
        return better
    return None if better else DropReason.REVERSED_SCORE


def _with_prompt(row: Row, fields: PromptFields | None, chosen: Value, rejected: Value) -> Proposal:
    prompt = None if fields is None else read_prompt(row, fields)
    if isinstance(prompt, DropReason):
        return Refusal(prompt)
    return Candidate(prompt, chosen, rejected)


def _propose_comparison(row: Row, adapter: ComparisonAdapter) -> Proposal:
    verdict = decide(row, adapter.verdict)
    if isinstance(verdict, DropReason):
        return Refusal(verdict)
    if adapter.replies is TextForm.JSON_TURNS:
        return _propose_turn_lists(row, adapter, first_is_better=verdict)
    sides = []
    for path in (adapter.a, adapter.b):
        side = read_form(dig(row, path), adapter.replies)
        if isinstance(side, DropReason):
            return Refusal(side)
        sides.append(side)
    chosen, rejected = sides if verdict else reversed(sides)
    return _with_prompt(row, adapter.prompt, chosen, rejected)


def _propose_turn_lists(row: Row, adapter: ComparisonAdapter, *, first_is_better: bool) -> Proposal:
    """Weave the user's turns and each side's turns into two conversations."""
    if adapter.prompt is None or len(adapter.prompt.fields) != 1:
        return Refusal(DropReason.MISSING_FIELD)
    lists = [read_turn_texts(dig(row, path)) for path in (adapter.prompt.fields[0], adapter.a, adapter.b)]
    conversations = []
    asked = lists[0]
    for answers in lists[1:]:
        if isinstance(asked, DropReason):
            return Refusal(asked)
        if isinstance(answers, DropReason):
            return Refusal(answers)
        if len(asked) != len(answers):
            return Refusal(DropReason.BAD_ROLE_ORDER)
        conversations.append([_message(role, text) for turn in zip(asked, answers, strict=True) for role, text in zip(_SPEAKERS, turn, strict=True)])
    chosen, rejected = conversations if first_is_better else reversed(conversations)
    return Candidate(None, chosen, rejected)


_SPEAKERS = (Role.USER, Role.ASSISTANT)


def _message(role: Role, text: str) -> dict[str, str]:
    return {"role": role.value, "content": text}


def decide(row: Row, verdict: LabelVerdict | StrengthVerdict | ScoreVerdict | FlagVerdict) -> bool | DropReason:
    """Return whether the first of two replies is the better one, or why there is no telling."""
    if isinstance(verdict, LabelVerdict):
        return _decide_label(dig(row, verdict.label), verdict)
    if isinstance(verdict, FlagVerdict):
        flags = [read_number(dig(row, path)) for path in (verdict.a, verdict.b, verdict.tie)]
        if sorted(flag if flag is not None else -1.0 for flag in flags) != [0.0, 0.0, 1.0]:
            return DropReason.UNKNOWN_LABEL
        return DropReason.TIED if flags[2] else flags[0] == 1.0
    if isinstance(verdict, StrengthVerdict):
        strength = read_number(dig(row, verdict.strength))
        first, second = (None, None) if strength is None else (-strength, 0.0)
    else:
        first, second = read_number(dig(row, verdict.score_a)), read_number(dig(row, verdict.score_b))
    if first is None or second is None:
        return DropReason.MISSING_SCORE
    return DropReason.TIED if first == second else first > second


def _decide_label(value: Value, verdict: LabelVerdict) -> bool | DropReason:
    label = label_text(value)
    for values, answer in ((verdict.a, True), (verdict.b, False), (verdict.tie, DropReason.TIED)):
        if label in [known.casefold() for known in values]:
            return answer
    return DropReason.MISSING_FIELD if label is None else DropReason.UNKNOWN_LABEL


def label_text(value: Value) -> str | None:
    """Return a label as text to compare: without case and surrounding white space, whole numbers without a fraction."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value).strip().casefold()


def _propose_ratings(row: Row, adapter: RatingsAdapter) -> list[Proposal]:
    prompt = read_prompt(row, adapter.prompt)
    if isinstance(prompt, DropReason):
        return [Refusal(prompt)]
    replies = dig(row, adapter.replies)
    if prompt is None or replies is None:
        return [Refusal(DropReason.MISSING_FIELD)]
    if not isinstance(replies, list | tuple):
        return [Refusal(DropReason.WRONG_TYPE)]
    scored: list[tuple[int, Value, float]] = []
    refusals: list[Proposal] = []
    for place, item in enumerate(replies):
        text, score = dig(item, adapter.text), mean_score(item, adapter.scores)
        if text is None:
            refusals.append(Refusal(DropReason.MISSING_FIELD, item))
        elif score is None:
            refusals.append(Refusal(DropReason.MISSING_SCORE, item))
        else:
            scored.append((place, text, score))
    return [*refusals, *pair_up(prompt, scored, adapter.pairs)]


def mean_score(item: Value, paths: Sequence[str], values: Mapping[str, float] | None = None) -> float | None:
    """Return the mean of the scores at `paths`, None when one of them is missing or no number."""
    scores = [_score(dig(item, path), values or {}) for path in paths]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None


def _score(value: Value, values: Mapping[str, float]) -> float | None:
    if not values:
        return read_number(value)
    return {label.casefold(): score for label, score in values.items()}.get(label_text(value) or "")


def _propose_tree(row: Row, adapter: TreeAdapter) -> list[Proposal]:
    root = dig(row, adapter.root)
    if root is None:
        return [Refusal(DropReason.MISSING_FIELD)]
    proposals = [proposal for node in _walk(root, adapter) for proposal in _propose_siblings(*node, adapter)]
    return proposals or [Refusal(DropReason.NO_COMPARISON)]


def _walk(root: Value, adapter: TreeAdapter) -> Iterator[tuple[str, list[dict[str, str]], Value]]:
    """Yield every node in order, with its place in the tree and the messages from the root to it."""
    stack: list[tuple[str, list[dict[str, str]], Value]] = [("", [], root)]
    while stack:
        mark, above, node = stack.pop()
        role, text = dig(node, adapter.role), dig(node, adapter.text)
        speaker = Role.USER if role in ("prompter", Role.USER.value) else Role.ASSISTANT if role == Role.ASSISTANT.value else None
        if speaker is None or not isinstance(text, str):
            yield mark, above, None
            continue
        path = [*above, _message(speaker, text)]
        yield mark, path, node
        children = dig(node, adapter.children)
        if isinstance(children, list | tuple):
            stack.extend((f"{mark}/{place}", path, child) for place, child in reversed(list(enumerate(children))))


def _propose_siblings(mark: str, path: list[dict[str, str]], node: Value, adapter: TreeAdapter) -> list[Proposal]:
    """Make pairs of the ranked assistant replies below one node; a node that is no message is refused."""
    if node is None:
        return [Refusal(DropReason.WRONG_TYPE)]
    children = dig(node, adapter.children)
    if children is None or path[-1]["role"] != Role.USER.value:
        return []
    if not isinstance(children, list | tuple):
        return [Refusal(DropReason.WRONG_TYPE)]
    scored = []
    for place, child in enumerate(children):
        rank, text = read_number(dig(child, adapter.rank)), dig(child, adapter.text)
        if rank is not None and isinstance(text, str) and dig(child, adapter.role) == Role.ASSISTANT.value:
            scored.append((place, text, rank))
    if len(scored) < 2:
        return []
    return [
        proposal._replace(mark=f"{mark}/{proposal.mark}") if isinstance(proposal, Candidate) else proposal
        for proposal in pair_up(path, scored, adapter.pairs)
    ]


def propose_group(rows: Sequence[Row], adapter: RatedRowsAdapter) -> tuple[list[Candidate], list[DropReason | None]]:
    """Make pairs of the rows of one prompt.

    Returns:
        The pairs, and for every row why it gave none (None: the row took part).
    """
    prompt = read_prompt(rows[0], adapter.prompt)
    if prompt is None or isinstance(prompt, DropReason):
        reason = prompt if isinstance(prompt, DropReason) else DropReason.MISSING_FIELD
        return [], [reason] * len(rows)
    reasons: list[DropReason | None] = []
    scored = []
    for place, row in enumerate(rows):
        reply, score = dig(row, adapter.reply), mean_score(row, adapter.scores, adapter.values)
        if not has_path(row, adapter.reply):
            reasons.append(DropReason.MISSING_FIELD)
        elif is_blank(reply):
            reasons.append(DropReason.NO_COMPARISON)
        elif score is None:
            reasons.append(DropReason.MISSING_SCORE)
        else:
            reasons.append(None)
            scored.append((place, reply, score))
    proposals = pair_up(prompt, scored, adapter.pairs)
    if isinstance(proposals[0], Refusal):
        reason = proposals[0].reason
        return [], [reason if found is None else found for found in reasons]
    pairs = [proposal for proposal in proposals if isinstance(proposal, Candidate)]
    used = {int(place) for pair in pairs for place in pair.mark.split(">")}
    lowest, highest = min(entry[2] for entry in scored), max(entry[2] for entry in scored)
    for place, _, score in scored:
        if place not in used:
            widest = max(score - lowest, highest - score)
            reasons[place] = DropReason.BEYOND_MAX_PAIRS if widest > 0 and widest >= adapter.pairs.margin else DropReason.TIED
    return pairs, reasons
