"""The metrics by hand: section weights, Ties, the style matrix, one against many, columns of four; and what is said to be missing."""

from typing import Any

import pytest

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks import BENCHMARKS
from synpref_ray.evaluation.benchmarks.core import Item, Part, Verified, outcome_of_scores, outcome_of_verdicts
from synpref_ray.evaluation.benchmarks.hhh import HHH
from synpref_ray.evaluation.benchmarks.judgebench import JUDGEBENCH
from synpref_ray.evaluation.benchmarks.pairs import is_one_against_many, measure_one_against_many, read_one_against_many
from synpref_ray.evaluation.benchmarks.ppe import PPE_CORRECTNESS, PPE_PREFERENCE
from synpref_ray.evaluation.benchmarks.rewardbench import REWARDBENCH, SECTIONS
from synpref_ray.evaluation.benchmarks.rewardbench2 import REWARDBENCH2, SUBSETS
from synpref_ray.evaluation.benchmarks.rewardmath import REWARDMATH
from synpref_ray.evaluation.benchmarks.rm_bench import RM_BENCH
from synpref_ray.evaluation.benchmarks.rmb import RMB
from tests.evaluation.benchmarks.builders import by_hand, values_of, verdicts

NAN = float("nan")
RIGHT, WRONG = [1.0, 0.0], [0.0, 1.0]


def items_of(benchmark: Any, rows: list[dict[str, object]], name: str = "part") -> list[Item]:
    return benchmark.read([Part(name, rows)]).items


def rewardbench_rows(subsets: list[str]) -> list[dict[str, object]]:
    return [{"prompt": f"p{number}", "chosen": "a", "rejected": "b", "subset": subset, "id": number} for number, subset in enumerate(subsets)]


def test_rewardbench_sections_weigh_subsets_by_fixed_counts() -> None:
    subsets = [subset for section in SECTIONS.values() for subset in section]
    items = items_of(REWARDBENCH, rewardbench_rows(subsets))
    wrong = {"math-prm", "mt-bench-easy", "donotanswer", "llmbar-adver-manual"}
    values = values_of(REWARDBENCH, items, by_hand(items, [WRONG if subset in wrong else RIGHT for subset in subsets]))
    # math-prm weighs 984 of 984 + 6 x 164 = 1968: half of Reasoning, although it has 447 pairs
    by_hand_values = {
        "chat": (100 + 95 + 95 + 40) / 358,
        "chat_hard": (37 + 100 + 134 + 92 + 47) / 456,
        "safety": (100 + 100 + 154 + 250) / 740,
        "reasoning": 0.5,
    }
    for section, value in by_hand_values.items():
        assert values[section] == pytest.approx(value, rel=1e-15)
    assert values["overall"] == pytest.approx(sum(by_hand_values.values()) / 4, rel=1e-15)


def test_rewardbench_counts_are_those_of_the_filtered_set() -> None:
    pairs = sum(weight for section in SECTIONS.values() for weight in section.values()) - 984 + 447
    assert pairs == REWARDBENCH.num_items == 2985


def test_a_section_without_all_its_subsets_is_missing_and_so_is_the_overall() -> None:
    subsets = [*SECTIONS["chat"], *SECTIONS["reasoning"]][:-1]
    items = items_of(REWARDBENCH, rewardbench_rows(subsets))
    measured = REWARDBENCH.measure(items, by_hand(items, [RIGHT] * len(items)))
    assert measured.missing["reasoning"] == "no item of subset/hep-rust"
    assert "overall" in measured.missing
    values = values_of(REWARDBENCH, items, by_hand(items, [RIGHT] * len(items)))
    assert values["chat"] == 1.0
    assert not {"reasoning", "overall"} & set(values)
    assert values["subset/math-prm"] == 1.0


