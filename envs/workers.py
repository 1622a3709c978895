"""Environments in processes of their own: one that crashes, hangs or leaks takes no run with it.

`WorkerSuite` stands where the suite stood. Its environments live in worker processes, many in each
(one in each where the suite is `exclusive`), and answer as they do in this process. What may
happen to a worker, and what follows:

  it dies, or does not answer in time   it is killed with all that it started; its environments are
                                        made again elsewhere and take the actions of their episodes
                                        once more (`restarts`)
  ... a second time in one episode      the episode ends: `EnvironmentDied`, an env_error
  it has played many games, or grown    it gets no new ones and ends when its last one is closed
  it has grown to twice that            as if it had died

An environment whose worker died while another one's request was being answered is made again too,
and that counts for neither death.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data import process_memory
from data.errors import UserError
from envs import base

if TYPE_CHECKING:
  from data.replies import Replies, Trie

_MEGABYTE = 2**20
# Seconds between two looks at whether the process that started a worker is still there.
_WATCH = 5.0
# Seconds that the first request gets besides: a process starts, and makes its suite.
_START = 60.0
_SERVE = 'import sys; from envs import workers; workers.serve(int(sys.argv[1]))'


class EnvironmentFault(RuntimeError):
  """What an environment in a worker raised; the text names the class."""


class EnvironmentDied(RuntimeError):
  """An environment whose worker died twice in one episode, or whose suite was closed."""


class _Gone(Exception):
  """A worker is no more.

  Attributes:
    mine: it died on this request, and not before.
  """

  def __init__(self, reason: str = '', mine: bool = False):
    super().__init__(reason)
    self.mine = mine


def default_workers(suite: base.Suite, environments: int) -> int:
  """Processes for a suite that names no number: 0 (this one) but for those that ask for their own.

  Args:
    suite: `own_process` is true of one that can crash or leak.
    environments: that are alive at once.
  """
  if not getattr(suite, 'own_process', False):
    return 0
  if getattr(suite, 'exclusive', False):
    return environments
  return min(environments, os.cpu_count() or 1)


class WorkerSuite:
  """A suite whose environments run in worker processes.

  Everything but `make` is answered by the suite itself, in this process. Several threads may play
  with it at once, each with environments of its own.

  Attributes:
    parallel: requests that can be answered at once, in as many threads.
    counts: what happened: started, crashed, hung, leaked and recycled workers, replayed and ended
      episodes.
  """

  def __init__(
    self,
    suite: base.Suite,
    name: str,
    options: Mapping[str, Any],
    *,
    workers: int,
    timeout: float = 120.0,
    recycle_games: int = 200,
    growth_mb: float = 1024.0,
  ):
    """Describes the pool; a worker is started when an environment needs one.

    Args:
      suite: the suite, for everything but its environments.
      name, options: of `envs.get_suite`, by which a worker makes the suite again.
      workers: processes at most, those that only finish their last environments not counted.
      timeout: seconds in which a request must be answered; a worker's first one gets more.
      recycle_games: games after which a worker is replaced.
      growth_mb: megabytes of memory, more than after its first game, likewise.

    Raises:
      UserError: a limit is not positive.
    """
    for key, value in (('workers', workers), ('timeout', timeout),
                       ('recycle_games', recycle_games), ('growth_mb', growth_mb)):
      if value <= 0:
        raise UserError(f'{key} must be more than 0, not {value!r}.')
    self._suite, self._recipe = suite, (name, dict(options))
    self._limit, self._timeout, self.parallel = workers, timeout, workers
    self._recycle_games, self._growth_mb = recycle_games, growth_mb
    self._exclusive = bool(getattr(suite, 'exclusive', False))
    self._workers: list[_Worker] = []
    self._closed = False
    self._lock = threading.Lock()
    self._keys = itertools.count()
    self.counts: collections.Counter[str] = collections.Counter()
    # Nobody has to close a suite; one that is forgotten takes its workers with it.
    self._finalizer = weakref.finalize(self, _stop_all, self._workers)

  def __getattr__(self, attribute: str) -> Any:
    if attribute == '_suite':
      raise AttributeError(attribute)
    return getattr(self._suite, attribute)

  def make(self, task: base.Task) -> RemoteEnvironment:
    return RemoteEnvironment(self, task, next(self._keys), self._timeout)

  def close(self) -> None:
    """Ends all workers, and the suite's own programs; whoever waits for an answer is told."""
    with self._lock:
      self._closed = True
      _stop_all(self._workers)
    if close := getattr(self._suite, 'close', None):
      close()

  def take(self) -> _Worker:
    """A worker with room for one more environment, whose place it then holds."""
    with self._lock:
      if self._closed:
        raise EnvironmentDied('its workers were ended')
      self._workers[:] = [worker for worker in self._workers if not worker.dead]
      active = [worker for worker in self._workers if not worker.retiring]
      free = [worker for worker in active if not worker.live]
      if not free and len(active) < self._limit:
        free = [_Worker(self._recipe, 2 * self._growth_mb)]
        self.counts['started'] += 1
        self._workers.extend(free)
      if not free and self._exclusive:
        raise UserError(
          f'All {self._limit} environment workers are taken, and every {self._suite.name} '
          'environment needs one of its own; set env_workers to the number of slots.')
      worker = min(free or active, key=lambda worker: worker.live)
      worker.live += 1
      worker.games += 1
      if worker.games >= self._recycle_games:
        worker.retiring = True
      return worker

  def give_back(self, worker: _Worker) -> None:
    """One environment of a worker has ended."""
    with self._lock:
      worker.live -= 1
      worker.retiring |= worker.growth_mb > self._growth_mb
      if worker.retiring and not worker.live and not worker.dead:
        worker.stop()
        self.counts['recycled'] += 1

  def count(self, what: str) -> None:
    with self._lock:
      self.counts[what] += 1

  def summary(self) -> dict[str, int]:
    """What happened, for a run's summary."""
    names = ('started', 'crashed', 'hung', 'leaked', 'recycled', 'replayed', 'ended')
    return {name: self.counts[name] for name in names}


