"""Files runs as committed results and writes the tables that are made from them.

  python -m experiments.results_table --workdir=runs/demo --name=demo
  python -m experiments.results_table      # only writes the tables again

No number of README.md and of experiments/results/README.md is copied by hand: what stands between
their markers, and the plot, is generated here, and a test compares the two.
"""

import datetime
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from data import errors, summary
from data import workdir as workdir_lib
from experiments import aot_table, experience_rows
from experiments.bench import kv_cache, lengths, quantization, retrieval

_ROOT = pathlib.Path(__file__).parents[1]
RESULTS = pathlib.Path(__file__).parent / 'results'
_SEEDS = ('seed0', 'seed1', 'seed2')
_DIFFERENCES = (
  ('base+hints', 'base'), ('sft', 'base'), ('distilled', 'base'), ('distilled', 'sft'),
  ('distilled', 'base+hints'), ('base+hints', 'base+random'), ('base+hints', 'base+fixed'),
  ('sft+hints', 'sft'), ('distilled+hints', 'distilled'))


def path_of(name: str, method: str = 'hint_distillation') -> pathlib.Path:
  """Where the result of that name is committed."""
  return RESULTS / f'{method}_{name}.json'


def load(name: str, method: str = 'hint_distillation') -> dict[str, Any] | None:
  """A committed result; None where there is none of that name."""
  return workdir_lib.read_record(path_of(name, method))


def file_run(
  workdir: pathlib.Path, name: str, *, command: str, machine: str, method: str = 'hint_distillation'
) -> pathlib.Path:
  """Copies a finished run's summary to the results, with what measured it; returns the file.

  Args:
    workdir: the run's folder.
    name: of the result.
    command: that made it.
    machine: what it ran on.
    method: where the summary does not say it as `experiment`.

  Raises:
    errors.UserError: the run is not finished.
  """
  path = workdir / 'summary.json'
  if not path.is_file():
    raise errors.UserError(f'{path} is not there; give --workdir of a finished run.')
  text = path.read_text()
  if data := os.environ.get('HINTSIGHT_DATA'):
    # Where the data lay on that machine says nothing on another one.
    text = text.replace(data.rstrip('/'), '${HINTSIGHT_DATA}')
  # Its own folder, and another run's beside it from which it goes on.
  for folder, shown in ((workdir, '${workdir}'), (workdir.parent, '${workdir}/..')):
    for spelt in {folder.absolute(), folder} - {pathlib.Path()}:
      # The whole path, wherever it stands in a list of them.
      text = re.sub(rf'(?<![\w./-]){re.escape(str(spelt))}(?=["/,])', shown, text)
  record = json.loads(text)
  record['measured'] = {
    'command': command, 'machine': machine,
    'date': datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()}
  RESULTS.mkdir(exist_ok=True)
  path = path_of(name, record.get('experiment', method))
  workdir_lib.write_json(path, record)
  return path


