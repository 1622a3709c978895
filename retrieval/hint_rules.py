"""Hints by rules: what the trace of a failed episode shows, said in one sentence each.

The writer sees what the agent saw (instruction, actions, observations, task type) and nothing else:
no table of rules, no house. In houses that explain themselves a trace shows facts, of the state
that was asked for or of others: labels, effects of attempts, reasons of refusal. In the official
games, which explain nothing, it shows where the procedure broke off; what heats, cools and cleans
there is common sense that the writer brings along (`_COMMON_SENSE`), as paper A's GPT-4o does.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

from data.schema import Episode

# What each official state needs. Common sense rather than an answer key: the official games use
# real appliances, and a strong writer (paper A's GPT-4o) knows as much.
_COMMON_SENSE = {
  'hot': ('heat', 'microwave'), 'cool': ('cool', 'fridge'), 'clean': ('clean', 'sinkbasin')}
_STATE_OF_VERB = {verb: state for state, (verb, _) in _COMMON_SENSE.items()}

_PRECONDITION = {
  '': '', 'open': ' after you open it', 'closed': ' after you close it', 'on': ' after you use it'}

_PREFIX = re.compile(r'^\s*your task is to:?\s*', re.IGNORECASE)
_GOALS = tuple(re.compile(pattern) for pattern in (
  r'(?P<verb>heat|cool|clean) some (?P<object>\w+) and put it (?:in|on) (?P<target>\w+)',
  r'(?:look at|examine) (?:the |a |an |some )?(?P<object>\w+) (?:under|with) the (?P<light>\w+)',
  r'put (?P<two>two) (?P<object>\w+) (?:in|on) (?P<target>\w+)',
  r'find (?P<two>two) (?P<object>\w+) and put them (?:in|on) (?P<target>\w+)',
  r'put (?:a|an|some|the) (?:(?P<state>[\w-]+) )?(?P<object>\w+) (?:in|on) (?P<target>\w+)',
  r'(?:make|get|have) (?:a|an|some|the) (?P<state>[\w-]+) (?P<object>\w+)',
))

_LABEL = re.compile(
  r'A label reads: (\w+) things here(?: while it is (\w+))? to make them ([\w-]+)\.')
_EFFECT = re.compile(r'You (\w+) the ([a-z]+) \d+ with the ([a-z]+) \d+\. It is now ([\w-]+)\.')
_OFFICIAL_EFFECT = re.compile(r'You (heat|cool|clean) the ([a-z]+) \d+ using the ([a-z]+) \d+\.')
_MUST = re.compile(r'The ([a-z]+) \d+ must be (open|closed|on)\.')
_NOTHING = 'Nothing happens'


def rule_hint(state: str, verb: str, appliance: str, precondition: str = '') -> str:
  """The one phrasing of a house rule, e.g. 'To make {object} glazed, fire it with the kiln.'

  Args:
    state: the state that the rule gives.
    verb: the verb of the command.
    appliance: the appliance's type, without a number.
    precondition: '', 'open', 'closed' or 'on'.
  """
  return f'To make {{object}} {state}, {verb} it with the {appliance}{_PRECONDITION[precondition]}.'


def explore_hint(state: str) -> str:
  """What to do where no trace shows how a state comes about."""
  return f'Examine each appliance to find what makes {{object}} {state}.'


@dataclasses.dataclass(frozen=True)
class Goal:
  """What the instruction asks for; '' where it asks for no such thing.

  Attributes:
    object: type of the thing.
    state: state it has to be in.
    target: type of the receptacle it has to go to.
    light: the lamp it has to be looked at with.
    two: whether two such things are wanted.
  """

  object: str = ''
  state: str = ''
  target: str = ''
  light: str = ''
  two: bool = False


def bare_instruction(instruction: str) -> str:
  """The goal sentence without 'Your task is to:'."""
  return _PREFIX.sub('', instruction).strip()


def parse_goal(instruction: str) -> Goal:
  """Reads an instruction in one of the games' wordings; an empty Goal for any other."""
  text = bare_instruction(instruction).lower().rstrip('.')
  for pattern in _GOALS:
    if match := pattern.fullmatch(text):
      found = {k: v or '' for k, v in match.groupdict().items()}
      return Goal(
        object=found['object'], state=found.get('state') or _STATE_OF_VERB.get(
          found.get('verb', ''), ''),
        target=found.get('target', ''), light=found.get('light', ''), two=bool(found.get('two')))
  return Goal()


