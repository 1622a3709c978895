"""Writes README's results table from the committed JSON, so that no number is copied by hand.

  python -m experiments.results_table            # rewrites README.md
"""

import json
import pathlib

_ROOT = pathlib.Path(__file__).parents[1]
RESULTS = pathlib.Path(__file__).parent / 'results'
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


def main() -> None:
  record = json.loads((RESULTS / 'hint_distillation_demo.json').read_text())
  path = _ROOT / 'README.md'
  path.write_text(insert(path.read_text(), demo_table(record)))


if __name__ == '__main__':
  main()
