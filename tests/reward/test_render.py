from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from synpref_ray.errors import InputError, SchemaError
from synpref_ray.reward.render import choose_pad_token, render_conversation, render_pairs, render_replies, template_digest
from tests.reward.conftest import TEMPLATE, byte_tokenizer

USER = [{"role": "user", "content": "hi"}]


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_the_whole_conversation_without_a_system_message_of_ours() -> None:
    tokenizer = byte_tokenizer()
    assert text_of(tokenizer, render_conversation(tokenizer, USER, "yes")) == "<|user|>\nhi<|end|><|assistant|>\nyes<|end|>"


def test_a_doubled_bos_is_dropped_once_and_a_single_one_stays() -> None:
    doubled = byte_tokenizer("<|bos|><|bos|>" + TEMPLATE, bos_token="<|bos|>")
    single = byte_tokenizer("<|bos|>" + TEMPLATE, bos_token="<|bos|>")
    assert render_conversation(doubled, USER, "yes") == render_conversation(single, USER, "yes")
    assert render_conversation(single, USER, "yes").count(single.bos_token_id) == 1


def test_a_bos_that_begins_the_template_but_is_not_added_by_the_tokenizer_stays() -> None:
    tokenizer = byte_tokenizer(bos_token="<|user|>")  # as in SmolLM2, whose BOS opens every turn
    assert render_conversation(tokenizer, USER, "yes")[0] == tokenizer.bos_token_id


def test_no_date_of_today() -> None:
    dated = byte_tokenizer("{{ strftime_now('%d %b %Y') }}|{{ date_string }}" + TEMPLATE)
    assert text_of(dated, render_conversation(dated, USER, "yes")).startswith("26 Jul 2024|26 Jul 2024<|user|>")


def test_pairs_keep_order_and_over_long_ones_are_marked_not_cut() -> None:
    tokenizer = byte_tokenizer()
    rows = [
        {"pair_id": "a", "prompt": USER, "chosen": "yes", "rejected": "no"},
        {"pair_id": "b", "prompt": USER, "chosen": "yes" * 50, "rejected": "no"},
        {"pair_id": "c", "prompt": USER, "chosen": "1", "rejected": "no"},
    ]
    rendered = render_pairs(tokenizer, pa.Table.from_pylist(rows), max_length_tokens=40)
    assert rendered.drop_reasons == (None, "too_long", None)
    assert rendered.usable() == [0, 2]
    chosen, rejected = rendered.sequences(2)
    assert chosen.tolist() == render_conversation(tokenizer, USER, "1")
    assert rejected.tolist() == render_conversation(tokenizer, USER, "no")
    assert [len(sequence) for sequence in rendered.sequences(1)] == [0, 0]


def test_the_limit_itself_is_allowed() -> None:
    tokenizer = byte_tokenizer()
    rows = pa.Table.from_pylist([{"pair_id": "a", "prompt": USER, "chosen": "yes", "rejected": "no"}])
    length = len(render_conversation(tokenizer, USER, "yes"))
    assert render_pairs(tokenizer, rows, length).drop_reasons == (None,)
    assert render_pairs(tokenizer, rows, length - 1).drop_reasons == ("too_long",)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


LONG = [message("system", "s"), *(message(role, f"{role[0]}{turn}" * 5) for turn in range(3) for role in ("user", "assistant")), *USER]


def length(prompt: list[dict[str, str]], reply: str) -> int:
    return len(render_conversation(byte_tokenizer(), prompt, reply))


@pytest.mark.parametrize(("num_turns", "start"), [(0, 1), (1, 3), (2, 5), (3, 7)])
def test_the_oldest_turns_go_from_both_sides_until_the_longer_one_fits(num_turns: int, start: int) -> None:
    left = [LONG[0], *LONG[start:]]
    limit = length(left, "a longer reply")
    rows = [
        {"pair_id": "a", "prompt": LONG, "chosen": "yes", "rejected": "a longer reply"},
        {"pair_id": "b", "prompt": USER, "chosen": "yes", "rejected": "no"},
    ]
    rendered = render_pairs(byte_tokenizer(), pa.Table.from_pylist(rows), limit, "drop_oldest_turns")
    assert rendered.drop_reasons == (None, None)
    assert rendered.shortened == ((0,) if num_turns else ())
    for i, (prompt, row) in enumerate(zip((left, USER), rows, strict=True)):
        expected = [render_conversation(byte_tokenizer(), prompt, str(row[name])) for name in ("chosen", "rejected")]
        assert [sequence.tolist() for sequence in rendered.sequences(i)] == expected
    replies = render_replies(byte_tokenizer(), LONG, ["yes", "a longer reply"], limit, "drop_oldest_turns")
    assert replies == [render_conversation(byte_tokenizer(), left, reply) for reply in ("yes", "a longer reply")]


def test_a_last_turn_that_does_not_fit_alone_is_too_long_and_no_message_is_cut() -> None:
    limit = length([LONG[0], *USER], "yes") - 1
    rows = pa.Table.from_pylist([{"pair_id": "a", "prompt": LONG, "chosen": "yes", "rejected": "no"}])
    rendered = render_pairs(byte_tokenizer(), rows, limit, "drop_oldest_turns")
    assert (rendered.drop_reasons, rendered.shortened) == (("too_long",), ())
    for over_long in ("reject", "drop_oldest_turns"):
        with pytest.raises(InputError, match="more than max_length_tokens"):
            render_replies(byte_tokenizer(), LONG, ["yes", "no"], limit, over_long)
    assert render_pairs(byte_tokenizer(), rows, 60, "reject").drop_reasons == ("too_long",)


