import collections
import dataclasses
import threading

import pytest

from agents import episode as episode_lib
from agents import expert_episodes, memory, runner
from data import errors, trajectory
from inference import engine as engine_lib
from tests.agents import fakes

LABELS = episode_lib.Labels('base', 'mock', 'test', 0)
SPEC = episode_lib.AgentSpec('react', max_env_steps=4, max_calls=8, max_new_tokens=200)


def script(text):
  """Pulls lever 1, then lever 2: tasks of lever 3 run into 'lose'."""
  return ['pull lever 1', 'think: hm', 'pull lever 2', 'lose'][text.count('assistant\n') - 1]


def engine(tokenizer, answers=script, **options):
  return fakes.ScriptedEngine(
    tokenizer, answers, overflow=engine_lib.ContextOverflow, completion=engine_lib.Completion,
    **options)


def games(suite, players=(LABELS,)):
  return episode_lib.games(suite.tasks('test'), players)


def play(tokenizer, workdir, answers=script, *, count=10, spec=SPEC, suite=None, memories=None,
         progress=False, **options):
  suite = suite or fakes.LeverSuite(count)
  played = engine(tokenizer, answers, **options)
  return runner.play(
    played, tokenizer, suite, games(suite), spec, workdir, memories=memories, progress=progress
  ), played


@pytest.mark.parametrize('num_slots', [1, 3, 16])
def test_every_task_is_played_once_in_order(tokenizer, tmp_path, num_slots):
  episodes, played = play(tokenizer, tmp_path, num_slots=num_slots)
  assert [e.task_id for e in episodes] == [f'test/lever-{i}' for i in range(10)]
  expected = ['success', 'success', 'failure']
  assert [e.termination for e in episodes] == [expected[i % 3] for i in range(10)]
  # Nothing was given to the engine twice.
  assert played.submitted == sum(e.prefilled_tokens for e in episodes)


def test_slots_do_not_change_what_is_played(tokenizer, tmp_path):
  one, _ = play(tokenizer, tmp_path / 'one', num_slots=1)
  four, _ = play(tokenizer, tmp_path / 'four', num_slots=4)
  for a, b in zip(one, four):
    a.wall_s = b.wall_s = 0.0
    assert a == b


def test_environments_that_can_are_asked_at_the_same_time(tokenizer, tmp_path):
  suite, calm = fakes.LeverSuite(6), fakes.LeverSuite(6)
  suite.parallel = 2
  first_two = [threading.Barrier(2, timeout=10).wait] * 2

  class Waiting(fakes.LeverEnvironment):
    def reset(self):
      if first_two:
        first_two.pop()()
      return super().reset()

  suite.make = Waiting
  played, _ = play(tokenizer, tmp_path / 'at once', suite=suite, num_slots=2)
  alone, _ = play(tokenizer, tmp_path / 'in turn', suite=calm, num_slots=2)
  for a, b in zip(played, alone, strict=True):
    a.wall_s = b.wall_s = 0.0
    assert a == b


def test_journal_and_store_hold_the_same(tokenizer, tmp_path):
  episodes, _ = play(tokenizer, tmp_path)
  by_id = {e.id: e for e in trajectory.Journal(tmp_path / trajectory.JOURNAL_NAME).read()}
  assert [by_id[e.id] for e in episodes] == episodes
  assert trajectory.read_tfds(tmp_path / trajectory.TFDS_NAME) == episodes


def test_a_stopped_run_goes_on(tokenizer, tmp_path):
  asked = collections.Counter()

  def dies(text):
    asked['calls'] += 1
    if asked['calls'] == 12:
      raise KeyboardInterrupt
    return script(text)

  with pytest.raises(KeyboardInterrupt):
    play(tokenizer, tmp_path, dies)
  kept = trajectory.Journal(tmp_path / trajectory.JOURNAL_NAME).read()
  assert 0 < len(kept) < 10 and not (tmp_path / trajectory.TFDS_NAME).exists()
  with open(tmp_path / trajectory.JOURNAL_NAME, 'ab') as f:
    f.write(b'{"sha256":"0123')  # as if killed while writing
  episodes, again = play(tokenizer, tmp_path)
  assert len(episodes) == 10
  # Only the tasks that were not kept were played again.
  assert again.submitted == sum(
    e.prefilled_tokens for e in episodes if e.id not in {k.id for k in kept})
  assert len(trajectory.Journal(tmp_path / trajectory.JOURNAL_NAME).read()) == 10


def test_a_finished_run_plays_nothing(tokenizer, tmp_path):
  first, _ = play(tokenizer, tmp_path)
  second, played = play(tokenizer, tmp_path)
  assert played.submitted == 0 and second == first


def first_prompt_room(tokenizer, workdir):
  """The context that the first prompt of these tasks and one reply fill."""
  episodes, _ = play(tokenizer, workdir, count=1)
  return int(episodes[0].steps[0].prompt_tokens) + SPEC.max_new_tokens


