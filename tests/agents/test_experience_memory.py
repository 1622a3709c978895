"""Experiences in play: chosen once or at every step, beside hints, and growing."""

import dataclasses
import itertools
import json
import shutil
import types

import pytest

import rollout
from agents import episode as episode_lib
from agents import experience_memory, expert_episodes, runner
from agents import memory as memory_lib
from data import errors, trajectory
from inference.engine import Completion, ContextOverflow
from retrieval import experience as experience_lib
from retrieval import experience_index, experience_select
from tests.agents import fakes

SUITE = fakes.LeverSuite(8)
SPEC = episode_lib.AgentSpec(format='plain', layout='paper_b', max_env_steps=6, max_calls=6)
LABELS = episode_lib.Labels('base', 'tiny', 'test', 0)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return fakes.make_tokenizer(tmp_path_factory.mktemp('tokenizer'))


def bank_of(tokenizer, split='train', spec=SPEC):
  labels = episode_lib.Labels('expert', 'expert', split, 0)
  bank = experience_lib.ExperienceBank()
  bank.add_episodes(
    [expert_episodes.expert_episode(SUITE, task, tokenizer, spec, labels)
     for task in SUITE.tasks(split)], tokenizer, 'runs/expert')
  return bank


def memory_of(bank, tokenizer, method='bm25', query='static', hints=None, **rules):
  return experience_memory.ExperienceMemory(
    experience_index.ExperienceIndex(bank, method, query),
    experience_select.Rules(**rules), tokenizer, hints)


def play(tokenizer, workdir, script, **options):
  tasks = options.pop('tasks', SUITE.tasks('test'))
  engine = fakes.ScriptedEngine(
    tokenizer, script, overflow=ContextOverflow, completion=Completion,
    num_slots=options.pop('num_slots', 3))
  episodes = runner.play(
    engine, tokenizer, SUITE, episode_lib.games(tasks, [LABELS]), SPEC, workdir, progress=False,
    **options)
  return episodes, engine


def test_the_prompt_of_a_run_is_that_of_its_experiences(tokenizer):
  bank = bank_of(tokenizer)
  prompt = experience_memory.prompt_of(tokenizer, SPEC, SUITE)
  assert bank.provenance['prompt'] == prompt
  bank.check('plain', prompt, tokenizer.fingerprint)
  full = dataclasses.replace(SPEC, style='full')
  with pytest.raises(errors.UserError, match='made with other prompts'):
    bank.check('plain', experience_memory.prompt_of(tokenizer, full, SUITE), tokenizer.fingerprint)


def test_static_memory_separates_outcomes_and_records_where_they_come_from(tokenizer, tmp_path):
  bank = bank_of(tokenizer)
  lost = dataclasses.replace(
    bank.experiences[1], id='lost', success=False, policy=experience_lib.ERRING_EXPERT,
    task_id='train/lost')
  bank.experiences.append(lost)
  memory = memory_of(bank, tokenizer, k=3)
  task = SUITE.tasks('test')[1]
  [chosen] = memory.choose([task]).values()
  assert [r['outcome'] for r in chosen.retrieved].count('failure') == 1
  block = chosen.block('paper_b')
  good, bad = block.index('that succeeded:'), block.index('that failed:')
  assert good < bad
  # The text of the failure, and only that, stands under its header.
  assert block[bad:].count('{"assistant"') == len(lost.turns)
  failed = next(r for r in chosen.retrieved if r['outcome'] == 'failure')
  assert failed['provenance'].endswith('(failed on purpose)')
  episodes, _ = play(
    tokenizer, tmp_path, lambda text: 'pull lever 2', memories={task.id: chosen}, tasks=[task])
  assert [r['step'] for r in episodes[0].retrieved] == [0, 0, 0]
  assert episodes[0].memory == 'experience'
  # The student's context: the very ids of the prompt without a memory.
  plain, _ = play(tokenizer, tmp_path / 'plain', lambda text: 'pull lever 2', tasks=[task])
  assert trajectory.without(episodes[0])[0].tolist() == plain[0].tokens.tolist()
  assert (episodes[0].kinds == trajectory.KIND['memory']).sum() > 20
  # The TFDS store gives back what the journal holds.
  assert trajectory.read_tfds(tmp_path / trajectory.TFDS_NAME) == episodes


