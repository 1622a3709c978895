"""Long slots apart from short ones: what is read is less, and what is sampled the same."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import Engine, LookupConfig, SamplingConfig, Trie, lengths
from models import decoder
from tests.inference.tiny import CONFIG, STOP, model

BUCKETS = lengths.attend_buckets(4096)
KINDS = {
  'float32': dict(cache_dtype='float32'),
  'int8': dict(cache_dtype='int8'),
  'sampled': dict(sampling=SamplingConfig(temperature=1.0, top_p=0.95)),
  'drafts': dict(lookup=LookupConfig(draft_len=2, min_ngram=1, min_accepted=0.0)),
  'window': dict(windowed=True),
  'groups': dict(num_slots=8, groups=2),
}


@functools.cache
def windowed():
  config = dataclasses.replace(
    CONFIG, num_layers=2, sliding_window=12, global_every=2)
  return decoder.create(config, seed=3)


@functools.cache
def engines(kind):
  options = dict(
    num_slots=4, max_len=96, decode_steps=3, block_len=8, block_buckets=(12,), attend_step=32,
    stop_ids=STOP, share_prefixes=False) | KINDS[kind]
  own = windowed() if options.pop('windowed', False) else model()
  plain, split = (Engine(own, **options) for _ in range(2))
  plain._splits = []
  return plain, split


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=5, deadline=None)
@given(sizes=st.lists(
  st.one_of(st.integers(1, 20), st.integers(33, 80)), min_size=1, max_size=4), data=st.data())
def test_what_long_slots_read_apart_changes_no_token(kind, sizes, data):
  draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
  prompts = [draw.integers(2, 9, size).tolist() for size in sizes]
  played = []
  for engine in engines(kind):
    for slot, tokens in enumerate(prompts):
      allowed = Trie([[*tokens[:3], 0], [7, 8, 0]]) if slot == 1 else None
      engine.submit(
        slot * engine.num_slots // 4, tokens, 9, reset=True, seed=slot, allowed=allowed)
    played.append({done.slot: done for done in engine.run_until_complete()})
  assert played[0].keys() == played[1].keys()
  for slot, done in played[0].items():
    assert done.tokens.tolist() == played[1][slot].tokens.tolist()
    np.testing.assert_allclose(done.logprobs, played[1][slot].logprobs, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_one_long_slot_is_read_apart(kind):
  engine = engines(kind)[1]
  # 64 positions are read of all without it: long enough to save, and not the whole cache.
  engine.submit(0, [2 + i % 9 for i in range(45)], 9, reset=True)
  engine.submit(1, [3, 4], 9, reset=True)
  engine.run_until_complete()
  assert engine._programs.traces['section'] > 0


def choose(own, whole):
  found = lengths.splits(BUCKETS, len(own), np.inf)
  return lengths.choose(own, whole, found, 8, True)


def test_a_split_reads_what_there_is():
  assert choose([4000] + 31 * [250], 4096) == lengths.Split(256, 4096, 4)
  assert choose(np.geomspace(128, 2000, 32), 2048) == lengths.Split(512, 2048, 16)


def test_slots_of_similar_lengths_are_not_split():
  assert choose(32 * [500], 512) is None
  assert choose(np.linspace(1500, 2000, 32), 2048) is None
  assert choose([500], 512) is None


def test_splits_are_few_and_fit_into_memory():
  found = lengths.splits(BUCKETS, 32, np.inf)
  assert len(found) == 20 and len(set(found)) == 20
  assert lengths.splits(BUCKETS, 32, 0) == []
