"""Warm start: expert episodes that teach a small model to act and to read a hint block.

The papers' agents are 7B and larger and read a hint without having learnt to; a 135M model does
not. Its warm start uses skills whose rules are redrawn for every episode: nothing in them can be
learnt by heart, so what lowers the loss is reading the rule where it is written, in a hint or on an
appliance's label.
"""

import pathlib
import random
from collections.abc import Sequence

from agents import episode as episode_lib
from agents import expert_episodes, runner
from agents import memory as memory_lib
from data import errors, trajectory
from data.tokenizer import Tokenizer
from envs import base as envs_base
from envs import household, household_skills
from envs.base import Suite, Task
from retrieval import hint_rules, hint_rules_webshop


def hint_block(
  task: Task,
  rules: Sequence[household.Rule],
  rng: random.Random,
  *,
  k: int,
  rule_share: float,
  seed: int,
) -> tuple[memory_lib.Memory, list]:
  """Draws the hint block of one warm-start episode, in the words of the `rules` writer.

  Args:
    task: a task of generated skills.
    rules: those that hold in its house.
    rng: of this episode.
    k: hints in the block.
    rule_share: probability that the rule that the task needs is among them.
    seed: of the skill tables: no (verb, appliance) pair of the loop's or the hard table is told.

  Returns:
    (memory, rules that the block tells about the asked state: one or none). The other hints are
    what a mined bank also returns: rules of other states, and the advice to examine.
  """
  state = hint_rules.parse_goal(task.instruction).state
  if not state:
    # Official tasks that only move or look at things need no rule: nothing to tell.
    return memory_lib.NO_MEMORY, []
  needed = [rule for rule in rules if rule.state == state]
  if not needed:
    raise errors.UserError(
      f'Task {task.id} asks for a state that no rule of its house gives; the warm start needs '
      'generated skills (skills:warm).')
  told = needed[:1] if rng.random() < rule_share else []
  texts = [_text(rule) for rule in told]
  others = [rule for rule in rules if rule.state != state]
  # Rules of absent states and appliances too: a bank knows more than this house.
  others += [
    rule for rule in household_skills.draw('warm', seed, f'{task.id} others')
    if rule.state != state and rule.appliance not in {r.appliance for r in rules}]
  rng.shuffle(others)
  texts += [_text(rule) for rule in others[:k - len(texts)]]
  if not told and rng.random() < 0.3:
    texts[0] = hint_rules.explore_hint(state)
  rng.shuffle(texts)
  return memory_lib.hints(texts), told


def _text(rule) -> str:
  return hint_rules.rule_hint(rule.state, rule.verb, rule.appliance, rule.precondition)


def reminder_block(
  task: Task, rng: random.Random, *, k: int, rule_share: float
) -> tuple[memory_lib.Memory, list[str]]:
  """Draws the hint block of one shopping trip, in the words of the `rules` writer.

  Args:
    task: a goal of WebShop.
    rng: of this episode.
    k: hints in the block.
    rule_share: probability of each care (`envs.webshop_expert.CARES`) that the block has it.

  Returns:
    (memory, cares that it reminds of). The other hints tell how to search and to click.
  """
  texts = hint_rules_webshop.reminders(task.instruction)
  told = [care for care in sorted(texts) if rng.random() < rule_share]
  told = rng.sample(told, min(k, len(told)))
  lines = [texts[care] for care in told]
  lines += rng.sample(
    hint_rules_webshop.GENERAL_HINTS, min(k - len(lines), len(hint_rules_webshop.GENERAL_HINTS)))
  rng.shuffle(lines)
  return memory_lib.hints(lines), told


def play(
  suite: Suite,
  tasks: Sequence[Task],
  tokenizer: Tokenizer,
  spec: episode_lib.AgentSpec,
  workdir: str | pathlib.Path,
  *,
  k: int,
  hint_share: float,
  rule_share: float,
  seed: int,
) -> list[trajectory.Episode]:
  """Plays the expert on every task, with a hint block in `hint_share` of them.

  With the needed rule in the block the expert goes straight to the appliance; without it, it
  examines one appliance after the other, as the model will have to.
  """
  labels = episode_lib.Labels('expert', 'expert', 'train', seed)

  def one(task: Task) -> trajectory.Episode:
    rng = random.Random(f'warm start {seed} {task.id}')
    memory, told = memory_lib.NO_MEMORY, []
    # Where no rules govern the tasks (a shop's) there is none to tell.
    rules = envs_base.rules_of(suite, task)
    if rules and rng.random() < hint_share:
      memory, told = hint_block(task, rules, rng, k=k, rule_share=rule_share, seed=seed)
    return expert_episodes.expert_episode(
      suite, task, tokenizer, spec, labels, memory=memory, known_rules=told)

  return runner.play_each(one, tasks, labels, workdir)