def test_hints_and_experiences_stand_in_one_block(tokenizer):
  task = SUITE.tasks('test')[0]
  hints = {task.id: memory_lib.hints(['Pull the lever.'])}
  [both] = memory_of(bank_of(tokenizer), tokenizer, k=1, hints=hints).choose([task]).values()
  assert both.kind == 'hints+experience'
  memory_lib.check_kind(both.kind)
  block = both.block()
  assert block.startswith('Hints:\n- Pull the lever.\n\nSolved before:\n{"user":')
  alone = memory_lib.Memory('experience', both.retrieved[1:])
  assert block.endswith(alone.block())


def _tries(text):
  """Levers in order: the number of replies so far tells which is next."""
  return f'pull lever {text.count("clicks") + 1}'


def test_dynamic_memory_is_asked_every_call_and_rebuilt_only_when_it_changed(tokenizer, tmp_path):
  bank = bank_of(tokenizer)
  memory = memory_of(bank, tokenizer, query='dynamic', k=1)
  asked = []

  def recall(runs):
    asked.append(len(runs))
    return memory.recall(runs)

  episodes, engine = play(tokenizer, tmp_path, _tries, recall=recall)
  assert sum(asked) == sum(e.model_calls for e in episodes)
  # What the engine holds at the end is the episode's own tokens: nothing stale was left in it.
  last = next(e for e in episodes if e.tokens.tolist() == engine.context[0])
  assert last.memory == 'experience'
  system = trajectory.KIND['system']
  for episode in episodes:
    shown = {}
    for r in episode.retrieved:
      shown.setdefault(r['step'], []).append(r['id'])
    blocks = list(shown.values())
    assert 0 in shown and all(a != b for a, b in itertools.pairwise(blocks))
    prompt = episode.steps[0].prompt_tokens
    kept = int((episode.kinds == system).argmin())
    for number, step in enumerate(episode.steps[1:], 1):
      if number in shown:
        # From the memory block on: everything but the system prompt before it.
        assert step.prefilled_tokens >= step.prompt_tokens - prompt
        assert step.prefilled_tokens <= step.prompt_tokens - kept
      else:
        before = episode.steps[number - 1]
        assert step.prefilled_tokens == (
          step.prompt_tokens - before.prompt_tokens - before.generated_tokens)
  assert any(len({r['step'] for r in e.retrieved}) > 1 for e in episodes), 'some memory changed'
  assert any(e.model_calls > len({r['step'] for r in e.retrieved}) for e in episodes), 'some not'
  assert trajectory.read_tfds(tmp_path / trajectory.TFDS_NAME) == episodes


def test_dynamic_memory_that_never_changes_is_static_memory(tokenizer, tmp_path):
  bank = bank_of(tokenizer)
  memory = memory_of(bank, tokenizer, method='random', k=2)
  tasks = SUITE.tasks('test')
  static, one = play(tokenizer, tmp_path / 's', _tries, memories=memory.choose(tasks))
  dynamic, two = play(
    tokenizer, tmp_path / 'd', _tries, recall=memory.recall)
  for a, b in zip(static, dynamic):
    a.wall_s = b.wall_s = 0.0
    assert a == b
  assert one.submitted == two.submitted


