"""Problems and scores of reasoning-gym: splits share no question, gold answers score 1.0, and no text is executed."""

import inspect
import json
import random
import re
import socket

import pytest
import reasoning_gym
from datasets import Dataset

from grpo_ext.rewards.logic import SAFE_ANSWERS, UNSUPPORTED_TASKS, logic_problems, logic_reward
from tests.tools.lanes import slow_but

TASKS = sorted(set(reasoning_gym.factory.DATASETS) - set(UNSUPPORTED_TASKS))
# Each of these harms a scorer that trusts its input.
HOSTILE = [
    "",
    "9" * 9000,
    "R999999999",
    "F+999999999",
    "1e999999999",
    "1.e999999999",
    "1e999_999_999",
    "nan",
    "[NaN, NaN, NaN]",
    "9**9**9**9",
    "(\n9**9**9**9)",
    "[[" * 4000,
    "(" * 9000,
    "¬" * 9000,
    "A=1," * 2000,
    "1×" * 4000,
    "UDLR" * 2000,
    "R9 " * 66,
    "open('owned', 'w').write('x')",
    "[open('owned', 'w')]",
    "\x00",
    "\ud800",
    "\U0001f642" * 2000,
]


def score(row, answer):
    """The score of a text in <answer> tags, for a row of `logic_problems`."""
    columns = {key: [row[key]] for key in ("answer", "task", "metadata")}
    return logic_reward([f"<answer>\n{answer}\n</answer>"], prompts=[row["question"]], **columns)[0]


def test_splits_share_no_question():
    """chain_sum with one-digit terms has few questions, so independent splits would often overlap."""
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train, heldout = logic_problems("chain_sum", train=60, heldout=20, seed=3, **small)
    questions = [row["question"] for row in train + heldout]
    assert len(train) == 60
    assert len(heldout) == 20
    assert len(set(questions)) == 80
    assert logic_problems("chain_sum", train=60, heldout=20, seed=3, **small) == (train, heldout)
    assert logic_problems("chain_sum", train=60, heldout=20, seed=400, **small)[1] != heldout
    with pytest.raises(ValueError, match=r"'chain_sum' generated \d+ distinct questions out of 1200; 500 \+ 100 are"):
        logic_problems("chain_sum", train=500, heldout=100, **small)


