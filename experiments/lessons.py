"""What a small decoder learns from: expert episodes, and drills of what they hardly ever ask for.

Every house draws anew which of the game's words its states have: a word says nothing about verb or
appliance, so that only a model gets on that reads the rule where it is written, in a hint or on a
label. That is what carries over to skills whose rules never change.
"""

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence

import numpy as np

import rollout
from agents import episode as episode_lib
from agents import expert_episodes, formats, prompts
from agents import memory as memory_lib
from configs import rollout as rollout_config
from data import trajectory
from data.tokenizer import Tokenizer
from envs import base as envs_base
from envs import household, household_expert, household_games, household_skills
from envs.base import Decision, Environment, ScriptedExpert, StepResult, Suite, Task
from envs.household import Rule
from experiments import warm_start
from retrieval import experience as experience_lib
from retrieval import hint_rules
from training import packing

_DRILL_RULES = (1, 4)  # in one drill, from and to; one alone is the first step of looking it up
_SEARCHED = 5  # appliances of a room, as in the games
_FAR = (5, 8)  # likewise in a game drill, from and to
_STATES = (3, 6)  # of a match or label drill, from and to
_SAME_SHARE = 0.4  # of them that are the goal's
_OTHER_WORLD = 1000  # added to the seed: the ids of products begin alike in both catalogues

_POOL = household_skills.POOLS['warm']
_STATE = re.compile(rf'\b(?:{"|".join(_POOL)})\b')
# Every word that a state may have.
_WORDS = tuple(word for pool in household_skills.POOLS.values() for word in pool)


def drawn_states(key: str) -> dict[str, str]:
  """State of the warm pool -> the word for it in the episode of that key; all are different."""
  return dict(zip(_POOL, random.Random(f'words {key}').sample(_WORDS, len(_POOL)), strict=True))


def rename(task: Task, words: dict[str, str]) -> Task:
  """The task with other words for its states: instruction, house and rules; the id stays."""
  payload = {
    **task.payload,
    'problem': _reworded(task.payload['problem'], words),
    'rules': [{**rule, 'state': words[rule['state']]} for rule in task.payload['rules']],
  }
  return dataclasses.replace(
    task, instruction=_reworded(task.instruction, words), payload=payload)


def _reworded(text: str, words: dict[str, str]) -> str:
  return _STATE.sub(lambda match: words[match[0]], text)


class _Recorded:
  """A suite whose expert has played each task at most once: its games are told again, not played.

  A simulator takes a second for a lesson that tokenizer, prediction and training ask for.
  """

  def __init__(self, suite: Suite, games: dict[str, list]):
    """`games`, which is filled: task id -> limits, first observation, (decision, result) a step."""
    self._suite, self._games = suite, games
    self.action_templates = suite.action_templates

  def make(self, task: Task) -> Environment:
    return _Told(self._games[task.id])

  def expert(self, task: Task, known_rules: Sequence = (), **options) -> ScriptedExpert:
    return _Told(self._games[task.id])

  def play(self, task: Task) -> None:
    """Plays a task that has not been."""
    if task.id in self._games:
      return
    environment, expert = self._suite.make(task), self._suite.expert(task)
    observation, steps = environment.reset(), []
    limits = envs_base.limits_of(environment)
    game = [limits, observation]
    while len(steps) < limits.steps:
      decision = expert.act(observation)
      result = environment.step(decision.action)
      observation = result.observation
      steps.append((decision, result))
      if result.done:
        break
    if close := getattr(environment, 'close', None):
      close()
    self._games[task.id] = [*game, *steps]


class _Told:
  """Environment and expert of a recorded game."""

  def __init__(self, game: Sequence):
    self.limits, self._start, *self._steps = game
    self._moves = iter([decision for decision, _ in self._steps])
    self._results = iter([result for _, result in self._steps])

  def reset(self) -> str:
    return self._start

  def act(self, observation: str) -> Decision:
    return next(self._moves)

  def step(self, action: str) -> StepResult:
    return next(self._results)


