"""vLLM at the place where TRL calls it, without vLLM: TRL's own `VLLMGeneration` sends the merged weights to, and has
completions drawn by, an object that stands where the server's client or the colocated engine would. It draws with
transformers in bfloat16, so that its log-probs differ from the trainer's as those of vLLM do. On a GPU with vLLM itself
this was not run."""

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
    """A policy of its own that is sent weights and asked for samples; where `before` is given, it answers with what
    that one drew."""

    def __init__(self, lm, tokenizer, before=None):
        self.lm, self.tokenizer, self.before = copy.deepcopy(lm).to(torch.bfloat16), tokenizer, before
        self.drawn = []
        self.weights_arrived = 0

    def load_weights(self, named):
        self.weights_arrived += 1
        for name, value in named:
            self.lm.get_parameter(name).data.copy_(value)

    @torch.no_grad()
    def sample(self, prompts, n, temperature, max_tokens):
        """Ids and log-probs of n completions of each prompt."""
        if self.before is not None:
            self.drawn.append(self.before.drawn[len(self.drawn)])
            return self.drawn[-1]
        ids, logps = [], []
        with torch.random.fork_rng():
            torch.manual_seed(len(self.drawn))
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
        self.drawn.append((ids, logps))
        return ids, logps


class Client:
    """As TRL's client of a vLLM server."""

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
    """As `vllm.LLM` in the process of the trainer, which has one weight loaded at a time and answers each row once."""

    @property
    def llm_engine(self):
        runner = SimpleNamespace(model=self.engine)
        return SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))

    def generate(self, prompts, sampling_params, use_tqdm):
        prompts = [row["prompt_token_ids"] for row in prompts]
        drawn = self.engine.sample(prompts, sampling_params.n, sampling_params.temperature, sampling_params.max_tokens)
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
            for prompt, ids, logps in zip(prompts, *drawn, strict=True)
        ]


def reads_of_prompts(trainer, prompts):
    """Counts, from now on, how often each prompt goes through the model."""
    reads = Counter()

    def count(module, args):
        for row in args[0].tolist():
            text = trainer.processing_class.decode(row, skip_special_tokens=True)
            reads.update(prompt for prompt in prompts if text.startswith(prompt[:-1]))

    trainer.model.get_input_embeddings().register_forward_pre_hook(count)
    return reads


@pytest.fixture
def trained(build, small_model, tokenizer, monkeypatch):
    """`trained(kind, mode, before, **settings)`: a trained trainer, the engine that drew for it, and prompts' reads."""

    def make(kind, mode, before=None, **settings):
        engine = Engine(small_model, tokenizer, before)

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
        reads = reads_of_prompts(trainer, PROMPTS)
        trainer.train()
        return trainer, engine, start, reads

    return make


# In "sequence_mask", the clip takes some answers out and leaves others in.
CASES = {
    "server": ("server", {"vllm_importance_sampling_mode": "token_truncate"}),
    "server, masked": ("server", {"vllm_importance_sampling_clip_max": 1.0}),
    "colocate": ("colocate", {"vllm_importance_sampling_mode": "sequence_truncate"}),
    "colocate, old log-probs": ("colocate", {"num_iterations": 3}),
    # of one token each, where the ratio of an answer is the ratio of its token
    "server, ours": ("server", {"max_completion_length": 1, "vllm_importance_sampling_clip_max": 1.0}),
}


@pytest.mark.parametrize("case", slow_but(CASES, ["server"]))
def test_what_vllm_drew_trains_as_in_stock_trl(case, trained):
    """Completions and log-probs of the sampler that are dropped, mixed up, or replaced by our own sampler's, and
    weights that do not reach it; in scoring, each prompt is read once for all of its answers."""
    mode, settings = CASES[case]
    settings = {"loss_type": "grpo"} | settings
    stock, drew, start, stock_reads = trained(GRPOTrainer, mode, **settings)
    if case == "server, ours":
        settings["loss_type"] = "grpo_sequence"
    ours, engine, own_start, reads = trained(GRPOExtTrainer, mode, drew, **settings)

    assert ours.shares_prompts
    assert not ours.parts.sampler.is_shared
    assert len(engine.drawn) == len(drew.drawn) == (1 if "num_iterations" in settings else STEPS)
    assert engine.weights_arrived == drew.weights_arrived > 0
    for name, value in drew.lm.named_parameters():  # merged, and sent whole
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
    assert sum(stock_reads.values()) == SIBLINGS * sum(reads.values()) > 0