# Tables of one result, and of several seeds.


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows of one summary.json as Markdown."""
  lines = [
    '| policy | success % (95 % interval) | steps | prompt tokens | computed tokens | generated |',
    '|---|---|---|---|---|---|']
  for row in rows:
    low, high = row['success_ci95']
    lines.append(
      f'| {row["id"]} | {100 * row["success_rate"]:.1f} ({100 * low:.1f} to {100 * high:.1f}) | '
      f'{row["env_steps_mean"]:.1f} | {row["prompt_tokens_mean"]:.0f} | '
      f'{row["prefilled_tokens_mean"]:.0f} | {row["generated_tokens_mean"]:.0f} |')
  return '\n'.join(lines)


def score_line(rows: Sequence[Mapping[str, Any]]) -> str:
  """Mean scores of 100 where a game that is not won can have one; '' where none has."""
  if all(abs(row.get('score_mean', row['success_rate']) - row['success_rate']) < 1e-9
         for row in rows):
    return ''
  return 'Mean score of 100: ' + ', '.join(
    f'{row["id"]} {100 * row["score_mean"]:.1f}' for row in rows) + '.'


def pair_line(pair: Mapping[str, Any]) -> str:
  """A difference with its interval, and what it is worth."""
  low, high = (100 * x for x in pair['ci95'])
  verdict = '' if low > 0 or high < 0 else ' (not significant)'
  seeds = ''
  if 'by_seed' in pair:
    seeds = '; by seed ' + ', '.join(f'{100 * d:+.1f}' for d in pair['by_seed'])
  return (f'- {pair["a"]} - {pair["b"]}: {100 * pair["difference"]:+.1f} points, '
          f'95 % interval {low:+.1f} to {high:+.1f}{verdict}{seeds}')


def measured_line(records: Sequence[Mapping[str, Any]]) -> str:
  """Games, seeds, machine, date, minutes and command of these results."""
  rows = [record['rows'][0] for record in records]
  measured = [record['measured'] for record in records]
  minutes = [sum(record['wall_s'].values()) / 60 for record in records]

  def joined(values: Sequence[str]) -> str:
    return ', '.join(dict.fromkeys(values))

  seeds = joined([str(row['seed']) for row in rows])
  several = ',' in seeds

  return (
    f'n = {rows[0]["n"]} games{" a seed" if several else ""}, paired, greedy, '
    f'seed{"s" if several else ""} {seeds}; '
    f'{joined([m["machine"] for m in measured])}; {joined([m["date"] for m in measured])}; '
    f'{", ".join(f"{m:.0f}" for m in minutes)} minutes; '
    f'{joined(["`" + m["command"] + "`" for m in measured])}.')


def decoder_line(record: Mapping[str, Any]) -> str:
  """What a decoder was trained on from random weights, stage by stage, and how well it reads."""
  stages, earlier = [], record
  while earlier:
    stages.append(earlier)
    # RUN/small_decoder, filed under the run's name.
    start = pathlib.PurePosixPath(earlier.get('start_decoder', ''))
    earlier = workdir_lib.read_record(path_of(start.parent.name, 'from_scratch'))

  def total(key: str):
    return sum(stage[key] for stage in stages)

  drills = sum(stage[key] for stage in stages for key in stage if key.endswith('drills'))
  told, untold = (
    100 * record['held_out'][key]['rule' if drills else 'replies'] for key in ('told', 'untold'))
  if drills:
    learned = f'{total("episodes"):,} expert episodes and {drills:,} drills'
    reads = ('its first reply that names a verb is right in '
             f'{told:.0f} % where one of several hints tells it, and in {untold:.0f} % where a '
             'label does.')
  else:
    learned = f'{total("episodes"):,} expert episodes'
    reads = (f"{told:.0f} % of its replies are the expert's, word for word, where hints are shown, "
             f'and {untold:.0f} % where none are.')
  return (
    f'{record["parameters"]:,} parameters, trained on {total("tokens"):,} tokens of '
    f'{learned} in {total("wall_s") / 60:.0f} minutes. '
    f'In held-out episodes {reads}')


def single(record: Mapping[str, Any], ids: Sequence[str] = ()) -> str:
  """One result as Markdown; `ids` are the rows that are shown, () for all."""
  rows = [row for row in record['rows'] if not ids or row['id'] in ids]
  shown = {row['id'] for row in rows}
  pairs = [pair for pair in record['paired'] if {pair['a'], pair['b']} <= shown]
  scores = score_line(rows)
  return '\n'.join(
    [rows_table(rows), '', *map(pair_line, pairs), *(['', scores] if scores else []), '',
     measured_line([record])])


def merge(
  records: Sequence[Mapping[str, Any]], differences: Sequence[tuple[str, str]] = _DIFFERENCES
) -> dict[str, Any]:
  """Rows and differences over several seeds of one experiment.

  Args:
    records: committed results with the same rows and numbers of games.
    differences: pairs of row ids; those that both were played are reported.

  Returns:
    {'rows', 'paired'}: a row's success rate is that of all games together, `by_seed` the rates of
    the seeds; other columns are means of the seeds. Differences are paired by game; their interval
    resamples the games of each seed. Three seeds are too few to resample the seeds themselves: how
    far they lie apart is shown by `by_seed`.
  """
  ids = [row['id'] for row in records[0]['rows']
         if all(row['id'] in record['won']['rows'] for record in records)]
  won = {id_: [np.array(record['won']['rows'][id_]) for record in records] for id_ in ids}
  rows = []
  for id_ in ids:
    own = [next(row for row in record['rows'] if row['id'] == id_) for record in records]
    merged = {key: float(np.mean([row[key] for row in own]))
              for key in own[0] if key.endswith('_mean')}
    games = np.concatenate(won[id_])
    rows.append({
      'id': id_, 'n': len(games), 'success_rate': float(games.mean()),
      'success_ci95': summary.wilson(int(games.sum()), len(games)),
      'by_seed': [float(w.mean()) for w in won[id_]], **merged})
  pairs = [
    {'a': a, 'b': b, **summary.bootstrap([x - y for x, y in zip(won[a], won[b])])}
    for a, b in differences if a in won and b in won]
  return {'rows': rows, 'paired': pairs}


def seeds_table(records: Sequence[Mapping[str, Any]]) -> str:
  """Several seeds of one experiment as Markdown."""
  merged = merge(records)
  lines = [
    '| policy | success % (95 % interval) | by seed | steps | prompt tokens | computed tokens | '
    'generated |', '|---|---|---|---|---|---|---|']
  for row in merged['rows']:
    low, high = row['success_ci95']
    lines.append(
      f'| {row["id"]} | {100 * row["success_rate"]:.1f} ({100 * low:.1f} to {100 * high:.1f}) | '
      f'{", ".join(f"{100 * rate:.1f}" for rate in row["by_seed"])} | '
      f'{row["env_steps_mean"]:.1f} | {row["prompt_tokens_mean"]:.0f} | '
      f'{row["prefilled_tokens_mean"]:.0f} | {row["generated_tokens_mean"]:.0f} |')
  return '\n'.join(
    [*lines, '', *map(pair_line, merged['paired']), '', measured_line(records)])


# Experience retrieval: policies by index conditions.

_EXPERIENCE = 'experience_retrieval'
_CONDITIONS = ('matched', 'mismatched', 'empty', 'all', 'random', 'growing')


def _experience_seeds() -> list[dict[str, Any]]:
  return [record for name in _SEEDS if (record := load(name, _EXPERIENCE))]


def experience_tables(records: Sequence[Mapping[str, Any]], *, brief: bool = False) -> str:
  """Results of experience retrieval, one or several seeds of them, as Markdown.

  Args:
    records: as `experiments.experience_retrieval` makes them.
    brief: of the differences, those on the hard tasks only.
  """
  pairs = [(p['a'], p['b']) for p in records[0]['paired']
           if experience_rows.headline((p['a'], p['b']))]
  merged = merge(records, pairs)
  rates = {row['id']: row for row in merged['rows']}
  there = {name.partition('+')[2] or 'empty' for name in rates}
  columns = [column for column in _CONDITIONS if column in there]
  lines = []
  for split in experience_rows.SPLITS:
    lines += [f'| {split}: success % (95 % interval) | ' + ' | '.join(columns) + ' |',
              '|---' * (len(columns) + 1) + '|']
    for policy in experience_rows.POLICIES:
      cells = []
      for column in columns:
        row = rates.get(experience_rows.Row(split, policy, column).id)
        low, high = row['success_ci95'] if row else (0, 0)
        cells.append(
          f'{100 * row["success_rate"]:.1f} ({100 * low:.1f} to {100 * high:.1f})' if row else '')
      if any(cells):
        lines.append(f'| {policy} | ' + ' | '.join(cells) + ' |')
    lines.append('')
  if brief:
    lines += [pair_line(pair) for pair in merged['paired'] if pair['a'].startswith('hard/')]
    return '\n'.join([*lines, '', measured_line(records)])
  for name, costs in experience_rows.collapse(
      {name: row['success_rate'] for name, row in rates.items()}).items():
    lines.append(f'- {name}: the empty index costs ' + ', the mismatched one '.join(
      f'{100 * costs[key]:.1f} points' for key in ('empty', 'mismatched') if key in costs))
  scores = score_line(merged['rows'])
  return '\n'.join([
    *lines, '', *map(pair_line, merged['paired']), *(['', scores] if scores else []), '',
    measured_line(records)])


_ABLATED = ('easy/exprag_lora+matched', 'hard/exprag_lora+matched', 'hard/exprag_lora',
            'easy/lora', 'hard/lora')
# What a record's config says besides the recipe.
_NOT_RECIPE = ('evaluate',)


def _changes(record: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
  """The config keys in which a record differs, as its command line has them."""
  return ', '.join(
    f'`{key}={value:g}`' if isinstance(value, float) else f'`{key}={value}`'
    for key, value in record['config'].items()
    if key not in _NOT_RECIPE and value != reference['config'].get(key))


def _is_ablation(record: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
  """Whether it played the reference's own games with one factor changed."""
  same = ('setting', 'model', 'seed', 'eval_games', 'index_games')
  return (record is not reference and record['won']['tasks'] == reference['won']['tasks']
          and all(record['config'].get(key) == reference['config'].get(key) for key in same))


