r"""From failed episodes to a bank of hints (paper A, section 3, step 2).

A writer gives 1 to 4 short imperative hints per failed trajectory (`retrieval.hint_writers`). Here
they are normalised, grouped by task type, counted, freed of near-duplicates and kept in a readable
JSON file that says of every hint which episodes taught it.

  python -m retrieval.hints --episodes=runs/base --writer=rules --out=runs/bank.json
  python -m retrieval.hints --episodes=runs/base --writer=openai --model=NAME \
    --base_url=http://localhost:8000/v1 --out=runs/bank.json
"""

import collections
import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data import errors
from data import text as text_lib
from data import trajectory as trajectory_lib

VERSION = 1
WRITERS = ('rules', 'self', 'openai')
SIMILARITY = 0.85  # Paper A, section 3: near-duplicates within a type.

# Words that carry no part of a rule. 'open', 'on', 'use', 'from', 'before', 'after' and 'not' are
# none of them: 'fire it after you open it' is another fact than 'before you open it'.
_STOP_WORDS = frozenset((
  'a', 'an', 'and', 'are', 'as', 'at', 'be', 'by', 'do', 'each', 'every', 'for', 'get', 'in',
  'into', 'is', 'it', 'its', 'make', 'of', 'or', 'so', 'some', 'that', 'the', 'them', 'then',
  'there', 'this', 'those', 'to', 'up', 'will', 'with', 'you', 'your'))


@dataclasses.dataclass
class Hint:
  """One lesson, and the failures that taught it.

  Attributes:
    id: stable name, made of the task type and a hash of the text.
    text: imperative, with placeholders such as {object} where the next task differs.
    task_type: the type of the tasks that it was written for.
    count: number of failed episodes that gave it, near-duplicates included.
    sources: those episodes as {'episode_id', 'task_id'}.
    writer: 'rules', 'self' or 'openai'.
  """

  id: str
  text: str
  task_type: str
  count: int
  sources: list[dict[str, str]]
  writer: str

  def taught_only_by(self, task_id: str) -> bool:
    """Whether leaving `task_id` out leaves nothing that supports this hint."""
    return bool(self.sources) and all(s['task_id'] == task_id for s in self.sources)


def hint_id(task_type: str, text: str) -> str:
  """Returns the stable id of a hint text within its type."""
  return f'{task_type}-{hashlib.sha256(text.encode()).hexdigest()[:10]}'


def normalise(text: str) -> str:
  """Valid text: one line, single spaces, a capital, a full stop; no list marker, no quotes."""
  text = ' '.join(text_lib.valid(text).split())
  text = re.sub(r'^(?:[-*•]+|\(?\d{1,2}[.):])\s*', '', text).strip('"“”` ')
  text = re.sub(r'\s+([.,;:!])', r'\1', text).rstrip('.;,: ')
  if not text:
    return ''
  return text[0].upper() + text[1:] + ('' if text[-1] in '!?' else '.')


def rule_words(text: str) -> tuple[str, ...]:
  """The words that make up the rule of a hint, in order: no stop words, plain plurals folded."""
  words = re.findall(r"\{\w+\}|[a-z0-9']+", text.lower())
  fold = lambda w: w[:-1] if len(w) > 3 and w.endswith('s') and not w.endswith('ss') else w
  return tuple(fold(w) for w in words if w not in _STOP_WORDS)


def near_duplicates(a: str, b: str) -> bool:
  """Whether two hints of one type say the same.

  Similarity alone does not tell: 'fire it with the kiln to make it glazed' and '... matte' are 0.9
  alike and different facts. So hints must also have the same rule words in the same order; what may
  differ is articles, plurals, punctuation and case.
  """
  if rule_words(a) != rule_words(b):
    return False
  return difflib.SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio() > SIMILARITY