def test_rows_are_strings_and_make_a_data_set(monkeypatch):
    """Offline: no connection is opened. Each column has one type, whatever the metadata of a task."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("no network"))
    tasks = ("chain_sum", "graph_color", "sudoku")
    rows = [row for task in tasks for row in logic_problems(task, train=2, heldout=0)[0]]
    data = Dataset.from_list(rows)
    assert {feature.dtype for feature in data.features.values()} == {"string"}
    assert set(data.column_names) == {"question", "answer", "task", "metadata"}
    assert logic_reward(["<answer>x</answer>"] * len(rows), **data.remove_columns("question").to_dict())[0] == 0.0


@pytest.mark.parametrize("task", slow_but(TASKS, ["chain_sum", "countdown", "knights_knaves", "rubiks_cube"]))
def test_every_task_gives_its_gold_answer_the_full_score_and_survives_hostile_ones(task, tmp_path, monkeypatch):
    """If JSON did not preserve the metadata, right answers would score as wrong. A scorer that executes the model's
    text would leave a file here, or never return."""
    monkeypatch.chdir(tmp_path)
    rows, _ = logic_problems(task, train=2, heldout=0, seed=5)
    for row in rows:
        if row["answer"]:
            assert score(row, row["answer"]) == 1.0
    rng = random.Random(0)
    mutated = ["".join(rng.sample(row["answer"], len(row["answer"]))) for row in rows]
    scores = [score(rows[0], answer) for answer in HOSTILE + mutated]
    assert all(0.0 <= each <= 1.0 for each in scores)
    assert not list(tmp_path.iterdir())


def test_scorers_that_execute_text_are_all_known():
    """After an upgrade of reasoning-gym this reports any new scorer that executes what the model writes."""
    runs = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\((?!entry|metadata|exp|problem)")
    for name, (kind, _) in reasoning_gym.factory.DATASETS.items():
        if runs.search(inspect.getsource(kind.score_answer)):
            assert name in UNSUPPORTED_TASKS or name in SAFE_ANSWERS, name


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<answer>7</answer>", 1.0),
        (r"so \boxed{7}", 1.0),
        ("#### 7", 1.0),
        ("The answer is 7.", 1.0),
        ("4 + 3\n7", 1.0),  # the last line
        ("4 + 3\n7\n\n", 1.0),
        ("7\nis it", 0.0),
        ("<think><answer>7</answer></think>8", 0.0),
        ("<answer>8</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_where_the_answer_is_taken_from(completion, reward):
    row = {"answer": ["7"], "task": ["chain_sum"], "metadata": ['{"config": {}, "metadata": {}}']}
    chat = [{"role": "assistant", "content": completion}]
    assert logic_reward([completion], **row) == logic_reward([chat], **row) == [reward]


def test_partial_scores_are_kept():
    (row,), _ = logic_problems("countdown", train=1, heldout=0, seed=1)
    numbers = json.loads(row["metadata"])["metadata"]["numbers"]
    assert score(row, row["answer"]) == 1.0
    assert score(row, " + ".join(map(str, numbers))) == 0.05  # the right numbers
    assert score(row, "1 + 1") == 0.05
    assert score(row, "no idea") == 0.0
    assert score(row, "(2\n**3)") == 0.0  # powers are refused on every line: the scorer would compute huge ones


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("complex_arithmetic", "nan"),
        ("number_sorting", "[NaN, NaN]"),
        ("coin_flip", "1e9999999"),
        ("coin_flip", "1.e-9999"),
        ("coin_flip", "1e-9_999"),
        ("coin_flip", "1,e-9,999"),
    ],
)
def test_what_is_not_a_number_earns_nothing(task, answer):
    """A scorer that takes the smaller of two scores would accept NaN as the right number."""
    rows, _ = logic_problems(task, train=5, heldout=0)
    for row in rows:
        count = row["answer"].count(",") + 1
        assert score(row, answer.replace("NaN, NaN", ", ".join(["NaN"] * count))) == 0.0


def test_the_scorer_gets_the_options_of_the_task():
    """decimal_arithmetic tolerates an error of one unit in the last decimal place, whose number is an option."""
    for places, forgiven in ((1, 1.0), (4, 0.0)):
        options = {"min_num_decimal_places": places, "max_num_decimal_places": places}
        (row,), _ = logic_problems("decimal_arithmetic", train=1, heldout=0, **options)
        assert score(row, str(float(row["answer"]) + 0.05)) == forgiven


def test_bad_data_is_reported():
    with pytest.raises(ValueError, match=r"has no task 'chain_sums'.*chain_sum, "):
        logic_problems("chain_sums", train=1, heldout=0)
    with pytest.raises(ValueError, match="'simple_integration' is not supported: its scorer runs the model's text"):
        logic_problems("simple_integration", train=1, heldout=0)
    with pytest.raises(ValueError, match=r"'chain_sum' does not accept the options .*terms"):
        logic_problems("chain_sum", train=1, heldout=0, terms=3)
    for metadata in ("", "{}", "[]", '"x"', '{"config": {}}', None):
        with pytest.raises(ValueError, match="The metadata of 'chain_sum' do not come from logic_problems"):
            logic_reward(["7"], answer=["7"], task=["chain_sum"], metadata=[metadata])
    with pytest.raises(ValueError, match="has no task 'nothing'"):
        logic_reward(["7"], answer=["7"], task=["nothing"], metadata=['{"config": {}, "metadata": {}}'])