def test_a_prompt_that_does_not_fit_is_counted(tokenizer, tmp_path):
  room = first_prompt_room(tokenizer, tmp_path / 'one') + 20
  long = memory.hints(['it is lever 2, as everybody in this hall has always known'] * 3)
  episodes, played = play(
    tokenizer, tmp_path / 'run', lambda text: 'lose', max_len=room,
    memories={'test/lever-1': long, 'test/lever-4': long})
  overflown = [e for e in episodes if e.termination == 'context_overflow']
  assert [e.task_id for e in overflown] == ['test/lever-1', 'test/lever-4'] and len(episodes) == 10
  assert {e.model_calls for e in overflown} == {0}
  assert played.submitted == sum(e.prefilled_tokens for e in episodes)


def test_a_first_prompt_that_does_not_fit_is_told_before_anything_is_played(tokenizer, tmp_path):
  suite = fakes.LeverSuite(10)
  tasks = suite.tasks('test')
  room = first_prompt_room(tokenizer, tmp_path / 'one')

  def check(max_context, tasks=tasks, **options):
    runner.check_first_prompt(max_context, tokenizer, suite, tasks, SPEC, LABELS, **options)

  check(room)
  with pytest.raises(errors.UserError, match=(
      rf'first prompt has {room - 200} tokens.* 200 .*max_context={room - 1}.*{room} or more')):
    check(room - 1)
  with pytest.raises(errors.UserError, match='max_context'):
    check(room, memories={tasks[0].id: memory.hints(['it is lever 2'])})
  # A game that does not start is counted when it is played; the next one has a prompt.
  broken = dataclasses.replace(tasks[0], payload={'lever': 'broken'})
  with pytest.raises(errors.UserError, match='max_context'):
    check(room - 20, [broken, *tasks[1:]])
  check(1, [broken])


def test_a_conversation_that_does_not_fit_ends(tokenizer, tmp_path):
  first, _ = play(tokenizer, tmp_path / 'a', count=1)
  room = int(first[0].steps[0].prompt_tokens) + SPEC.max_new_tokens + 5
  episodes, _ = play(tokenizer, tmp_path / 'b', lambda text: 'wait', max_len=room)
  assert {(e.termination, e.model_calls) for e in episodes} == {('context_overflow', 1)}


def test_broken_games_are_counted_and_the_rest_is_played(tokenizer, tmp_path, capsys):
  class Broken(fakes.LeverSuite):
    def make(self, task):
      if task.id.endswith('-3'):
        raise OSError('disk gone')
      return super().make(task)

  episodes, _ = play(tokenizer, tmp_path, suite=Broken(10))
  assert [e.task_id for e in episodes if e.termination == 'env_error'] == ['test/lever-3']
  assert len(episodes) == 10 and 'disk gone' in capsys.readouterr().err


def test_memories_reach_the_prompt(tokenizer, tmp_path):
  seen = []

  def reads(text):
    seen.append('- it is lever 2' in text)
    return 'pull lever 2' if seen[-1] else 'lose'

  episodes, _ = play(
    tokenizer, tmp_path, reads, count=6, memories={'test/lever-1': memory.hints(['it is lever 2'])})
  assert [e.success for e in episodes] == [False, True, False, False, False, False]
  assert [e.memory for e in episodes][:2] == ['none', 'hints']


def test_prediction_comes_first_and_changes_nothing(tokenizer, tmp_path, capsys):
  quiet, _ = play(tokenizer, tmp_path / 'quiet')
  loud, _ = play(tokenizer, tmp_path / 'loud', progress=True)
  text = capsys.readouterr().err
  assert text.startswith('10 episodes, about ') and 'min at' in text.splitlines()[0]
  for a, b in zip(quiet, loud):
    a.wall_s = b.wall_s = 0.0
    assert a == b


def test_expert_episodes_through_the_same_journal(tokenizer, tmp_path):
  suite = fakes.LeverSuite(5)
  labels = episode_lib.Labels('expert', 'expert', 'train', 0)

  def make(task):
    return expert_episodes.expert_episode(suite, task, tokenizer, SPEC, labels)

  first = runner.play_each(make, suite.tasks('train')[:2], labels, tmp_path, progress=False)
  every = runner.play_each(make, suite.tasks('train'), labels, tmp_path, progress=False)
  assert every[:2] == first and len(every) == 5 and all(e.success for e in every)


def test_after_each_episode_the_caller_is_told(tokenizer, tmp_path):
  suite, labels = fakes.LeverSuite(4), episode_lib.Labels('expert', 'expert', 'train', 0)
  told = []
  runner.play(
    engine(tokenizer), tokenizer, suite, games(suite), SPEC, tmp_path / 'a', progress=False,
    after_episode=lambda: told.append('played'))
  runner.play_each(
    lambda task: expert_episodes.expert_episode(suite, task, tokenizer, SPEC, labels),
    suite.tasks('train'), labels, tmp_path / 'b', progress=False,
    after_episode=lambda: told.append('expert'))
  assert told == ['played'] * 4 + ['expert'] * 4


def test_two_tasks_of_one_id(tokenizer, tmp_path):
  class Twins(fakes.LeverSuite):
    def tasks(self, split):
      return super().tasks(split)[:1] * 2

  with pytest.raises(errors.UserError, match='one id'):
    play(tokenizer, tmp_path, suite=Twins())
