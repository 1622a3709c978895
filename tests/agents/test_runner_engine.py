"""Episodes over the real engine, with a random model of one layer."""

import functools

import numpy as np
import pytest

from agents import episode as episode_lib
from agents import expert_episodes, runner
from data import errors
from envs import get_suite, workers
from inference import Engine, SamplingConfig
from models import decoder, registry
from tests.agents import fakes

LABELS = episode_lib.Labels('base', 'tiny', 'test', 0)
SPEC = episode_lib.AgentSpec('react', max_env_steps=3, max_calls=3, max_new_tokens=12)


@pytest.fixture(scope='module')
def make_engine(tokenizer):
  config = registry.shrink(
    registry.get_config('smollm2_135m'), vocab_size=tokenizer.vocab_size, num_layers=1,
    embed_dim=32, head_dim=8, mlp_dim=48)
  return functools.partial(
    Engine, decoder.create(config, seed=2), num_slots=3, max_len=512,
    stop_ids=tokenizer.stop_ids, sampling=SamplingConfig(temperature=1.5), block_buckets=(8,),
    attend_step=512)


class Watched(fakes.LeverSuite):
  """Notes of every command whether it was admissible; `suite`'s environments, or levers."""

  def __init__(self, suite=None, count=8):
    super().__init__(count)
    self._suite, self.seen = suite, []

  def make(self, task):
    environment = self._suite.make(task) if self._suite else super().make(task)
    step = environment.step

    def watched(action):
      self.seen.append((action, action in environment.admissible_commands()))
      return step(action)

    environment.step = watched
    return environment


@pytest.mark.slow
def test_what_prompts_share_is_computed_once(tokenizer, make_engine, tmp_path, capsys):
  suite = fakes.LeverSuite(8)
  tasks = suite.tasks('test')
  examples = expert_episodes.few_shot_examples(
    suite, {'odd', 'even'}, tokenizer, SPEC, 2, exclude={task.id for task in tasks})
  played = {}
  for share in (True, False):
    engine = make_engine(share_prefixes=share)
    played[share] = runner.play(
      engine, tokenizer, suite, episode_lib.games(tasks, [LABELS]), SPEC, tmp_path / str(share),
      examples=examples)
    new = sum(episode.prefilled_tokens for episode in played[share])
    # The prediction of the run's time is not counted.
    assert engine.stats.prefilled + engine.stats.copied == new
    prompts = sum(int(episode.steps[0].prompt_tokens) for episode in played[share])
    if share:
      # Two types in three slots: six of eight prompts find their few-shots computed.
      assert engine.stats.copied > 0.5 * prompts
    else:
      assert engine.stats.copied == 0
  assert 'min at' in capsys.readouterr().err
  for ours, theirs in zip(played[True], played[False], strict=True):
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-3)
    ours.logprobs, ours.wall_s = theirs.logprobs, theirs.wall_s
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize('agent', ['plain', 'react'])
def test_every_action_of_a_constrained_agent_is_admissible(tokenizer, make_engine, tmp_path, agent):
  spec = episode_lib.AgentSpec(
    agent, max_env_steps=4, max_calls=5, max_new_tokens=80, constrained=True)
  engine = make_engine()
  levers = Watched(count=4)
  house = get_suite('household', skills='loop', num_valid=2)
  houses = Watched(house)
  for name, suite, tasks in (
      ('levers', levers, levers.tasks('test')), ('houses', houses, house.tasks('valid_seen'))):
    episodes = runner.play(
      engine, tokenizer, suite, episode_lib.games(tasks, [LABELS]), spec, tmp_path / name,
      progress=False)
    assert suite.seen and all(admissible for _, admissible in suite.seen)
    for episode in episodes:
      for step in episode.steps:
        assert step.parsed == 'action' or step.reply.startswith('think:')
  # A random model hits none of them otherwise.
  free = Watched(count=2)
  runner.play(
    engine, tokenizer, free, episode_lib.games(free.tasks('test'), [LABELS]), episode_lib.AgentSpec(
      agent, max_env_steps=2, max_calls=2, max_new_tokens=8), tmp_path / 'free', progress=False)
  assert not any(admissible for _, admissible in free.seen)


def test_masks_built_in_workers_restrict_to_the_same_tokens(tokenizer, make_engine, tmp_path):
  spec = episode_lib.AgentSpec(
    'react', max_env_steps=3, max_calls=4, max_new_tokens=60, constrained=True)
  options = {'skills': 'loop', 'num_valid': 3}
  house = get_suite('household', **options)
  pool = workers.WorkerSuite(house, 'household', options, workers=2)
  games = episode_lib.games(house.tasks('valid_seen'), [LABELS])
  engine, played = make_engine(), []
  for name, suite in (('here', house), ('elsewhere', pool)):
    played.append(runner.play(
      engine, tokenizer, suite, games, spec, tmp_path / name, progress=False))
    engine.forget()
  pool.close()
  assert pool.counts['started'] == 2
  for ours, theirs in zip(*played, strict=True):
    assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.env_steps == theirs.env_steps


def test_what_cannot_be_constrained_is_told(tokenizer, make_engine, tmp_path):
  with pytest.raises(errors.UserError, match='more than a command'):
    episode_lib.AgentSpec('stateact', constrained=True)
  short = episode_lib.AgentSpec('plain', max_new_tokens=2, constrained=True)
  suite = fakes.LeverSuite(2)
  too_long = r"'pull lever 1' has \d+ tokens .*max_new_tokens is 2"
  with pytest.raises(errors.UserError, match=too_long):
    runner.play(
      make_engine(), tokenizer, suite, episode_lib.games(suite.tasks('test'), [LABELS]), short,
      tmp_path / 'short', progress=False)

  class Broken(fakes.LeverEnvironment):
    def admissible_commands(self):
      raise RuntimeError('no list today')

  suite.make = Broken
  episodes = runner.play(
    make_engine(), tokenizer, suite, episode_lib.games(suite.tasks('test'), [LABELS]),
    episode_lib.AgentSpec('plain', constrained=True), tmp_path / 'broken', progress=False)
  assert [episode.termination for episode in episodes] == ['env_error'] * 2
