"""Episodes of a suite's scripted expert, in the schema of sampled ones.

The expert decides from observations alone; the format writes its decisions as replies; the ids are
those a model would have sampled (reply and end of turn). Used for the warm start, for few-shot
examples and by `rollout.py` with agent=expert.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from agents import episode as episode_lib
from agents import formats, prompts
from agents import memory as memory_lib
from data import errors, trajectory
from data.tokenizer import Tokenizer
from envs.base import Decision, Suite, Task

# Few-shot examples are the shortest of this many solved tasks a type: exploring experts differ by
# a factor of five in length, and an example is read in every call.
_EXAMPLE_CANDIDATES = 8


def expert_spec(spec: episode_lib.AgentSpec) -> episode_lib.AgentSpec:
  """`spec` with the environment's own limits; those of a spec are the model's."""
  return dataclasses.replace(spec, max_env_steps=0, max_calls=0, max_repeats=0)


def expert_episode(
  suite: Suite,
  task: Task,
  tokenizer: Tokenizer,
  spec: episode_lib.AgentSpec,
  labels: episode_lib.Labels,
  *,
  memory: memory_lib.Memory = memory_lib.NO_MEMORY,
  examples: Sequence[prompts.Example] = (),
  known_rules: Sequence[Any] = (),
  thoughts: bool = True,
  **options,
) -> trajectory.Episode:
  """Lets the expert play one task.

  Args:
    suite: gives environment and expert.
    task: the task.
    tokenizer: of the model that will learn from the episode.
    spec: format, layout and limits, as for a model.
    labels: for the record.
    memory: what stands in the prompt; the expert itself does not read it.
    examples: few-shot examples in the prompt.
    known_rules: what the expert knows, as `Suite.expert` takes it; what it does not know it has to
      find out.
    thoughts: whether the replies state the expert's reasons; in ReAct each is a call of its own.
    **options: further options of `Suite.expert`.

  Returns:
    The episode. Log-probabilities are 0, `prefilled_tokens` too: no model was asked.
  """
  return _play(
    suite, task, tokenizer, spec, labels, memory=memory, examples=examples,
    known_rules=known_rules, thoughts=thoughts, **options).result()


def few_shot_examples(
  suite: Suite,
  task_types: Collection[str],
  tokenizer: Tokenizer,
  spec: episode_lib.AgentSpec,
  count: int,
  *,
  split: str = 'train',
  exclude: Collection[str] = (),
  thoughts: bool = True,
) -> dict[str, list[prompts.Example]]:
  """Solved tasks of each type, short ones first.

  Args:
    suite: gives tasks, environments and experts.
    task_types: the types that examples are wanted for.
    tokenizer: any that the prompts are rendered with.
    spec: the format that the examples show.
    count: examples a type.
    split: where they come from.
    exclude: ids of tasks that must not be shown, those that are played.
    thoughts: as in `expert_episode`.

  Raises:
    errors.UserError: no such split, or a type has too few solved tasks in it.
  """
  if split not in suite.splits:
    raise errors.UserError(
      f'Few-shot examples come from split {split!r}, which {suite.name} lacks; set few_shots=0.')
  labels = episode_lib.Labels('expert', 'expert', split, 0)
  spec = expert_spec(spec)
  tasks = [task for task in suite.tasks(split) if task.id not in exclude]
  found = {}
  for task_type in sorted(task_types):
    solved: list[prompts.Example] = []
    for task in tasks:
      if task.task_type != task_type:
        continue
      run = _play(suite, task, tokenizer, spec, labels, thoughts=thoughts)
      if run.result().success:
        solved.append(prompts.Example(
          prompts.task_text(task.instruction, run.first_observation),
          tuple((s.reply, s.observation) for s in run.result().steps)))
      if len(solved) == max(count, _EXAMPLE_CANDIDATES):
        break
    if len(solved) < count:
      raise errors.UserError(
        f'Split {split} of {suite.name} has {len(solved)} solved tasks of type {task_type!r}, not '
        f'{count}; ask for fewer few_shots.')
    found[task_type] = sorted(solved, key=lambda example: len(example.turns))[:count]
  return found


def _play(
  suite, task, tokenizer, spec, labels, *, memory=memory_lib.NO_MEMORY, examples=(),
  known_rules=(), thoughts=True, **options,
) -> episode_lib.EpisodeRun:
  run = episode_lib.EpisodeRun(
    episode_lib.Game(task, labels), suite.make, tokenizer, spec,
    action_templates=suite.action_templates, memory=memory, examples=examples)
  reply_format = formats.get_format(spec.format)
  run.start()
  if run.done:
    return run
  expert = suite.expert(task, known_rules, **options)
  observation = run.first_observation
  while not run.done:
    decision = expert.act(observation)
    shown = decision if thoughts else Decision(decision.action, '')
    for reply in reply_format.render(shown, task.instruction, run.history):
      run.next_tokens()
      ids = [*tokenizer.encode(reply), tokenizer.chat.end_of_turn]
      run.receive(
        ids, [0.0] * len(ids), stop_reason='expert', prefilled_tokens=0, thought=decision.thought)
      if run.done:
        break
    observation = run.answer
  return run