@dataclasses.dataclass
class HintBank:
  """Hints of all task types, most frequent first within a type, and what they were made from.

  Attributes:
    hints: sorted by task type, then count (descending), then text.
    provenance: runs, policies, models, writer and the counts of the way from failures to hints.
      Holds no dates, so that the same episodes give the same file.
  """

  hints: list[Hint]
  provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

  def of_type(self, task_type: str) -> list[Hint]:
    """The hints of one type, most frequent first; empty for a type that the bank does not know."""
    return [h for h in self.hints if h.task_type == task_type]

  @property
  def task_types(self) -> list[str]:
    return sorted({h.task_type for h in self.hints})

  @property
  def fingerprint(self) -> str:
    """SHA-256 of ids, texts and types: what retrieval depends on."""
    rows = [[h.id, h.task_type, h.text] for h in self.hints]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

  def save(self, path: str | os.PathLike) -> None:
    """Writes the bank as indented JSON, whole or not at all.

    Raises:
      errors.UserError: if the place cannot be written to.
    """
    path = pathlib.Path(path)
    record = {
      'version': VERSION,
      'provenance': self.provenance,
      'hints': [dataclasses.asdict(h) for h in self.hints],
    }
    temporary = path.with_name(f'{path.name}.tmp')
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(temporary, 'w', encoding='utf-8') as f:
        f.write(json.dumps(record, indent=2, ensure_ascii=False) + '\n')
        f.flush()
        os.fsync(f.fileno())
      os.replace(temporary, path)
    except OSError as error:
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
      raise errors.UserError(
        f'The hint bank {path} cannot be written ({error.strerror}); free some space, or give '
        'another --out.') from None

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'HintBank':
    """Reads a bank.

    Raises:
      errors.UserError: if the file is missing, broken, of another version or holds a bad hint.
    """
    try:
      record = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    except OSError as error:
      raise errors.UserError(
        f'The hint bank {path} cannot be read ({error.strerror}); '
        'python -m retrieval.hints makes one.') from None
    except ValueError as error:
      raise errors.UserError(f'The hint bank {path} is not JSON: {error}.') from None
    if not isinstance(record, dict) or record.get('version') != VERSION:
      found = record.get('version') if isinstance(record, dict) else None
      raise errors.UserError(
        f'The hint bank {path} has version {found!r}, this program reads {VERSION}; make it again.')
    hints = []
    for number, row in enumerate(record.get('hints', [])):
      try:
        hint = Hint(**row)
        if not (isinstance(hint.text, str) and hint.text and isinstance(hint.task_type, str)
                and isinstance(hint.count, int)):
          raise TypeError
        _ = [(s['episode_id'], s['task_id']) for s in hint.sources]
        hint.text = text_lib.valid(hint.text)
      except (TypeError, KeyError):
        raise errors.UserError(
          f'Hint {number} of the bank {path} is incomplete; mend it or make the bank again.'
        ) from None
      hints.append(hint)
    if len({h.id for h in hints}) != len(hints):
      raise errors.UserError(f'The hint bank {path} holds a hint id twice; make it again.')
    return cls(hints, record.get('provenance', {}))


def merge(
  rows: Iterable[tuple[str, str, int, dict[str, str]]], writer: str
) -> tuple[list[Hint], int]:
  """Normalises, groups, counts and deduplicates.

  Args:
    rows: (task type, text, number of the failure, its source) per written hint; numbers tell the
      failures of several runs apart, whose episode ids may coincide.
    writer: name of the writer.

  Returns:
    The hints, sorted as in `HintBank`, and how many texts were merged into another one.
  """
  groups: dict[tuple[str, str], dict[int, dict[str, str]]] = collections.defaultdict(dict)
  for task_type, text, number, source in rows:
    if text := normalise(text):
      groups[task_type, text][number] = source
  ranked = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
  kept: list[tuple[str, str, dict[int, dict[str, str]]]] = []
  # Near-duplicates have equal rule words, so only those need comparing: linear, not quadratic.
  buckets: dict[tuple[str, tuple[str, ...]], list] = collections.defaultdict(list)
  for (task_type, text), failures in ranked:
    bucket = buckets[task_type, rule_words(text)]
    twin = next((entry for entry in bucket if near_duplicates(entry[1], text)), None)
    if twin is None:
      entry = (task_type, text, dict(failures))
      kept.append(entry)
      bucket.append(entry)
    else:
      twin[2].update(failures)
  hints = [
    Hint(
      id=hint_id(task_type, text), text=text, task_type=task_type, count=len(failures),
      sources=[source for _, source in sorted(failures.items())], writer=writer)
    for task_type, text, failures in kept]
  hints.sort(key=lambda h: (h.task_type, -h.count, h.text))
  return hints, len(ranked) - len(kept)


def distil(
  episodes: Sequence[trajectory_lib.Episode], writer, *, runs: Sequence[str] = ()
) -> HintBank:
  """Makes the bank of hints that the failures among `episodes` teach.

  Args:
    episodes: successes and failures; successes are only counted.
    writer: has `name`, `write(failures) -> list of lists of texts`, `counts` and `provenance()`.
    runs: where the episodes come from, for the record.
  """
  failures = [e for e in episodes if not e.success]
  written = writer.write(failures)
  rows = [
    (e.task_type, text, number, {'episode_id': e.id, 'task_id': e.task_id})
    for number, (e, texts) in enumerate(zip(failures, written, strict=True)) for text in texts]
  hints, merged = merge(rows, writer.name)
  unique = lambda field: sorted({str(getattr(e, field)) for e in failures})
  types = {}
  for task_type in sorted({e.task_type for e in episodes}):
    own = [(e, t) for e, t in zip(failures, written) if e.task_type == task_type]
    types[task_type] = {
      'episodes': sum(e.task_type == task_type for e in episodes),
      'failures': len(own),
      'failures_without_hints': sum(not t for _, t in own),
      'written': sum(len(t) for _, t in own),
      'hints': sum(h.task_type == task_type for h in hints),
    }
  return HintBank(hints, {
    'runs': list(runs),
    'policies': unique('policy'),
    'agents': unique('agent'),
    'models': unique('model'),
    'writer': writer.provenance(),
    'writer_counts': dict(sorted(writer.counts.items())),
    'episodes': len(episodes),
    'failures': len(failures),
    'failures_without_hints': sum(not texts for texts in written),
    'written': len(rows),
    'merged': merged,
    'similarity': SIMILARITY,
    'types': types,
  })


