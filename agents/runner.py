"""Plays episodes over the slots of one engine and keeps each the moment it ends.

S slots play S episodes at once; a slot whose episode ends takes the next game before the next
dispatch. Environments in processes of their own work at the same time, each with what its slot
needs next: the answer to a command, and the mask of the replies to it. A run that is stopped and
started again goes on with the games that its journal lacks.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import math
import pathlib
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tqdm

from agents import episode as episode_lib
from agents import formats, prompts
from agents import memory as memory_lib
from data import errors, trajectory
from data.tokenizer import Tokenizer
from envs.base import Suite, Task

if TYPE_CHECKING:
  # JAX comes with it, which a command's --help and its first checks need not wait for.
  from inference import Completion, Engine

# Dynamic retrieval: the memories of runs, asked before each of their calls.
Recall = Callable[[Sequence[episode_lib.EpisodeRun]], Sequence[memory_lib.Memory]]


def play(
  engine: Engine,
  tokenizer: Tokenizer,
  suite: Suite,
  games: Sequence[episode_lib.Game],
  spec: episode_lib.AgentSpec,
  workdir: str | pathlib.Path,
  *,
  memories: Mapping[str, memory_lib.Memory] | None = None,
  examples: Mapping[str, Sequence[prompts.Example]] | None = None,
  recall: Recall | None = None,
  progress: bool = True,
  after_episode: Callable[[], None] | None = None,
) -> list[trajectory.Episode]:
  """Plays every game once, or what is left of them, and writes journal and TFDS store.

  Args:
    engine: built, with its weights; its slots are taken over (every episode resets its slot).
    tokenizer: the model's.
    suite: makes the environments.
    games: of `episode.games`, with distinct ids; those of several policies are played side by side.
    spec: format, layout and limits.
    workdir: gets `journal.jsonl` and, when all is played, `episodes/` (TFDS).
    memories: task id -> memory, chosen at episode start; a task that is missing has none.
    examples: task type -> few-shot examples.
    recall: gives the memories of the episodes whose turn is next, at every step (dynamic
      retrieval); None keeps those of the start.
    progress: state the predicted minutes first and show a bar.
    after_episode: called when an episode is safe.

  Returns:
    The episodes in the order of `games`, those of an earlier start included.

  Raises:
    errors.UserError: the journal is broken or belongs to another process.
  """
  from inference.engine import ContextOverflow

  new_run = functools.partial(
    _new_run, tokenizer, suite, spec, memories or {}, examples or {})
  keeper = _Keeper(workdir, games, progress, after_episode)
  waiting = collections.deque(keeper.left)
  if progress and waiting:
    print(_prediction(engine, spec, keeper, new_run(waiting[0])), file=sys.stderr, flush=True)
  slots: list[episode_lib.EpisodeRun | None] = [None] * engine.num_slots

  def refill(empty: list[int]) -> None:
    """Puts the next games that start into the slots."""
    while empty and waiting:
      runs = [new_run(waiting.popleft()) for _ in range(min(len(empty), len(waiting)))]
      each(episode_lib.EpisodeRun.start, runs)
      for run in runs:
        if run.done:
          keeper.keep(run)
        else:
          slots[empty.pop(0)] = run

  def advance(ready: list[int]) -> None:
    """Gives the engine the new tokens of slots; an ended episode makes room for the next game."""
    while ready:
      empty = [slot for slot in ready if slots[slot] is None or slots[slot].done]
      for slot in empty:
        if slots[slot] is not None:
          keeper.keep(slots[slot])
          slots[slot] = None
      refill(empty)
      ready = [slot for slot in ready if slots[slot] is not None]
      if recall is not None and ready:
        runs = [slots[slot] for slot in ready]
        for run, memory in zip(runs, recall(runs), strict=True):
          run.remember(memory)
      overflown = []
      masks = [None] * len(ready)
      if spec.constrained:
        masks = each(episode_lib.EpisodeRun.allowed, [slots[slot] for slot in ready])
      for slot, allowed in zip(ready, masks, strict=True):
        run = slots[slot]
        fresh, keep, game = not run.steps, run.kept, run.game
        if run.done:  # its environment broke
          overflown.append(slot)
          continue
        try:
          engine.submit(
            slot, run.next_tokens(), spec.max_new_tokens, reset=fresh, keep=None if fresh else keep,
            seed=_seed(game) if fresh else None, allowed=allowed, policy=game.policy)
        except ContextOverflow:
          run.overflow()
          overflown.append(slot)
      ready = overflown

  def receive(completion: Completion) -> None:
    slots[completion.slot].receive(
      completion.tokens, completion.logprobs, stop_reason=completion.stop_reason,
      prefilled_tokens=completion.prefilled_tokens)

  with keeper, _at_once(suite) as each:
    advance(list(range(engine.num_slots)))
    while any(slots):
      completions = engine.step()
      each(receive, completions)
      advance([completion.slot for completion in completions])
  return keeper.finish()


@contextlib.contextmanager
def _at_once(suite: Suite) -> Iterator[Callable[[Callable, Sequence], list]]:
  """A `map` over things that ask environments: at the same time, where these can answer so."""
  threads = getattr(suite, 'parallel', 1)
  if threads == 1:
    yield lambda function, things: [function(thing) for thing in things]
    return
  pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix='environment')
  try:
    yield lambda function, things: list(pool.map(function, things))
  finally:
    # Who is interrupted does not wait for an environment that hangs.
    pool.shutdown(wait=False, cancel_futures=True)


def check_first_prompt(
  max_context: int,
  tokenizer: Tokenizer,
  suite: Suite,
  tasks: Sequence[Task],
  spec: episode_lib.AgentSpec,
  labels: episode_lib.Labels,
  *,
  memories: Mapping[str, memory_lib.Memory] | None = None,
  examples: Mapping[str, Sequence[prompts.Example]] | None = None,
) -> None:
  """Checks, before a model plays, that the first prompt and one reply fit into the context.

  A run whose first prompt does not fit is useless, as prompts differ little; a later prompt or turn
  that does not fit ends its own episode (context_overflow). A game that does not start is passed
  over: `play` counts it.

  Args:
    max_context: tokens of a slot.
    tokenizer, suite, spec, memories, examples: as for `play`.
    tasks: of which the first is looked at.
    labels: for its record.

  Raises:
    errors.UserError: it does not fit.
  """
  for task in tasks:
    game = episode_lib.Game(task, labels)
    run = _new_run(tokenizer, suite, spec, memories or {}, examples or {}, game)
    run.start()
    if run.done:
      continue
    prompt = len(run.next_tokens())
    run.overflow()  # closes its environment
    if prompt + spec.max_new_tokens > max_context:
      raise errors.UserError(
        f'The first prompt has {prompt} tokens and a reply up to {spec.max_new_tokens} more, which '
        f'do not fit into max_context={max_context}; set it to {prompt + spec.max_new_tokens} or '
        'more (every turn of an episode needs room, too), or give fewer few_shots or hints.')
    return


def play_each(
  make_episode: Callable[[Task], trajectory.Episode],
  tasks: Sequence[Task],
  labels: episode_lib.Labels,
  workdir: str | pathlib.Path,
  *,
  progress: bool = True,
  after_episode: Callable[[], None] | None = None,
) -> list[trajectory.Episode]:
  """`play` for episodes that need no engine (scripted experts): one after the other.

  Args:
    make_episode: plays one task; its episode's id must be `labels.episode_id(task.id)`.
    tasks: with distinct ids.
    labels: for the record.
    workdir, progress, after_episode: as for `play`.
  """
  keeper = _Keeper(workdir, episode_lib.games(tasks, [labels]), progress, after_episode)
  if progress and keeper.left:
    started = time.perf_counter()
    first = make_episode(keeper.left[0].task)
    minutes = (time.perf_counter() - started) * len(keeper.left) / 60
    print(f'{len(keeper.left)} episodes, about {minutes:.1f} min', file=sys.stderr, flush=True)
    with keeper:
      keeper.keep_episode(first)
      for game in keeper.left[1:]:
        keeper.keep_episode(make_episode(game.task))
  else:
    with keeper:
      for game in keeper.left:
        keeper.keep_episode(make_episode(game.task))
  return keeper.finish()


def _new_run(tokenizer, suite, spec, memories, examples, game) -> episode_lib.EpisodeRun:
  return episode_lib.EpisodeRun(
    game, suite.make, tokenizer, spec, action_templates=list(suite.action_templates),
    memory=memories.get(game.task.id, memory_lib.NO_MEMORY),
    examples=examples.get(game.task.task_type, ()))


def _seed(game: episode_lib.Game) -> int:
  """Of an episode's random stream: draws depend neither on slots nor on where a run stopped."""
  return zlib.crc32(game.id.encode())


