"""A suite whose environments die, hang, leak and lie when they are told to."""

import os
import pathlib
import signal
import sys
import time

from data import errors
from envs import base

LEAKED = []


class Hostile:
  """Counts. A task's payload names what 'now' does, and a file that makes it do so only once."""

  def __init__(self, task):
    self._payload, self._count = task.payload, 0
    self._fault('make')

  def reset(self):
    self._fault('reset')
    self._count = 0
    return f'zero, {os.getpid() if self._payload.get("unsteady") else "as ever"}'

  def step(self, action):
    if action == 'now':
      self._fault('step')
    if action == 'pid':
      return base.StepResult(str(os.getpid()), 0.0, False, False, True, True)
    self._count += 1
    won = self._count == 5
    return base.StepResult(f'{action} {self._count}', float(won), won, won, True, True)

  def admissible_commands(self):
    return ['more', 'now']

  def close(self):
    self._fault('close')

  def _fault(self, where):
    fault, _, place = self._payload.get('fault', '').partition(' in ')
    once = self._payload.get('once')
    if not fault or where != (place or 'step') or (once and pathlib.Path(once).exists()):
      return
    if once:
      pathlib.Path(once).touch()
    if fault == 'exits':
      os._exit(7)
    elif fault == 'is killed':
      os.kill(os.getpid(), signal.SIGKILL)
    elif fault == 'hangs':
      time.sleep(600)
    elif fault == 'leaks':
      LEAKED.append(bytearray(os.urandom(1)) * 100 * 2**20)
    elif fault == 'raises':
      raise BrokenPipeError('the pipe broke')
    elif fault == 'exits politely':
      sys.exit('critical error')
    elif fault == 'is mended by hand':
      raise errors.UserError('Install it.')
    elif fault == 'loses its engine':
      raise base.EngineDied('the engine is gone')


class HostileSuite:
  name, splits, action_templates = 'hostile', ('train',), ['more', 'now']
  own_process = True

  def __init__(self, exclusive=False, fault='', once=''):
    self.exclusive = exclusive
    self._payload = {'fault': fault, 'once': once} if fault else {}

  def tasks(self, split):
    return [task(f'train/{i}', **(self._payload if i == 1 else {})) for i in range(4)]

  def make(self, task):
    return Hostile(task)


def task(name='train/0', **payload):
  return base.Task(name, 'hostile', 'train', 'counting', 'count.', payload)
