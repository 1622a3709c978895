"""Episodes: what an agent saw, sampled and did, token by token.

An episode is stored token-in, token-out: the ids that were sampled are the ids that training sees,
nothing is tokenised twice. Every token carries the kind of the prompt segment it belongs to, so
"the hints removed" is a mask over tokens and the ids of the actions stay the same.

Axes: T tokens of one episode.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from data import text as text_lib

# Order is part of the file format: `Episode.kinds` holds indices into it. Every sampled id (a
# thought, an action, the stop token) is 'action'; the chat template's own ids take the kind of the
# segment that they introduce or close.
KINDS = ('system', 'few_shot', 'memory', 'task', 'observation', 'action')
KIND = {name: index for index, name in enumerate(KINDS)}
TERMINATIONS = (
  'success',
  'failure',
  'step_limit',
  'call_limit',
  'repetition',
  'context_overflow',
  'env_error',
)
PARSED = ('action', 'thought', 'invalid')


@dataclasses.dataclass
class Step:
  """One call of the model and what came back.

  Attributes:
    reply: the whole text that was sampled.
    parsed: what the agent's format made of it, one of `PARSED`.
    thought: the reply's thought, '' where there is none.
    action: the command sent to the environment, '' for a thought or an invalid reply.
    observation: the answer: the environment's, or the agent's own to a thought or an invalid reply.
    reward: the environment's reward for this step.
    changed: whether the world moved; False marks a no-op.
    prompt_tokens: tokens in the context of this call (what an API would bill).
    prefilled_tokens: the part of them that was computed; the rest lay in the KV cache.
    generated_tokens: tokens sampled, the stop token included.
    stop_reason: 'stop' or 'length'; 'expert' where no model was asked.
  """

  reply: str
  parsed: str = 'action'
  thought: str = ''
  action: str = ''
  observation: str = ''
  reward: float = 0.0
  changed: bool = True
  prompt_tokens: int = 0
  prefilled_tokens: int = 0
  generated_tokens: int = 0
  stop_reason: str = 'stop'


@dataclasses.dataclass(eq=False)
class Episode:
  """One episode of one agent on one task.

  Its texts are made valid (`data.text`), those of its steps too: no file takes lone surrogates.

  Attributes:
    id: unique within a run.
    task_id: names the task instance; retrieval leaves it out (leave-one-out).
    env, task_type, split, instruction: of the task.
    seed: the seed that the episode was played with.
    policy: who acted, e.g. 'base', 'teacher', 'expert'.
    agent: the format, e.g. 'react'.
    memory: the kind of memory in the prompt, 'none' for none.
    model: name of the model that sampled.
    tokenizer: fingerprint of the tokenizer that made the ids.
    tokens: int32 [T].
    kinds: uint8 [T], indices into `KINDS`.
    logprobs: float32 [T], of the sampled tokens; 0 where nothing was sampled.
    steps: the model calls, in order.
    success: whether the task was solved.
    score: 0 to 1.
    termination: why it ended, one of `TERMINATIONS`.
    retrieved: what the memory block was built from: dicts of 'id', 'score', 'text'; those of
      experiences also of 'outcome' ('success' or 'failure'), 'provenance' and 'step', the model
      call before which it was put there. Where the memory changed in between, every later block
      follows, an experience that was shown before with the text ''; `tokens` hold the last one.
    env_steps, model_calls, invalid_actions, repeated_noops: counts.
    prompt_tokens, prefilled_tokens, generated_tokens: sums over the calls.
    retrieval_tokens: tokens spent on retrieval itself.
    memory_dropped: experiences left out because the memory block's budget was full.
    env_restarts: times that it was played again because its environment's process had died.
    wall_s: seconds from reset to end.
  """

  id: str
  task_id: str
  env: str
  task_type: str
  split: str
  instruction: str
  seed: int
  policy: str
  agent: str
  memory: str
  model: str
  tokenizer: str
  tokens: np.ndarray
  kinds: np.ndarray
  logprobs: np.ndarray
  steps: list[Step]
  success: bool
  score: float
  termination: str
  retrieved: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  env_steps: int = 0
  model_calls: int = 0
  invalid_actions: int = 0
  repeated_noops: int = 0
  prompt_tokens: int = 0
  prefilled_tokens: int = 0
  generated_tokens: int = 0
  retrieval_tokens: int = 0
  memory_dropped: int = 0
  env_restarts: int = 0
  wall_s: float = 0.0

  def __post_init__(self):
    self.tokens = np.asarray(self.tokens, np.int32)
    self.kinds = np.asarray(self.kinds, np.uint8)
    self.logprobs = np.asarray(self.logprobs, np.float32)
    shapes = {self.tokens.shape, self.kinds.shape, self.logprobs.shape}
    if len(shapes) != 1 or self.tokens.ndim != 1:
      raise ValueError(
        f'Episode {self.id}: tokens, kinds and logprobs must have one shape [T], got '
        f'{self.tokens.shape}, {self.kinds.shape}, {self.logprobs.shape}.'
      )
    if self.kinds.size and self.kinds.max() >= len(KINDS):
      raise ValueError(f'Episode {self.id}: a segment kind is not below {len(KINDS)}.')
    if self.termination not in TERMINATIONS:
      raise ValueError(f'Episode {self.id}: unknown termination {self.termination!r}.')
    for step in self.steps:
      if step.parsed not in PARSED:
        raise ValueError(f'Episode {self.id}: a step is parsed as {step.parsed!r}.')
    for part in (self, *self.steps):
      for name, value in vars(part).items():
        if isinstance(value, str):
          setattr(part, name, text_lib.valid(value))
    self.retrieved = [
      {key: text_lib.valid(value) if isinstance(value, str) else value
       for key, value in found.items()} for found in self.retrieved]

  def __eq__(self, other):
    return isinstance(other, Episode) and self.to_json() == other.to_json()

  def to_json(self) -> str:
    """One line of JSON, keys in the order of the fields; `from_json` gives the same episode back.

    Float32 log-probabilities are written as the doubles they are equal to, so nothing is rounded.
    """
    record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    for name in ('tokens', 'kinds', 'logprobs'):
      record[name] = record[name].tolist()
    record['steps'] = [dataclasses.asdict(step) for step in self.steps]
    # Counts and flags often arrive as NumPy scalars.
    return json.dumps(record, default=lambda value: value.item(), separators=(',', ':'))

  @classmethod
  def from_json(cls, text: str | bytes) -> 'Episode':
    """Reads what `to_json` wrote; ValueError or TypeError for anything else."""
    record = json.loads(text)
    record['steps'] = [Step(**step) for step in record['steps']]
    return cls(**record)


def without(
  episode: Episode, drop: Sequence[str] = ('memory', 'few_shot')
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The token stream with whole segments removed (paper A, step 4: hints and few-shots).

  Returns:
    (tokens int32 [T'], kinds uint8 [T'], logprobs float32 [T']). Each part of a prompt is tokenised
    on its own, so these are the ids of the same prompt rendered without the parts.
  """
  keep = ~np.isin(episode.kinds, [KIND[name] for name in drop])
  return episode.tokens[keep], episode.kinds[keep], episode.logprobs[keep]