def test_a_turn_begins_with_a_person_and_may_have_several_messages() -> None:
    two = [message("assistant", "welcome"), message("user", "a" * 20), message("assistant", "b"), *USER, *USER]
    for left in (two[1:], two[3:]):
        rows = pa.Table.from_pylist([{"pair_id": "a", "prompt": two, "chosen": "yes", "rejected": "no"}])
        rendered = render_pairs(byte_tokenizer(), rows, length(left, "yes"), "drop_oldest_turns")
        assert rendered.sequences(0)[0].tolist() == render_conversation(byte_tokenizer(), left, "yes")
    assert render_pairs(byte_tokenizer(), rows, length(two[3:], "yes") - 1, "drop_oldest_turns").drop_reasons == ("too_long",)


def test_a_template_that_refuses_what_is_left_makes_the_pair_too_long() -> None:
    tokenizer = byte_tokenizer("{% if messages|length < 8 %}{{ raise_exception('too few') }}{% endif %}" + TEMPLATE)
    rows = pa.Table.from_pylist([{"pair_id": "a", "prompt": LONG, "chosen": "yes", "rejected": "no"}])
    assert render_pairs(tokenizer, rows, length(LONG, "yes") - 1, "drop_oldest_turns").drop_reasons == ("too_long",)


PIECES = st.sampled_from(["<|end|>", "<|user|>", "<|pad|>", "<|", "end", "|>", "|", "a", " ", "\n", "\ufdd0", "é"])
SPELLINGS = st.lists(PIECES, min_size=1, max_size=12).map("".join)


@settings(deadline=None, max_examples=60)
@given(SPELLINGS, SPELLINGS)
def test_what_a_pair_says_is_read_to_the_letter_and_never_controls(question: str, reply: str) -> None:
    tokenizer = byte_tokenizer()
    digest = template_digest(tokenizer)
    ids = render_conversation(tokenizer, [message("user", question)], reply)
    assert template_digest(tokenizer) == digest
    assert tokenizer("<|end|>")["input_ids"] == [tokenizer.eos_token_id]  # reading letters leaves no trace in the tokenizer
    assert text_of(tokenizer, ids) == f"<|user|>\n{question}<|end|><|assistant|>\n{reply}<|end|>"
    special = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"])
    assert [token for token in ids if token in set(tokenizer.all_special_ids)] == special


def test_where_letters_cannot_be_read_apart_the_pair_is_refused_with_a_reason() -> None:
    letters = {letter: i for i, letter in enumerate(["▁", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.BPE(letters, [], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # sentencepiece: the text's beginning is special
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)
    rows = pa.Table.from_pylist([{"pair_id": str(i), "prompt": USER, "chosen": text, "rejected": "no"} for i, text in enumerate(("<|end|>", "a"))])
    rendered = render_pairs(tokenizer, rows, 100)
    assert (rendered.drop_reasons, rendered.spelled) == (("special_token_text", None), ())
    with pytest.raises(InputError, match="spells special tokens"):
        render_conversation(tokenizer, USER, "<|end|>")


def test_a_conversation_that_the_template_refuses_is_marked() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    rows = [
        {"pair_id": "a", "prompt": [{"role": "system", "content": "be kind"}, *USER], "chosen": "yes", "rejected": "no"},
        {"pair_id": "b", "prompt": USER, "chosen": "yes", "rejected": "no"},
    ]
    assert render_pairs(byte_tokenizer(template), pa.Table.from_pylist(rows), 100).drop_reasons == ("bad_role_order", None)


def test_zero_rows_and_missing_columns() -> None:
    table = pa.table({"pair_id": pa.array([], pa.string()), "prompt": [], "chosen": [], "rejected": []})
    assert len(render_pairs(byte_tokenizer(), table, 100)) == 0
    with pytest.raises(SchemaError, match="missing: rejected"):
        render_pairs(byte_tokenizer(), table.drop_columns(["rejected"]), 100)


def test_no_template_is_one_clear_error() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render_conversation(tokenizer, USER, "yes")


def test_the_digest_follows_the_template_and_survives_use_and_saving(tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = byte_tokenizer(pad_token="<|end|>")
    digest = template_digest(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert template_digest(tokenizer) == digest
    assert choose_pad_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|pad|>")
    tokenizer.save_pretrained(tmp_path)
    assert template_digest(AutoTokenizer.from_pretrained(tmp_path)) == digest
    assert template_digest(byte_tokenizer(TEMPLATE + " ", pad_token="<|end|>")) != digest


def test_a_pad_token_that_ends_every_conversation_is_replaced() -> None:
    tokenizer = byte_tokenizer(pad_token="<|end|>")  # pad = eos = end of turn
    assert choose_pad_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|pad|>")
    kept = byte_tokenizer(TEMPLATE + "{{ '\\n' }}", pad_token="<|end|>")  # SmolLM2: a newline follows the end of turn
    assert choose_pad_token(kept) == kept.convert_tokens_to_ids("<|end|>")