def _stop_all(workers: list[_Worker]) -> None:
  for worker in workers:
    worker.stop()
  workers.clear()


class RemoteEnvironment:
  """An `Environment` in a worker.

  Attributes:
    limits: those of the environment itself.
    restarts: how often the episode was played again because its worker had died.
  """

  def __init__(self, pool: WorkerSuite, task: base.Task, key: int, timeout: float):
    self._pool, self._task, self._key, self._timeout = pool, task, key, timeout
    self._played: list[tuple[tuple[str, ...], Any]] = []
    self._worker: _Worker | None = None
    self._deaths = self.restarts = 0
    try:
      self.limits: base.Limits = self._ask('make', task)
    except BaseException:
      # There will be no object that somebody could close.
      self.close()
      raise

  def reset(self) -> str:
    self._played.clear()
    return self._kept('reset')

  def step(self, action: str) -> base.StepResult:
    return self._kept('step', action)

  def admissible_commands(self) -> list[str]:
    return self._ask('admissible_commands')

  def command_openings(self) -> list[str]:
    return self._ask('command_openings')

  def allowed_replies(self, replies: Replies) -> Trie | None:
    """What an agent may reply now: the worker builds it, and only its array comes back."""
    return self._ask('allowed_replies', replies)

  def close(self) -> None:
    """Gives its place back; a worker that dies over it takes nothing with it that is wanted."""
    worker, self._worker = self._worker, None
    if worker is None:
      return
    try:
      if not worker.dead:
        worker.ask('close', self._key, timeout=self._timeout)
    except _Gone as death:
      self._note(death)
    finally:
      self._pool.give_back(worker)

  def _kept(self, *request: str) -> Any:
    answer = self._ask(*request)
    self._played.append((request, answer))
    return answer

  def _ask(self, operation: str, *arguments: Any) -> Any:
    """The answer of the environment, made again where its worker is no more."""
    while True:
      try:
        if self._worker is None or self._worker.dead:
          self._move(operation == 'make')
        return self._worker.ask(operation, self._key, *arguments, timeout=self._timeout)
      except _Gone as death:
        self._note(death)
        if not death.mine:
          continue
        self._deaths += 1
        if self._deaths == 2:
          self._pool.count('ended')
          raise EnvironmentDied(f'its worker died twice, the second time as it {death}') from None

  def _note(self, death: _Gone) -> None:
    if death.mine:
      reason = str(death)
      self._pool.count('hung' if reason.startswith('gave no answer') else
                       'leaked' if reason.startswith('grew') else 'crashed')

  def _move(self, made: bool) -> None:
    """Takes a place in a worker; what was played is played again there.

    Args:
      made: only a place is wanted, the environment has not been made before.
    """
    if self._worker is not None:
      self._pool.give_back(self._worker)
      self._worker = None
      self.restarts += 1
      self._pool.count('replayed')
    self._worker = self._pool.take()
    if made:
      return
    self._worker.ask('make', self._key, self._task, timeout=self._timeout)
    for request, answer in self._played:
      again = self._worker.ask(*_addressed(request, self._key), timeout=self._timeout)
      if again != answer:
        raise EnvironmentFault(
          f'the episode was played again after its worker died, and {" ".join(request)!r} was '
          'answered otherwise than before')


def _addressed(request: tuple[str, ...], key: int) -> tuple[Any, ...]:
  operation, *arguments = request
  return operation, key, *arguments


