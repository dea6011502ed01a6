"""Peak memory of an update: one chunk for any G, plus the prompt's states, their gradients and copies."""

import json
import os
import subprocess
import sys

import pytest

from tests.engine import peak_memory
from tests.engine.peak_memory import SHAPE
from tests.tools.lanes import thinned
from tests.tools.memory import RETURN_FREED
from tests.tools.paths import ROOT
from tests.tools.waiting import PATIENCE

C = 64
PLAIN = {G: ("plain", 256, C, G, None) for G in (4, 16)}
GROUPS = {G: ("shared", 256, C, G, 4 * (256 + C)) for G in (4, 16)}  # chunks of four rows
CHUNKS = thinned([256, 64], [256])  # the smaller one leaves less for a graph that is too large
# Prompts are prefilled in segments of that length, and rows are scored one at a time.
PROMPTS = {(S, chunk): ("shared", S, C, 4, chunk) for S in (256, 1024) for chunk in CHUNKS}


@pytest.fixture(scope="module")
def peaks():
    """Peak bytes of each case, above the resident memory before the update."""
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


def test_more_siblings_need_no_more_memory(peaks):
    """A graph that outlives its chunk (of a row or of the whole group) would grow with G, as on the plain path."""
    assert peaks[PLAIN[16]] > 2.5 * peaks[PLAIN[4]], (
        "activations do not dominate in this shape: the test proves nothing"
    )
    assert peaks[GROUPS[16]] < 1.15 * peaks[GROUPS[4]]


def bytes_of_prompt(S: int, tokens: int) -> int:
    """Memory that S prompt tokens may need if `tokens` of them, or one row, carry a graph at the same time.

    In units of the prompt's states, the keys and values of all layers:

    - 1: the states themselves. The boundaries between segments are views into those of the whole prompt
      (`share_prefix_storage`).
    - 1: incoming gradients: their sums over the siblings (`LeafStates`) while the rows run, `state_grads` afterwards.
    - 1: gradients of the leaves, which go to these sums or to the segment before.
    - 1: the copy by `fork` for the one row of a chunk, or for a segment; layer by layer, its concatenation with the
      chunk's own states replaces it, and stays in the graph. Heads that share it do not copy it (`grouped_attention`).
    - 2 / layers: in one layer at a time, that concatenation while the copy is still there, and its gradient.

    In addition, SDPA keeps that mask in every layer: one float per token of the chunk and per key.
    """
    layers, heads, kv_heads = (SHAPE[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads"))
    head_dim = SHAPE["hidden_size"] // heads
    states = layers * 2 * kv_heads * S * head_dim * 4
    return states * 4 + 2 * states // layers + layers * tokens * S * 4


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_longer_prompts_only_need_memory_for_their_states(peaks, chunk_tokens):
    """Guards against a graph over the whole prompt, and against copies of all earlier states in every segment, which
    grow as S squared."""
    short, long = (peaks[PROMPTS[S, chunk_tokens]] for S in (256, 1024))
    allowed = bytes_of_prompt(1024, chunk_tokens) - bytes_of_prompt(256, chunk_tokens)
    print(f"{(long - short) / 1e6:.1f} MB more, {allowed / 1e6:.1f} of them explained by states and their copies")
    assert long - short < 0.15 * short + 1.1 * allowed
