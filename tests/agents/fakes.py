"""A tokenizer of a few hundred tokens, a game of levers, and an engine that reads from a script."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import tokenizers

from data.tokenizer import Tokenizer
from envs import base

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
  "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# Enough of the games' own sentences that a house is a hundred tokens and not five hundred.
_TEXTS = [
  'You are in the middle of a room. Looking quickly around you, you see a desk 1, a dresser 1, ',
  'You arrive at shelf 1. On the shelf 1, you see nothing. Your task is to: make a striped mug.',
  'Reply with one command each turn, or with a line that starts with "think:" to reason first.',
  'You solve a task in a text world. Reply with one command each turn.',
  'You are in a hall. You see a lever 1, a lever 2, and a lever 3.', 'Your task is to: pull',
  'system user assistant think: action: goal: pull lever 1 Nothing happens. OK. Hints: - use',
]


def tokenizer_folder(folder: pathlib.Path) -> pathlib.Path:
  """Writes the tokenizer as a Hugging Face folder."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(_TEXTS * 3, tokenizers.trainers.BpeTrainer(
    vocab_size=600, show_progress=False,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  folder.mkdir(parents=True, exist_ok=True)
  backend.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': '<|im_end|>', 'chat_template': CHATML}))
  return folder


def make_tokenizer(folder: pathlib.Path) -> Tokenizer:
  return Tokenizer.load(tokenizer_folder(folder))


class LeverEnvironment:
  """Pull the right lever. 'lose' ends it, 'boom' raises, 'wait' and all else do nothing."""

  def __init__(self, task: base.Task):
    self._lever = task.payload['lever']
    self._pulled = set()
    self.closed = 0

  def reset(self) -> str:
    if self._lever == 'broken':
      raise RuntimeError('the game file is broken')
    return 'You are in a hall. You see a lever 1, a lever 2, and a lever 3.'

  def step(self, action: str) -> base.StepResult:
    if action == 'boom':
      raise RuntimeError('the worker died')
    if action == 'lose':
      return base.StepResult('You fall.', 0.0, True, False, True, True)
    if action.startswith('pull lever '):
      number = action.removeprefix('pull lever ')
      won = number == str(self._lever)
      fresh = number not in self._pulled
      self._pulled.add(number)
      return base.StepResult(
        'A door opens.' if won else f'Lever {number} clicks.', float(won), won, won, True, fresh)
    return base.StepResult('Nothing happens.', 0.0, False, False, action == 'wait', False)

  def admissible_commands(self) -> list[str]:
    return [f'pull lever {i}' for i in (1, 2, 3)]

  def close(self) -> None:
    self.closed += 1


class LeverExpert:
  def __init__(self, lever: str, known: bool):
    self._order = [lever] if known else ['1', '2', '3']

  def act(self, observation: str) -> base.Decision:
    return base.Decision(f'pull lever {self._order.pop(0)}', 'This one was not tried.')


class LeverSuite:
  """Two types of task, in two splits."""

  name = 'levers'
  splits = ('train', 'test')
  action_templates = ['pull {lever}']

  def __init__(self, count: int = 12):
    self._count = count

  def tasks(self, split: str) -> list[base.Task]:
    return [
      base.Task(f'{split}/lever-{i}', self.name, split, ('odd', 'even')[i % 2],
                f'pull the lever of door {i}.', {'lever': str(i % 3 + 1)})
      for i in range(self._count)]

  def make(self, task: base.Task) -> LeverEnvironment:
    return LeverEnvironment(task)

  def expert(self, task: base.Task, known_rules=()) -> LeverExpert:
    return LeverExpert(task.payload['lever'], bool(known_rules))


class ScriptedEngine:
  """Answers with `script(text of the slot's whole context)`; forgets nothing, recomputes nothing.

  One finished slot a step, the newest first, so that slots end out of order.
  """

  def __init__(self, tokenizer: Tokenizer, script: Callable[[str], str], *, num_slots=3,
               max_len=4096, overflow=None, completion=None):
    self.num_slots, self.max_len = num_slots, max_len
    self._tokenizer, self._script = tokenizer, script
    self._overflow, self._completion = overflow, completion
    self.context: list[list[int]] = [[] for _ in range(num_slots)]
    self._pending: dict[int, tuple[int, int]] = {}
    self.submitted = 0

  def submit(self, slot, tokens, max_new_tokens, *, reset=False, keep=None, seed=None,
             allowed=None, policy=None):
    assert slot not in self._pending and len(tokens)
    cached = 0 if reset else len(self.context[slot]) if keep is None else keep
    assert cached <= len(self.context[slot])
    if cached + len(tokens) + max_new_tokens > self.max_len:
      raise self._overflow(f'{cached} + {len(tokens)}')
    self.context[slot] = self.context[slot][:cached]
    self.context[slot] += [int(t) for t in tokens]
    self.submitted += len(tokens)
    self._pending[slot] = (len(tokens), max_new_tokens)

  def step(self):
    if not self._pending:
      return []
    slot = max(self._pending)
    prefilled, limit = self._pending.pop(slot)
    text = self._tokenizer.decode(self.context[slot], skip_special=False)
    ids = [*self._tokenizer.encode(self._script(text)), self._tokenizer.chat.end_of_turn]
    stop = 'stop' if len(ids) <= limit else 'length'
    ids = ids[:limit]
    prompt = len(self.context[slot])
    self.context[slot] += ids
    return [self._completion(
      slot=slot, tokens=np.asarray(ids, np.int32), logprobs=np.full(len(ids), -0.5, np.float32),
      stop_reason=stop, prefilled_tokens=prefilled, prompt_tokens=prompt)]

  def forget(self):
    assert not self._pending
    self.context = [[] for _ in range(self.num_slots)]

  def run_until_complete(self):
    done = []
    while self._pending:
      done += self.step()
    return done