class Lessons:
  """Expert episodes, made anew wherever they are needed."""

  def __init__(self, config):
    """Describes them; nothing is played yet. `config` is as configs/from_scratch.py makes it."""
    self._config = config
    values = {key: config[key] for key in rollout_config.DEFAULTS if key in config}
    values['env_options'] = ';'.join(filter(None, (config.env_options, config.lesson_options)))
    if config.env == 'household':
      values.update(skills='warm', env_seed=config.seed)
    else:
      # What is generated is another world than the experiment's.
      values.update(env_seed=config.seed + _OTHER_WORLD, agent='expert', expert_format=config.agent)
      # In this process: one simulator finds the paths and plays them.
      values['env_workers'] = 0
    self._rollout = rollout_config.make(values)
    self._spec = rollout.make_spec(self._rollout)
    self._games: dict[str, list] = {}
    self._erring = {}
    if config.expert_error_rate:
      self._erring = {'error_rate': config.expert_error_rate, 'seed': config.seed}
    if config.env != 'household':
      self._spec = expert_episodes.expert_spec(self._spec)

  def play(
    self, tokenizer: Tokenizer, split: str | None, count: int, *, hint_share: float | None = None,
    rule_share: float | None = None,
  ) -> Iterator[trajectory.Episode]:
    """The first `count` episodes of a split, None being the environment's last, its test.

    The shares are the config's where none are given.
    """
    c = self._config
    hint_share = c.warm_hint_share if hint_share is None else hint_share
    rule_share = c.warm_rule_share if rule_share is None else rule_share
    self._rollout.episodes = count
    suite = rollout.make_suite(self._rollout)
    split = suite.splits[-1] if split is None else split
    labels = episode_lib.Labels('expert', 'expert', split, c.seed)
    tasks = rollout.choose_tasks(suite, split, count)
    if c.env != 'household':
      yield from self._play_as_it_is(suite, tasks, tokenizer, labels, hint_share, rule_share)
      return
    for task in tasks:
      rng = random.Random(f'lesson {c.seed} {task.id}')
      words = drawn_states(f'{c.seed} {task.id}')
      memory, told = memory_lib.NO_MEMORY, []
      if rng.random() < hint_share:
        memory, told = warm_start.hint_block(
          task, suite.rules(task), rng, k=c.k, rule_share=rule_share, seed=c.seed)
        texts = [hint['text'] for hint in memory.retrieved]
        memory = memory_lib.hints([_reworded(text, words) for text in texts])
        told = [dataclasses.replace(rule, state=words[rule.state]) for rule in told]
      yield expert_episodes.expert_episode(
        suite, rename(task, words), tokenizer, self._spec, labels, memory=memory,
        known_rules=told, **self._erring)

  def _play_as_it_is(
    self, suite: Suite, tasks: Sequence[Task], tokenizer: Tokenizer, labels: episode_lib.Labels,
    hint_share: float, rule_share: float,
  ) -> Iterator[trajectory.Episode]:
    """Episodes of an environment whose words stay as they are; the suite is closed after them."""
    c = self._config
    solved: dict[str, str] = {}
    recorded = _Recorded(suite, self._games) if getattr(suite, 'own_process', False) else None
    try:
      for task in tasks:
        if recorded:
          recorded.play(task)
        rng = random.Random(f'lesson {c.seed} {task.id}')
        memory, told = memory_lib.NO_MEMORY, []
        if c.env == 'webshop' and rng.random() < hint_share:
          memory, told = warm_start.reminder_block(task, rng, k=c.k, rule_share=rule_share)
        elif task.task_type in solved and rng.random() < c.experience_share:
          memory = memory_lib.Memory('experience', ({
            'id': 'given-0', 'score': 0.0, 'text': solved[task.task_type], 'outcome': 'success'},))
        episode = expert_episodes.expert_episode(
          recorded or suite, task, tokenizer, self._spec, labels, memory=memory, known_rules=told,
          **self._erring)
        if episode.success and c.experience_share:
          # The next lesson of the type may have it in its context.
          solved[task.task_type] = experience_lib.get_format(c.experience_format)(
            experience_lib.from_episode(episode, tokenizer, ''))
        yield episode
    finally:
      if close := getattr(suite, 'close', None):
        close()


