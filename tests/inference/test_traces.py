"""Nothing is compiled in the steady state, whatever comes together in one engine."""

import numpy as np
import pytest

from inference import ContextOverflow, LookupConfig, SamplingConfig, Trie
from tests.inference.tiny import VOCAB, engine

EPISODES = 500
BEGINNINGS = [[5 + i % 17 for i in range(n)] for n in (30, 21)] + [[4] * 12, [9]]


@pytest.mark.slow
def test_five_hundred_mixed_episodes_trace_a_fixed_number_of_programs():
  eng = engine(
    num_slots=4, max_len=96, block_buckets=(2, 6), attend_step=32,
    sampling=SamplingConfig(temperature=1.0, top_p=0.95),
    lookup=LookupConfig(draft_len=2, min_ngram=1), prefix_bytes=50_000)
  rng = np.random.default_rng(0)
  left, ended, new, counts = {}, 0, 0, []
  waiting = list(range(EPISODES))

  def submit(slot):
    """The slot's next turn, or the first one of another episode."""
    nonlocal new, ended
    while waiting or left.get(slot):
      reset = not left.get(slot)
      if reset:
        waiting.pop()
        left[slot] = int(rng.integers(1, 7))
      left[slot] -= 1
      own = rng.integers(2, VOCAB, rng.integers(1, 25)).tolist()
      tokens = BEGINNINGS[rng.integers(4)] + own if reset else own
      allowed = Trie([[*own[:3], 0], [7, 8, 0]]) if rng.random() < 0.3 else None
      try:
        eng.submit(slot, tokens, int(rng.integers(4, 20)), reset=reset, allowed=allowed)
        return
      except ContextOverflow:
        left[slot] = 0
        ended += 1

  for slot in range(eng.num_slots):
    submit(slot)
  while eng.busy:
    for done in eng.step():
      new += done.prefilled_tokens
      ended += not left[done.slot]
      submit(done.slot)
    counts += [eng.stats.traces] * (ended - len(counts))
  assert ended == EPISODES
  # Attended lengths 32, 64, 96 (64, 96 of a prefill) and two numbers of blocks, each restricted or
  # not; one or two of 4 slots read 96 where all read 32: prefill, prefix, section, decode, verify,
  # absorb (either's tokens), take, place.
  assert counts[-1] <= 2 * 2 * 2 + 2 + 2 + (3 + 2) * 2 + (3 + 2) * 2 + 2 + 3 + 3
  assert counts[-1] == counts[EPISODES // 2]
  # And no token was computed twice.
  assert eng.stats.prefilled + eng.stats.copied == new and eng.stats.copied > 0
  assert eng.stats.accepted > 0