def summary_table(bank: HintBank) -> str:
  """The way from failures to hints, one line per task type, for the terminal."""
  columns = ('episodes', 'failures', 'failures_without_hints', 'written', 'hints')
  titles = ('task type', 'episodes', 'failures', 'without hints', 'written', 'hints')
  types = bank.provenance.get('types', {})
  rows = [(name, *(str(counts[c]) for c in columns)) for name, counts in types.items()]
  rows.append(('all', *(str(sum(c[column] for c in types.values())) for column in columns)))
  widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
  line = lambda row: '  '.join(
    cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row))
  lines = [line(titles), '-' * len(line(titles)), *map(line, rows)]
  provenance = bank.provenance
  lines.append(f'{provenance.get("merged", 0)} near-duplicates merged into hints that were kept.')
  for name, count in provenance.get('writer_counts', {}).items():
    lines.append(f'writer: {name.replace("_", " ")}: {count}')
  return '\n'.join(lines)


def check_flags(writer: str, model: str) -> None:
  """Raises errors.UserError for a writer that does not exist or lacks what it needs."""
  if writer not in WRITERS:
    raise errors.UserError(f'There is no hint writer {writer!r}; there are {", ".join(WRITERS)}.')
  if writer == 'openai' and not model:
    raise errors.UserError('--writer=openai needs --model, a name that the server knows.')


def load_runs(runs: Sequence[str]) -> list[trajectory_lib.Episode]:
  """Episodes of several run folders, one after the other.

  Raises:
    errors.UserError: a folder holds no episodes, or none of the episodes failed.
  """
  if not runs:
    raise errors.UserError('--episodes names no run folder.')
  episodes = [e for run in runs for e in trajectory_lib.load_episodes(run)]
  if all(e.success for e in episodes):
    raise errors.UserError(
      f'There is no failure among the {len(episodes)} episodes of {", ".join(runs)}: hints come '
      'from failures.')
  return episodes


def main(flags, load_policy: Callable[[], tuple] | None = None) -> HintBank:
  """The command: episodes in, bank and table out.

  Args:
    flags: has the flags of `define_flags` as attributes.
    load_policy: gives (model, tokenizer, name) of the policy for writer 'self'; this room knows
      neither models nor engines, so whoever calls it brings them.
  """
  from retrieval import hint_writers
  check_flags(flags.writer, flags.model)
  runs = [run for run in flags.episodes.split(',') if run]
  episodes = load_runs(runs)
  answers = f'{flags.out}.answers.jsonl'
  if flags.writer == 'rules':
    writer = hint_writers.RulesWriter()
  elif flags.writer == 'openai':
    writer = hint_writers.OpenAIWriter(
      flags.base_url, flags.model, answers_path=answers, timeout_s=flags.timeout_s,
      retries=flags.retries)
  else:
    model, tokenizer, name = load_policy()
    writer = hint_writers.PolicyWriter(
      hint_writers.engine_generate(
        model, tokenizer, slots=flags.slots, max_context=flags.max_context),
      model=' + '.join(filter(None, (name, flags.adapter))), answers_path=answers)
  bank = distil(episodes, writer, runs=runs)
  bank.save(flags.out)
  print(summary_table(bank))
  print(f'{len(bank.hints)} hints in {flags.out}')
  return bank


def define_flags() -> None:
  """Flags of the command; not defined on import, since other programs import this module."""
  from absl import flags
  flags.DEFINE_string('episodes', None, 'Run folders with episodes, comma separated.')
  flags.DEFINE_string('out', None, 'JSON file to write the bank to.')
  flags.DEFINE_string('writer', 'rules', f'Who writes the hints: {", ".join(WRITERS)}.')
  flags.DEFINE_string('model', '', "Model name, for writer 'self' or 'openai'.")
  flags.DEFINE_string('base', '', "Weights of writer 'self'; '' is the published ones.")
  flags.DEFINE_string('adapter', '', "PEFT folder on the model of writer 'self'.")
  flags.DEFINE_integer('slots', 8, "Episodes that writer 'self' reads at a time.", lower_bound=1)
  flags.DEFINE_integer('max_context', 4096, "Tokens that writer 'self' reads at most.")
  flags.DEFINE_string(
    'base_url', 'https://api.openai.com/v1',
    "Server of writer 'openai'; its key comes from OPENAI_API_KEY.")
  flags.DEFINE_float('timeout_s', 60.0, "Seconds that writer 'openai' waits for one answer.")
  flags.DEFINE_integer('retries', 4, "Attempts of writer 'openai' after the first.", lower_bound=0)


if __name__ == '__main__':
  # Under the module's own name, so that its classes exist once.
  from absl import flags as absl_flags

  from configs import cli
  from retrieval import hints
  define_flags()

  def load_policy():
    # As a program of its own this module is an entry, and entries look down on every room.
    from agents import policy
    chosen = absl_flags.FLAGS
    base = policy.load_base(chosen.model or 'smollm2_135m', chosen.base)
    return base.model(chosen.adapter), base.tokenizer, base.name

  cli.run(lambda _: hints.main(absl_flags.FLAGS, load_policy), required=('episodes', 'out'))
