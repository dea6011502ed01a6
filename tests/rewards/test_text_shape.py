"""Format, length and coherence: scores worked out by hand, and texts that earn them without any content."""

import pickle

import pytest
from trl import GRPOTrainer

from grpo_ext.rewards import (
    CoherenceReward,
    FormatReward,
    LengthReward,
    coherence_reward,
    format_reward,
    length_reward,
    math_answer_reward,
)
from tests.tools.training import log_of

FORMATS = [
    # text, score, score with partial credit (thirds: two tags and the complete format)
    ("<think>6*7</think><answer>42</answer>", 1, 1),
    ("\n<think>\n6*7\n</think>\n\n<answer> 42 </answer> \n", 1, 1),
    ("<think>a < b</think><answer><b>42</b></answer>", 1, 1),  # other tags are text
    # something outside
    ("So: <think>6*7</think><answer>42</answer>", 0, 2 / 3),
    ("<think>6*7</think> thus <answer>42</answer>", 0, 2 / 3),
    ("<think>6*7</think><answer>42</answer>.", 0, 2 / 3),
    # one tag of two, or none
    ("<think>6*7</think> 42", 0, 1 / 3),
    ("<answer>42</answer>", 0, 1 / 3),
    ("42", 0, 0),
    ("", 0, 0),
    # out of order, nested, interleaved
    ("<answer>42</answer><think>6*7</think>", 0, 1 / 3),
    ("<think>6*7<answer>42</answer></think>", 0, 1 / 3),
    ("<think>6*7<answer></think>42</answer>", 0, 1 / 3),
    ("</think>6*7<think><answer>42</answer>", 0, 1 / 3),
    # not once each
    ("<think>6</think><think>7</think><answer>42</answer>", 0, 1 / 3),
    ("<think>6*7</think><answer>42</answer><answer>43</answer>", 0, 1 / 3),
    ("<think><think>6*7</think><answer>42</answer>", 0, 1 / 3),
    ("<think>6*7<answer>42</answer>", 0, 1 / 3),
    # tags around nothing
    ("<think></think><answer></answer>", 0, 0),
    ("<think> \n </think><answer>42</answer>", 0, 1 / 3),
    # almost a tag
    ("<Think>6*7</Think><answer>42</answer>", 0, 1 / 3),
    ("< think>6*7</think><answer>42</answer>", 0, 1 / 3),
]


@pytest.mark.parametrize(("text", "score", "partly"), FORMATS)
def test_format(text, score, partly):
    assert format_reward([text]) == [score]
    assert FormatReward(partial=True)([text]) == [pytest.approx(partly)]


def test_format_with_other_tags():
    steps = FormatReward(tags=("plan", "code", "test"), partial=True)
    assert steps(["<plan>a</plan> <code>b</code> <test>c</test>", "<plan>a</plan><test>c</test>"]) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("words", "score"), [(50, 1.0), (49, 0.98), (51, 0.98), (25, 0.5), (75, 0.5), (0, 0.0), (100, 0.0), (500, 0.0)]
)
def test_length(words, score):
    """max(0, 1 - |words - 50| / 50)."""
    assert length_reward(["word " * words]) == [pytest.approx(score)]
    assert length_reward(["\n\tword  " * words]) == [pytest.approx(score)]


def test_length_in_characters_for_text_without_spaces():
    """Fifty Chinese sentences without white space are one word."""
    chinese = "今天 下雨，\n所以带伞。"  # ten characters without the white space
    assert LengthReward(target=10, unit="characters")([chinese, chinese * 2, chinese[:5]]) == [1.0, 0.0, 0.4]
    assert length_reward([chinese.replace(" ", "").replace("\n", "") * 50]) == [pytest.approx(0.02)]
    assert LengthReward(target=4)(["one two three"]) == [0.75]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("今天下雨。", 0.0),
        ("因为今天下雨，我带伞。", 0.2),
        ("因为今天下雨，所以我带伞。", 0.4),
        ("因为下雨，所以带伞；然而忘了，但是无妨。", 0.8),
        ("因为下雨，因为刮风", 0.4),  # each occurrence counts: four connectives once each would never earn 1.0
        ("因为" * 5, 1.0),
        ("因为" * 6, 1.0),
    ],
)
def test_coherence(text, score):
    assert coherence_reward([text]) == [score]


def test_coherence_with_latin_words_and_other_weights():
    because = CoherenceReward(connectives=("so", "because", "so that"), each=0.25)
    assert because(["Some reasons: it is SO. Because it was, so.", "also sober", "so that", "所so以because因"]) == [
        0.75,
        0.0,
        0.25,
        0.5,
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FormatReward(tags=()), r"tags=\(\); valid: one or more distinct names"),
        (lambda: FormatReward(tags=("a", "a")), "distinct names"),
        (lambda: FormatReward(tags=("<a>",)), "such as"),
        (lambda: LengthReward(target=0), "target=0; valid: a length above 0"),
        (lambda: LengthReward(unit="tokens"), "unit='tokens'; valid: 'words', 'characters'"),
        (lambda: CoherenceReward(connectives=()), r"connectives=\(\); valid: one or more words"),
        (lambda: CoherenceReward(connectives=("",)), "one or more words"),
        (lambda: CoherenceReward(each=0), "each=0; valid: above 0"),
    ],
)
def test_invalid_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("reward", [format_reward, length_reward, coherence_reward])
def test_chat_completions_names_and_pickles(reward):
    text = "<think>因为</think><answer>42</answer>"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    empty = [{"role": "assistant", "content": None}]
    assert reward([chat, empty, []], prompts=["q"] * 3, trainer_state=None) == reward([text, "", ""])
    assert reward.__name__ in ("format_reward", "length_reward", "coherence_reward")
    assert pickle.loads(pickle.dumps(reward)) == reward


def test_stock_trl_takes_them_with_weights_and_logs_them_by_name(build, small_model):
    trainer = build(
        small_model,
        trainer=GRPOTrainer,
        reward=[math_answer_reward, format_reward, LengthReward(target=4)],
        columns={"answer": ["3", "71", "4", "15"]},
        reward_weights=[1.0, 0.1, 0.2],
        max_steps=1,
    )
    trainer.train()
    names = ("math_answer_reward", "format_reward", "length_reward")
    means = [log_of(trainer, f"rewards/{name}/mean") for name in names]
    assert all(len(mean) == 1 for mean in means)
    assert means[2][0] > 0  # random text has words
    assert log_of(trainer, "reward")[0] == pytest.approx(means[0][0] + 0.1 * means[1][0] + 0.2 * means[2][0])
