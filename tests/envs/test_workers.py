"""Environments in worker processes: the same answers, and what becomes of those that die."""

import os
import threading
import time

import hypothesis
import pytest
from hypothesis import strategies

import envs
from data import errors
from data.replies import Replies
from envs import base, workers
from tests.agents import fakes
from tests.envs import hostile

NAME = 'tests.envs.hostile:HostileSuite'


@pytest.fixture
def make_pool():
  """Makes pools of hostile environments and closes them."""
  pools = []

  def make(count=1, exclusive=False, **limits):
    options = {'exclusive': exclusive}
    pools.append(workers.WorkerSuite(
      envs.get_suite(NAME, **options), NAME, options, workers=count, **limits))
    return pools[-1]

  yield make
  for pool in pools:
    pool.close()


def play(environment, actions):
  return [environment.reset(), *map(environment.step, actions), environment.admissible_commands()]


def pid_of(environment):
  environment.reset()
  return int(environment.step('pid').observation)


def alive(pid):
  try:
    with open(f'/proc/{pid}/stat') as f:
      return f.read().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


@pytest.fixture(scope='module')
def houses():
  options = {'skills': 'loop', 'num_train': 3}
  suite = envs.get_suite('household', **options)
  pool = workers.WorkerSuite(suite, 'household', options, workers=1)
  yield suite, pool
  pool.close()


@hypothesis.settings(max_examples=10)
@hypothesis.given(strategies.data())
def test_answers_are_those_of_the_environment_itself(houses, data):
  suite, pool = houses
  task = data.draw(strategies.sampled_from(suite.tasks('train')))
  own, remote = suite.make(task), pool.make(task)
  assert own.reset() == remote.reset()
  for _ in range(data.draw(strategies.integers(0, 8))):
    commands = own.admissible_commands()
    assert remote.admissible_commands() == commands
    assert remote.command_openings() == base.openings_of(own)
    command = data.draw(strategies.sampled_from([*commands, 'sing', '']))
    assert own.step(command) == remote.step(command)
  remote.close()
  assert base.limits_of(remote) == base.limits_of(own) and remote.restarts == 0


@pytest.fixture(scope='module')
def replies(tmp_path_factory):
  tokenizer = fakes.make_tokenizer(tmp_path_factory.mktemp('workers') / 'tokenizer')
  return Replies(tokenizer, ('think:',), 64)


def test_masks_are_built_where_the_environment_is(houses, replies, monkeypatch):
  suite, pool = houses
  [task, *_] = suite.tasks('train')
  own, remote = suite.make(task), pool.make(task)
  assert own.reset() == remote.reset()
  wanted, sent = [], []
  for _ in range(3):
    wanted.append(base.allowed_replies(own, replies))
    command = own.admissible_commands()[0]
    assert own.step(command) == remote.step(command)
  remote.reset()
  # Nothing of it is done in this process, and the tokenizer is sent once.
  monkeypatch.setattr(Replies, 'trie', None)
  monkeypatch.setattr(Replies, '__getstate__', lambda self: sent.append(self) or self.__dict__)
  own = suite.make(task)
  own.reset()
  for trie in wanted:
    found = base.allowed_replies(remote, replies)
    assert found.edges.tolist() == trie.edges.tolist() and found.longest == trie.longest
    remote.step(own.admissible_commands()[0])
    own.step(own.admissible_commands()[0])
  assert sent == [replies]
  remote.close()


def test_masks_are_built_again_by_a_worker_that_took_over(make_pool, tmp_path, replies):
  pool = make_pool()
  environment = pool.make(hostile.task(fault='is killed', once=str(tmp_path / 'once')))
  environment.reset()
  before = base.allowed_replies(environment, replies)
  environment.step('now')
  again = base.allowed_replies(environment, replies)
  assert environment.restarts == 1 and again.edges.tolist() == before.edges.tolist()
  short = Replies(replies._tokenizer, (), 1)
  with pytest.raises(errors.UserError, match=r"command 'more' has .* max_new_tokens is 1"):
    base.allowed_replies(environment, short)


