"""Peak memory of an update: that of one chunk whatever G is, beside the prompt's states, their gradients and copies."""

import json
import os
import subprocess
import sys

import pytest

from tests.engine import peak_memory
from tests.engine.peak_memory import SHAPE
from tests.tools.memory import RETURN_FREED
from tests.tools.paths import ROOT
from tests.tools.waiting import PATIENCE

C = 64
PLAIN = {G: ("plain", 256, C, G, None) for G in (4, 32)}
GROUPS = {G: ("shared", 256, C, G, 4 * (256 + C)) for G in (4, 32)}  # chunks of four rows
# Of 256 and of 64 tokens, so that prompts are read in segments of as many, and rows are scored one at a time.
PROMPTS = {(S, chunk): ("shared", S, C, 4, chunk) for S in (256, 2048) for chunk in (256, 64)}


@pytest.fixture(scope="module")
def peaks():
    """Bytes by case, above what was resident before the update."""
    cases = [*PLAIN.values(), *GROUPS.values(), *PROMPTS.values()]
    done = subprocess.run(
        [sys.executable, peak_memory.__file__, json.dumps(cases)],
        env=os.environ | RETURN_FREED | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    measured = dict(zip(cases, json.loads(done.stdout), strict=True))
    for case, peak in measured.items():
        print(f"{peak / 1e6:8.1f} MB  {case}")
    return measured


def test_more_siblings_need_no_more(peaks):
    """A graph that outlives its chunk, of one row or of the whole group, grows with G as the plain path does."""
    assert peaks[PLAIN[32]] > 4 * peaks[PLAIN[4]], "this shape says nothing: activations do not dominate"
    assert peaks[GROUPS[32]] < 1.15 * peaks[GROUPS[4]]


def bytes_of_prompt(S: int, tokens: int) -> int:
    """What S prompt tokens may cost where `tokens` of them, or one row, carry a graph at once: `engine/score.py`.

    In units of the prompt's states, the keys and values of all layers:

    - 1: the states themselves. The boundaries between segments are views into those of the whole prompt
      (`share_prefix_storage`).
    - 1: the gradients that come in: `totals` over the siblings while their rows are run, `state_grads` after.
    - 1: the gradients of the leaves, which go out to `totals` or to the segment before.
    - 1: the copy for the one row of a chunk, or for a segment: `fork`, which the layers then replace, one by one, by
      its concatenation with what the chunk adds.
    - heads / key-value heads: `repeat_kv`, in the graph of every layer, since a chunk on a cache has a mask.

    Beside them SDPA keeps that mask in every layer, as a float for each token of the chunk and each key.
    """
    layers, heads, kv_heads = (SHAPE[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads"))
    head_dim = SHAPE["hidden_size"] // heads
    states = layers * 2 * kv_heads * S * head_dim * 4
    return states * (4 + heads // kv_heads) + layers * tokens * S * 4


@pytest.mark.parametrize("chunk_tokens", [256, 64])
def test_longer_prompts_need_their_states_only(peaks, chunk_tokens):
    """A graph over the whole prompt, or states kept for every segment anew, which add up to S squared."""
    short, long = (peaks[PROMPTS[S, chunk_tokens]] for S in (256, 2048))
    allowed = bytes_of_prompt(2048, chunk_tokens) - bytes_of_prompt(256, chunk_tokens)
    print(f"{(long - short) / 1e6:.1f} MB more, {allowed / 1e6:.1f} of them explained by states and their copies")
    assert long - short < 0.15 * short + allowed