class _Worker:
  """One process, seen from the one that started it.

  Attributes:
    dead: it is no more.
    retiring: it gets no new environment.
    live, games: environments that it has, and has ever had.
    growth_mb: by how much it is larger than after its first game.
  """

  def __init__(self, recipe: tuple[str, dict[str, Any]], most_mb: float):
    self.dead = self.retiring = False
    self.live = self.games = 0
    self.growth_mb, self._first_mb, self._most_mb = 0.0, 0.0, most_mb
    self._lock = threading.Lock()
    self._replies: Replies | None = None  # what it has been told of them
    ours, theirs = socket.socketpair()
    # A session of its own: what it starts dies with it, and Ctrl-C reaches the run alone.
    self._process = subprocess.Popen(
      [sys.executable, '-c', _SERVE, str(theirs.fileno())], pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
    theirs.close()
    self._connection = multiprocessing.connection.Connection(ours.detach())
    self._connection.send(recipe)

  @property
  def pid(self) -> int:
    return self._process.pid

  def ask(self, operation: str, key: int, *arguments: Any, timeout: float) -> Any:
    """What an environment answers.

    Raises:
      _Gone: the worker is dead now, or was before.
      UserError, EnvironmentFault: what the environment raised.
    """
    with self._lock:
      if self.dead:
        raise _Gone
      if operation == 'allowed_replies':
        # They hold a tokenizer, which is sent once.
        [replies] = arguments
        arguments, self._replies = (None if replies is self._replies else replies,), replies
      try:
        self._connection.send((operation, key, *arguments))
        if not self._connection.poll(timeout + (0.0 if self._first_mb else _START)):
          self._kill(at_once=True)
          raise _Gone(f'gave no answer for {timeout:g} s', mine=True)
        status, value, memory_mb = self._connection.recv()
      except (EOFError, OSError):
        raise _Gone(self._kill(), mine=True) from None
      except KeyboardInterrupt:
        # Its answer would be taken for that of the next request.
        self._kill(at_once=True)
        raise
      if status == 'died':
        self._kill(at_once=True)
        raise _Gone(f'lost its engine: {value}', mine=True)
      if operation == 'make':
        self._first_mb = self._first_mb or memory_mb
      self.growth_mb = memory_mb - self._first_mb if self._first_mb else 0.0
      if self.growth_mb > self._most_mb:
        self._kill(at_once=True)
        raise _Gone(f'grew by {self.growth_mb:.0f} MB', mine=True)
    if status == 'user':
      raise UserError(value)
    if status == 'fault':
      raise EnvironmentFault(value)
    return value

  def stop(self) -> None:
    """Lets it end; kills it where it does not."""
    self.dead = True
    self._connection.close()
    self._kill()

  def _kill(self, at_once: bool = False) -> str:
    """Kills it and all that it started, and where it may end by itself says how it did."""
    self.dead = True
    code = None
    if not at_once:
      with contextlib.suppress(subprocess.TimeoutExpired):
        code = self._process.wait(timeout=2)
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    self._connection.close()
    if code is None:
      return 'closed its connection'
    return f'was killed by signal {-code}' if code < 0 else f'exited with {code}'


def _watch(parent: int) -> None:
  """Ends this process and all that it started when the one that started it is gone."""
  while os.getppid() == parent:
    time.sleep(_WATCH)
  os.killpg(0, signal.SIGKILL)


class _Server:
  """The environments of a worker, seen from inside it."""

  def __init__(self, name: str, options: dict[str, Any]):
    self._suite = base.get_suite(name, **options)
    self._environments: dict[int, base.Environment] = {}
    self._replies: Replies | None = None

  def answer(self, operation: str, key: int, *arguments: Any) -> Any:
    if operation == 'make':
      environment = self._environments[key] = self._suite.make(*arguments)
      return base.limits_of(environment)
    if operation == 'close':
      close = getattr(self._environments.pop(key, None), 'close', None)
      return close() if close else None
    if operation == 'command_openings':
      return base.openings_of(self._environments[key])
    if operation == 'allowed_replies':
      self._replies = arguments[0] or self._replies
      return base.allowed_replies(self._environments[key], self._replies)
    return getattr(self._environments[key], operation)(*arguments)


def serve(descriptor: int) -> None:
  """What a worker does: answers one request after the other until the connection closes.

  Args:
    descriptor: of a connected socket. First comes the recipe of the suite, then the requests.
  """
  threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
  connection = multiprocessing.connection.Connection(descriptor)
  server = None
  name, options = connection.recv()
  while True:
    try:
      request = connection.recv()
    except (EOFError, OSError):
      return
    try:
      server = server or _Server(name, options)
      reply = 'ok', server.answer(*request)
    except base.EngineDied as error:
      reply = 'died', str(error)
    except UserError as error:
      reply = 'user', str(error)
    except base.FAULTS as error:
      reply = 'fault', f'{type(error).__name__}: {error}'
    try:
      connection.send((*reply, process_memory.resident_bytes() / _MEGABYTE))
    except OSError:
      return
    except Exception as error:
      # Whatever an environment answers, the worker does.
      fault = f'{type(error).__name__}: {error}'
      connection.send(('fault', fault, process_memory.resident_bytes() / _MEGABYTE))