def test_who_waits_for_a_pool_that_is_closed_is_told(make_pool):
  pool, raised = make_pool(), []
  environment = pool.make(hostile.task(fault='hangs'))
  environment.reset()

  def step():
    try:
      environment.step('now')
    except workers.EnvironmentDied as error:
      raised.append(str(error))

  thread = threading.Thread(target=step, daemon=True)
  thread.start()
  while not environment._worker._lock.locked():
    time.sleep(0.01)
  pool.close()
  thread.join(30)
  # No other worker was started to hang in its place.
  assert raised == ['its workers were ended'] and pool.counts['started'] == 1


@pytest.mark.parametrize('fault, what', [
  ('is killed', 'crashed'),
  pytest.param('exits', 'crashed', marks=pytest.mark.slow),
  pytest.param('loses its engine', 'crashed', marks=pytest.mark.slow),
  pytest.param('exits in make', 'crashed', marks=pytest.mark.slow),
  pytest.param('exits in reset', 'crashed', marks=pytest.mark.slow),
])
def test_the_first_death_is_made_good_by_playing_again(make_pool, tmp_path, fault, what):
  pool = make_pool()
  environment = pool.make(hostile.task(fault=fault, once=str(tmp_path / 'once')))
  answers = play(environment, ['more', 'now', 'pid', 'more', 'more'])
  calm = hostile.Hostile(hostile.task())
  expected = play(calm, ['more', 'now', 'pid', 'more', 'more'])
  assert answers[:3] + answers[4:] == expected[:3] + expected[4:]
  assert environment.restarts == 1
  assert (pool.counts[what], pool.counts['replayed'], pool.counts['ended']) == (1, 1, 0)
  assert pool.counts['started'] == 2


@pytest.mark.parametrize('fault, shown', [
  ('exits', 'exited with 7'),
  pytest.param('is killed', 'was killed by signal 9', marks=pytest.mark.slow),
  pytest.param(
    'loses its engine', 'lost its engine: the engine is gone', marks=pytest.mark.slow)])
def test_the_second_death_ends_the_episode_and_no_other(make_pool, fault, shown):
  pool = make_pool()
  other = pool.make(hostile.task('train/1'))
  before = [other.reset(), other.step('more')]
  environment = pool.make(hostile.task(fault=fault))
  environment.reset()
  with pytest.raises(workers.EnvironmentDied, match=f'died twice.*{shown}'):
    environment.step('now')
  environment.close()
  # The other one lived in the same process, died with it twice, and knows where it was.
  assert before[0] == 'zero, as ever' and other.step('more').observation == 'more 2'
  assert other.restarts == 1 and pool.summary()['ended'] == 1
  other.close()
  assert pool.make(hostile.task()).reset() == 'zero, as ever'


def test_a_hang_is_killed_with_all_that_it_started(make_pool, tmp_path):
  pool = make_pool(timeout=5)
  environment = pool.make(hostile.task(fault='hangs', once=str(tmp_path / 'once')))
  pid = pid_of(environment)
  pool._timeout = environment._timeout = 0.5
  started = time.perf_counter()
  # The episode of pid_of answers otherwise in another process, and is not taken for the same.
  with pytest.raises(workers.EnvironmentFault, match='answered otherwise than before'):
    environment.step('now')
  assert time.perf_counter() - started < 20 and not alive(pid)
  assert pool.counts['hung'] == 1 and environment.restarts == 1


@pytest.mark.slow
def test_what_leaks_is_replaced(make_pool, tmp_path):
  pool = make_pool(growth_mb=60)
  first = pool.make(hostile.task())
  pid = pid_of(first)
  leaking = pool.make(hostile.task(fault='leaks'))
  leaking.reset()
  leaking.step('now')
  # Grown by 100 MB: what it has is played to the end, then it ends; it gets nothing new.
  leaking.close()
  assert pid_of(first) == pid and pid_of(pool.make(hostile.task())) != pid
  first.close()
  assert pool.counts['recycled'] == 1 and not alive(pid)
  # By more than twice 60 MB at once, and again when it is played again.
  leaking = pool.make(hostile.task(fault='leaks'))
  leaking.reset()
  leaking.step('now')
  with pytest.raises(workers.EnvironmentDied, match='grew by'):
    leaking.step('now')
  assert pool.counts['leaked'] == 2


