"""What is added to ScienceWorld's simulator: it answers as before, and its parts fit together."""

import random
import zipfile

import pytest

from data import errors
from envs import scienceworld, scienceworld_java, scienceworld_server

UNCLEAR = (
  'go to', 'open door', 'move a the orange to agent', 'look at the   air in kitchen', 'close',
  'pick up substance', 'wait1', 'focus on nothing', 'help', 'objects', 'task', '0')
SOME = ('power-component', 'chemistry-mix', 'lifespan-shortest-lived')


@pytest.fixture(scope='module')
def servers():
  """Two simulators, for the same game in both."""
  pytest.importorskip('scienceworld')
  made = scienceworld_server.Server(), scienceworld_server.Server()
  yield made
  for server in made:
    server.stop()


def plain_step(server, action):
  """A step as the official interface takes it."""
  game = server._game
  answer = game.step(action)
  return scienceworld_server.Step(
    answer, round(100 * game.getScore()), game.getCompleted(),
    (game.freeActionLook(), game.freeActionInventory()))


@pytest.mark.parametrize('task_type', [
  pytest.param(t, marks=() if t in SOME else pytest.mark.slow) for t in scienceworld.TASK_TYPES])
def test_steps_are_those_of_the_official_interface(servers, task_type):
  fast, plain = servers
  rng = random.Random(task_type)
  for simplifications in ('easy', ''):
    fast.load(task_type, 1, simplifications)
    # Ours goes on in one of them; the other has the simulator's own parser.
    assert not plain._call(plain._game.load, task_type, 1, simplifications, False)
    over = False
    for step in range(16):
      # They draw random names, so that both are asked.
      actions, others = (sorted(set(s.valid_actions()) - {'reset task'}) for s in servers)
      assert actions == others
      # Focusing on the wrong thing ends most games.
      actions = [a for a in actions if not a.startswith('focus') or step > 8] or actions
      action = rng.choice(UNCLEAR if step % 4 == 3 else actions)
      result = fast.step(action)
      assert result == plain_step(plain, action), action
      over = over or result.over
      if over:
        break
    assert step > 7


def test_the_jar_is_made_from_its_source(tmp_path, monkeypatch):
  """After a change to the Java: make java."""
  assert scienceworld_java.built_digest() == scienceworld_java.source_digest()
  monkeypatch.setattr(scienceworld_java, 'JAR', tmp_path / 'none.jar')
  with pytest.raises(errors.UserError, match=r'none\.jar is missing; .*make java'):
    scienceworld_java.classpath('any', tmp_path)
  # It needs the simulator's classes, and javac.
  pytest.importorskip('scienceworld')
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(errors.UserError, match='no javac on the PATH'):
    scienceworld_java.build()


def test_another_simulator_is_named(tmp_path):
  jar = tmp_path / 'other.jar'
  with zipfile.ZipFile(jar, 'w') as archive:
    archive.writestr('some.class', b'')
  for path, reason in ((jar, 'EnvObject'), (tmp_path / 'none.jar', 'No such file'),
                       (__file__, 'not a zip file')):
    with pytest.raises(errors.UserError, match=f'is not the simulator.*{reason}'):
      scienceworld_java.classpath(path, tmp_path / 'out')
  with pytest.raises(ValueError, match='not a class'):
    scienceworld_java.with_ours(b'PK')


def test_methods_are_changed_once_and_in_the_right_class():
  constants = pytest.importorskip('scienceworld.constants')
  with zipfile.ZipFile(constants.JAR_PATH) as archive:
    plain = archive.read(scienceworld_java.OBJECT_CLASS)
    other = archive.read('scienceworld/objects/portal/Portal.class')
  changed = scienceworld_java.with_ours(plain)
  with pytest.raises(ValueError, match='hashCode already'):
    scienceworld_java.with_ours(changed)
  with pytest.raises(ValueError, match='other methods'):
    scienceworld_java.with_ours(other)


def test_objects_have_the_hash_of_their_number(servers):
  server = servers[0]
  server.load('boil', 0, '')
  agent = server._game.agent().get()
  assert agent.hashCode() == agent.uuid() > 0


def test_what_lies_within_is_collected_as_before(servers):
  """Against the same walk here: whatever is hidden or a way out, each once."""
  server = servers[0]
  server.load('grow-plant', 0, '')
  universe = server._game.agentInterface().get().universe()

  def each(found):
    iterator = found.iterator()
    while iterator.hasNext():
      yield iterator.next()

  def walk(thing, hidden, connections):
    ids = set()
    for one in each(thing.getContainedObjects(True)):
      if hidden or not one.isHidden():
        ids |= {one.uuid()} | walk(one, hidden, connections)
    for door in each(thing.getPortals(True)):
      if hidden or not door.isHidden():
        ids.add(door.uuid())
        ids |= {end.uuid() for end in each(door.getConnectionPoints())} if connections else set()
    return ids

  sizes = set()
  for options in ((True, True), (True, False), (False, False)):
    found = [one.uuid() for one in each(universe.getContainedObjectsAndPortalsRecursive(*options))]
    assert len(found) == len(set(found)) and set(found) == walk(universe, *options)
    sizes.add(len(found))
  assert len(sizes) > 1
