"""Data sets that TRL reads row by row: the checks before a run read the same rows, and only columns that these have."""

import pytest
from datasets import Dataset, IterableDataset
from trl import GRPOConfig, GRPOTrainer

from grpo_ext import GRPOExtConfig, GRPOExtTrainer
from tests.tools.models import small_llama
from tests.tools.reward_functions import PROMPTS, share_of_digits
from tests.tools.training import SETTINGS


def transformed(prompts):
    """A data set without a column `prompt`: `set_transform` adds it to the rows, from a column of another name."""
    data = Dataset.from_dict({"text": prompts})
    data.set_transform(lambda batch: {"prompt": [f"Question: {text}" for text in batch["text"]]})
    return data


def train(tokenizer, path, data, *, is_ours, **settings):
    trainer, config = (GRPOExtTrainer, GRPOExtConfig) if is_ours else (GRPOTrainer, GRPOConfig)
    own = {"guards": True} if is_ours else {}
    args = config(
        str(path),
        **(
            SETTINGS
            | {"max_steps": 2, "use_cpu": True, "report_to": "none", "max_completion_length": 8, "beta": 0.0}
            | settings
            | own
        ),
    )
    made = trainer(small_llama(tokenizer), share_of_digits, args, data, processing_class=tokenizer)
    made.train()
    return [row["reward"] for row in made.state.log_history if "reward" in row], made


@pytest.mark.parametrize("is_ours", [False, True], ids=["trl", "ours"])
def test_set_transform(tokenizer, tmp_path, is_ours):
    """For such a data set, `data["prompt"]` raises KeyError, and `column_names` are not those of the rows."""
    rewards, made = train(tokenizer, tmp_path, transformed(PROMPTS * 4), is_ours=is_ours)
    assert len(rewards) >= 1
    assert made.state.global_step == 2


def test_set_transform_and_long_prompts(tokenizer, tmp_path):
    """The lengths that count are those of the prompts in the rows, not of the underlying column."""
    data = transformed(["1+1", *PROMPTS * 4, "1" * 100])
    _, made = train(tokenizer, tmp_path, data, is_ours=True, max_prompt_tokens=60, overlong_prompts="drop")
    assert len(made.train_dataset) == len(data) - 1
    assert made.train_dataset[0]["prompt"] == "Question: 1+1"


def test_data_without_prompts_is_refused(tokenizer, tmp_path):
    """Guards against a bare KeyError."""
    data = Dataset.from_dict({"text": PROMPTS * 4})
    with pytest.raises(ValueError, match=r"no column 'prompt'; it has: text\. .*rename_column\('text', 'prompt'\)"):
        train(tokenizer, tmp_path, data, is_ours=True)


def test_a_stream_is_not_opened_by_the_checks(tokenizer, tmp_path):
    """Each opening downloads the first part of a data set again, or starts its generator."""
    openings = []

    def rows():
        openings.append(1)
        yield from ({"prompt": prompt} for prompt in PROMPTS * 8)

    found = {}
    for is_ours in (False, True):
        openings.clear()
        data = IterableDataset.from_generator(rows)
        train(tokenizer, tmp_path, data, is_ours=is_ours, save_strategy="no", dataloader_num_workers=0)
        found[is_ours] = len(openings)
    assert found[True] == found[False]
