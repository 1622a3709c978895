"""The first prompt of an episode, as token ids with their segment kinds.

Layouts (order of the parts):
  default  system, few-shots, memory, task
  paper_a  system, task, memory, few-shots (arXiv 2510.01375: hints after the task description)
  paper_b  system with the memory in it, few-shots, task (arXiv 2603.18272)

Every part is tokenised on its own and the chat template's seams belong to the parts that stay, so
dropping all tokens of the kinds 'memory' and 'few_shot' leaves exactly the ids of the prompt
rendered without them, in every layout. The first observation (the room) is part of the task and
stays: paper A's code lost it together with the few-shots.
"""

import dataclasses
from collections.abc import Sequence

from agents import formats
from agents import memory as memory_lib
from data import errors, trajectory
from data.tokenizer import Tokenizer

LAYOUTS = ('default', 'paper_a', 'paper_b')
STYLES = ('short', 'full')


@dataclasses.dataclass(frozen=True)
class Example:
  """A solved task of the same type, shown before the own one (few-shot).

  Attributes:
    task: the text of its task part.
    turns: (reply, observation) of each model call, in order.
  """

  task: str
  turns: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """tokens and kinds (indices into `data.trajectory.KINDS`), both of length T."""

  tokens: list[int]
  kinds: list[int]


def check(layout: str, style: str) -> None:
  """Raises errors.UserError for a layout or style that does not exist."""
  if layout not in LAYOUTS:
    raise errors.UserError(f'There is no layout {layout!r}; there are {", ".join(LAYOUTS)}.')
  if style not in STYLES:
    raise errors.UserError(f'There is no prompt style {style!r}; there are {", ".join(STYLES)}.')


def system_text(
  reply_format: formats.Format, style: str = 'short', action_templates: Sequence[str] = ()
) -> str:
  """The system prompt.

  'short' is 20 to 60 tokens: a 135M model on a laptop learns the rest in its warm start. 'full'
  explains the game and lists the action templates, one global list (paper B), for models that have
  not been trained on the environment.
  """
  if style == 'short':
    return f'You solve a task in a text world. {reply_format.instructions}'
  listed = '\n'.join(f'- {template}' for template in action_templates)
  return (
    'You are an agent in a text world. You are given a task and what you see at the start. '
    'Solve the task with as few commands as you can; after each command you are told what '
    'happened. If nothing happens, the command was not possible: try another one.\n'
    f'{reply_format.instructions}\n'
    f'The commands have these forms, with your objects and places filled in:\n{listed}')


def system_for(format_name: str, style: str, action_templates: Sequence[str]) -> str:
  """`system_text` of a reply format by name."""
  return system_text(formats.get_format(format_name), style, action_templates)


def task_text(instruction: str, observation: str) -> str:
  """The task part: the first observation with the instruction, once."""
  observation = observation.strip()
  if instruction.strip().rstrip('.').lower() in observation.lower():
    return observation
  return f'{observation}\n\nYour task is to: {instruction.strip()}'


def render(
  tokenizer: Tokenizer,
  *,
  system: str,
  task: str,
  memory: memory_lib.Memory = memory_lib.NO_MEMORY,
  examples: Sequence[Example] = (),
  layout: str = 'default',
) -> Prompt:
  """Renders the prompt up to and including the generation header of the first reply."""
  chat = tokenizer.chat
  block = memory.block(layout)
  prompt = Prompt([], [])

  def add(kind: str, *parts: str | Sequence[int]) -> None:
    for part in parts:
      ids = tokenizer.encode(part) if isinstance(part, str) else part
      prompt.tokens.extend(ids)
      prompt.kinds.extend([trajectory.KIND[kind]] * len(ids))

  add('system', chat.system_open, system)
  if block and layout == 'paper_b':
    add('memory', f'\n\n{block}')
  add('system', chat.system_to_user)
  if layout == 'paper_a':
    # One user turn holds task, hints and examples, so the examples are flat text here.
    add('task', task)
    if block:
      add('memory', f'\n\n{block}')
    for example in examples:
      add('few_shot', f'\n\n{_flat(example)}')
    add('task', chat.user_to_assistant)
    return prompt
  for example in examples:
    # Starts and ends with a user turn open, so it can be left out as a whole.
    add('few_shot', example.task, chat.user_to_assistant)
    for i, (reply, observation) in enumerate(example.turns):
      add('few_shot', reply, [chat.end_of_turn], chat.assistant_to_user)
      if i + 1 < len(example.turns):
        add('few_shot', observation, chat.user_to_assistant)
  if block and layout == 'default':
    add('memory', f'{block}\n\n')
  add('task', task, chat.user_to_assistant)
  return prompt


def _flat(example: Example) -> str:
  lines = ['Example of a similar task:', example.task]
  for i, (reply, observation) in enumerate(example.turns):
    lines.append(f'> {reply}')
    if i + 1 < len(example.turns):
      lines.append(observation)
  return '\n'.join(lines)


def next_turn(tokenizer: Tokenizer, observation: str, sampled: Sequence[int]) -> list[int]:
  """Ids between a reply and the next: seam, observation, generation header.

  Args:
    tokenizer: the model's.
    observation: what the environment, or the agent itself, answers.
    sampled: the ids of the reply as sampled. Where they do not end in the chat's end of turn (the
      reply ran into its length limit, or stopped at another stop token) it is supplied here, as
      part of the observation: it was not sampled.
  """
  chat = tokenizer.chat
  closed = len(sampled) and int(sampled[-1]) == chat.end_of_turn
  return [
    *([] if closed else [chat.end_of_turn]),
    *chat.assistant_to_user,
    *tokenizer.encode(observation.strip()),
    *chat.user_to_assistant,
  ]
