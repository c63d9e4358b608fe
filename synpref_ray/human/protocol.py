"""What a verdict must come with: the paper's protocol, enforced where a form arrives.

Paper: Sec. 3.2: annotators see conversation, both replies, attributes and guideline; facts are checked with a search engine, code is run; help from
LLMs is allowed, relying on them fully is not; a pair that a person cannot decide is discarded. Our choice: which category needs which evidence is
a setting, an undecidable pair needs none, and a person states with every verdict whether an LLM helped.
"""

import hmac
from collections.abc import Set
from enum import StrEnum
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from synpref_ray.config import Settings
from synpref_ray.schema import Controversiality, Objectivity, TaskCategory, Verdict

MAX_TEXT_CHARS = 10_000
MIN_RUN_CHARS = 20
UNDECIDABLE = "undecidable"
WITHDRAWN = "withdrawn"


class Evidence(StrEnum):
    """What shows that a verdict was checked."""

    SEARCH_LINK = "search_link"
    CODE_RUN = "code_run"


class ProtocolConfig(Settings):
    """How people verify."""

    lease_minutes: float = Field(default=30.0, gt=0)  # ours: the paper's slowest pair took five; the page renews it while it is open
    evidence: dict[TaskCategory, Evidence] = Field(  # Sec. 3.2: facts are checked with a search engine, code by running it
        default={TaskCategory.INFORMATION_SEEKING: Evidence.SEARCH_LINK, TaskCategory.CODING: Evidence.CODE_RUN}
    )
    min_rationale_chars: int = Field(default=0, ge=0)  # ours: the paper asks for none
    show_notes: bool = True  # Sec. 3.2: notes of an LLM on each reply, where the queue has them


class Given(Settings):
    """A verdict as a form gives it: replies are 1 and 2 as they stood on the page. Strength: 1 slight, 2 clear, 3 strong.

    Texts of any length are taken, and `problems` bounds them: what a person typed is shown to them again, not thrown away.
    """

    choice: str
    strength: int = Field(default=2, ge=1, le=3)
    rationale: str = ""
    search_link: str = ""
    code_run: str = ""
    llm_helped: bool = False
    own_judgement: bool = False
    task_category: str = ""
    objectivity: str = ""
    controversiality: str = ""
    desired_attributes: str = ""
    annotation_guideline: str = ""
    focus_seconds: float = Field(default=0.0, ge=0.0, le=1e6)

    @field_validator("rationale", "code_run", "desired_attributes", "annotation_guideline", mode="before")
    @classmethod
    def _line_ends(cls, value: object) -> object:
        return unix_lines(value)

    @property
    def attributes(self) -> dict[str, str | None]:
        """The five attributes as this person has them; null where a field is empty."""
        fields = ("task_category", "objectivity", "controversiality", "desired_attributes", "annotation_guideline")
        return {name: getattr(self, name).strip() or None for name in fields}

    @property
    def evidence(self) -> dict[str, object]:
        """What was checked, and whether an LLM helped."""
        return {"search_link": self.search_link.strip(), "code_run": self.code_run.strip(), "llm_helped": self.llm_helped}

    def verdict(self, *, swapped: bool) -> str:
        """Return chosen, rejected or undecidable, of the pair as ingested."""
        if self.choice == UNDECIDABLE:
            return UNDECIDABLE
        return Verdict.REJECTED.value if (self.choice == "1") == swapped else Verdict.CHOSEN.value


_LIMITS = {"rationale": MAX_TEXT_CHARS, "search_link": 2000, "code_run": MAX_TEXT_CHARS}
_LIMITS |= {"desired_attributes": MAX_TEXT_CHARS, "annotation_guideline": MAX_TEXT_CHARS}
_VALUES = {"task_category": TaskCategory, "objectivity": Objectivity, "controversiality": Controversiality}


def problems(given: Given, config: ProtocolConfig, tagged: str | None) -> list[str]:
    """Return what a verdict lacks, a sentence each; empty: it may be stored.

    Args:
        tagged: the task category that the pair came with. Its evidence is asked for too: changing or clearing the category gets nobody round it.
    """
    found = []
    if given.choice not in ("1", "2", UNDECIDABLE):
        found.append("Say which reply is better, or that you cannot decide.")
    for name, enum in _VALUES.items():
        value = getattr(given, name)
        if value and value not in {entry.value for entry in enum}:
            found.append(f"{name.replace('_', ' ').capitalize()} has a value that is not on the list.")
    for name, limit in _LIMITS.items():
        if len(getattr(given, name)) > limit:
            found.append(f"{name.replace('_', ' ').capitalize()} has {len(getattr(given, name))} characters; at most {limit} are kept.")
    texts = [getattr(given, name) for name in _LIMITS]
    if any((ord(char) < 32 and char not in "\t\n\r") or "\ud800" <= char <= "\udfff" for text in texts for char in text):
        found.append("A text holds a control character; paste it as plain text.")
    if len(given.rationale.strip()) < config.min_rationale_chars:
        found.append(f"Give your reason in at least {config.min_rationale_chars} characters.")
    if given.search_link.strip() and not is_web_link(given.search_link.strip()):
        found.append("The link must begin with http:// or https://.")
    if given.choice in ("1", "2"):
        if given.llm_helped and not given.own_judgement:
            found.append("An LLM helped: confirm that the judgement is your own. If it is not, choose undecidable.")
        found += _missing_evidence(given, {required_evidence(category, config) for category in (tagged, given.task_category)})
    return found


def unix_lines(value: object) -> object:
    """Return a text with line ends as they were before a browser sent it: forms carry CR LF."""
    return value.replace("\r\n", "\n") if isinstance(value, str) else value


def required_evidence(task_category: str | None, config: ProtocolConfig) -> Evidence | None:
    """Return what a pair of this category must be checked with; None: nothing is asked for."""
    return next((evidence for category, evidence in config.evidence.items() if category.value == task_category), None)


def is_web_link(text: str) -> bool:
    """Whether a text is an absolute http or https address."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc) and not any(char.isspace() for char in text)


def is_swapped(salt: str, pair_id: str, admin: str) -> bool:
    """Whether this admin sees the pair's rejected reply first; the same whenever they see it, and not to be told without the database's salt."""
    return bool(hmac.digest(salt.encode(), f"{pair_id}:{admin}".encode(), "sha256")[0] & 1)


def _missing_evidence(given: Given, wanted: Set[Evidence | None]) -> list[str]:
    found = []
    if Evidence.SEARCH_LINK in wanted and not given.search_link.strip():
        found.append("Facts must be checked: give the link of what you found.")
    if Evidence.CODE_RUN in wanted and len(given.code_run.strip()) < MIN_RUN_CHARS:
        found.append("Code must be run: paste what you ran and what came out.")
    return found
