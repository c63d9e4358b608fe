"""No text of the corpus leaves its line, its quotes or its place in a prompt, and none becomes a control token."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from synpref_ray.llm.engine import Request
from synpref_ray.llm.injections import CONTROL, INJECTIONS, Injection, InjectionKind, plant
from synpref_ray.llm.prompts import JUDGE_GUIDELINES, JUDGE_REPLY_START, TAG_INSTRUCTIONS, TAG_REPLY_START, JudgedExample, judge_prompt, tag_prompt
from synpref_ray.llm.tokens import PlainEncoder
from synpref_ray.schema import TaskCategory

PLAIN = "plain"
HEADINGS = ("System: ", "User: ", "Assistant: ", "Request: ", "Candidate 1: ", "Candidate 2: ", "Reply A: ", "Reply B: ")
STARTS = (*HEADINGS, JUDGE_REPLY_START, TAG_REPLY_START, "Task category: ", "Desired attributes: ", "Annotation guideline: ")
FIELDS = ("earlier", "request", "candidate_1", "candidate_2", "desired_attributes", "annotation_guideline")
CONTROL_TOKENS = [
    *("<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
]


def example(answer: str | None = None, **fields: str) -> JudgedExample:
    """Return a pair whose named fields hold the given texts, all others PLAIN."""
    texts = {name: fields.get(name, PLAIN) for name in FIELDS}
    return JudgedExample(
        prompt=[
            {"role": "user", "content": texts["earlier"]},
            {"role": "assistant", "content": PLAIN},
            {"role": "user", "content": texts["request"]},
        ],
        candidate_1=texts["candidate_1"],
        candidate_2=texts["candidate_2"],
        attributes={"task_category": TaskCategory.OTHER, **{name: texts[name] for name in ("desired_attributes", "annotation_guideline")}},
        answer=answer,
    )


def judge_target(field: str, text: str) -> str:
    return judge_prompt(JUDGE_GUIDELINES["full"], example(**{field: text}), [example("2")])


def judge_exemplar(field: str, text: str) -> str:
    return judge_prompt(JUDGE_GUIDELINES["full"], example(), [example("1"), example("2", **{field: text})])


def tagged(field: str, text: str) -> str:
    pair = example(**{field: text})
    return tag_prompt(TAG_INSTRUCTIONS["full"], pair.prompt, [pair.candidate_1, pair.candidate_2])


PLACES = [
    *((build, field) for build in (judge_target, judge_exemplar) for field in FIELDS),
    *((tagged, field) for field in ("earlier", "request", "candidate_1", "candidate_2")),
]
every_place = pytest.mark.parametrize(("build", "field"), PLACES, ids=lambda value: value if isinstance(value, str) else value.__name__)
every_injection = pytest.mark.parametrize("injection", INJECTIONS, ids=lambda injection: injection.name)


def starts(prompt: str) -> list[str | None]:
    """Return what each line of a prompt begins with, of all that means something to a judge or a tagger."""
    return [next((start for start in STARTS if line.startswith(start)), None) for line in prompt.splitlines()]


def assert_contained(build: Callable[[str, str], str], field: str, text: str) -> None:
    """The text changes one line of the prompt, and from that line `json.loads` gives it back whole, after a heading of ours."""
    hostile, plain = build(field, text), build(field, PLAIN)
    assert starts(hostile) == starts(plain)
    changed = [(ours, found) for ours, found in zip(plain.splitlines(), hostile.splitlines(), strict=True) if ours != found]
    assert len(changed) == (text != PLAIN)
    for ours, found in changed:
        heading = ours.removesuffix(json.dumps(PLAIN))
        assert heading != ours
        assert found.startswith(heading)
        assert json.loads(found.removeprefix(heading)) == text


@every_place
def test_no_injection_leaves_its_line(build: Callable[[str, str], str], field: str) -> None:
    for injection in (*INJECTIONS, CONTROL):
        assert_contained(build, field, injection.text)
        assert_contained(build, field, plant("A reply.", injection))


pieces = st.one_of(
    st.sampled_from(
        [*STARTS, *CONTROL_TOKENS, '"', "\\", "\\u0022", "\n", "\r", "\u2028", "\u2029", "\u0085", "\x0b", "\x1c", "\x00", "\x7f", "\u202e"]
    ),
    st.text(max_size=8),
)


@settings(deadline=None)
@given(st.sampled_from(PLACES), st.lists(pieces, max_size=8).map("".join))
def test_no_text_whatever_leaves_its_line(place: tuple[Callable[[str, str], str], str], text: str) -> None:
    assert_contained(*place, text)


def control_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the control tokens of four families."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


TOKENIZER = control_tokenizer()
ENCODER = PlainEncoder(TOKENIZER)
CONTROL_IDS = set(TOKENIZER.convert_tokens_to_ids(CONTROL_TOKENS))


@every_injection
def test_no_injection_becomes_a_control_token(injection: Injection) -> None:
    prompt = judge_target("candidate_2", plant("A reply.", injection))
    request = Request.of(prompt, prompt_version="v", max_new_tokens=1, chat=True, reply_start=JUDGE_REPLY_START)
    tokens = ENCODER.encode_request(request)
    start, end = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [token for token in tokens if token in CONTROL_IDS] == [start, end, start]  # the template's own three
    assert prompt in TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False)


def test_the_corpus_would_be_control_tokens_for_a_tokenizer_left_alone() -> None:
    for injection in (injection for injection in INJECTIONS if injection.kind is InjectionKind.TEMPLATE_TOKENS):
        assert set(TOKENIZER(injection.text)["input_ids"]) & CONTROL_IDS, injection.name


def test_the_corpus_is_what_it_says() -> None:
    names = [injection.name for injection in INJECTIONS]
    assert len(set(names)) == len(names) >= 24
    assert len({injection.text for injection in INJECTIONS}) == len(names)
    assert {injection.kind for injection in INJECTIONS} == set(InjectionKind) - {CONTROL.kind}
    assert CONTROL.name not in names
    of_kind = {kind: [injection for injection in INJECTIONS if injection.kind is kind] for kind in InjectionKind}
    assert len(of_kind[InjectionKind.LANGUAGE]) >= 5
    assert all(len(injection.text) > 4000 for injection in of_kind[InjectionKind.LONG])
    assert len(of_kind[InjectionKind.TEMPLATE_TOKENS]) == 4


def test_a_planted_reply_keeps_the_reply_and_the_text() -> None:
    assert plant("Reply.", Injection("n", InjectionKind.ENCODED, "text")) == "Reply.\n\ntext"