def drill(tokenizer: Tokenizer, seed: int, index: int, agent: str = 'plain') -> packing.Example:
  """Some rules as hints, and for each, in another order, what an expert replies who has read it.

  An episode asks for a rule once or twice in 300 tokens; here nearly every token of the loss does,
  and what looks a rule up forms sooner. Before an expert's replies stands the task, without a loss.
  The rules are a warm episode's: no (verb, appliance) pair of the loop's or the hard table.
  """
  key = f'drill {seed} {index}'
  rng = random.Random(key)
  words = drawn_states(key)
  rules = [
    dataclasses.replace(rule, state=words[rule.state])
    for rule in rng.sample(
      household_skills.draw('warm', seed, key), rng.randint(*_DRILL_RULES))]
  hints = [f'- {hint_rules.rule_hint(r.state, r.verb, r.appliance)}\n' for r in rules]
  pieces = [(''.join(hints), False)]
  rng.shuffle(rules)
  reply_format = formats.get_format(agent)
  for rule in rules:
    thing, place = rng.choice(household_games.SKILL_THINGS).lower(), f'{rule.appliance} 1'
    goal = f'make a {rule.state} {thing}.'
    pieces.append((f'{goal}\n', False))
    for action, thought in (
        (f'go to {place}', household_expert.plan_thought(rule)),
        (f'{rule.verb} {thing} 1 with {place}', household_expert.use_thought(rule, thing))):
      replies = reply_format.render(Decision(action, thought), goal, ())
      pieces += [(f'{reply}\n', True) for reply in replies]
  return _drilled(tokenizer, pieces, key)


def search_drill(
  tokenizer: Tokenizer, seed: int, index: int, agent: str = 'plain'
) -> packing.Example:
  """A room, a goal, and labels one after the other: what an expert replies to each.

  Whether a label tells the state of the goal, and which appliance is the next of the room, is asked
  once or twice in an episode of 500 tokens; here after every label. The game lists its rooms by the
  alphabet, these are in any order: in the game's a small decoder learned which appliance follows
  another one in the alphabet, and not to look it up.
  """
  key = f'search drill {seed} {index}'
  rng = random.Random(key)
  room, goal, moves = _search(key, seed, rng, _SEARCHED)
  pieces = [(f'You see {household.listing(room)}.\nYour task is to: {goal}\n', False)]
  reply_format = formats.get_format(agent)
  for decision, place, rule in moves:
    pieces += [(f'{reply}\n', True) for reply in reply_format.render(decision, goal, ())]
    if rule:
      pieces.append((f'On the {place}, you see nothing. {household.label(rule)}\n', False))
  return _drilled(tokenizer, pieces, key)


def game_drill(
  tokenizer: Tokenizer, seed: int, index: int, agent: str = 'plain'
) -> packing.Example:
  """The same search in the game's own turns and in larger rooms, as far from the goal as in games.

  A decoder of the lines of `search_drill` alone took 85 % of the right labels there, 47 % in games.
  """
  key = f'game drill {seed} {index}'
  rng = random.Random(key)
  room, goal, moves = _search(key, seed, rng, rng.randint(*_FAR))
  chat, reply_format = tokenizer.chat, formats.get_format(agent)
  pieces: list[tuple[str | Sequence[int], bool]] = [
    (chat.system_to_user, False), (prompts.task_text(goal, household.first_look(room)), False)]

  def take(decision: Decision, observation: str) -> None:
    *thoughts, last = reply_format.render(decision, goal, ())
    for reply, answer in (
        *((thought, formats.THOUGHT_ANSWER) for thought in thoughts), (last, observation)):
      pieces.extend((
        (chat.user_to_assistant, False), (reply, True), ([chat.end_of_turn], True),
        (chat.assistant_to_user, False), (answer, False)))

  for decision, place, rule in moves:
    seen = f'On the {place}, you see nothing.'
    take(decision, f'You arrive at {place}. {seen}' if rule else '')
    if rule:
      take(Decision(f'examine {place}', ''), f'{seen} {household.label(rule)}')
  return _drilled(tokenizer, pieces, key)


def _search(
  key: str, seed: int, rng: random.Random, appliances: int
) -> tuple[list[str], str, list[tuple[Decision, str, Rule | None]]]:
  """A search by an expert that has the thing in hand.

  Returns:
    The room's furniture; the goal; moves, each with its place and the rule whose label is read
    there, None for the last one, which makes the state.
  """
  words = drawn_states(key)
  rules = [
    dataclasses.replace(rule, state=words[rule.state])
    for rule in rng.sample(household_skills.draw('warm', seed, key), appliances)]
  wanted = rng.choice(rules)
  thing = rng.choice(household_games.SKILL_THINGS).lower()
  room = _room([f'{rule.appliance} 1' for rule in rules], rng)
  moves: list[tuple[Decision, str, Rule | None]] = []
  for read, rule in zip((None, *rules), rules, strict=False):
    place = f'{rule.appliance} 1'
    thought = household_expert.search_thought(wanted.state, place, read)
    moves.append((Decision(f'go to {place}', thought), place, rule))
    if rule is wanted:
      break
  last = Decision(
    f'{wanted.verb} {thing} 1 with {place}', household_expert.use_thought(wanted, thing))
  return room, f'make a {wanted.state} {thing}.', [*moves, (last, place, None)]