def test_workers_are_replaced_after_their_games(make_pool):
  pool = make_pool(recycle_games=3)
  pids = []
  for _ in range(7):
    environment = pool.make(hostile.task())
    pids.append(pid_of(environment))
    environment.close()
  assert len(set(pids[:3])) == len(set(pids[3:6])) == 1 and len(set(pids)) == 3
  assert pool.summary()['recycled'] == 2 and not any(map(alive, pids[:6])) and alive(pids[6])
  pool.close()
  assert not alive(pids[6])


@pytest.mark.parametrize('fault, raised, text', [
  ('raises', workers.EnvironmentFault, 'BrokenPipeError: the pipe broke'),
  ('exits politely', workers.EnvironmentFault, 'SystemExit: critical error'),
  ('is mended by hand', errors.UserError, 'Install it.')])
def test_what_an_environment_raises_kills_nothing(make_pool, fault, raised, text):
  pool = make_pool()
  environment = pool.make(hostile.task(fault=fault))
  pid = pid_of(environment)
  with pytest.raises(raised, match=text):
    environment.step('now')
  environment.close()
  other = pool.make(hostile.task(fault=f'{fault} in close'))
  assert pid_of(other) == pid
  with pytest.raises(raised, match=text):
    other.close()
  assert pool.counts['started'] == 1 and not pool.counts['crashed']


def test_what_cannot_be_made_leaves_its_place_to_others(make_pool):
  pool = make_pool(1, exclusive=True, recycle_games=3)
  for _ in range(2):
    with pytest.raises(workers.EnvironmentFault, match='the pipe broke'):
      pool.make(hostile.task(fault='raises in make'))
  environment = pool.make(hostile.task())
  pid = pid_of(environment)
  environment.close()
  assert pool.summary()['recycled'] == 1 and not alive(pid)


@pytest.mark.slow
def test_environments_spread_and_an_exclusive_one_has_its_process_to_itself(make_pool):
  spread = make_pool(2)
  assert len({pid_of(spread.make(hostile.task())) for _ in range(4)}) == 2
  pool = make_pool(2, exclusive=True)
  held = [pool.make(hostile.task()) for _ in range(2)]
  assert len(set(map(pid_of, held))) == 2
  with pytest.raises(errors.UserError, match='needs one of its own; set env_workers'):
    pool.make(hostile.task())
  held.pop().close()
  assert pool.make(hostile.task()).reset() == 'zero, as ever' and pool.counts['started'] == 2


@pytest.mark.slow
def test_threads_play_at_once(make_pool):
  pool = make_pool(2)
  seen = []

  def one():
    for _ in range(5):
      environment = pool.make(hostile.task())
      seen.append([environment.reset(), *(environment.step('more').observation for _ in range(4))])
      environment.close()

  threads = [threading.Thread(target=one) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(seen) == 20
  assert all(s == ['zero, as ever', *(f'more {i}' for i in (1, 2, 3, 4))] for s in seen)


def test_how_many_by_default():
  assert workers.default_workers(envs.get_suite('household'), 8) == 0
  textworld = envs.get_suite('household', engine='textworld')
  assert workers.default_workers(textworld, 64) == min(64, os.cpu_count())
  assert workers.default_workers(envs.get_suite(NAME, exclusive=True), 8) == 8


@pytest.mark.parametrize('limit', ['workers', 'timeout', 'recycle_games', 'growth_mb'])
def test_limits_are_checked(limit):
  with pytest.raises(errors.UserError, match=f'{limit} must be more than 0'):
    workers.WorkerSuite(hostile.HostileSuite(), NAME, {}, **{'workers': 1, limit: 0})
