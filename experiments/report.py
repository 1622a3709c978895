"""HTML pages about a finished experiment: results, curves, memory, and every episode.

  python -m experiments.report --workdir=runs/demo     # writes runs/demo/report.html

A page is one file without any address in it: it can be mailed, archived and opened offline.
Its rows are those of the run's summary.json, whatever policies and controls they are. Under the
table and the charts it has an episode reader, in which the policies are read side by side on the
same game, and the place where teacher and student part is marked.
"""

import collections
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from agents import policy as policy_lib
from configs import cli
from data import errors, trajectory
from data import tokenizer as tokenizer_lib
from experiments import report_page
from retrieval import hints as hints_lib

TEACHER, STUDENT = 'base+hints', 'distilled'  # The rows whose episodes are held side by side.
TRAININGS = ('warm_start', 'sft', 'distilled')
COLLECTIONS = ('base', 'teacher')
NAME = 'report.html'
_ROW_KEYS = {
  'id', 'n', 'success_rate', 'success_ci95', 'env_steps_mean', 'model_calls_mean',
  'prompt_tokens_mean', 'prefilled_tokens_mean', 'generated_tokens_mean', 'policy', 'memory'}

_MEND = 'start the experiment with this --workdir again to finish it'


def read_json(path: pathlib.Path) -> Any:
  """Reads a file of a run.

  Raises:
    errors.UserError: it is missing or torn.
  """
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise errors.UserError(f'{path} cannot be read ({error.strerror}); {_MEND}.') from None
  except ValueError as error:
    raise errors.UserError(f'{path} is not JSON ({error}); {_MEND}.') from None


def read_metrics(folder: pathlib.Path) -> list[dict[str, float]]:
  """The records of a training; none for a student that had no episode to be trained on."""
  path, done = folder / 'metrics.jsonl', folder / 'done.json'
  if not path.exists() and done.exists() and read_json(done).get('trained') == 0:
    return []
  try:
    records = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines() if line]
    _ = [(float(r['step']), float(r['loss'])) for r in records]
  except OSError as error:
    raise errors.UserError(f'{path} cannot be read ({error.strerror}); {_MEND}.') from None
  except (KeyError, TypeError, ValueError):
    raise errors.UserError(f'{path} holds a broken record; {_MEND}.') from None
  return records


