"""Expert episodes with a memory in the context: what experience retrieval trains on.

The block is the one that the agent will have (arXiv 2603.18272): the same index, query, K, format
and order; what was played on the task itself is left out. With retrieval dropout some contexts get
no memory, or experiences of other kinds of tasks, so that the model does not come to depend on a
good index; in them the expert shows what to do without one.
"""

import pathlib
import random
from collections.abc import Sequence

from agents import episode as episode_lib
from agents import experience_memory, expert_episodes, runner
from agents import memory as memory_lib
from data import errors, trajectory
from data.tokenizer import Tokenizer
from envs import base as envs_base

# What the expert knows: the rules of every house; none, it reads the labels; or what a success in
# its context shows. Without a memory that shows it, 'shown' demonstrates how to find out.
KNOWS = ('rules', 'nothing', 'shown')


def check_knows(knows: str) -> None:
  """Raises errors.UserError for a kind of knowledge that there is not."""
  if knows not in KNOWS:
    raise errors.UserError(f'expert_knows is {", ".join(KNOWS)}, not {knows!r}.')


def known_rules(
  suite: envs_base.Suite, task: envs_base.Task, memory: memory_lib.Memory, knows: str
) -> Sequence:
  """What the expert is told of a task, as `Suite.expert` takes it."""
  rules = envs_base.rules_of(suite, task)
  if knows == 'shown':
    solved = [r['text'] for r in memory.retrieved if r.get('outcome') == 'success']
    # The command of a rule reads VERB thing N with APPLIANCE N.
    return [rule for rule in rules if any(
      f'{rule.verb} ' in text and f' with {rule.appliance} ' in text for text in solved)]
  return rules if knows == 'rules' else ()


def memory_for(
  task: envs_base.Task, retrieved: memory_lib.Memory, memory: experience_memory.ExperienceMemory,
  rng: random.Random, *, dropout: float, mismatched: float,
) -> memory_lib.Memory:
  """The memory of one context: what was retrieved, or with probability `dropout` something else.

  Args:
    task: the task.
    retrieved: what the index gives for it.
    memory: gives experiences of other kinds of tasks.
    rng: of this context.
    dropout: probability that what was retrieved is not shown.
    mismatched: share of those contexts that get experiences of other kinds of tasks; the others get
      no memory.
  """
  if rng.random() >= dropout:
    return retrieved
  return memory.choose_other(task) if rng.random() < mismatched else memory_lib.NO_MEMORY


def play(
  suite: envs_base.Suite,
  tasks: Sequence[envs_base.Task],
  tokenizer: Tokenizer,
  spec: episode_lib.AgentSpec,
  memory: experience_memory.ExperienceMemory,
  workdir: pathlib.Path,
  *,
  draw: int,
  dropout: float,
  mismatched: float,
  knows: str,
  seed: int,
) -> list[trajectory.Episode]:
  """Plays the expert on every task, with a memory in the context.

  Args:
    suite, tasks: of the training split.
    tokenizer: of the model that learns from the episodes.
    spec: of the agent that will play.
    memory: the index that the agent will have.
    workdir: gets the journal.
    draw: number of this pass over the tasks; each draws its dropout anew.
    dropout, mismatched: as for `memory_for`.
    knows: one of `KNOWS`.
    seed: of the draws.
  """
  labels = episode_lib.Labels('expert', 'expert', 'train', draw)
  chosen = memory.choose(tasks)

  def one(task: envs_base.Task) -> trajectory.Episode:
    rng = random.Random(f'dropout {seed} {draw} {task.id}')
    shown = memory_for(
      task, chosen[task.id], memory, rng, dropout=dropout, mismatched=mismatched)
    return expert_episodes.expert_episode(
      suite, task, tokenizer, spec, labels, memory=shown,
      known_rules=known_rules(suite, task, shown, knows))

  return runner.play_each(one, tasks, labels, workdir)
