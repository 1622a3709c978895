"""Several policies in one engine: each conversation as an engine of its own policy alone has it."""

import functools

import numpy as np
import pytest

from inference import Engine, LookupConfig
from models import adapters, decoder, sharding
from models.lora import LoraConfig
from tests.inference.tiny import CONFIG, SHAPES, STOP, model

# The base, and adapters of other ranks, scales and targets.
SHAPES_OF = (None, LoraConfig(2, 6.0), LoraConfig(3, 12.0, targets=('q', 'v', 'down')))
BEGINNING = [5 + i % 17 for i in range(36)]


@functools.cache
def drawn(policy):
  """The policy's adapter, with an effect."""
  lora = SHAPES_OF[policy]
  if lora is None:
    return None
  rng = np.random.default_rng(policy)
  params = decoder.to_params(decoder.abstract(CONFIG, lora).lora)
  return lora, {name: 0.3 * rng.standard_normal(x.shape).astype(np.float32)
                for name, x in params.items()}


def frozen():
  return decoder.to_params(model().frozen)


def alone(policy, **options):
  """An engine of one policy, its adapter merged."""
  lora, params = drawn(policy) or (None, {})
  return Engine(
    decoder.from_params(CONFIG, frozen() | params, lora), **SHAPES, stop_ids=STOP, **options)


def together(mesh=None, **options):
  joint, params, gates = adapters.side_by_side(CONFIG, [drawn(i) for i in range(3)])
  one = decoder.from_params(CONFIG, frozen() | params, joint, mesh=mesh)
  return Engine(
    adapters.SideBySide(one, gates), **SHAPES | {'num_slots': 6}, stop_ids=STOP, mesh=mesh,
    **options)


def turns(slot, wave):
  """Of a conversation; slots play one beginning, of which some would be copied."""
  return [([*BEGINNING, 3 + slot, 4 + wave], 9), ([3, 4 + slot], 5)]


def check_as_alone(eng, **options):
  """Plays policies in changing slots, and every conversation once more by its policy alone."""
  references = [alone(policy, **options) for policy in range(3)]
  seen = set()
  for wave in range(2):
    policies = [(slot + wave) % 3 for slot in range(6)]
    for turn in range(2):
      for slot, policy in enumerate(policies):
        tokens, budget = turns(slot, wave)[turn]
        eng.submit(slot, tokens, budget, reset=not turn, policy=None if turn else policy)
      for done in eng.run_until_complete():
        policy = policies[done.slot]
        reference = references[policy]
        tokens, budget = turns(done.slot, wave)[turn]
        # Six conversations in three slots.
        own = done.slot % 3
        if turn:
          reference.submit(own, turns(done.slot, wave)[0][0], 9, reset=True)
          reference.run_until_complete()
        reference.submit(own, tokens, budget, reset=not turn)
        [wanted] = reference.run_until_complete()
        assert done.tokens.tolist() == wanted.tokens.tolist()
        np.testing.assert_allclose(done.logprobs, wanted.logprobs, atol=1e-4)
        if not turn:
          seen.add((done.slot, policy, tuple(wanted.tokens.tolist())))
  # The policies differ, or nothing was shown.
  assert all(len({tokens for _, p, tokens in seen if p == policy} - {
    tokens for _, p, tokens in seen if p != policy}) > 0 for policy in range(3))


def test_every_policy_plays_as_if_it_were_alone():
  eng = together()
  check_as_alone(eng)
  assert eng.num_policies == 3
  # A beginning was copied where its own policy had it, and computed once by each at least.
  assert eng.stats.copied > 0
  assert eng.stats.prefilled > 3 * len(BEGINNING)


@pytest.mark.slow
def test_with_drafts_groups_and_over_devices_it_is_the_same():
  drafts = LookupConfig(draft_len=3, min_ngram=1, min_accepted=0.0)
  eng = together(lookup=drafts, groups=2)
  check_as_alone(eng, lookup=drafts)
  assert eng.stats.accepted > 0
  eng = together(sharding.make_mesh(data=2, fsdp=2, tensor=2))
  check_as_alone(eng)
  traces = eng.stats.traces
  check_as_alone(eng)
  assert eng.stats.traces == traces


def test_another_policy_takes_nothing_of_a_slot_s_last_conversation():
  eng = together()
  copied = []
  for policy in (1, 1, 2, 0, 1):
    eng.submit(0, BEGINNING, 2, reset=True, policy=policy)
    [done] = eng.run_until_complete()
    copied.append(done.copied_tokens)
  # What policy 1 had twice was kept for it, and for nobody else.
  assert copied == [0, 35, 0, 0, 35]
  with pytest.raises(ValueError, match='cannot take policy 3: there are 3'):
    eng.submit(1, [5], 2, reset=True, policy=3)
  with pytest.raises(ValueError, match='keeps its own'):
    eng.submit(0, [5], 2, policy=2)
  with pytest.raises(ValueError, match='there are 1'):
    alone(0).submit(0, [5], 2, reset=True, policy=1)


def test_an_engine_of_one_policy_runs_the_programs_of_a_plain_one():
  one, plain = alone(1), alone(0)
  assert one._programs is plain._programs and one._gates_of(slice(0, 3)) is None
