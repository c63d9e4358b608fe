from typing import Any

import pyarrow as pa
import pytest

from synpref_ray.errors import InputError, SchemaError
from synpref_ray.reward.render import choose_pad_token, render_conversation, render_pairs, template_digest
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
