"""Shared beginnings: computed once, with the same results as if each had computed its own."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import prefixes
from tests.inference.tiny import engine, play


@dataclasses.dataclass
class Row:
  nbytes: int


def ids(*tokens):
  return np.asarray(tokens, np.int32)


def test_shared_lengths():
  held = np.asarray([[1, 2, 3, 4], [1, 2, 9, 4], [5, 2, 3, 4]])
  assert prefixes.shared_lengths(held, ids(1, 2, 3)).tolist() == [3, 2, 0]
  assert prefixes.shared_lengths(held, ids(1, 2, 3, 4, 5)).tolist() == [4, 2, 0]
  assert prefixes.shared_lengths(held, ids()).tolist() == [0, 0, 0]
  assert prefixes.shared_lengths(held[:, :0], ids(1)).tolist() == [0, 0, 0]


def test_the_store_drops_what_was_used_longest_ago():
  store = prefixes.PrefixStore(100)
  store.add(ids(1, 2, 3), Row(40))
  store.add(ids(4, 5), Row(40))
  key = prefixes.Key(0, ids(1, 2, 3).tobytes())
  assert store.find(ids(1, 2, 9)) == (2, key)
  assert store.find(ids(7)) == (0, None)
  store.row(key)
  store.add(ids(6), Row(30))
  assert store.find(ids(4, 5))[0] == 0 and store.find(ids(1, 2, 3))[0] == 3
  # A longer one with the same beginning takes its place.
  store.add(ids(1, 2, 3, 4), Row(50))
  assert len(store) == 2 and store.nbytes == 80
  store.add(ids(8), Row(101))  # larger than all of it
  assert len(store) == 2 and store.find(ids(8))[0] == 0
  store.clear()
  assert len(store) == store.nbytes == 0


def make_plan(rows, held, waiting, store=None, min_tokens=2, policies=None):
  width = max(map(len, rows))
  table = np.asarray([[*row, *[99] * (width - len(row))] for row in rows], np.int32)
  waiting = {slot: prefixes.Waiting(held[slot], len(rows[slot])) for slot in waiting}
  return prefixes.plan(
    table, np.asarray(held), waiting, store or prefixes.PrefixStore(100), min_tokens,
    np.asarray(policies or [0] * len(rows)))


def test_what_another_slot_holds_is_copied():
  rows = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 4, 8, 8]]
  # Slot 0 holds all of it, slot 1 waits, slot 2 holds two tokens and waits.
  now, copies = make_plan(rows, [5, 0, 2], [1, 2])
  assert now == [1, 2]
  assert copies == [prefixes.Copy(1, 0, 3), prefixes.Copy(2, 0, 4)]
  # What is not there, and what is too little, is computed.
  assert make_plan(rows, [1, 0, 0], [1, 2])[1] == []
  # All of a prompt but its last token, from which the reply follows.
  assert make_plan([[1, 2, 3], [1, 2, 3]], [3, 0], [1])[1] == [prefixes.Copy(1, 0, 2)]


def test_the_store_serves_where_it_has_more():
  store = prefixes.PrefixStore(100)
  store.add(ids(1, 2, 3, 4), Row(1))
  rows = [[1, 2, 3, 7], [1, 2, 3, 4, 5]]
  assert make_plan(rows, [4, 0], [1], store)[1] == [
    prefixes.Copy(1, prefixes.Key(0, ids(1, 2, 3, 4).tobytes()), 4)]


def test_policies_share_nothing():
  # Slot 0 holds all of it and the store does, for policy 0; slots 1 and 3 have policy 1.
  rows = [[*range(20), own] for own in (50, 51, 52, 53)]
  store = prefixes.PrefixStore(100)
  store.add(ids(*range(20)), Row(1), 0)
  now, copies = make_plan(rows, [21, 0, 0, 0], [1, 2, 3], store, policies=[0, 1, 0, 1])
  assert now == [1, 2] and copies == [prefixes.Copy(2, 0, 20)]
  store.add(ids(*range(20), 9), Row(1), 1)
  assert len(store) == 2 and store.find(ids(*range(20), 9), 0)[0] == 20
  assert make_plan(rows, [21, 0, 0, 0], [3], store, policies=[0, 1, 0, 1])[1] == [
    prefixes.Copy(3, prefixes.Key(1, ids(*range(20), 9).tobytes()), 20)]


def test_of_several_with_one_beginning_the_first_computes_it():
  beginning = list(range(20))
  rows = [[*beginning, 50], [*beginning, 51], [70, 71, 72], [*beginning, 52]]
  assert make_plan(rows, [0] * 4, range(4)) == ([0, 2], [])
  # A wait that would save less than a dispatch costs is not made.
  short = [[1, 2, 3, 50], [1, 2, 3, 51]]
  assert make_plan(short, [0, 0], range(2)) == ([0, 1], [])


def counted(eng):
  return eng.stats.prefilled, eng.stats.copied


def test_a_beginning_is_prefilled_once():
  eng = engine()
  beginning = [5 + i % 17 for i in range(40)]
  play(eng, [[([*beginning, 2 + slot], 2)] for slot in range(3)])
  assert counted(eng) == (40 + 3, 80)
  # The next wave finds it in its own slots; the last one's own tokens are new, those of a slot that
  # asks the same again are not (but for one, which the reply follows from).
  played = play(eng, [[([*beginning, 9, 9], 2)], [([*beginning, 3], 2)], [([7, 7, 7], 2)]])
  assert counted(eng) == (43 + 2 + 1 + 3, 80 + 80)
  assert [done.copied_tokens for (done,) in played] == [40, 40, 0]
  assert [done.prefilled_tokens for (done,) in played] == [42, 41, 3]


@pytest.mark.slow
def test_the_store_keeps_what_no_slot_holds_any_more():
  eng = engine(num_slots=1, prefix_bytes=10**6)
  kinds = [[5 + i % 17 for i in range(33)], [6 + i % 11 for i in range(34)]]
  for kind, own in ((0, 2), (0, 3), (1, 2), (1, 3), (0, 4), (1, 4)):
    play(eng, [[([*kinds[kind], own], 3)]])
  assert counted(eng) == (33 + 34 + 6, 2 * (33 + 34))
  eng.forget()
  assert counted(eng) == (0, 0) and eng.length(0) == 0 and eng.stats.traces > 0
  # Without room for entries only what the slot held last is found.
  eng = engine(num_slots=1, prefix_bytes=0)
  for own in (2, 3):
    for kind in kinds:
      play(eng, [[([*kind, own], 3)]])
  assert eng.stats.copied == 0


@functools.cache
def two_engines():
  return engine(share_prefixes=False), engine(prefix_bytes=12_000)


BEGINNINGS = [[5 + i % 17 for i in range(36)], [5 + i % 17 for i in range(18)] + [4] * 16, [9, 3]]
CONVERSATION = st.tuples(
  st.sampled_from(BEGINNINGS), st.lists(st.integers(2, 22), min_size=1, max_size=4),
  st.integers(1, 5), st.booleans())


@settings(max_examples=20)
@given(waves=st.lists(st.lists(CONVERSATION, min_size=1, max_size=3), min_size=2, max_size=4))
def test_greedy_with_shared_beginnings_equals_greedy_without(waves):
  plain, sharing = two_engines()
  sharing.forget()
  new = 0
  for wave in waves:
    conversations = [
      [([*beginning, *own], budget), *([(own, budget)] if again else [])]
      for beginning, own, budget, again in wave]
    played = (itertools.chain(*play(eng, conversations)) for eng in (sharing, plain))
    for ours, theirs in zip(*played, strict=True):
      assert ours.tokens.tolist() == theirs.tokens.tolist()
      np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
      assert ours.prefilled_tokens == theirs.prefilled_tokens
      new += ours.prefilled_tokens
  assert sum(counted(sharing)) == new
  assert plain.stats.copied == 0