@dataclasses.dataclass(frozen=True)
class Fact:
  """A house rule as far as a trace shows it."""

  state: str
  verb: str
  appliance: str
  precondition: str = ''


@dataclasses.dataclass
class Evidence:
  """What one trace shows.

  Attributes:
    facts: rules, in the order of their discovery.
    seen: types of receptacles at which the wanted thing was seen, in order.
    taken: number of times the wanted thing was picked up.
    placed: number of times it was put down at the target.
    applied: the asked state was brought about.
    wrong_taken: something else was picked up.
    closed: types of receptacles seen closed and never opened, appliances apart.
    visits: arrivals per receptacle.
    repeats: actions sent again directly after they had changed nothing.
    invalid: replies that held no action.
    lit: the lamp was switched on.
  """

  facts: dict[str, Fact] = dataclasses.field(default_factory=dict)
  seen: list[str] = dataclasses.field(default_factory=list)
  taken: int = 0
  placed: int = 0
  applied: bool = False
  wrong_taken: bool = False
  closed: list[str] = dataclasses.field(default_factory=list)
  visits: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  repeats: int = 0
  invalid: int = 0
  lit: bool = False


def read_trace(episode: Episode, goal: Goal) -> Evidence:
  """Collects the evidence of one trace."""
  evidence = Evidence()
  closed: dict[str, bool] = {}
  must: dict[str, str] = {}
  place = last = ''
  for step in episode.steps:
    if step.parsed == 'thought':
      continue
    if step.parsed == 'invalid':
      evidence.invalid += 1
      continue
    action, observation = ' '.join(step.action.lower().split()), step.observation
    nothing = observation.startswith(_NOTHING)
    evidence.repeats += action == last and (nothing or not step.changed)
    last = action
    if match := re.match(r'You arrive at ([a-z]+ \d+)\.', observation):
      place = match[1]
      evidence.visits[place] += 1
    for name, state in re.findall(r'The ([a-z]+ \d+) is (closed|open)\.', observation):
      closed[name] = closed.get(name, True) and state == 'closed'
    if goal.object and re.search(rf'\ba {goal.object} \d+', observation):
      kind = _kind(place)
      if kind and kind not in evidence.seen:
        evidence.seen.append(kind)
    _read_facts(evidence, action, observation, must)
    _read_handling(evidence, action, observation, goal)
  for appliance, precondition in must.items():
    for state, fact in evidence.facts.items():
      if fact.appliance == appliance and not fact.precondition:
        evidence.facts[state] = dataclasses.replace(fact, precondition=precondition)
  # An appliance that was found closed is closed for its own reasons and hides nothing.
  appliances = {f.appliance for f in evidence.facts.values()} | set(must)
  evidence.closed = sorted({_kind(name) for name, shut in closed.items() if shut} - appliances)
  return evidence


def _kind(name: str) -> str:
  return name.rpartition(' ')[0]


def _read_facts(evidence: Evidence, action: str, observation: str, must: dict[str, str]) -> None:
  """Facts that a self-explaining house shows: labels, effects, refusals."""
  examined = re.fullmatch(r'examine ([a-z]+) \d+', action)
  for verb, precondition, state in _LABEL.findall(observation):
    if examined:
      evidence.facts[state] = Fact(state, verb, examined[1], precondition)
  for verb, _, appliance, state in _EFFECT.findall(observation):
    evidence.facts.setdefault(state, Fact(state, verb, appliance))
  for appliance, precondition in _MUST.findall(observation):
    must[appliance] = precondition


def _read_handling(evidence: Evidence, action: str, observation: str, goal: Goal) -> None:
  """What the agent did with the wanted thing."""
  if match := re.match(r'You pick up the ([a-z]+) \d+ from', observation):
    evidence.taken += match[1] == goal.object
    evidence.wrong_taken |= bool(goal.object) and match[1] != goal.object
  if match := re.match(r'You move the ([a-z]+) \d+ to the ([a-z]+) \d+\.', observation):
    if match[1] == goal.object and match[2] == goal.target:
      evidence.placed += 1
  for _, thing, _, state in _EFFECT.findall(observation):
    evidence.applied |= thing == goal.object and state == goal.state
  for verb, thing, _ in _OFFICIAL_EFFECT.findall(observation):
    evidence.applied |= thing == goal.object and _STATE_OF_VERB[verb] == goal.state
  if goal.light and re.match(rf'You turn on the {goal.light} \d+\.', observation):
    evidence.lit = True


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """A hint before those of all failures are compared.

  Attributes:
    text: the hint.
    fact: the rule that it states, if it does.
    state: the state that it advises to find out about, if it does.
  """

  text: str
  fact: Fact | None = None
  state: str = ''


