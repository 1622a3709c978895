"""Our engine answers as TextWorld does, command by command, and a deviation would be found."""

import collections
import concurrent.futures
import importlib.util
import os

import pytest

from envs import household_files, household_official
from envs.household import Game
from envs.household_games import SPLITS
from envs.household_generate import walkthrough
from tests.envs import engine_comparison
from tests.envs.engine_comparison import Pair

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('alfworld') is None, reason='the official engine is not installed')

_STEPS = 60
_REAL_TRAIN, _REAL_VALID_SEEN, _GENERATED = 200, 100, 100


def small_game(index):
  options = household_official.OfficialOptions(num_receptacles=(6, 12))
  return household_official.official_game(0, 'train', index, options)


# One of each task type, and one of valid_seen; the others take a quarter of a minute each.
@pytest.mark.parametrize('number', [
  *range(6), 14,
  *(pytest.param(n, marks=pytest.mark.slow) for n in (*range(6, 14), *range(15, 20)))])
def test_real_games(hintsight_data, number):
  folder = engine_comparison.stratified_folders(hintsight_data, 14, 6)[number]
  steps, deviation = Pair(household_files.load_game(folder)).random(_STEPS)
  assert deviation is None, str(deviation)
  assert steps == _STEPS


@pytest.mark.parametrize('index', range(6))
def test_generated_games(index):
  data = small_game(index)
  pair, commands = Pair(data), walkthrough(data)
  for steps, (played, deviation) in (
    (40, pair.random(40)), (len(commands), pair.walkthrough(commands))):
    assert deviation is None, str(deviation)
    assert played == steps


def assert_all_equal(folders, capsys):
  """All games' random steps and walkthroughs are compared, in worker processes."""
  with capsys.disabled():
    print()
    comparisons = engine_comparison.compare_folders(folders, _STEPS)
  deviations = engine_comparison.report(comparisons)
  assert not deviations, deviations
  assert len(comparisons) == len({c.game for c in comparisons}) == len(folders)
  assert all(c.random_steps == _STEPS and c.walkthrough_steps > 1 for c in comparisons)
  return collections.Counter((c.game.partition('/')[0], c.task_type) for c in comparisons)


@pytest.mark.slow
def test_300_real_games_of_both_splits_and_all_types(hintsight_data, capsys):
  folders = engine_comparison.stratified_folders(hintsight_data, _REAL_TRAIN, _REAL_VALID_SEEN)
  counts = assert_all_equal(folders, capsys)
  assert counts.total() == _REAL_TRAIN + _REAL_VALID_SEEN == 300
  for task_type in household_official.TASK_TYPES:
    assert counts['train', task_type] >= 33
    # valid_seen has 13 games with a lamp and 16 with a microwave.
    assert counts['valid_seen', task_type] >= 13


@pytest.mark.slow
def test_100_generated_games(tmp_path, capsys):
  folders = []
  for index in range(_GENERATED):
    # The split goes round after all six types; every game is of another seed, so of other houses.
    split = SPLITS[index // len(household_official.TASK_TYPES) % len(SPLITS)]
    data = household_official.official_game(index, split, index)
    folders.append(str(household_files.write_game(tmp_path, data, walkthrough(data))))
  counts = assert_all_equal(folders, capsys)
  assert len(counts) == len(SPLITS) * len(household_official.TASK_TYPES)


# The comparison itself: engines that answer wrongly on purpose are reported.


class OtherStart(Game):
  def reset(self):
    return super().reset() + '\n'


class OtherText(Game):
  def step(self, command):
    observation, won = super().step(command)
    return observation.replace('You arrive at', 'You are at'), won


class OtherCommands(Game):
  @property
  def admissible_commands(self):
    return [c for c in super().admissible_commands if c != 'look' or self.held is None]


class NeverMoved(Game):
  def step(self, command):
    answer = super().step(command)
    self.changed = False
    return answer


class NeverWon(Game):
  def step(self, command):
    return super().step(command)[0], False


class TwoHands(Game):
  def _take(self, rest):
    held, self.held = self.held, None
    observation = super()._take(rest)
    self.held = held if self.held is None else self.held
    return observation


class Raises(Game):
  def _go(self, rest):
    raise KeyError('no way there')


def play_other_text(data):
  return OtherText(data.problem, data.instruction)


def die(data):
  os._exit(1)


@pytest.fixture(scope='module')
def pair():
  return Pair(small_game(0))


@pytest.mark.parametrize('kind, play, what, ours, official', [
  (OtherStart, 'random', 'observation', r".\n'", ".'"),
  (OtherText, 'random', 'observation', "'You are at ", "'You arrive at "),
  (OtherCommands, 'random', 'admissible commands', "'inventory', 'move", "'inventory', 'look'"),
  (NeverMoved, 'random', 'changed', 'False', 'True'),
  (NeverWon, 'walkthrough', 'won', 'False', 'True'),
  (TwoHands, 'random', 'observation', "'You pick up the", "'Nothing happens.'"),
  (Raises, 'walkthrough', 'observation', "KeyError('no way there')", "'You arrive at "),
])  # fmt: skip
def test_an_altered_engine_is_reported(pair, kind, play, what, ours, official):
  def make(data):
    return kind(data.problem, data.instruction)

  steps, deviation = (
    pair.random(_STEPS, make) if play == 'random'
    else pair.walkthrough(walkthrough(pair.data), make))
  assert deviation is not None
  assert (deviation.game, deviation.play, deviation.what) == (pair.data.id, play, what)
  assert deviation.step == steps
  assert ours in deviation.ours and official in deviation.official
  for part in (pair.data.id, f'step {steps}', repr(deviation.command), deviation.ours,
               deviation.official):
    assert part in str(deviation)


def test_a_walkthrough_that_does_not_win_is_reported(pair):
  steps, deviation = pair.walkthrough(walkthrough(pair.data)[:-1])
  assert steps == len(walkthrough(pair.data)) - 1
  assert deviation.what == 'the walkthrough does not win'


def test_worker_processes_report_and_their_death_is_no_success(tmp_path, capsys):
  folders = [
    str(household_files.write_game(tmp_path, data, walkthrough(data)))
    for data in map(small_game, range(2))]
  comparisons = engine_comparison.compare_folders(folders, 5, play_other_text)
  assert [c.game for c in comparisons] == [small_game(index).id for index in range(2)]
  text = engine_comparison.report(comparisons)
  for comparison in comparisons:
    assert {d.play for d in comparison.deviations} >= {'walkthrough'}
    assert comparison.game in text
  assert capsys.readouterr().out == f'2 of 2 games compared, 2 deviate\n{text}\n'
  with pytest.raises(concurrent.futures.process.BrokenProcessPool):
    engine_comparison.compare_folders(folders[:1], 5, die)
