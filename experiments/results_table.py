"""Files a run's summary as a committed result and writes README's table from it.

  python -m experiments.results_table --workdir=runs/demo --machine='2 CPU cores'
  python -m experiments.results_table            # only rewrites README.md

No number of the README is copied by hand; a test compares the two.
"""

import datetime
import json
import pathlib

from absl import flags

from data import errors
from data import workdir as workdir_lib

_ROOT = pathlib.Path(__file__).parents[1]
RESULTS = pathlib.Path(__file__).parent / 'results'
DEMO = RESULTS / 'hint_distillation_demo.json'
_BEGIN, _END = '<!-- results: begin -->', '<!-- results: end -->'


def demo_table(record: dict) -> str:
  """Rows and paired differences of one summary.json as Markdown."""
  lines = [
    '| policy | success % (95 % interval) | steps | prompt tokens | computed tokens | generated |',
    '|---|---|---|---|---|---|']
  for row in record['rows']:
    low, high = row['success_ci95']
    lines.append(
      f'| {row["id"]} | {100 * row["success_rate"]:.1f} ({100 * low:.1f} to {100 * high:.1f}) | '
      f'{row["env_steps_mean"]:.1f} | {row["prompt_tokens_mean"]:.0f} | '
      f'{row["prefilled_tokens_mean"]:.0f} | {row["generated_tokens_mean"]:.0f} |')
  lines.append('')
  for pair in record['paired']:
    low, high = (100 * x for x in pair['ci95'])
    verdict = '' if low > 0 or high < 0 else ' (not significant)'
    lines.append(f'- {pair["a"]} - {pair["b"]}: {100 * pair["difference"]:+.1f} points, '
                 f'95 % interval {low:+.1f} to {high:+.1f}{verdict}')
  minutes = sum(record['wall_s'].values()) / 60
  measured = record['measured']
  lines.append(
    f'\nn = {record["rows"][0]["n"]} games, paired, greedy, seed {record["rows"][0]["seed"]}; '
    f'{measured["machine"]}; {measured["date"]}; {minutes:.0f} minutes without installation; '
    f'`{measured["command"]}`.')
  return '\n'.join(lines)


def insert(readme: str, table: str) -> str:
  """README's text with the table between its two markers."""
  before, _, rest = readme.partition(_BEGIN)
  _, found, after = rest.partition(_END)
  if not found:
    raise ValueError(f'README.md lacks {_BEGIN} ... {_END}.')
  return f'{before}{_BEGIN}\n{table}\n{_END}{after}'


def readme_text() -> str:
  """README.md as it has to be for the committed results."""
  record = json.loads(DEMO.read_text())
  return insert((_ROOT / 'README.md').read_text(), demo_table(record))


def main(_) -> None:
  if flags.FLAGS.workdir:
    path = pathlib.Path(flags.FLAGS.workdir) / 'summary.json'
    if not path.is_file():
      raise errors.UserError(f'{path} is not there; give --workdir of a finished run.')
    record = json.loads(path.read_text())
    record['measured'] = {
      'command': flags.FLAGS.command, 'machine': flags.FLAGS.machine,
      'date': datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()}
    RESULTS.mkdir(exist_ok=True)
    workdir_lib.write_json(DEMO, record)
  if not DEMO.is_file():
    raise errors.UserError(f'{DEMO} is not there; file a run with --workdir first.')
  (_ROOT / 'README.md').write_text(readme_text())


if __name__ == '__main__':
  from configs import cli
  flags.DEFINE_string('workdir', '', 'Finished hint-distillation run to file.')
  flags.DEFINE_string('command', 'make demo', 'The command that made it.')
  flags.DEFINE_string('machine', '', 'What it ran on.')
  cli.run(main, required=())