def diagnose(episode: Episode) -> list[_Candidate]:
  """The hints of one failure, most useful first: the asked state, other states, the procedure."""
  goal = parse_goal(episode.instruction)
  evidence = read_trace(episode, goal)
  facts = sorted(evidence.facts.values(), key=lambda f: f.state != goal.state)
  candidates = [_Candidate(rule_hint(**dataclasses.asdict(f)), fact=f) for f in facts]
  official = goal.state in _COMMON_SENSE and goal.state not in evidence.facts
  if goal.state and not official and goal.state not in evidence.facts:
    # The asked state comes first, known or not. 'The globe can only soak things' is no lead: it
    # says neither what soaking brings nor that it does not bring the asked state.
    candidates = [_Candidate(explore_hint(goal.state), state=goal.state), *candidates]
  return candidates + [_Candidate(text) for text in _procedure(goal, evidence, episode)]


def _procedure(goal: Goal, evidence: Evidence, episode: Episode) -> list[str]:
  """Where the procedure broke off, the first missing link first."""
  hints = []
  holding = evidence.taken > evidence.placed
  if goal.object and not evidence.taken:
    if evidence.seen:
      hints.append('Take {object} as soon as you see it, before you go elsewhere.')
    elif evidence.closed:
      hints.append(f'Open each {evidence.closed[0]} to look for {{object}} inside.')
    else:
      hints.append('Visit every {location} once to find {object}.')
  elif goal.state and not evidence.applied and goal.state in _COMMON_SENSE:
    verb, appliance = _COMMON_SENSE[goal.state]
    end = 'placing it in {container}' if goal.target else 'anything else'
    hints.append(f'Take {{object}} to the {appliance} to {verb} it before {end}.')
  elif goal.target and not evidence.placed and (evidence.applied or not goal.state) and holding:
    if goal.target in evidence.closed:
      hints.append('Open {container} before you move {object} to it.')
    else:
      hints.append('Once you hold {object} as asked, go to {container} and move it there.')
  if goal.two and evidence.placed == 1:
    hints.append('After placing the first {object}, find the second one and move it there too.')
  if goal.light and evidence.taken and not evidence.lit:
    hints.append(f'Hold {{object}}, go to the {goal.light} and use it.')
  if evidence.wrong_taken and not evidence.taken:
    hints.append('Take only {object}; leave other things where they are.')
  if episode.termination == 'repetition' or evidence.repeats >= 2:
    hints.append('Do not repeat an action that changed nothing; try another one.')
  elif not evidence.taken and any(count >= 3 for count in evidence.visits.values()):
    hints.append('Do not go back to a {location} that you have already searched.')
  if evidence.invalid >= 2:
    hints.append('Answer with one command in the listed wording.')
  return hints


def write_all(
  failures: Sequence[Episode], counts: collections.Counter, *, max_hints: int
) -> list[list[str]]:
  """Hints for every failure.

  A failure that shows nothing about its state gives a hint to explore. Where another failure of the
  same task type shows the fact, that hint is out of date, and so is a fact without the precondition
  that another trace shows: both are left out and counted as 'superseded'.

  Args:
    failures: failed episodes.
    counts: 'superseded' and 'hints_beyond_four' are added to.
    max_hints: per failure.

  Returns:
    A list of texts per failure, at most `max_hints` each.
  """
  diagnoses = [diagnose(episode) for episode in failures]
  known = set()
  conditioned = set()
  for episode, candidates in zip(failures, diagnoses):
    for candidate in candidates:
      if fact := candidate.fact:
        known.add((episode.task_type, fact.state))
        if fact.precondition:
          conditioned.add((episode.task_type, dataclasses.replace(fact, precondition='')))
  written = []
  for episode, candidates in zip(failures, diagnoses):
    current = [
      c for c in candidates
      if (episode.task_type, c.state) not in known
      and (episode.task_type, c.fact) not in conditioned]
    counts['superseded'] += len(candidates) - len(current)
    counts['hints_beyond_four'] += max(0, len(current) - max_hints)
    written.append([c.text for c in current[:max_hints]])
  return written
