"""Drafts from the context: the same tokens as without them, greedy or sampled, in fewer steps."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from inference import LookupConfig, SamplingConfig
from inference import lookup as lookup_lib
from models import decoder
from tests.inference.tiny import VOCAB, engine, model, play

LOOKUP = LookupConfig(draft_len=3, min_ngram=1, min_accepted=0.0)


@functools.cache
def two_engines():
  return engine(), engine(lookup=LOOKUP)


def reference_draft(context, config):
  """The latest of the longest matches of the newest tokens, by search."""
  best, at = 0, None
  for end in range(1, len(context)):
    match = 0
    while (match < min(config.max_ngram, end) and
           context[end - 1 - match] == context[len(context) - 1 - match]):
      match += 1
    if match >= max(best, config.min_ngram):
      best, at = match, end
  return [] if at is None else (context[at:] * config.draft_len)[:config.draft_len]


@settings(max_examples=60)
@given(
  context=st.lists(st.integers(0, 2), min_size=1, max_size=16),
  ngrams=st.sampled_from([(1, 1), (1, 3), (2, 3)]))
def test_a_draft_is_what_followed_the_longest_and_latest_match(context, ngrams):
  config = LookupConfig(draft_len=3, min_ngram=ngrams[0], max_ngram=ngrams[1])
  rows = np.full((2, 16), 7, np.int32)
  rows[0, :len(context)] = context
  propose = jax.jit(lookup_lib.propose, static_argnums=2)
  drafts, counts = propose(rows, np.asarray([len(context), 1], np.int32), config)
  want = reference_draft(context, config)
  assert np.asarray(drafts)[0, :counts[0]].tolist() == want and int(counts[1]) == 0


def test_accepted_is_what_was_chosen_up_to_the_first_other():
  drafts = jnp.asarray([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7]])
  chosen = jnp.asarray([[5, 6, 7, 8], [5, 9, 7, 8], [5, 6, 7, 8], [4, 6, 7, 8]])
  assert lookup_lib.accepted(drafts, jnp.asarray([3, 3, 2, 3]), chosen).tolist() == [3, 1, 2, 0]


TURN = st.tuples(
  st.lists(st.integers(2, 6), min_size=1, max_size=9), st.integers(1, 14))
CONVERSATIONS = st.lists(st.lists(TURN, min_size=1, max_size=2), min_size=1, max_size=3)


def assert_same(ours, theirs):
  for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
    assert a.tokens.tolist() == b.tokens.tolist()
    assert (a.stop_reason, a.prompt_tokens) == (b.stop_reason, b.prompt_tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@settings(max_examples=25)
@given(conversations=CONVERSATIONS)
def test_greedy_with_drafts_equals_greedy_without(conversations):
  plain, drafting = two_engines()
  assert_same(play(drafting, conversations), play(plain, conversations))


def test_drafts_were_accepted_and_counted():
  plain, drafting = engine(), engine(lookup=LOOKUP)
  conversations = [[([3, 4, 3, 4, 2], 20)]]
  assert_same(play(drafting, conversations), play(plain, conversations))
  stats = drafting.stats
  # The model repeats itself: fewer steps than tokens.
  assert 0 < stats.accepted <= stats.drafted and stats.verified <= stats.decoded
  assert stats.decoded == plain.stats.decoded == 19
  assert stats.as_dict()['accepted_per_step'] == stats.accepted / stats.verified > 1
  assert stats.decode_computed < 4 * plain.stats.decode_computed
  assert plain.stats.verified == 0 and plain.stats.as_dict()['accepted_per_step'] == 0


@pytest.mark.slow
def test_sampled_tokens_are_the_same_too():
  hot = dict(sampling=SamplingConfig(temperature=0.6, top_p=0.9), stop_ids=())
  plain, drafting = engine(**hot), engine(**hot, lookup=LOOKUP)
  conversations = [[([5, 6, 7, 5, 6], 16), ([8, 5], 16)], [([9, 9, 9], 30)], [([3, 4], 5)]]
  assert_same(play(drafting, conversations), play(plain, conversations))
  assert 0 < drafting.stats.accepted < drafting.stats.drafted


@pytest.mark.slow
def test_frequencies_behind_a_draft_follow_the_distribution():
  sampling = SamplingConfig(temperature=0.8, top_k=8)
  # Whatever comes first has been there before: nearly every second token has a draft.
  draws, prompt = 3000, [*range(2, VOCAB)]
  eng = engine(sampling=sampling, stop_ids=(), lookup=LOOKUP, num_slots=100, decode_steps=2)
  pairs = []
  for start in range(0, draws, 100):
    for slot in range(100):
      # Three tokens: behind the last one nothing could be accepted, so nothing is drafted for it.
      eng.submit(slot, prompt, 3, reset=True, seed=start + slot)
    pairs += [done.tokens[:2].tolist() for done in eng.run_until_complete()]
  # What the second token should be, from whole rows: p(second) = sum of p(first) p(second | first).
  tiny = model()

  @jax.jit
  def last_logits(rows):
    places = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden = decoder.forward(tiny.graphdef, tiny.lora, tiny.frozen, rows, places)
    return decoder.logits(tiny.graphdef, tiny.frozen, hidden)

  rows = np.asarray([[*prompt, token] for token in range(VOCAB)], np.int32)
  logits = np.asarray(last_logits(rows), np.float64)

  def distribution(row):
    weights = np.exp((row - row.max()) / sampling.temperature)
    weights[weights < np.sort(weights)[-sampling.top_k]] = 0
    return weights / weights.sum()

  first = distribution(logits[0, len(prompt) - 1])
  second = np.stack([distribution(row) for row in logits[:, -1]])
  joint = first[:, None] * second
  counts = np.zeros((VOCAB, VOCAB))
  np.add.at(counts, tuple(np.asarray(pairs).T), 1)
  assert not counts[joint == 0].any()
  # As in test_sampling.py; and of the most frequent first token alone.
  for found, want in ((counts, joint), (counts[first.argmax()], second[first.argmax()])):
    n = found.sum()
    assert np.abs(found / n - want).sum() / 2 < np.sqrt(want / n).sum() / 2 + 0.02
  assert eng.stats.drafted > draws / 2 and 0 < eng.stats.accepted < eng.stats.drafted


def test_a_slot_whose_drafts_fail_rests_and_tries_again():
  acceptance = lookup_lib.Acceptance(2, LookupConfig(draft_len=4, min_accepted=1.0))
  everyone = np.array([True, True])
  assert acceptance.drafting.all() and lookup_lib.pays(acceptance.drafting, everyone)
  for _ in range(8):
    acceptance.update(1, 1, 3, 4)
    if acceptance.drafting[0]:
      acceptance.update(0, 1, 0, 1)
  assert acceptance.drafting.tolist() == [False, True]
  assert lookup_lib.pays(acceptance.drafting, everyone)
  assert not lookup_lib.pays(acceptance.drafting, np.array([True, False]))
  acceptance.update(0, 0, 0, 63)
  assert not acceptance.drafting[0]
  acceptance.update(0, 0, 0, 1)
  assert acceptance.drafting[0]
  acceptance.update(0, 1, 0, 1)  # one trial, in vain
  assert not acceptance.drafting[0]
  acceptance.reset(0)
  assert acceptance.drafting[0]


@pytest.mark.slow
def test_an_engine_whose_drafts_never_pay_decodes_without():
  eng = engine(stop_ids=(), lookup=dataclasses.replace(LOOKUP, min_accepted=3.0))
  plain = engine(stop_ids=())
  conversations = [[([5, 6, 7, 5, 6], 40)]]
  assert_same(play(eng, conversations), play(plain, conversations))
  # The first dispatch drafts; in what follows the slot rests.
  assert 0 < eng.stats.verified <= 3
  assert eng.stats.decode_computed < plain.stats.decode_computed + 3 * 3 * 4


@pytest.mark.parametrize('options', [
  dict(draft_len=0), dict(min_ngram=0), dict(min_ngram=4), dict(min_accepted=5.0)])
def test_bad_settings_are_named(options):
  with pytest.raises(UserError, match=next(iter(options))):
    LookupConfig(**options)