def match_drill(
  tokenizer: Tokenizer, seed: int, index: int, agent: str = 'plain'
) -> packing.Example:
  """A goal and states one after the other: is it the goal's? Every sixth token answers that.

  One in 75 of a search drill does, and from them alone it is not learned in 10 million tokens; from
  these lines it is in 200,000, and what compares words then serves the search.
  """
  key = f'match drill {seed} {index}'
  rng = random.Random(key)
  wanted, thing, states = _goal_and_states(key, rng)
  pieces = [(f'make a {wanted} {thing}.\n', False)]
  for state in states:
    kind = thing if state == wanted else 'thing'
    pieces += [(f'a {state}', False), (f' {kind}', True), ('.\n', False)]
  return _drilled(tokenizer, pieces, key)


def label_drill(
  tokenizer: Tokenizer, seed: int, index: int, agent: str = 'plain'
) -> packing.Example:
  """A goal and labels one after the other: does one tell the goal's state, and what is done then?

  Between the lines of `match_drill` and a search: the words of the expert's thoughts, no replies.
  """
  key = f'label drill {seed} {index}'
  rng = random.Random(key)
  wanted, thing, states = _goal_and_states(key, rng)
  pieces = [(f'make a {wanted} {thing}.\n', False)]
  for state in states:
    verb = rng.choice(household_skills.VERBS)
    label = household.label(Rule(state, verb, ''))
    pieces += [(f'{label}\nI can make a {state}', False),
               (f' {thing if state == wanted else "thing"}', True), (' here.', False)]
    if state == wanted:
      pieces += [(' I', False), (f' {verb}', True), (' it.', False)]
    pieces.append(('\n', False))
  return _drilled(tokenizer, pieces, key)


def room_drill(
  tokenizer: Tokenizer, seed: int, index: int, agent: str = 'plain'
) -> packing.Example:
  """A room, and its appliances in its order: which is the next one? Half of the tokens answer."""
  key = f'room drill {seed} {index}'
  rng = random.Random(key)
  places = [f'{name} 1' for name in rng.sample(household_skills.APPLIANCES, _SEARCHED)]
  pieces = [(f'You see {household.listing(_room(places, rng))}.\n', False)]
  for place in places:
    pieces += [('I try the', False), (f' {place}', True), ('.\n', False)]
  return _drilled(tokenizer, pieces, key)


# The keys of configs/from_scratch.py that say how many -> what makes one.
DRILLS = {
  'drills': drill, 'match_drills': match_drill, 'label_drills': label_drill,
  'room_drills': room_drill, 'search_drills': search_drill, 'game_drills': game_drill}


def _room(places: Sequence[str], rng: random.Random) -> list[str]:
  """Appliances in their order, a surface or two among them."""
  room = list(places)
  for name in rng.sample(household_games.SURFACES, rng.randint(1, 2)):
    room.insert(rng.randint(0, len(room)), f'{name.lower()} 1')
  return room


def _goal_and_states(key: str, rng: random.Random) -> tuple[str, str, list[str]]:
  """A goal's state and thing, and three to six states of which two in five are the goal's."""
  wanted, *others = drawn_states(key).values()
  thing = rng.choice(household_games.SKILL_THINGS).lower()
  states = [wanted if rng.random() < _SAME_SHARE else other
            for other in others[:rng.randint(*_STATES)]]
  return wanted, thing, states


def _drilled(
  tokenizer: Tokenizer, pieces: Sequence[tuple[str | Sequence[int], bool]], key: str
) -> packing.Example:
  """One example of (text or token ids, whether they have a loss)."""
  tokens, mask = [], []
  for piece, loss in pieces:
    ids = tokenizer.encode(piece) if isinstance(piece, str) else piece
    tokens += ids
    mask += [loss] * len(ids)
  return packing.Example(np.array(tokens, np.int32), np.array(mask), key)
