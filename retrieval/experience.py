r"""Whole past episodes as memory (arXiv 2603.18272): their bank, and their text.

A bank is a folder: bank.json says what it was made from and with which tokenizer and prompts, a
file of JSON lines holds the experiences. It is made from any stored episodes, also those of a
scripted expert (`rollout.py` with agent=expert; with expert_error_rate, failures on purpose):

  python -m retrieval.experience --episodes=runs/expert,runs/erring --out=runs/bank

The same command with further runs adds to the bank that is there.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from data import errors, trajectory
from data import text as text_lib
from data import workdir as workdir_lib
from data.tokenizer import Tokenizer
from retrieval import hint_rules

VERSION = 1
# The policy of scripted experts that err on purpose: their failures are marked as such.
ERRING_EXPERT = 'erring_expert'
_META = 'bank.json'


@dataclasses.dataclass(frozen=True)
class Turn:
  """One call of the model and its answer: the reply, the command in it ('' for none), the answer.

  `changed` is False where the answer was no news (`data.schema.Step.changed`).
  """

  reply: str
  action: str
  observation: str
  changed: bool = True


@dataclasses.dataclass(frozen=True)
class Experience:
  """One past episode.

  Attributes:
    id: unique and stable: policy, task and a hash of the content.
    task_id: the task instance; leave-one-out leaves out all that was played on it.
    env, task_type, split, instruction: of the task.
    task: the first user message as the agent saw it: first observation and goal.
    turns: the model calls, in order.
    success: whether the task was solved.
    policy: who acted; `ERRING_EXPERT` failed on purpose.
    source: the run that it comes from.
  """

  id: str
  task_id: str
  env: str
  task_type: str
  split: str
  instruction: str
  task: str
  turns: tuple[Turn, ...]
  success: bool
  policy: str
  source: str

  @property
  def outcome(self) -> str:
    """'success' or 'failure'."""
    return 'success' if self.success else 'failure'

  @property
  def on_purpose(self) -> bool:
    """Whether it is a failure that was made to be one."""
    return not self.success and self.policy == ERRING_EXPERT

  @property
  def provenance(self) -> str:
    """Who played what, and the run it comes from, for a reader."""
    return f'{self.policy} on {self.task_id}, from {self.source}'

  @functools.cached_property
  def group(self) -> tuple[str, str]:
    """What makes two tasks the same kind: their type and, where one is asked for, the state."""
    return group_of(self.task_type, self.instruction)


def group_of(task_type: str, instruction: str) -> tuple[str, str]:
  """(task type, asked state); the state is '' in worlds without any."""
  return task_type, hint_rules.parse_goal(instruction).state


# The storage formats: an experience as text.


def flat_text(task: str, turns: Iterable[Turn]) -> str:
  """One paragraph. Also what dynamic retrieval compares: a trajectory, or the history so far."""
  parts = [f'Task: {_line(task)}']
  for turn in turns:
    parts.append(f'Action: {_line(turn.reply)} Observation: {_line(turn.observation)}')
  return ' '.join(parts)


def render_chat(experience: Experience) -> str:
  """One JSON object a message, with the role as its key."""
  messages = [('user', experience.task)]
  for turn in experience.turns:
    messages += [('assistant', turn.reply.strip()), ('user', turn.observation.strip())]
  return '\n'.join(
    json.dumps({role: content}, ensure_ascii=False, separators=(',', ':'))
    for role, content in messages)


def render_flat(experience: Experience) -> str:
  return flat_text(experience.task, experience.turns)


def render_summary(experience: Experience) -> str:
  """The goal, then one command a line, with its answer where that changed something."""
  lines = [_line(experience.instruction)]
  for turn in experience.turns:
    if turn.action:
      lines.append(
        f'> {turn.action}: {_line(turn.observation)}' if turn.changed else f'> {turn.action}')
  return '\n'.join(lines)


def _line(text: str) -> str:
  return ' '.join(text.split())


FORMATS: dict[str, Callable[[Experience], str]] = {
  'chat': render_chat, 'flat': render_flat, 'summary': render_summary}


def get_format(name: str) -> Callable[[Experience], str]:
  """Returns the renderer of that name.

  Raises:
    errors.UserError: there is none; names those there are.
  """
  if name not in FORMATS:
    raise errors.UserError(
      f'There is no experience format {name!r}; there are {", ".join(FORMATS)}.')
  return FORMATS[name]


# From episodes to experiences.


def prompt_fingerprint(agent: str, system_ids: Sequence[int]) -> str:
  """SHA-256 of how an agent is asked: its reply format and the ids of its system prompt.

  Args:
    agent: name of the reply format.
    system_ids: the prompt's ids of kind 'system', template seams included.
  """
  ids = np.asarray(system_ids, np.int32).tobytes()
  return hashlib.sha256(agent.encode() + b'\n' + ids).hexdigest()


def episode_prompt(episode: trajectory.Episode) -> str:
  """The `prompt_fingerprint` that an episode was played with."""
  return prompt_fingerprint(
    episode.agent, episode.tokens[episode.kinds == trajectory.KIND['system']])


def from_episode(
  episode: trajectory.Episode, tokenizer: Tokenizer, source: str
) -> Experience:
  """An episode as an experience.

  Args:
    episode: any.
    tokenizer: the one it was played with; the first observation is read from the tokens.
    source: the run, for the record.
  """
  ids = episode.tokens[episode.kinds == trajectory.KIND['task']].tolist()
  seam = list(tokenizer.chat.user_to_assistant)
  if seam and ids[-len(seam):] == seam:
    ids = ids[:-len(seam)]
  turns = tuple(
    Turn(step.reply, step.action, step.observation, step.changed) for step in episode.steps)
  content = json.dumps([dataclasses.asdict(turn) for turn in turns]).encode()
  digest = hashlib.sha256(episode.task_id.encode() + b'\n' + content).hexdigest()[:8]
  return Experience(
    id=f'{episode.policy}/{episode.task_id}#{digest}', task_id=episode.task_id, env=episode.env,
    task_type=episode.task_type, split=episode.split, instruction=episode.instruction,
    task=text_lib.valid(tokenizer.decode(ids)).strip(), turns=turns,
    success=bool(episode.success), policy=episode.policy, source=source)


class ExperienceBank:
  """Experiences in the order in which they came, and what they were made from.

  Attributes:
    experiences: each id once.
    provenance: 'agent', 'prompt' and 'tokenizer' (fingerprints) of all episodes, and 'sources': per
      run and policy the episodes taken, by outcome, and those left out. Holds no dates.
  """

  def __init__(
    self, experiences: Sequence[Experience] = (), provenance: dict[str, Any] | None = None
  ):
    self.experiences = list(experiences)
    self.provenance = provenance or {'agent': '', 'prompt': '', 'tokenizer': '', 'sources': []}
    self._ids = {e.id for e in self.experiences}

  def __len__(self) -> int:
    return len(self.experiences)

  def add_episodes(
    self, episodes: Sequence[trajectory.Episode], tokenizer: Tokenizer, source: str
  ) -> list[Experience]:
    """Adds episodes of one run; one that is there already is counted, not added again.

    An episode whose environment broke, or in which nothing was done, teaches nothing and is counted
    as left out.

    Args:
      episodes: successes and failures.
      tokenizer: that they were played with.
      source: the run's folder, for the record.

    Returns:
      The new experiences.

    Raises:
      errors.UserError: the episodes were played with another tokenizer, other prompts or another
        reply format than the bank's or one another's.
    """
    if foreign := {e.tokenizer for e in episodes} - {tokenizer.fingerprint}:
      raise errors.UserError(
        f'The episodes of {source} were tokenised by {sorted(foreign)[0][:12]}, and the tokenizer '
        f'given is {tokenizer.fingerprint[:12]}; give the model that played them.')
    for agent, prompt in sorted({(e.agent, episode_prompt(e)) for e in episodes}):
      if not self.provenance['prompt']:
        self.provenance.update(agent=agent, prompt=prompt, tokenizer=tokenizer.fingerprint)
      self.check(agent, prompt, tokenizer.fingerprint, f'{source} holds')
    new, counts = [], collections.defaultdict(collections.Counter)
    for episode in episodes:
      count = counts[episode.policy]
      if episode.termination == 'env_error' or not episode.steps:
        count['left_out'] += 1
        continue
      experience = from_episode(episode, tokenizer, source)
      if experience.id in self._ids:
        count['there_already'] += 1
        continue
      self._ids.add(experience.id)
      new.append(experience)
      count['successes' if experience.success else 'failures'] += 1
    self.experiences += new
    self.provenance['sources'] += [
      {'run': source, 'policy': policy, **dict(sorted(count.items()))}
      for policy, count in sorted(counts.items())]
    return new

  def check(self, agent: str, prompt: str, tokenizer: str, who: str = 'this run plays') -> None:
    """Checks that episodes of an agent fit those of the bank.

    Args:
      agent: name of the reply format.
      prompt: `prompt_fingerprint`.
      tokenizer: fingerprint.
      who: begins the part of the sentence about the agent.

    Raises:
      errors.UserError: they do not.
    """
    own = self.provenance
    if own['tokenizer'] and own['tokenizer'] != tokenizer:
      raise errors.UserError(
        f'The experience bank was made with another tokenizer ({own["tokenizer"][:12]}), {who} '
        f'episodes of {tokenizer[:12]}; make the bank from episodes of the same model.')
    if own['prompt'] and own['prompt'] != prompt:
      raise errors.UserError(
        f'The experience bank was made with other prompts (format {own["agent"]}, system prompt '
        f'{own["prompt"][:12]}), {who} format {agent}, system prompt {prompt[:12]}; make the bank '
        'with the same agent and prompt.')

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the bank, whole or not at all; a killed writer leaves the one that was there.

    Raises:
      errors.UserError: the place cannot be written to.
    """
    folder = pathlib.Path(folder)
    body = ''.join(
      json.dumps(dataclasses.asdict(e), ensure_ascii=False) + '\n' for e in self.experiences
    ).encode()
    digest = hashlib.sha256(body).hexdigest()
    name = f'experiences-{digest[:12]}.jsonl'
    try:
      folder.mkdir(parents=True, exist_ok=True)
      temporary = folder / f'{name}.tmp'
      temporary.write_bytes(body)
      os.replace(temporary, folder / name)
      workdir_lib.write_json(folder / _META, {
        'version': VERSION, 'provenance': self.provenance, 'experiences': len(self),
        'file': name, 'sha256': digest})
      for old in folder.glob('experiences-*'):
        if old.name != name:
          old.unlink()
    except OSError as error:
      raise errors.UserError(
        f'The experience bank {folder} cannot be written ({error.strerror}); free some space, or '
        'take another folder.') from None

  @classmethod
  def load(cls, folder: str | os.PathLike) -> 'ExperienceBank':
    """Reads a bank.

    Raises:
      errors.UserError: there is none, it is torn, of another version, or empty.
    """
    folder = pathlib.Path(folder)
    path = folder / _META
    try:
      record = json.loads(path.read_text(encoding='utf-8'))
      version = record['version']
    except OSError as error:
      raise errors.UserError(
        f'There is no experience bank in {folder} ({error.strerror}: {_META}); '
        'python -m retrieval.experience makes one.') from None
    except (ValueError, TypeError, KeyError):
      raise errors.UserError(f'{path} is torn; make the experience bank again.') from None
    if version != VERSION:
      raise errors.UserError(
        f'The experience bank {folder} has version {version!r}, this program reads {VERSION}; make '
        'it again.')
    try:
      body = (folder / record['file']).read_bytes()
      if hashlib.sha256(body).hexdigest() != record['sha256']:
        raise ValueError
      rows = [json.loads(line) for line in body.decode().splitlines()]
      experiences = [
        Experience(**{**row, 'turns': tuple(Turn(**turn) for turn in row['turns'])})
        for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
      raise errors.UserError(
        f'The experiences of the bank {folder} are torn (missing, or their checksum differs); make '
        'it again.') from None
    if not experiences:
      raise errors.UserError(
        f'The experience bank {folder} is empty; add episodes, or play with memory=none.')
    return cls(experiences, record['provenance'])


def main(flags, load_tokenizer: Callable[[], Tokenizer]) -> ExperienceBank:
  """The command: run folders in, bank out; adds to a bank that is there.

  Args:
    flags: has `episodes` and `out` as attributes.
    load_tokenizer: gives the tokenizer of the model that played.
  """
  runs = [run for run in flags.episodes.split(',') if run]
  if not runs:
    raise errors.UserError('--episodes names no run folder.')
  played = [(run, trajectory.load_episodes(run)) for run in runs]
  there = (pathlib.Path(flags.out) / _META).exists()
  bank = ExperienceBank.load(flags.out) if there else ExperienceBank()
  tokenizer = load_tokenizer()
  for run, episodes in played:
    new = bank.add_episodes(episodes, tokenizer, run)
    counts = collections.Counter(e.outcome for e in new)
    print(f'{run}: {len(episodes)} episodes, {len(new)} new ('
          + (', '.join(f'{n} {name}' for name, n in sorted(counts.items())) or 'none') + ')')
  if not len(bank):
    raise errors.UserError(
      f'No episode of {", ".join(runs)} can be an experience: the bank would be empty.')
  bank.save(flags.out)
  print(f'{len(bank)} experiences in {flags.out}')
  return bank


def define_flags() -> None:
  """Flags of the command; not defined on import, since other programs import this module."""
  from absl import flags
  flags.DEFINE_string('episodes', None, 'Run folders with episodes, comma separated.')
  flags.DEFINE_string('out', None, 'Folder of the bank.')
  flags.DEFINE_string('model', 'smollm2_135m', 'Model that played them (for its tokenizer).')
  flags.DEFINE_string('base', '', "That model's weights; '' is the published ones.")
  flags.DEFINE_string('tokenizer', '', 'Path of its tokenizer, where it is another.')


if __name__ == '__main__':
  # Under the module's own name, so that its classes exist once.
  from absl import flags as absl_flags

  from configs import cli
  from retrieval import experience
  define_flags()

  def load_tokenizer():
    # As a program of its own this module is an entry, and entries look down on every room.
    from agents import policy
    chosen = absl_flags.FLAGS
    return policy.load_tokenizer(chosen.model, chosen.base, chosen.tokenizer)

  cli.run(
    lambda _: experience.main(absl_flags.FLAGS, load_tokenizer), required=('episodes', 'out'))