def load_summary(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads the summary of a finished run.

  Raises:
    errors.UserError: no folder, an unfinished run, or a run of another program.
  """
  if not workdir.is_dir():
    raise errors.UserError(
      f'There is no folder {workdir}; give the --workdir of a finished hint distillation.')
  path = workdir / 'summary.json'
  if not path.exists():
    raise errors.UserError(f'{workdir} is no finished run (it has no summary.json); {_MEND}.')
  record = read_json(path)
  rows = record.get('rows') if isinstance(record, dict) else None
  ids = [row.get('id') for row in rows or [] if isinstance(row, dict)]
  if not ids or not (workdir / 'evaluation').is_dir():
    raise errors.UserError(
      f'{path} is not of a hint distillation (it has no rows, or there is no evaluation folder '
      'beside it); give the --workdir of experiments.hint_distillation.')
  if len(set(ids)) < len(rows):
    raise errors.UserError(f'{path}: two rows have one id, or a row has none; {_MEND}.')
  for row in record['rows']:
    if missing := sorted(_ROW_KEYS - row.keys()):
      raise errors.UserError(f'{path}: the row {row["id"]} lacks {", ".join(missing)}; {_MEND}.')
    if not row['n']:
      raise errors.UserError(f'{path}: {row["id"]} was evaluated on no game; {_MEND}.')
  return record


def load_evaluations(
  folder: pathlib.Path, summary: dict[str, Any]
) -> dict[str, dict[str, trajectory.Episode]]:
  """Returns policy -> task id -> episode, the tasks in the same order for every policy.

  Args:
    folder: holds the run of every row.
    summary: has the rows.

  Raises:
    errors.UserError: episodes are missing, or the policies did not play the same games.
  """
  played, counts = {}, {row['id']: row.get('n') for row in summary['rows']}
  for policy in counts:
    episodes = trajectory.load_episodes(folder / policy)
    if len(episodes) != counts[policy]:
      raise errors.UserError(
        f'{folder / policy} holds {len(episodes)} episodes and summary.json '
        f'counts {counts[policy]}; {_MEND}.')
    played[policy] = {e.task_id: e for e in episodes}
  first = next(iter(played))
  tasks = sorted(played[first])
  for policy in played:
    if sorted(played[policy]) != tasks:
      raise errors.UserError(
        f'{folder}: {policy} and {first} were not evaluated on the same games; {_MEND}.')
    played[policy] = {task: played[policy][task] for task in tasks}
  return played


def parting(
  teacher: trajectory.Episode, student: trajectory.Episode
) -> tuple[int | None, int | None] | None:
  """Where two episodes of one game first send different commands.

  Thoughts and replies that hold no command are passed over: what parts two episodes is what is done
  to the world, and the same commands in the same house have the same answers.

  Returns:
    (index into the teacher's steps, index into the student's steps), None for the one that had no
    further command; or None if both sent the same commands to the end.
  """
  commands = [
    [(i, step.action) for i, step in enumerate(e.steps) if step.parsed == 'action']
    for e in (teacher, student)]
  for (i, a), (j, b) in zip(*commands, strict=False):
    if a != b:
      return i, j
  shared = min(map(len, commands))
  if len(commands[0]) == len(commands[1]):
    return None
  return tuple(own[shared][0] if len(own) > shared else None for own in commands)


class Texts:
  """Texts that are stored once, however often they are used: system prompts, few-shots."""

  def __init__(self):
    self.all: list[str] = []
    self._places: dict[str, int] = {}

  def place(self, text: str) -> int:
    if text not in self._places:
      self._places[text] = len(self.all)
      self.all.append(text)
    return self._places[text]


def prompt_parts(
  episode: trajectory.Episode, tokenizer: tokenizer_lib.Tokenizer, texts: Texts
) -> list[list]:
  """The prompt of the first call as [kind, place of its text, is control tokens, tokens] parts.

  Control tokens are parts of their own: text from an environment that only looks like one is
  thereby told from a real one.
  """
  parts = []
  for token, kind in zip(episode.tokens.tolist(), episode.kinds.tolist(), strict=True):
    name, control = trajectory.KINDS[kind], token in tokenizer.special_ids
    if name == 'action':
      break
    if not parts or parts[-1][:2] != [name, control]:
      parts.append([name, control, []])
    parts[-1][2].append(token)
  return [
    [name, texts.place(tokenizer.decode(ids, skip_special=False)), control, len(ids)]
    for name, control, ids in parts]


def _step_record(step: trajectory.Step) -> dict[str, Any]:
  record = {'parsed': step.parsed, 'observation': step.observation}
  if step.thought:
    record['thought'] = step.thought
  if step.action:
    record['action'] = step.action
  # The reply is what was sampled; it is shown where thought and action do not say all of it.
  if step.reply.strip() not in (step.thought.strip(), step.action.strip()):
    record['reply'] = step.reply
  if step.reward:
    record['reward'] = step.reward
  if not step.changed:
    record['unchanged'] = True
  if step.stop_reason == 'length':
    record['cut'] = True
  return record


def _retrieved(
  episode: trajectory.Episode, bank_places: dict[str, int]
) -> list[dict[str, Any]]:
  """What was in the memory block, in its order, with what the record says of where it came from."""
  texts: dict[str, str] = {}
  found = []
  for r in episode.retrieved:
    name = str(r.get('id'))
    # Where a block holds again what an earlier one held, the text stands there only.
    texts[name] = str(r.get('text', '')) or texts.get(name, '')
    record = {'text': texts[name], 'score': float(r.get('score', math.nan)), 'step': 0,
              'bank': bank_places.get(name)}
    if r.get('outcome'):
      record |= {'outcome': str(r['outcome']), 'provenance': str(r.get('provenance', '')),
                 'step': int(r.get('step', 0))}
    found.append(record)
  return found


def episode_record(
  episode: trajectory.Episode, bank_places: dict[str, int],
  tokenizer: tokenizer_lib.Tokenizer | None, texts: Texts
) -> dict[str, Any]:
  """What the reader shows of one episode; `prompt` is None without its tokenizer."""
  readable = tokenizer is not None and tokenizer.fingerprint == episode.tokenizer
  return {
    'won': bool(episode.success),
    'termination': episode.termination,
    'prompt': prompt_parts(episode, tokenizer, texts) if readable else None,
    'retrieved': _retrieved(episode, bank_places),
    'steps': [_step_record(step) for step in episode.steps],
    'env_steps': int(episode.env_steps),
    'calls': int(episode.model_calls),
    'tokens': [int(episode.prompt_tokens), int(episode.prefilled_tokens),
               int(episode.generated_tokens)],
  }


def reader_data(
  played: dict[str, dict[str, trajectory.Episode]], bank_places: dict[str, int],
  tokenizer: tokenizer_lib.Tokenizer | None, *, teacher: str = TEACHER, student: str = STUDENT,
  base: str = 'base', memory: str = 'hints'
) -> dict[str, Any]:
  """Everything that the episode reader needs, of JSON's types.

  Args:
    played: row -> task id -> episode, as `load_evaluations` gives them.
    bank_places: hint id -> its number on the page.
    tokenizer: of the run; None shows no prompts.
    teacher, student, base: the rows whose episodes are held against one another.
    memory: what the block holds, in words.
  """
  texts = Texts()
  policies, games = list(played), []
  both = {teacher, student} <= played.keys()
  for task, first in played[policies[0]].items():
    episodes = [played[policy][task] for policy in policies]
    parts = parting(played[teacher][task], played[student][task]) if both else None
    games.append({
      'task': task,
      'type': first.task_type,
      'instruction': first.instruction,
      'parting': None if parts is None else list(parts),
      'episodes': [episode_record(e, bank_places, tokenizer, texts) for e in episodes],
    })
  # Games of one outcome lie together, so that the map shows how large each group is; the student's
  # outcome makes the largest groups, then the teacher's.
  weight = sorted(range(len(policies)), key=lambda i: (
    policies[i] != student, policies[i] != teacher, -i))
  games.sort(key=lambda game: [not game['episodes'][i]['won'] for i in weight])
  place = lambda policy: policies.index(policy) if policy in played else -1
  return {
    'policies': policies,
    'teacher': place(teacher),
    'student': place(student),
    'base': place(base),
    'memory': memory,
    'texts': texts.all,
    'games': games,
  }


def token_means(episodes: Sequence[trajectory.Episode]) -> dict[str, list[float]]:
  """Mean tokens per episode with a 95 % interval of the mean, as [mean, low, high].

  `billed` counts the whole prompt of every call, `computed` what the engine really processed.
  """
  found = {}
  for name, field in (('billed', 'prompt_tokens'), ('computed', 'prefilled_tokens')):
    values = [getattr(e, field) + e.generated_tokens for e in episodes]
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    half = 1.959964 * math.sqrt(spread / len(values))
    found[name] = [mean, max(0.0, mean - half), mean + half]
  return found


def solved_by_call(episodes: Sequence[trajectory.Episode]) -> list[float]:
  """Share of the episodes solved within 0, 1, 2, ... model calls."""
  calls = [e.model_calls for e in episodes if e.success]
  last = max((e.model_calls for e in episodes), default=0)
  return [sum(c <= n for c in calls) / max(1, len(episodes)) for n in range(last + 1)]


def hint_uses(episodes: Sequence[trajectory.Episode]) -> dict[str, list[int]]:
  """Per hint id: in how many episodes it was in the prompt, and how many of those were solved."""
  uses = collections.defaultdict(lambda: [0, 0])
  for episode in episodes:
    for hint in {str(r.get('id')) for r in episode.retrieved}:
      uses[hint][0] += 1
      uses[hint][1] += bool(episode.success)
  return dict(uses)


def load_tokenizer(config: dict[str, Any]) -> tuple[tokenizer_lib.Tokenizer | None, str]:
  """The run's tokenizer, or None and the reason: a report must not need the weights' folder."""
  try:
    return policy_lib.load_tokenizer(
      str(config.get('model', '')), str(config.get('base', '')),
      str(config.get('tokenizer', ''))), ''
  except errors.UserError as error:
    return None, str(error)


def paired_with_counts(
  summary: dict[str, Any], played: dict[str, dict[str, trajectory.Episode]]
) -> list[dict[str, Any]]:
  """The differences between rows that were played, with the games that only one of them solved."""
  wins = {policy: [e.success for e in tasks.values()] for policy, tasks in played.items()}
  return [
    {**pair, 'only_a': sum(x and not y for x, y in zip(wins[pair['a']], wins[pair['b']])),
     'only_b': sum(y and not x for x, y in zip(wins[pair['a']], wins[pair['b']]))}
    for pair in summary.get('paired', []) if {pair['a'], pair['b']} <= wins.keys()]


def gather(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads a finished run into what `report_page.render` draws.

  Raises:
    errors.UserError: the run is not there, not finished, or damaged.
  """
  summary = load_summary(workdir)
  config = read_json(workdir / 'config.json')
  if not isinstance(config, dict):
    raise errors.UserError(f'{workdir / "config.json"} is not the config of a run; {_MEND}.')
  played = load_evaluations(workdir / 'evaluation', summary)
  bank = hints_lib.HintBank.load(workdir / 'hints' / 'bank.json')
  tokenizer, problem = load_tokenizer(config)
  evaluations = {policy: list(played[policy].values()) for policy in played}
  if tokenizer and next(iter(evaluations.values()))[0].tokenizer != tokenizer.fingerprint:
    problem = 'the tokenizer found is not the one that the episodes were played with'
  collected = {name: trajectory.load_episodes(workdir / name) for name in COLLECTIONS}
  # A later round starts from the round before and has no warm start of its own.
  warm = config.get('warm_episodes', 1) and not config.get('next_after')
  paired = paired_with_counts(summary, played)
  return {
    'summary': {**summary, 'paired': paired},
    'config': config,
    'tokens': {policy: token_means(evaluations[policy]) for policy in played},
    'solved': {policy: solved_by_call(evaluations[policy]) for policy in played},
    'trainings': {
      name: read_metrics(workdir / name) for name in TRAININGS if warm or name != 'warm_start'},
    'terminations': [
      *((f'evaluation: {policy}', policy, collections.Counter(
        e.termination for e in evaluations[policy])) for policy in played),
      *((f'training houses: {name}', TEACHER if name == 'teacher' else name,
         collections.Counter(e.termination for e in collected[name])) for name in COLLECTIONS)],
    'bank': bank,
    'uses': hint_uses(collected['teacher'] + evaluations.get(TEACHER, [])),
    'reader': reader_data(
      played, {hint.id: i for i, hint in enumerate(bank.hints)}, tokenizer),
    'prompt_problem': problem,
  }


def write(workdir: str | os.PathLike) -> list[pathlib.Path]:
  """Writes the page of a finished run, each whole or not at all; returns the paths.

  A hint distillation has one page, an experience retrieval one for each of its splits.

  Raises:
    errors.UserError: the run is not there, not finished or damaged, or cannot be written to.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / 'summary.json'
  record = read_json(path) if path.is_file() else None
  if isinstance(record, dict) and record.get('experiment') == 'experience_retrieval':
    from experiments import report_experience  # it reads with what is here
    pages = report_experience.pages(workdir, record)
  else:
    pages = {NAME: gather(workdir)}
  return [_write(workdir / name, report_page.render(run)) for name, run in pages.items()]


def _write(path: pathlib.Path, page: str) -> pathlib.Path:
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    # A lone surrogate in a model's reply must not cost the whole page.
    temporary.write_text(page, encoding='utf-8', errors='replace')
    os.replace(temporary, path)
  except OSError as error:
    raise errors.UserError(
      f'{path} cannot be written ({error.strerror}); make room or copy the run elsewhere.'
    ) from None
  return path


def main(_) -> None:
  for path in write(flags.FLAGS.workdir):
    print(f'{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser')


def define_flags() -> None:
  """Flags of the command; not defined on import, since tests import this module."""
  flags.DEFINE_string('workdir', None, 'Folder of a finished experiment.')


if __name__ == '__main__':
  define_flags()
  cli.run(main, required=('workdir',))
