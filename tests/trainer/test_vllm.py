"""Training with `use_vllm`, without vLLM: an object replaces the server's client or the colocated engine, and TRL's own
`VLLMGeneration` sends it the merged weights and requests completions from it. It samples with transformers in bfloat16,
so its log-probs differ from the trainer's, as vLLM's do. This was not run with vLLM itself on a GPU."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer
from trl.generation import vllm_generation

from grpo_ext import GRPOExtTrainer
from tests.tools.lanes import slow_but
from tests.tools.models import random_lora
from tests.tools.reward_functions import PROMPTS
from tests.tools.training import adapter_of, log_of

SIBLINGS, STEPS = 4, 3


class Engine:
    """A separate policy that receives weights and returns samples; if `earlier` is given, those of that engine."""

    def __init__(self, lm, tokenizer, earlier=None):
        self.lm, self.tokenizer, self.earlier = copy.deepcopy(lm).to(torch.bfloat16), tokenizer, earlier
        self.samples = []
        self.weights_arrived = 0

    def load_weights(self, named):
        self.weights_arrived += 1
        for name, value in named:
            self.lm.get_parameter(name).data.copy_(value)

    @torch.no_grad()
    def sample(self, prompts, n, temperature, max_tokens):
        """Ids and log-probs of n completions per prompt."""
        if self.earlier is not None:
            self.samples.append(self.earlier.samples[len(self.samples)])
            return self.samples[-1]
        ids, logps = [], []
        with torch.random.fork_rng():
            torch.manual_seed(len(self.samples))
            for prompt in prompts:
                output = self.lm.generate(
                    torch.tensor([prompt]).repeat(n, 1),
                    attention_mask=torch.ones(n, len(prompt), dtype=torch.long),
                    max_new_tokens=max_tokens,
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    output_scores=True,
                    return_dict_in_generate=True,
                )
                tokens = output.sequences[:, len(prompt) :]
                scored = torch.stack(output.scores, dim=1).log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
                for row, values in zip(tokens.tolist(), scored.tolist(), strict=True):
                    eos = self.tokenizer.eos_token_id
                    length = row.index(eos) + 1 if eos in row else len(row)
                    ids.append(row[:length])
                    logps.append(values[:length])
        self.samples.append((ids, logps))
        return ids, logps


class Client:
    """Replaces TRL's client of a vLLM server."""

    def __init__(self, engine):
        self.engine = engine

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named):
        named = list(named)
        assert [(name, list(value.shape)) for name, value in named] == [(name, shape) for name, _, shape in metadata]
        self.engine.load_weights(named)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, features, n, temperature, max_tokens, **sampling):
        ids, logps = self.engine.sample(prompts, n, temperature, max_tokens)
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": [[[lp] for lp in row] for row in logps]}


class Colocated(Client):
    """Replaces a `vllm.LLM` in the trainer's process: it loads one weight per call and completes each row once."""

    @property
    def llm_engine(self):
        runner = SimpleNamespace(model=self.engine)
        return SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))

    def generate(self, prompts, sampling_params, use_tqdm):
        prompts = [row["prompt_token_ids"] for row in prompts]
        samples = self.engine.sample(
            prompts, sampling_params.n, sampling_params.temperature, sampling_params.max_tokens
        )
        return [
            SimpleNamespace(
                prompt_token_ids=prompt,
                outputs=[
                    SimpleNamespace(
                        token_ids=ids,
                        logprobs=[{i: SimpleNamespace(rank=1, logprob=lp)} for i, lp in zip(ids, logps, strict=True)],
                    )
                ],
            )
            for prompt, ids, logps in zip(prompts, *samples, strict=True)
        ]


def count_prompt_runs(trainer, prompts):
    """Counts, from now on, how often each prompt passes through the model."""
    runs = Counter()

    def count(module, args):
        for row in args[0].tolist():
            text = trainer.processing_class.decode(row, skip_special_tokens=True)
            runs.update(prompt for prompt in prompts if text.startswith(prompt[:-1]))

    trainer.model.get_input_embeddings().register_forward_pre_hook(count)
    return runs