def ablations_table(
  reference: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
) -> str:
  """One-factor ablations of experience retrieval as Markdown.

  Args:
    reference: the run with the recipe as it is.
    records: name -> a run with one factor changed, on the same games.
  """
  shown = [id_ for id_ in _ABLATED
           if any(id_ in record['won']['rows'] for record in records.values())]
  lines = [
    '| changed | ' + ' | '.join(shown) + ' | hard, matched: difference (95 % interval) |',
    '|---' * (len(shown) + 2) + '|']
  for record in [reference, *records.values()]:
    rates = {row['id']: row for row in record['rows']}
    cells = [f'{100 * rates[id_]["success_rate"]:.1f}' if id_ in rates else '' for id_ in shown]
    difference = ''
    if record is not reference:
      won, own = (np.array(r['won']['rows'][_ABLATED[1]]) for r in (record, reference))
      found = summary.bootstrap([won - own])
      low, high = (100 * x for x in found['ci95'])
      difference = f'{100 * found["difference"]:+.1f} ({low:+.1f} to {high:+.1f})'
    lines.append(
      f'| {_changes(record, reference) or "nothing"} | ' + ' | '.join(cells) + f' | {difference} |')
  return '\n'.join([*lines, '', measured_line(list(records.values()))])


# The two pages.