class _Keeper:
  """Journal, progress bar and TFDS store of one run."""

  def __init__(self, workdir, games, progress, after_episode):
    self._after_episode = after_episode
    self._workdir = pathlib.Path(workdir)
    self._ids = [game.id for game in games]
    if len(set(self._ids)) < len(self._ids):
      raise errors.UserError('Two tasks of this run have one id; give every task its own.')
    self._journal = trajectory.Journal(self._workdir / trajectory.JOURNAL_NAME)
    self.before = [e for e in self._journal.read() if e.id in set(self._ids)]
    known = {e.id for e in self.before}
    self.left = [game for game in games if game.id not in known]
    self._progress = progress
    self._won = sum(e.success for e in self.before)
    self._played = len(self.before)
    self._tokens = 0
    self._errors: collections.Counter[str] = collections.Counter()
    if self._journal.torn and progress:
      print('The journal ended in a torn record; its episode is played again.', file=sys.stderr)

  def __enter__(self):
    self._started = time.perf_counter()
    if self.left:
      # Of a shorter run; should this one be stopped after its last episode, it is written anew.
      shutil.rmtree(self._workdir / trajectory.TFDS_NAME, ignore_errors=True)
    self._bar = tqdm.tqdm(
      total=len(self._ids), initial=len(self.before), unit='episode',
      disable=not self._progress or not self.left, dynamic_ncols=True, mininterval=1.0)
    return self

  def __exit__(self, *_):
    self._bar.close()
    self._journal.close()

  def keep(self, run: episode_lib.EpisodeRun) -> None:
    if run.error:
      self._errors[run.error] += 1
    self.keep_episode(run.result())

  def keep_episode(self, episode: trajectory.Episode) -> None:
    self._journal.append(episode)
    if self._after_episode is not None:
      self._after_episode()
    self._won += episode.success
    self._played += 1
    self._tokens += episode.prefilled_tokens + episode.generated_tokens
    seconds = max(1e-9, time.perf_counter() - self._started)
    self._bar.set_postfix_str(
      f'success {100 * self._won / self._played:.0f} %, {self._tokens / seconds:.0f} tok/s',
      refresh=False)
    self._bar.update()

  def finish(self) -> list[trajectory.Episode]:
    for error, count in self._errors.items():
      print(f'{count} episode(s) with an environment error: {error}', file=sys.stderr)
    by_id = {e.id: e for e in self._journal.read()}
    episodes = [by_id[id_] for id_ in self._ids]
    store = self._workdir / trajectory.TFDS_NAME
    if not store.exists():
      trajectory.write_tfds(episodes, store)
    return episodes