@pytest.fixture
def trained(build, small_model, tokenizer, monkeypatch):
    """`trained(kind, mode, earlier, **settings)`: trainer, its engine, its initial adapter, runs per prompt."""

    def make(kind, mode, earlier=None, **settings):
        engine = Engine(small_model, tokenizer, earlier)

        def connect(generation):
            if mode == "server":
                generation.vllm_client = Client(engine)
            else:
                generation.llm = Colocated(engine)

        monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", connect)
        monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
        torch.manual_seed(0)
        trainer = build(
            copy.deepcopy(small_model),
            trainer=kind,
            peft_config=random_lora(),
            use_vllm=True,
            vllm_mode=mode,
            max_steps=STEPS,
            scale_rewards="group",
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            disable_dropout=True,
            temperature=0.8,
            beta=0.0,
            entropy_coef=0.0,
            max_grad_norm=0.5,
            **settings,
        )
        start = adapter_of(trainer)
        runs = count_prompt_runs(trainer, PROMPTS)
        trainer.train()
        return trainer, engine, start, runs

    return make


# In "sequence_mask", the clip masks some completions and keeps others.
CASES = {
    "server": ("server", {"vllm_importance_sampling_mode": "token_truncate"}),
    "server, masked": ("server", {"vllm_importance_sampling_clip_max": 1.0}),
    "colocate": ("colocate", {"vllm_importance_sampling_mode": "sequence_truncate"}),
    "colocate, old log-probs": ("colocate", {"num_iterations": 3}),
    # one token each, so the ratio of a completion is that of its token
    "server, ours": ("server", {"max_completion_length": 1, "vllm_importance_sampling_clip_max": 1.0}),
}


@pytest.mark.parametrize("case", slow_but(CASES, ["server"]))
def test_samples_of_vllm_train_as_in_stock_trl(case, trained):
    """Guards against dropping vLLM's completions or log-probs, mixing them up or replacing them with our own sampler's,
    and against weights that do not reach it. In scoring, each prompt is run once for all of its completions."""
    mode, settings = CASES[case]
    settings = {"loss_type": "grpo"} | settings
    stock, stock_engine, start, stock_runs = trained(GRPOTrainer, mode, **settings)
    if case == "server, ours":
        settings["loss_type"] = "grpo_sequence"
    settings["dead_groups"] = "keep"  # so that both run the same prompts
    ours, engine, own_start, runs = trained(GRPOExtTrainer, mode, stock_engine, **settings)

    assert ours.shares_prompts
    assert not ours.parts.sampler.is_shared
    assert len(engine.samples) == len(stock_engine.samples) == (1 if "num_iterations" in settings else STEPS)
    assert engine.weights_arrived == stock_engine.weights_arrived > 0
    for name, value in stock_engine.lm.named_parameters():  # merged and complete
        torch.testing.assert_close(engine.lm.get_parameter(name), value, atol=1e-2, rtol=1e-2)

    metric = "sampling/importance_sampling_ratio/mean"
    assert log_of(ours, metric) == pytest.approx(log_of(stock, metric), abs=1e-5)
    assert all(abs(ratio - 1) > 1e-5 for ratio in log_of(stock, metric))
    trained_to = adapter_of(ours)
    moved = 0.0
    for name, value in adapter_of(stock).items():
        torch.testing.assert_close(own_start[name], start[name], atol=0, rtol=0)
        torch.testing.assert_close(trained_to[name], value, atol=2e-6, rtol=0, msg=name)
        moved = max(moved, (value - start[name]).abs().max().item())
    assert moved > 1e-2
    assert sum(stock_runs.values()) == SIBLINGS * sum(runs.values()) > 0