def readme_table() -> str:
  """README's table: the seeds together, or the demo's run where not all are there."""
  records = [load(name) for name in _SEEDS]
  if all(records):
    return seeds_table(records)
  demo = load('demo')
  if demo is None:
    raise errors.UserError(
      f'{path_of("demo")} is not there; file a run with --workdir and --name=demo first.')
  return single(demo)


def evidence() -> str:
  """The tables of all named experiments that are there, as Markdown."""
  parts = []

  def section(title: str, text: str) -> None:
    parts.append(f'### {title}\n\n{text}')

  seeds = [record for record in map(load, _SEEDS) if record]
  if seeds:
    section('Policies and controls', seeds_table(seeds))
  first = load('seed0')
  if first:
    ids = {row['id'] for row in first['rows']}
    ks = [f'base+hints@{k}' for k in (1, 6, 9) if f'base+hints@{k}' in ids]
    if ks:
      section('Hints in the prompt: k (3 where none is written)',
              single(first, ['base', ks[0], 'base+hints', *ks[1:]]))
    if 'base+self-hints' in ids:
      section('Writers: rules and the policy itself',
              single(first, ['base', 'base+hints', 'base+self-hints']))
  titles = {
    'plain': 'Formats: plain', 'react': 'Formats: ReAct', 'stateact': 'Formats: StateAct',
    'small': 'Another size: a decoder of 1.8 million parameters, trained from scratch, ReAct',
    'round2': 'A second round, from the first distilled student and its bank',
    'alfworld': "ALFWorld's own games, valid_seen",
    'webshop': 'WebShop, generated shop: a decoder of its own', 'demo': 'The demo: `make demo`'}
  for name, title in titles.items():
    record = load(name)
    if record:
      # 'small' plays with the repository's decoder, the others train their own.
      own = load('small_decoder' if name == 'small' else name, 'from_scratch')
      section(title, (f'{decoder_line(own)}\n\n' if own else '') + single(record))
  seeds = _experience_seeds()
  if seeds:
    section('Experience retrieval', experience_tables(seeds))
  names = [path.stem.removeprefix(f'{_EXPERIENCE}_')
           for path in sorted(RESULTS.glob(f'{_EXPERIENCE}_*.json'))]
  others = {name: load(name, _EXPERIENCE) for name in names if name not in _SEEDS}
  ablations = {name: record for name, record in others.items()
               if seeds and _is_ablation(record, seeds[0])}
  if ablations:
    section('Experience retrieval, one factor at a time: success %',
            ablations_table(seeds[0], ablations))
  for name, record in others.items():
    if name not in ablations:
      section(f'Experience retrieval: {name.replace("_", " ")}',
              (f'{decoder_line(own)}\n\n' if (own := load(name, 'from_scratch')) else '')
              + experience_tables([record]))
  if record := workdir_lib.read_record(aot_table.PATH):
    section('Qwen2.5 on TPU slices and on H200, compiled ahead of time', aot_table.section(record))
  from experiments.bench import cost_model  # Needs jax, which --help does not wait for.

  if record := workdir_lib.read_record(cost_model.PATH):
    section('The cost model against a measured step', cost_model.section(record))
  if record := workdir_lib.read_record(lengths.PATH):
    section('Decoding slots of different lengths', lengths.section(record))
  if record := workdir_lib.read_record(kv_cache.PATH):
    section('Keys and values in fewer bits', kv_cache.section(record))
  if record := workdir_lib.read_record(retrieval.OUT):
    section('Looking up experiences', retrieval.section(record))
  if record := workdir_lib.read_record(quantization.PATH):
    section('What a frozen base in 8 or 4 bits costs', quantization.section(record))
  return '\n\n'.join(parts)


