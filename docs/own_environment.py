"""A locked room: one of three drawers has the key. Play it as env=docs.own_environment:Escape."""

from envs.base import Decision, StepResult, Task


class Room:
  """One game; the protocol is envs.base.Environment."""

  def __init__(self, task):
    self._drawer, self._has_key = task.payload['drawer'], False

  def reset(self):
    return 'You are in a locked room. You see a door, a drawer 1, a drawer 2, and a drawer 3.'

  def step(self, action):
    if action == f'open drawer {self._drawer}' and not self._has_key:
      self._has_key = True
      return StepResult('You find a key and take it.', 0.0, False, False, valid=True, changed=True)
    if action == 'open door' and self._has_key:
      return StepResult('You are out.', reward=1.0, done=True, won=True, valid=True, changed=True)
    known = action in self.admissible_commands()
    answer = 'It is locked.' if action == 'open door' else 'It is empty.'
    return StepResult(answer if known else 'Nothing happens.', 0.0, False, False, known, False)

  def admissible_commands(self):
    return ['open door', 'open drawer 1', 'open drawer 2', 'open drawer 3']


class Seeker:
  """Shows how it is done; without one there is no agent=expert and there are no few-shots."""

  def __init__(self):
    self._plan = iter(['open drawer 1', 'open drawer 2', 'open drawer 3'])

  def act(self, observation):
    found = 'key' in observation
    return Decision('open door' if found else next(self._plan), 'The key must be somewhere.')


class Escape:
  """All games; the protocol is envs.base.Suite."""

  name, splits = 'escape', ('train', 'test')
  action_templates = ['open {door or drawer}']

  def tasks(self, split):
    return [Task(f'{split}/room-{i}', self.name, split, 'escape', 'get out of the room.',
                 {'drawer': i % 3 + 1}) for i in range(60)]

  def make(self, task):
    return Room(task)

  def expert(self, task, known_rules=()):
    return Seeker()
