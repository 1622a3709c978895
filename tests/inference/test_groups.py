"""Two groups of slots: one is computed while the other's environments step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from tests.inference.tiny import engine

TURN = st.tuples(st.lists(st.integers(2, 8), min_size=1, max_size=12), st.integers(1, 9))
EPISODES = st.lists(st.lists(TURN, min_size=1, max_size=3), min_size=1, max_size=9)


def play(eng, episodes):
  """As the runner does it: a slot whose episode has ended takes the next one."""
  waiting = list(enumerate(episodes))
  here, played, in_flight = {}, [[] for _ in episodes], 0

  def submit(slot):
    if not here.get(slot):
      if not waiting:
        return
      number, turns = waiting.pop(0)
      here[slot] = [(number, turn) for turn in turns]
      reset = True
    else:
      reset = False
    number, (tokens, budget) = here[slot][0]
    eng.submit(slot, tokens, budget, reset=reset, seed=number)

  for slot in range(eng.num_slots):
    submit(slot)
  while eng.busy:
    for done in eng.step():
      number, _ = here[done.slot].pop(0)
      played[number].append((done.tokens.tolist(), done.logprobs))
      submit(done.slot)
    in_flight += len(eng._flying)
  return played, in_flight


@settings(max_examples=15)
@given(episodes=EPISODES)
def test_two_groups_play_what_one_plays(episodes):
  one, in_flight = play(engine(), episodes)
  assert in_flight == 0
  two, in_flight = play(engine(num_slots=6, groups=2), episodes)
  # Episodes fill the first group; more than that are in both, and one flies while the other steps.
  assert in_flight > 0 or len(episodes) <= 3
  for ours, theirs in zip(two, one, strict=True):
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_one_group_holds_the_other_copies():
  eng = engine(num_slots=6, groups=2)
  beginning = [5 + i % 17 for i in range(40)]
  eng.submit(0, [*beginning, 2], 3, reset=True)
  [first] = eng.run_until_complete()
  eng.submit(4, [*beginning, 2], 3, reset=True)
  [second] = eng.run_until_complete()
  assert second.copied_tokens == 40 and second.slot == 4
  assert second.tokens.tolist() == first.tokens.tolist()


def test_slots_that_do_not_divide():
  with pytest.raises(UserError, match='5 slots do not divide into 2 groups'):
    engine(num_slots=5, groups=2)
