"""One episode as a state machine: tokens out, sampled tokens in, no model inside.

    run.start()
    while not run.done:
      new = run.next_tokens()       # only what the model has not seen yet
      run.receive(<what it sampled after them>)
    episode = run.result()

A memory may change between two calls (`remember`): the conversation is then rendered again from the
memory block on, and `kept` says how much of it the model still has.

The conversation is kept as the ids that were rendered and sampled; nothing is tokenised twice.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from agents import formats, prompts
from agents import memory as memory_lib
from data import errors, trajectory
from data import text as text_lib
from data.replies import Replies, Trie
from data.tokenizer import Tokenizer
from envs.base import FAULTS, Environment, Limits, Task, allowed_replies, limits_of


@dataclasses.dataclass(frozen=True)
class AgentSpec:
  """How an agent plays: everything but the weights and the memory.

  Attributes:
    format: name of a reply format (`agents.formats`).
    layout: order of the prompt's parts (`agents.prompts.LAYOUTS`).
    style: of the system prompt (`agents.prompts.STYLES`).
    max_env_steps: environment steps; the next one is not taken ('step_limit'). 0 is the limit of
      the environment itself.
    max_calls: model calls, thoughts and invalid replies included ('call_limit'). 0 is 100, or
      two for each environment step where that is more.
    max_repeats: the same reply with the same answer this many times ends it ('repetition'). 0 is
      the limit of the environment itself.
    max_new_tokens: sampled tokens a call; 0 is the format's own limit.
    constrained: replies are restricted to the environment's admissible commands (and to what the
      format may reply besides). Neither paper's agent sees them.
  """

  format: str = 'react'
  layout: str = 'default'
  style: str = 'short'
  max_env_steps: int = 50
  max_calls: int = 100
  max_repeats: int = 4
  max_new_tokens: int = 0
  constrained: bool = False

  def __post_init__(self):
    if self.constrained and formats.get_format(self.format).openings is None:
      raise errors.UserError(
        f'A reply of {self.format} is more than a command, so it cannot be restricted to the '
        'admissible ones; constrained needs agent=plain or react.')
    if self.max_new_tokens == 0:
      object.__setattr__(self, 'max_new_tokens', formats.get_format(self.format).max_tokens)
    prompts.check(self.layout, self.style)
    for name in ('max_env_steps', 'max_calls', 'max_repeats', 'max_new_tokens'):
      if getattr(self, name) < 0:
        raise errors.UserError(f'{name} must not be negative, and is {getattr(self, name)}.')


@dataclasses.dataclass(frozen=True)
class Labels:
  """What an episode is called in the record."""

  policy: str
  model: str
  split: str
  seed: int

  def episode_id(self, task_id: str) -> str:
    return f'{self.policy}/{task_id}/seed{self.seed}'


@dataclasses.dataclass(frozen=True)
class Game:
  """An episode that is to be played.

  Attributes:
    task: what is played.
    labels: by whom, for the record.
    policy: the same for the engine: the index of one of its policies.
  """

  task: Task
  labels: Labels
  policy: int = 0

  @property
  def id(self) -> str:
    return self.labels.episode_id(self.task.id)


def games(tasks: Sequence[Task], players: Sequence[Labels]) -> list[Game]:
  """Every task by every player, of whom the first is the engine's policy 0; a task's together."""
  return [Game(task, labels, i) for task in tasks for i, labels in enumerate(players)]


class EpisodeRun:
  """One episode in the making.

  Attributes:
    game, task: what is played.
    done: whether it has ended.
    first_observation: what the environment said at reset.
    error: what an environment exception said, '' without one.
    max_env_steps, max_calls, max_repeats: the limits of this episode: the agent's, or from `start`
      on the environment's.
  """

  def __init__(
    self,
    game: Game,
    make_environment: Callable[[Task], Environment],
    tokenizer: Tokenizer,
    spec: AgentSpec,
    *,
    action_templates: Sequence[str] = (),
    memory: memory_lib.Memory = memory_lib.NO_MEMORY,
    examples: Sequence[prompts.Example] = (),
  ):
    self.game, self.task = game, game.task
    self.done = False
    self.error = ''
    self.first_observation = ''
    self._make_environment = make_environment
    self._environment: Environment | None = None
    self._tokenizer = tokenizer
    self._spec = spec
    self._take_limits(Limits())
    self._format = formats.get_format(spec.format)
    self._templates = action_templates
    self._memory = memory
    # Of a memory that changes: all that was ever shown, with the call from which it was.
    self._shown: list[dict[str, Any]] = []
    self._retrieval_tokens = self._dropped = 0
    self._prompt_len = 0
    self._examples = examples
    self._tokens: list[int] = []
    self._kinds: list[int] = []
    self._logprobs: list[float] = []
    self._submitted = 0
    self._steps: list[trajectory.Step] = []
    self._counts: collections.Counter[str] = collections.Counter()
    self._answers: collections.Counter[tuple[str, str]] = collections.Counter()
    self._noops: set[tuple[str, str]] = set()
    self._reward = 0.0
    self._termination = ''
    self._started_at = self._ended_at = 0.0

  def start(self) -> None:
    """Resets the environment and renders the prompt."""
    self._started_at = time.perf_counter()
    try:
      self._environment = self._make_environment(self.task)
      self._take_limits(limits_of(self._environment))
      self.first_observation = _text(self._environment.reset())
    except errors.UserError:
      raise
    except FAULTS as error:
      self._fail(error)
      return
    prompt = self._render()
    self._tokens, self._kinds = prompt.tokens, prompt.kinds
    self._logprobs = [0.0] * len(prompt.tokens)
    self._prompt_len = len(prompt.tokens)
    self._note_memory()

  def _take_limits(self, limits: Limits) -> None:
    spec = self._spec
    self.max_env_steps = spec.max_env_steps or limits.steps
    self.max_calls = spec.max_calls or max(100, 2 * self.max_env_steps)
    self.max_repeats = spec.max_repeats or limits.repeats

  def remember(self, memory: memory_lib.Memory) -> None:
    """Takes a memory for the calls to come; nothing is rendered where it finds the same again."""
    before, self._memory = self._memory, memory
    if memory.block(self._spec.layout) == before.block(self._spec.layout):
      self._retrieval_tokens += memory.retrieval_tokens
      return
    prompt = self._render()
    tail = slice(self._prompt_len, None)
    tokens = prompt.tokens + self._tokens[tail]
    differ = (i for i, (a, b) in enumerate(zip(tokens, self._tokens)) if a != b)
    self._submitted = min(
      self._submitted, next(differ, min(len(tokens), len(self._tokens))))
    self._tokens, self._kinds = tokens, prompt.kinds + self._kinds[tail]
    self._logprobs = [0.0] * len(prompt.tokens) + self._logprobs[tail]
    self._prompt_len = len(prompt.tokens)
    self._note_memory()

  def _render(self) -> prompts.Prompt:
    return prompts.render(
      self._tokenizer,
      system=prompts.system_text(self._format, self._spec.style, self._templates),
      task=prompts.task_text(self.task.instruction, self.first_observation),
      memory=self._memory,
      examples=self._examples,
      layout=self._spec.layout)

  def _note_memory(self) -> None:
    step = len(self._steps)
    if not step:
      self._shown = []
    known = {r['id'] for r in self._shown}
    for found in self._memory.retrieved:
      record = dict(found)
      if memory_lib.is_experience(record):
        record['step'] = step
      if record['id'] in known:
        record['text'] = ''  # stands with its first showing
      self._shown.append(record)
    self._retrieval_tokens += self._memory.retrieval_tokens
    self._dropped += self._memory.dropped

  def next_tokens(self) -> np.ndarray:
    """The ids, int32 [n], that the model has not been given: the prompt, then each new turn."""
    new = self._tokens[self._submitted:]
    self._submitted = len(self._tokens)
    return np.asarray(new, np.int32)

  def allowed(self) -> Trie | None:
    """What the next reply may be; None where anything may, or where the environment broke (`done`).

    Raises:
      errors.UserError: a command is longer than a reply can be.
    """
    if not self._spec.constrained:
      return None
    try:
      return allowed_replies(self._environment, _replies(self._tokenizer, self._spec))
    except errors.UserError:
      raise
    except FAULTS as error:
      self._fail(error)
      return None

  @property
  def opening(self) -> int:
    """Tokens at the start of the conversation that other tasks' prompts may begin with, too."""
    own = [trajectory.KIND[kind] for kind in ('memory', 'task')]
    return next((i for i, kind in enumerate(self._kinds) if kind in own), len(self._kinds))

  @property
  def kept(self) -> int:
    """Tokens at the start of the conversation that the model has and that still hold."""
    return self._submitted

  def receive(
    self,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    *,
    stop_reason: str,
    prefilled_tokens: int,
    thought: str = '',
  ) -> None:
    """Takes what was sampled, acts, and renders the answer.

    Args:
      tokens: sampled ids [m], the stop token included where one was sampled.
      logprobs: of those ids [m].
      stop_reason: 'stop', 'length' or 'expert'.
      prefilled_tokens: tokens of this call's context that had to be computed.
      thought: why, where the author of the reply knows and the format has no place for it.
    """
    if self.done:
      raise ValueError(f'Episode of {self.task.id} has ended ({self._termination}).')
    reply = self._tokenizer.decode(list(tokens))
    parsed = self._format.parse(reply)
    step = trajectory.Step(
      reply=reply, parsed=parsed.kind, thought=parsed.thought or thought, action=parsed.action,
      prompt_tokens=len(self._tokens), prefilled_tokens=int(prefilled_tokens),
      generated_tokens=len(tokens), stop_reason=stop_reason)
    self._extend('action', [int(t) for t in tokens], [float(x) for x in logprobs])
    self._submitted = len(self._tokens)  # the engine has what it sampled
    self._steps.append(step)
    ended = self._act(step, parsed)
    if self.done:
      return
    self._answers[(parsed.action or reply.strip(), step.observation)] += 1
    if ended:
      self._end(ended)
    elif self._counts['env_steps'] >= self.max_env_steps:
      self._end('step_limit')
    elif len(self._steps) >= self.max_calls:
      self._end('call_limit')
    elif max(self._answers.values()) >= self.max_repeats:
      self._end('repetition')
    else:
      self._extend('observation', prompts.next_turn(self._tokenizer, step.observation, tokens))

  def overflow(self) -> None:
    """The engine had no room for `next_tokens()`: the episode ends, nothing is cut."""
    self._end('context_overflow')

  def result(self) -> trajectory.Episode:
    """The finished episode.

    Of a turn that the model was never given (context overflow) the tokens stay in the record: they
    are what did not fit.
    """
    if not self.done:
      raise ValueError(f'Episode of {self.task.id} has not ended.')
    total = {
      name: sum(getattr(step, name) for step in self._steps)
      for name in ('prompt_tokens', 'prefilled_tokens', 'generated_tokens')}
    success, labels = self._termination == 'success', self.game.labels
    return trajectory.Episode(
      id=self.game.id, task_id=self.task.id, env=self.task.env, task_type=self.task.task_type,
      split=labels.split, instruction=self.task.instruction, seed=labels.seed,
      policy=labels.policy, agent=self._spec.format, memory=self._memory.kind, model=labels.model,
      tokenizer=self._tokenizer.fingerprint, tokens=self._tokens, kinds=self._kinds,
      logprobs=self._logprobs, steps=self._steps, success=success,
      # A win that brought no reward at all is worth the whole of it.
      score=min(1.0, max(0.0, self._reward)) if self._reward else float(success),
      termination=self._termination, retrieved=self._shown,
      env_steps=self._counts['env_steps'], model_calls=len(self._steps),
      invalid_actions=self._counts['invalid_actions'],
      repeated_noops=self._counts['repeated_noops'],
      retrieval_tokens=self._retrieval_tokens, memory_dropped=self._dropped,
      env_restarts=getattr(self._environment, 'restarts', 0),
      wall_s=self._ended_at - self._started_at, **total)

  @property
  def steps(self) -> Sequence[trajectory.Step]:
    """The model calls so far."""
    return tuple(self._steps)

  @property
  def answer(self) -> str:
    """The newest observation."""
    return self._steps[-1].observation if self._steps else self.first_observation

  @property
  def history(self) -> list[formats.Turn]:
    """The environment steps so far, as the agent saw them."""
    return [formats.Turn(s.action, s.observation, s.changed)
            for s in self._steps if s.parsed == 'action']

  def _act(self, step: trajectory.Step, parsed: formats.ParsedReply) -> str:
    """Carries the reply out, fills in the step's answer; returns how that ended the episode."""
    if parsed.kind == 'thought':
      step.observation, step.changed = formats.THOUGHT_ANSWER, False
      return ''
    if parsed.kind == 'invalid':
      step.observation, step.changed = parsed.problem, False
      self._counts['invalid_actions'] += 1
      return ''
    self._counts['env_steps'] += 1
    try:
      answer = self._environment.step(parsed.action)
      observation, reward = _text(answer.observation), float(answer.reward)
    except errors.UserError:
      raise
    except FAULTS as error:
      self._fail(error)
      return ''
    step.observation, step.reward = observation, reward
    step.changed = bool(answer.changed)
    self._reward += step.reward
    self._counts['invalid_actions'] += not answer.valid
    # A repeated no-op: the world did not move, and the same command has already been answered the
    # same way since it last moved.
    if step.changed:
      self._noops.clear()
    else:
      seen = (parsed.action, answer.observation)
      self._counts['repeated_noops'] += seen in self._noops
      self._noops.add(seen)
    if answer.won:
      return 'success'
    return 'failure' if answer.done else ''

  def _extend(self, kind: str, ids: list[int], logprobs: list[float] | None = None) -> None:
    self._tokens += ids
    self._kinds += [trajectory.KIND[kind]] * len(ids)
    self._logprobs += [0.0] * len(ids) if logprobs is None else logprobs

  def _fail(self, error: BaseException) -> None:
    self.error = f'{type(error).__name__}: {error}'
    if self._steps:
      self._steps[-1].observation = f'(environment error: {self.error})'
      self._steps[-1].changed = False
    self._end('env_error')

  def _end(self, termination: str) -> None:
    self._termination = termination
    self.done = True
    self._ended_at = time.perf_counter()
    try:
      if close := getattr(self._environment, 'close', None):
        close()
    except FAULTS as error:
      # How the episode ended stands; that its environment could not be closed is shown.
      self.error = self.error or f'while closing: {type(error).__name__}: {error}'


@functools.lru_cache(maxsize=4)
def _replies(tokenizer: Tokenizer, spec: AgentSpec) -> Replies:
  """Of all episodes of an agent: what they have tokenised is kept, and sent to workers once."""
  return Replies(tokenizer, formats.get_format(spec.format).openings, spec.max_new_tokens)


def _text(observation: Any) -> str:
  if not isinstance(observation, str):
    raise TypeError(f'the observation is no text but {observation!r:.80}')
  return text_lib.valid(observation)