def rewardbench2_rows() -> list[dict[str, object]]:
    names = [subset.replace("_", " ").title().replace("If", "IF") for subset in SUBSETS]
    rows: list[dict[str, object]] = [
        {"id": f"{number}", "prompt": f"q{number}", "chosen": ["r"], "rejected": ["x", "y", "z"], "subset": name} for number, name in enumerate(names)
    ]
    for number in ("1", "2"):
        rows.append({"id": f"tied:{number}", "prompt": f"name one {number}", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties"})
        rows.append({"id": f"ref:{number}", "prompt": f"name the {number}", "chosen": ["a"], "rejected": ["c"], "subset": "Ties"})
    return rows


def test_rewardbench2_by_hand() -> None:
    items = items_of(REWARDBENCH2, rewardbench2_rows())
    assert [item.subset for item in items[:5]] == list(SUBSETS)
    scores = [
        [4.0, 1.0, 2.0, 3.0],  # the only highest: 1
        [4.0, 4.0, 2.0, 3.0],  # shared by two: 1/2
        [4.0, 4.0, 4.0, 4.0],  # shared by four: 1/4
        [1.0, 4.0, 2.0, 3.0],  # not the highest: 0
        [3.0, 1.0, 1.0, NAN],  # a reply without a reward: 0
        [5.0, 4.0, 1.0],  # tied 1: accurate, m = 3, d = 1
        [3.0, 2.0],  # ref 1: accurate, m = 1; min(3, 1) = 1 is not above d = 1; tanh(1/1 - 1) = 0
        [5.0, 5.0, 6.0],  # tied 2: not accurate, m = -1, d = 0; -1 is not above 0
        [1.0, 0.0],  # ref 2: accurate, m = 1; min = -1, tanh(-1/0 - 1) = -1
    ]
    values = values_of(REWARDBENCH2, items, by_hand(items, scores))
    assert [values[subset] for subset in SUBSETS] == [1.0, 0.5, 0.25, 0.0, 0.0]
    ties = 0.30 * 0.5 + 0.30 * 1.0 + 0.20 * 0.5 + 0.20 * 0.0 + 0.01 * (0.0 - 1.0) / 2
    assert values["ties"] == pytest.approx(ties, rel=1e-15)
    assert values["overall"] == pytest.approx((1.0 + 0.5 + 0.25 + 0.0 + 0.0 + ties) / 6, rel=1e-15)


def test_undefined_ties_margins_are_zero_and_a_perfect_model_nears_101_percent() -> None:
    rows = [row for row in rewardbench2_rows() if str(row["id"]).endswith(":1")]
    items = items_of(REWARDBENCH2, rows)
    values = values_of(REWARDBENCH2, items, by_hand(items, [[1.0, 1.0, 1.0], [1.0, 1.0]]))  # m = 0, d = 0: 0/0
    assert values["ties/margin"] == 0.0
    values = values_of(REWARDBENCH2, items, by_hand(items, [[9.0, 9.0, 1.0], [9.0, 1.0]]))  # d = 0: tanh of infinity
    assert values["ties"] == pytest.approx(1.01, rel=1e-15)
    values = values_of(REWARDBENCH2, items, by_hand(items, [[3.0, 2.0, 1.0], [9.0, NAN]]))
    assert (values["ties/accuracy_ref"], values["ties/preferred_hard"], values["ties/margin"]) == (0.0, 0.0, 0.0)


def test_rewardbench2_says_what_a_judge_of_pairs_cannot_give() -> None:
    items = items_of(REWARDBENCH2, rewardbench2_rows())
    measured = REWARDBENCH2.measure(items, verdicts(items))
    assert measured.missing["ties"] == "its margins need rewards, not verdicts on pairs"
    assert "overall" in measured.missing
    assert values_of(REWARDBENCH2, items, verdicts(items))["math"] == 1.0


@pytest.mark.parametrize("change", [{"id": "tie:1"}, {"chosen": ["a"]}, {"subset": "Other"}, {"chosen": "a"}, {"rejected": []}])
def test_rewardbench2_rows_that_are_not_official_are_one_clear_error(change: dict[str, object]) -> None:
    row = {**rewardbench2_rows()[5], **change}
    with pytest.raises(InputError, match="part, row 0: expected"):
        items_of(REWARDBENCH2, [row])


def rm_bench_rows(domains: list[str]) -> list[dict[str, object]]:
    return [
        {"id": n, "prompt": f"q{n}", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"], "domain": domain} for n, domain in enumerate(domains)
    ]


def test_rm_bench_matrix_and_difficulties_by_hand() -> None:
    items = items_of(RM_BENCH, rm_bench_rows(["chat", "math", "code", "safety-refuse", "safety-response"]), "total_dataset.json")
    fancier_wins = [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]  # a tie on the diagonal is wrong
    right = [3.0] * 3 + [1.0] * 3
    outcomes = by_hand(items, [fancier_wins, right, right, right, fancier_wins])
    values = values_of(RM_BENCH, items, outcomes)
    assert (values["chat/easy"], values["chat/normal"], values["chat/hard"], values["chat/mean"]) == (1.0, 0.0, 0.0, pytest.approx(1 / 3))
    assert (values["safety/easy"], values["safety/normal"], values["safety/hard"]) == (1.0, 0.5, 0.5)  # both files pooled
    assert values["chat/matrix/markdown_over_concise"] == 1.0
    assert values["chat/matrix/concise_over_markdown"] == 0.0
    assert (values["easy"], values["normal"], values["hard"]) == (1.0, (0 + 1 + 1 + 0.5) / 4, (0 + 1 + 1 + 0.5) / 4)
    assert values["overall"] == pytest.approx((1 / 3 + 1 + 1 + 2 / 3) / 4, rel=1e-15)
    assert "present_domains/overall" not in values


def test_rm_bench_without_a_domain_gives_means_that_are_named_as_not_official() -> None:
    items = items_of(RM_BENCH, rm_bench_rows(["chat", "code"]))
    measured = RM_BENCH.measure(items, verdicts(items))
    assert measured.missing["overall"] == "no item of math, safety"
    assert values_of(RM_BENCH, items, verdicts(items))["present_domains/hard"] == 1.0


def test_the_total_file_is_read_alone() -> None:
    rows = rm_bench_rows(["chat"])
    read = RM_BENCH.read(
        [Part("data/chat_filtered.json", [{key: row[key] for key in row if key != "domain"} for row in rows]), Part("data/total_dataset.json", rows)]
    )
    assert len(read.items) == 1


def judgebench_row(label: str, model: str = "gpt-4o-2024-05-13", source: str = "mmlu-pro-law") -> dict[str, object]:
    return {
        "pair_id": f"{label}{model}{source}",
        "source": source,
        "question": "q",
        "response_model": model,
        "response_A": "a",
        "response_B": "b",
        "label": label,
    }


def test_judgebench_ties_micro_and_macro() -> None:
    rows = [
        judgebench_row("A>B"),
        judgebench_row("B>A"),
        judgebench_row("B>A", source="livecodebench"),
        judgebench_row("A>B", "claude-3-5-sonnet-20240620"),
    ]
    items = items_of(JUDGEBENCH, rows)
    outcomes = by_hand(items, [[2.0, 1.0], [1.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    values = values_of(JUDGEBENCH, items, outcomes)
    assert (values["mmlu-pro"], values["livecodebench"], values["micro"]) == (0.5, 1.0, 2 / 3)
    assert (values["single_game/mmlu-pro"], values["single_game/micro"]) == (1.0, 1.0)  # a tie says B>A, whatever the order
    assert (values["claude/micro"], values["single_game/claude/micro"]) == (0.0, 0.0)
    assert "macro" not in values
    assert JUDGEBENCH.measure(items, outcomes).missing["macro"] == "no item of livebench-reasoning, livebench-math"
    by_judge = values_of(JUDGEBENCH, items, verdicts(items))
    assert by_judge["micro"] == 1.0
    assert "single_game/micro" not in by_judge


def test_the_paper_s_judgebench_column_is_macro() -> None:
    # Table 1 and 6.4 of the paper: Llama-3.1-8B 76.6 / 75.5 / 89.3 / 78.6 is reported as 80.0; pooled over pairs it would be 78.6
    right = {"mmlu-pro": (118, 154), "livebench-reasoning": (74, 98), "livebench-math": (50, 56), "livecodebench": (33, 42)}
    rows = [judgebench_row("A>B", source=f"{group}-{number}") for group, (_, size) in right.items() for number in range(size)]
    items = items_of(JUDGEBENCH, rows)
    scores = [RIGHT if number < num_right else WRONG for num_right, size in right.values() for number in range(size)]
    values = values_of(JUDGEBENCH, items, by_hand(items, scores))
    assert (round(100 * values["macro"], 1), round(100 * values["micro"], 1)) == (80.0, 78.6)


def test_a_judge_s_verdicts_are_summed_over_the_orders() -> None:
    item = Item("i", (), ("a", "b", "c"), ((0, 1), (0, 2), (1, 2)))
    outcome = outcome_of_verdicts(item, [2, 0, None])
    assert outcome.wins.tolist() == [True, False, False]
    assert not outcome.answered
    assert outcome_of_verdicts(item, [1, 1, -2]).wins.tolist() == [True, True, False]


def ppe_row(number: int) -> dict[str, object]:
    return {
        "question_id": number,
        "model_name": "m",
        "prompt": f"q{number}",
        **{f"response_{place}": f"r{place}" for place in range(1, 5)},
        "scores": [1, 0, 1, 0],
        "sampled_conflict_pairs": [[0, 1], [3, 2], [0, 2]],
    }


def test_ppe_correctness_pairs_and_curves_by_hand() -> None:
    names = ["PPE-MMLU-Pro-Best-of-K", "PPE-MATH-Best-of-K", "x/ppe/gpqa.jsonl", "ifeval_best_of_k.parquet", "PPE-MBPP-Plus-Best-of-K"]
    read = PPE_CORRECTNESS.read([Part(name, [ppe_row(number)]) for number, name in enumerate(names)])
    assert read.left_out == {"conflict pairs of equal truth": 5}
    assert [item.subset for item in read.items] == ["mmlu_pro", "math", "gpqa", "ifeval", "mbpp_plus"]
    assert read.items[0].pairs == ((0, 1), (2, 3))
    scores = [[4.0, 3.0, 2.0, 1.0]] + [[1.0, 2.0, 3.0, 4.0]] * 4
    values = values_of(PPE_CORRECTNESS, read.items, by_hand(read.items, scores))
    assert values["mmlu_pro/accuracy"] == 1.0
    assert values["math/accuracy"] == 0.0
    assert values["accuracy"] == pytest.approx(1 / 5)
    # of the six pairs of four replies: the first reply is the pick in 3, the second in 2, the third in 1
    assert values["mmlu_pro/best_of/2/model"] == pytest.approx((3 * 1 + 2 * 0 + 1 * 1) / 6)
    assert values["mmlu_pro/best_of/4/model"] == 1.0
    assert values["best_of/4/model"] == pytest.approx((1 + 0 * 4) / 5)
    assert values["best_of/2/oracle"] == pytest.approx(5 / 6)
    assert values["best_of/4/random"] == 0.5


def test_ppe_correctness_without_a_set_has_no_mean_of_five() -> None:
    read = PPE_CORRECTNESS.read([Part("PPE-MATH-Best-of-K", [ppe_row(1)])])
    measured = PPE_CORRECTNESS.measure(read.items, verdicts(read.items))
    assert measured.missing["accuracy"].startswith("no item of mmlu_pro/accuracy")
    assert "best_of" in measured.missing
    with pytest.raises(InputError, match="tells none of PPE's sets"):
        PPE_CORRECTNESS.read([Part("other.jsonl", [ppe_row(1)])])


def test_ppe_preference_leaves_ties_out() -> None:
    rows = [
        {"question_id": n, "prompt": "q", "response_1": "a", "response_2": "b", "winner": winner}
        for n, winner in enumerate(("model_a", "model_b", "tie", "tie (bothbad)"))
    ]
    read = PPE_PREFERENCE.read([Part("p", rows)])
    assert read.left_out == {"ties of the voters": 2}
    assert values_of(PPE_PREFERENCE, read.items, by_hand(read.items, [RIGHT, RIGHT])) == {"accuracy": 0.5}


def rmb_rows() -> list[dict[str, object]]:
    said = [{"role": "user", "content": "q", "language": "English"}]
    rows: list[dict[str, object]] = []
    for goal in ("Helpfulness", "Harmlessness"):
        pair = {
            "chosen": {"answer": "a", "llm_name": "m"},
            "reject": {"answer": "b", "llm_name": "m"},
            "pair_uid": goal,
            "category_path": f"Pairwise_set/{goal}/S1",
        }
        bon = {"bon_best": {"answer": "a"}, "loser_list": [{"answer": "b"}, {"answer": "c"}], "bon_uid": goal, "category_path": f"BoN_set/{goal}/S1"}
        rows += [{"conversation_input": said, **pair}, {"conversation_input": said, **bon}]
    return rows


def test_rmb_columns_by_hand() -> None:
    items = items_of(RMB, rmb_rows())
    assert [item.subset for item in items] == ["pairwise/helpfulness", "bon/helpfulness", "pairwise/harmlessness", "bon/harmlessness"]
    values = values_of(RMB, items, by_hand(items, [RIGHT, [3.0, 2.0, 1.0], RIGHT, [3.0, 3.0, 1.0]]))
    assert (values["bon/helpfulness"], values["bon/harmlessness"], values["overall"]) == (1.0, 0.0, 0.75)
    assert values["bon/best_of/3/model"] == pytest.approx((1 + 1 / 2) / 2)  # a tie for the highest is an even draw
    assert values["bon/best_of/1/model"] == pytest.approx(1 / 3)
    assert RMB.verified_for("bon/harmlessness") is Verified.UNVERIFIED
    assert RMB.verified_for("pairwise/harmlessness") is Verified.HAND_WORKED
    assert RMB.verified_for("bon/best_of/3/model") is Verified.HAND_WORKED
    part = items_of(RMB, rmb_rows()[:1])
    assert RMB.measure(part, verdicts(part)).missing["overall"].startswith("no item of pairwise/harmlessness")


def test_one_against_many_by_hand() -> None:
    rows: list[dict[str, object]] = [{"id": str(n), "prompt": f"q{n}", "chosen": "a", "rejected": ["b", "c"]} for n in range(4)]
    assert is_one_against_many(rows[0])
    assert not is_one_against_many({"rejected": "b"})
    items = read_one_against_many([Part("f", rows)]).items
    outcomes = by_hand(items, [[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 2.0, 2.0], [3.0, 1.0, NAN]])
    cells = measure_one_against_many(items, outcomes).cells
    means = {name: cell.values.mean() for name, cell in cells.items()}
    assert means["accuracy"] == 0.25
    assert means["accuracy_with_ties"] == 0.5
    assert means["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert len(cells["best_of/3/model"].values) == 3  # the item without all rewards is in no curve


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": []}, r"f, row 1: expected at least one text under 'rejected'"),
        ({"chosen": ["c", "d"], "rejected": ["e"]}, r"f, row 1: expected one text under 'chosen', found a list of 2"),
        ({"chosen": [], "rejected": ["e"]}, r"f, row 1: expected one text under 'chosen', found a list of 0"),
    ],
)
def test_nothing_to_beat_or_several_preferred_replies_are_refused(row: dict[str, object], message: str) -> None:
    first: dict[str, object] = {"prompt": "q", "chosen": ["a"], "rejected": ["b"]}
    assert is_one_against_many({"prompt": "q", "chosen": "a", "rejected": []})  # else the file is taken for pairs, all of them wrong
    with pytest.raises(InputError, match=message):
        read_one_against_many([Part("f", [first, {"prompt": "q", **row}])])


def test_an_item_without_a_comparison_is_wrong() -> None:
    item = Item("lonely", (), ("only",), ())
    for scores in ([1.0], [NAN]):
        measured = measure_one_against_many([item], by_hand([item], [scores]))
        assert {name: measured.cells[name].values.tolist() for name in ("accuracy", "accuracy_with_ties", "mrr")} == {
            "accuracy": [0.0],
            "accuracy_with_ties": [0.0],
            "mrr": [0.0],
        }


def test_rewardmath_reads_both_forms_and_joins_steps() -> None:
    direct = [
        {"problem": "p", "problem_id": 0, "eval_solution": ["x", "y"], "solution_type": kind, "solution_reference": "m"}
        for kind in ("rejected", "chosen", "rejected")
    ]
    direct[0]["eval_solution"], direct[2]["eval_solution"] = ["w1"], ["w2"]
    paired = [
        {"problem": "p", "problem_id": 0, "eval_solution_A": ["w1"], "eval_solution_B": ["x", "y"], "chosen_position": "B"},
        {"problem": "p", "problem_id": 0, "eval_solution_A": ["x", "y"], "eval_solution_B": ["w2"], "chosen_position": "A"},
    ]
    for rows in (direct, paired):
        (item,) = items_of(REWARDMATH, rows)
        assert item.replies == ("x\ny", "w1", "w2")
    both = REWARDMATH.read([Part("direct", direct), Part("pairwise", paired)]).items
    assert [item.replies for item in both] == [("x\ny", "w1", "w2")]
    with pytest.raises(InputError, match="expected one right solution and wrong ones, found 0, 2"):
        items_of(REWARDMATH, [direct[0], direct[2]])


def test_hhh_of_the_hub() -> None:
    rows: list[dict[str, object]] = [{"input": "q", "targets": {"choices": ["bad", "good"], "labels": [0, 1]}}]
    (item,) = items_of(HHH, rows, "hf://datasets/HuggingFaceH4/hhh_alignment@main#honest,test")
    assert (item.replies, item.subset) == (("good", "bad"), "honest")
    with pytest.raises(InputError, match="two choices, labelled 1 and 0"):
        items_of(HHH, [{"input": "q", "targets": {"choices": ["a", "b"], "labels": [1, 1]}}])


def test_a_missing_reward_wins_nothing_and_is_counted() -> None:
    item = Item("i", (), ("a", "b"), ((0, 1),))
    assert not outcome_of_scores(item, [1.0, NAN]).wins[0]
    assert not outcome_of_scores(item, [NAN, 0.0]).wins[0]
    assert not outcome_of_scores(item, [1.0, NAN]).answered
    with pytest.raises(ValueError, match="expected 2 scores"):
        outcome_of_scores(item, [1.0])


def test_a_row_without_a_field_names_itself() -> None:
    rows = rewardbench_rows(["hep-go", "hep-go"])
    del rows[1]["rejected"]
    with pytest.raises(InputError, match=r"part, row 1: expected text under 'rejected', found nothing; its fields: chosen, id, prompt, subset"):
        items_of(REWARDBENCH, rows)


def test_no_folder_belongs_to_two_benchmarks() -> None:
    assert list(BENCHMARKS) == [benchmark.name for benchmark in BENCHMARKS.values()]
    folders = [folder for benchmark in BENCHMARKS.values() for folder in benchmark.folders]
    assert len(set(folders)) == len(folders)