def _prediction(engine: Engine, spec: episode_lib.AgentSpec, keeper: _Keeper,
                run: episode_lib.EpisodeRun) -> str:
  """Times two rounds of one turn in every slot (the first one compiles) and extrapolates.

  How long episodes are is taken from the run's earlier ones, else guessed as half the step limit.
  """
  from inference.engine import ContextOverflow

  run.start()
  prompt = run.next_tokens()
  if run.done:
    return f'{len(keeper.left)} episodes'
  run.overflow()  # closes its environment; this episode is not kept
  calls = [e.model_calls for e in keeper.before]
  reply = [e.generated_tokens / max(1, e.model_calls) for e in keeper.before]
  calls = float(np.mean(calls)) if calls else run.max_env_steps / 2
  reply = float(np.mean(reply)) if reply else formats.get_format(spec.format).typical_tokens
  new = min(spec.max_new_tokens, math.ceil(reply))
  # Other tasks' prompts share its opening only.
  opening, own = np.split(prompt, [run.opening])
  prompts = [
    np.concatenate([opening, np.roll(own, slot)]) for slot in range(engine.num_slots)]
  turns = [prompt[:16]] * engine.num_slots

  def round_seconds(tokens: Sequence[np.ndarray], reset: bool) -> float:
    started = time.perf_counter()
    for slot in range(engine.num_slots):
      engine.submit(slot, tokens[slot], new, reset=reset)
    engine.run_until_complete()
    return time.perf_counter() - started

  try:
    compiling = round_seconds(prompts, True) + round_seconds(turns, False)
    engine.forget()
    first, later = round_seconds(prompts, True), round_seconds(turns, False)
  except ContextOverflow:
    return f'{len(keeper.left)} episodes; the context has no room for two turns'
  finally:
    # Nothing of it is counted, or found again.
    engine.run_until_complete()
    engine.forget()
  waves = len(keeper.left) / engine.num_slots
  minutes = (compiling + math.ceil(waves) * first + waves * max(0.0, calls - 1) * later) / 60
  return (f'{len(keeper.left)} episodes, about {minutes:.1f} min at {calls:.0f} calls an episode '
          f'({engine.num_slots} slots)')