def insert(page: str, table: str, name: str = 'results') -> str:
  """A page's text with the table between the two markers of that name."""
  begin, end = (f'<!-- {name}: {word} -->' for word in ('begin', 'end'))
  before, _, rest = page.partition(begin)
  _, found, after = rest.partition(end)
  if not found:
    raise ValueError(f'The page lacks {begin} ... {end}.')
  return f'{before}{begin}\n{table}\n{end}{after}'


def pages() -> dict[pathlib.Path, str]:
  """The pages as they have to be for the committed results."""
  pages = {path: insert(path.read_text(), make()) for path, make in (
    (_ROOT / 'README.md', readme_table), (RESULTS / 'README.md', evidence))}
  seeds = _experience_seeds()
  if seeds:
    pages[_ROOT / 'README.md'] = insert(
      pages[_ROOT / 'README.md'], experience_tables(seeds, brief=True), 'experience')
  record = workdir_lib.read_record(aot_table.PATH)
  if record and aot_table.points(record['cells']):
    pages[aot_table.PLOT] = aot_table.plot(record['cells'])
  return pages


def main(_) -> None:
  if flags.FLAGS.workdir:
    if not flags.FLAGS.name:
      raise errors.UserError('A run is filed under --name=NAME.')
    file_run(pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.name, command=flags.FLAGS.command,
             machine=flags.FLAGS.machine or summary.machine())
  for path, text in pages().items():
    path.write_text(text)


if __name__ == '__main__':
  from configs import cli
  flags.DEFINE_string('workdir', '', 'Finished run to file.')
  flags.DEFINE_string('name', '', 'Name of the result.')
  flags.DEFINE_string('command', 'make demo', 'The command that made it.')
  flags.DEFINE_string('machine', '', 'What it ran on; empty: this machine, as its CPU says.')
  cli.run(main, required=())