def test_a_bank_that_grows_knows_what_was_played_before_and_nothing_else(tokenizer, tmp_path):
  tasks = experience_memory.task_order(SUITE.tasks('test'), 3)
  assert tasks == experience_memory.task_order(SUITE.tasks('test'), 3)
  assert tasks != experience_memory.task_order(SUITE.tasks('test'), 4)
  calls = []

  def run(workdir, stop_after=99):
    memory = memory_of(experience_lib.ExperienceBank(), tokenizer, k=8)

    def one_more(text):
      calls.append(text)
      if len(calls) > stop_after:
        raise KeyboardInterrupt
      return _tries(text)

    def play_some(group, memories, progress):
      own = [game.task for game in group]
      return play(tokenizer, workdir, one_more, tasks=own, memories=memories)[0]

    games = episode_lib.games(tasks, [LABELS])
    return rollout.play_and_remember(play_some, games, memory, 3, workdir)

  episodes = run(tmp_path / 'a')
  order = [task.id for task in tasks]
  assert [e.task_id for e in episodes] == order
  for i, episode in enumerate(episodes):
    known = {r['id'].split('#')[0].removeprefix('base/') for r in episode.retrieved}
    assert known == set(order[:i // 3 * 3])
  assert len(experience_lib.ExperienceBank.load(tmp_path / 'a' / 'experiences')) == len(order)
  # Stopped and started again it plays the same.
  calls.clear()
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'b', stop_after=9)
  calls.clear()
  for a, b in zip(episodes, run(tmp_path / 'b')):
    a.wall_s = b.wall_s = 0.0
    assert a.tokens.tolist() == b.tokens.tolist() and a.retrieved == [
      {**r, 'provenance': r['provenance'].replace('/b', '/a')} for r in b.retrieved]


@pytest.mark.parametrize('values, words', [
  (dict(memory='experience'), 'needs experiences=FOLDER'),
  (dict(grow=3), 'grow needs memory=experience'),
  (dict(memory='experience', experiences='x', agent='expert', query='dynamic'), 'query=static'),
  (dict(expert_error_rate=0.5), 'needs agent=expert'),
  (dict(memory='experience', experiences='x', experience_format='xml'), 'experience format'),
])
def test_bad_keys(values, words):
  from configs import rollout as rollout_config
  with pytest.raises(errors.UserError, match=words):
    rollout.check_experiences(rollout_config.make(values))


def test_a_budget_that_takes_fewer_is_counted(tokenizer, tmp_path):
  bank = bank_of(tokenizer)
  task = SUITE.tasks('test')[0]
  [free] = memory_of(bank, tokenizer, k=3).choose([task]).values()
  tokens = [len(tokenizer.encode(r['text'])) for r in free.retrieved]
  [tight] = memory_of(bank, tokenizer, k=3, max_tokens=tokens[0] + 1).choose([task]).values()
  assert len(tight.retrieved) == 1 and tight.dropped == 2
  episodes, _ = play(
    tokenizer, tmp_path, _tries, memories={task.id: tight}, tasks=[task])
  assert episodes[0].memory_dropped == 2


def test_loading_says_what_is_missing(tokenizer, tmp_path):
  with pytest.raises(errors.UserError, match='There is no experience bank'):
    experience_memory.load(tmp_path / 'none', 'bm25', 'static')
  bank_of(tokenizer).save(tmp_path / 'bank')
  index = experience_memory.load(tmp_path / 'bank', 'bm25', 'static')
  assert len(index.bank) == 8
  config = types.SimpleNamespace(
    experience_k=1, outcomes='all', same_type=False, diversity=0.0, block_order='best_first',
    experience_format='flat', memory_tokens=0, seed=0)
  assert experience_memory.rules_of(config).format == 'flat'


def test_a_run_refuses_a_bank_of_other_prompts_or_another_tokenizer_and_writes_nothing(
    tokenizer, tmp_path):
  from configs import rollout as rollout_config
  folder = fakes.tokenizer_folder(tmp_path / 'tokenizer')
  values = dict(
    agent='expert', expert_format='plain', tokenizer=str(folder), base='random', split='train',
    skills='easy', task_types='make_state', episodes=4, expert_knows_rules=True)
  rollout.run(rollout_config.make(values), tmp_path / 'expert')
  bank = experience_lib.main(
    types.SimpleNamespace(episodes=str(tmp_path / 'expert'), out=str(tmp_path / 'bank')),
    lambda: tokenizer)
  assert len(bank) == 4
  values |= dict(memory='experience', experiences=str(tmp_path / 'bank'),
                 experience_retrieval='bm25')
  rollout.run(rollout_config.make(values), tmp_path / 'good')
  assert all(e.retrieved for e in trajectory.load_episodes(tmp_path / 'good'))
  # The same texts in another vocabulary.
  spec = json.loads((folder / 'tokenizer.json').read_text())
  spec['model']['merges'] = spec['model']['merges'][:-5]
  other = tmp_path / 'other'
  shutil.copytree(folder, other)
  (other / 'tokenizer.json').write_text(json.dumps(spec))
  for changes, words in (
      (dict(prompt='full'), 'made with other prompts'),
      (dict(expert_format='react'), 'format plain.*this run plays format react'),
      (dict(tokenizer=str(other)), 'made with another tokenizer'),
      (dict(memory_tokens=5), 'more than memory_tokens=5; raise'),
      (dict(experiences=str(tmp_path / 'nowhere')), 'There is no experience bank')):
    with pytest.raises(errors.UserError, match=words):
      rollout.run(rollout_config.make({**values, **changes}), tmp_path / 'bad')
    assert not (tmp_path / 'bad').exists()
