"""TextWorld in workers: memory that stays flat over many games, and native crashes."""

import collections
import os
import signal

import pytest

import envs
from data import process_memory
from envs import workers

ENVIRONMENTS, GAMES = 64, 1000
_OPTIONS = {'engine': 'textworld', 'num_receptacles': 6, 'num_train': 8}


@pytest.fixture
def make_pool():
  pytest.importorskip('textworld')
  pytest.importorskip('alfworld')
  pools = []

  def make(**limits):
    pools.append(workers.WorkerSuite(
      envs.get_suite('household', **_OPTIONS), 'household', _OPTIONS, **limits))
    return pools[-1]

  yield make
  for pool in pools:
    pool.close()


def megabytes(pool):
  """Resident memory of all worker processes, those that only finish their games included."""
  return sum(
    process_memory.resident_bytes(worker._process.pid)
    for worker in pool._workers if not worker.dead) / 2**20


@pytest.mark.slow
def test_memory_stays_flat_over_many_games(make_pool):
  """64 games at once in two processes; every closed one makes room for the next."""
  pool = make_pool(workers=2, recycle_games=48)
  tasks, live, memory = pool.tasks('train'), collections.deque(), []
  for game in range(GAMES):
    if len(live) == ENVIRONMENTS:
      environment = live.popleft()
      for command in environment.admissible_commands()[:2]:
        assert environment.step(command).observation
      environment.close()
    live.append(pool.make(tasks[game % len(tasks)]))
    assert live[-1].reset().startswith('You are in the middle of a room.')
    memory.append(megabytes(pool))
  first, last = max(memory[GAMES // 4:GAMES // 2]), max(memory[3 * GAMES // 4:])
  print(f'{GAMES} games: {memory[ENVIRONMENTS]:.0f} MB with the first {ENVIRONMENTS}, at most '
        f'{first:.0f} MB in the second quarter, {last:.0f} MB in the last; {pool.summary()}')
  assert last < 1.2 * first and pool.counts['recycled'] >= 2
  assert not pool.counts['crashed'] + pool.counts['hung'] + pool.counts['leaked']
  assert all(environment.restarts == 0 for environment in live)


@pytest.mark.slow
def test_a_native_crash_is_made_good(make_pool):
  """A segmentation fault in the process of two games: both go on where they were."""
  pool = make_pool(workers=1)
  task = pool.tasks('train')[0]
  games = [pool.make(task) for _ in range(2)]
  rooms = [game.reset() for game in games]
  command = games[0].admissible_commands()[0]
  answers = [game.step(command) for game in games]
  os.kill(games[0]._worker._process.pid, signal.SIGSEGV)
  looks = [game.step('look') for game in games]
  assert rooms[0] == rooms[1] and answers[0] == answers[1] and looks[0] == looks[1]
  assert [game.restarts for game in games] == [1, 1] and pool.counts['crashed'] == 1
