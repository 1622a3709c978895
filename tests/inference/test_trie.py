"""Replies that are restricted: to exactly what is allowed, and nothing else changes."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import LookupConfig, SamplingConfig, Trie
from inference import trie as trie_lib
from tests.inference.tiny import MAX_LEN, VOCAB, engine, play

END = 0
REPLIES = st.lists(
  st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=30)
@given(replies=REPLIES, opening=st.lists(st.integers(2, 5), max_size=2), data=st.data())
def test_the_table_allows_what_continues_a_reply(replies, opening, data):
  whole = [[*reply, END] for reply in replies]
  tables = trie_lib.Tables(2)
  assert tables.arrays() is None
  trie = Trie(whole, [opening] if opening else [])
  tables.set(0, trie)
  edges, nodes = tables.arrays()
  allowed = jax.jit(trie_lib.allowed, static_argnums=2)
  follow = jax.jit(trie_lib.follow)
  said = []
  while not said or said[-1] != END:
    free = bool(opening) and said[:len(opening)] == opening
    found = np.asarray(allowed(edges, nodes, VOCAB))
    assert found[1].all()  # the other slot is not restricted
    want = {reply[len(said)] for reply in whole
            if reply[:len(said)] == said and len(reply) > len(said)}
    if opening and opening[:len(said)] == said and not free:
      want.add(opening[len(said)])
    if free:
      assert found[0].all()
      break
    assert set(np.flatnonzero(found[0]).tolist()) == want
    said.append(data.draw(st.sampled_from(sorted(want))))
    nodes = np.asarray(follow(edges, nodes, np.asarray([said[-1], 7], np.int32)))
    tables.advance(0, said[-1:])
    np.testing.assert_array_equal(tables.nodes, nodes)
    dead = follow(edges, nodes, np.asarray([1, 1], np.int32))
    assert int(dead[0]) in (trie_lib.DEAD, trie_lib.FREE) and int(dead[1]) == trie_lib.FREE


def test_the_table_grows_with_the_largest_trie():
  tables = trie_lib.Tables(2)
  many = [[2 + i % 20, 2 + i // 20, END] for i in range(300)]
  tables.set(1, Trie(many))
  edges, _ = tables.arrays()
  assert edges.shape[1] >= len(Trie(many).edges) and edges.shape[1] % 128 == 0
  tables.set(1, None)
  assert tables.arrays() is None


def test_nothing_allowed_is_an_error():
  with pytest.raises(ValueError, match='No reply'):
    Trie([])
  with pytest.raises(ValueError, match='without tokens'):
    Trie([[]])


@functools.cache
def engines(temperature):
  options = dict(sampling=SamplingConfig(temperature=temperature))
  return engine(**options), engine(**options, lookup=LookupConfig(draft_len=3, min_ngram=1))


# Greedy, and without drafts, is enough where seconds count.
@pytest.mark.parametrize('temperature, count', [
  (0.0, 1), pytest.param(2.0, 2, marks=pytest.mark.slow)])
@settings(max_examples=12)
@given(replies=REPLIES, prompt=st.lists(st.integers(2, 9), min_size=1, max_size=8))
def test_every_reply_is_an_allowed_one(temperature, count, replies, prompt):
  whole = [[*reply, END] for reply in replies]
  for eng in engines(temperature)[:count]:
    eng.submit(0, prompt, 6, reset=True, allowed=Trie(whole), seed=1)
    eng.submit(1, prompt, 6, reset=True, seed=1)
    eng.submit(2, prompt, 6, reset=True, allowed=Trie(whole, [[5]]), seed=2)
    done = sorted(eng.run_until_complete(), key=lambda done: done.slot)
    assert done[0].tokens.tolist() in whole and done[0].stop_reason == 'stop'
    free = done[2].tokens.tolist()
    assert free in whole or free[0] == 5
    # The restriction ends with the turn: the next one is as free as the other slot's.
    eng.submit(0, [3, 4], 5, seed=4)
    eng.submit(1, [3, 4], 5, seed=4)
    assert len(eng.run_until_complete()) == 2


@pytest.mark.slow
def test_an_unrestricted_slot_samples_as_if_no_other_were_restricted():
  conversations = [[([5, 6, 7, 5, 6], 12)]]
  for eng in engines(2.0):
    [[alone]] = play(eng, conversations)
    eng.submit(1, [5, 6], 4, reset=True, allowed=Trie([[9, END]]))
    eng.submit(0, [5, 6, 7, 5, 6], 12, reset=True, seed=0)
    beside = {done.slot: done for done in eng.run_until_complete()}
    assert beside[0].tokens.tolist() == alone.tokens.tolist()
    assert beside[1].tokens.tolist() == [9, END]
    # Of the model's own distribution, not of the restricted one, where it would be zero.
    assert beside[1].logprobs[0] < -1.0


@pytest.mark.slow
def test_greedy_takes_the_best_of_what_is_allowed():
  eng = engine(stop_ids=(END,), num_slots=VOCAB - 2)
  prompt = [5, 6, 7]
  # The log-probability of every first token, by allowing no other one.
  for slot in range(eng.num_slots):
    eng.submit(slot, prompt, 2, reset=True, allowed=Trie([[slot + 2, END]]))
  scores = {done.tokens[0]: done.logprobs[0] for done in eng.run_until_complete()}
  assert sorted(scores) == list(range(2, VOCAB)) and MAX_LEN > 3
  for choices in ([3, 4], [9, 20, 2], list(range(2, VOCAB))):
    eng.submit(0, prompt, 2, reset=True, allowed=Trie([[token, END] for token in choices]))
    [done] = eng.run_until_complete()
    assert done.tokens[0] == max(choices, key=scores.__getitem__)
