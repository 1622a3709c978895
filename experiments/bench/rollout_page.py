"""Sums, table and plot of experiments/bench/rollout.py."""

import html
import math
from collections.abc import Mapping
from typing import Any

# How many times faster than each peer ours is meant to be on 2 CPU cores, and the share of its
# bound that decoding is meant to reach.
GOALS = {'reprefill': 8.0, 'cached': 3.0, 'llama_cpp': 1.5}
DECODE_GOAL = 0.5
# Two tokens are nearly tied whose logits differ by no more.
NEAR_TIE = 0.01
_NAMES = {
  'reprefill': 'transformers, prefilling each turn', 'cached': 'transformers, cache kept',
  'llama_cpp': 'llama.cpp, cache kept', 'transformers': 'transformers'}
_PARTS = ('prefill', 'decode', 'host', 'environment', 'compile')


def per_hour(record: Mapping[str, Any]) -> float:
  """Episodes/hour of a job."""
  return 3600 * record['episodes'] / record['wall_s']


def split_of_time(record: Mapping[str, Any]) -> dict[str, float]:
  """Shares of the wall time."""
  return {part: record.get(f'{part}_s', 0.0) / record['wall_s'] for part in _PARTS}


def rates(record: Mapping[str, Any], env_steps: float) -> dict[str, Any]:
  """Of a job; `env_steps`: an episode, on average."""
  a_second = lambda name: record[name] / record['wall_s']
  return {
    'episodes_per_hour': per_hour(record), 'episodes': record['episodes'],
    'env_steps_per_s': env_steps * a_second('episodes'),
    'generated_per_s': a_second('generated'), 'prefilled_per_s': a_second('prefilled'),
    'generated': record['generated'], 'prefilled': record['prefilled'],
    'copied': record.get('copied', 0), 'split': split_of_time(record)}


def summarise_play(
  played: Mapping[str, Any], ours: Mapping[str, Any], peers: Mapping[str, Mapping[str, Any]],
  compared: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """The record of free play and of the replays.

  Args:
    played: of `rollout_jax.play`.
    ours: of our replays {'setting', 'tastes', 'run', 'drafts', 'after'}: 'drafts' has of each taste
      with drafts the tokens that a verifying step accepts; 'after' is the share of its speed that a
      taste has after the peers, None without any.
    peers: likewise but for the last two, by engine.
    compared: `agreement` with ours, by peer.
  """
  steps = played['env_steps'] / played['episodes']
  engine = lambda found: {
    'setting': found['setting'], 'tastes': found['tastes'], **rates(found['run'], steps)}
  record = {
    'free': {**rates(played, steps), 'terminations': played['terminations'],
             'compile_first_s': played['compile_first_s'], 'stats': played['stats']},
    'ours': {**engine(ours), 'drafts': ours['drafts'], 'after': ours['after'],
             'stats': ours['run']['stats']},
    'peers': {name: engine(found) for name, found in peers.items()},
    'agreement': dict(compared), 'device_name': played['device_name']}
  for name, found in record['peers'].items():
    ratio = record['ours']['episodes_per_hour'] / found['episodes_per_hour']
    found |= {'ratio': ratio, 'goal': GOALS[name], 'reached': ratio >= GOALS[name]}
  return record


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
  """At how many places both find the same token the likeliest, and how far apart it is elsewhere.

  Args:
    ours: {'ids', 'logits'}, each [N][8], likeliest first.
    theirs: likewise, of the same N places.

  Returns:
    'share' of equal places, 'places', 'different', and of the latter 'near_ties' and
    'largest_gap': by how much, in logits, either side prefers its own token to the other's; None
    where a side has the other's token not among its 8.
  """
  gaps = []
  for a, x, b, y in zip(
      ours['ids'], ours['logits'], theirs['ids'], theirs['logits'], strict=True):
    if a[0] == b[0]:
      continue
    if b[0] in a and a[0] in b:
      gaps.append(max(x[0] - x[a.index(b[0])], y[0] - y[b.index(a[0])]))
    else:
      gaps.append(math.inf)
  places, largest = len(ours['ids']), max(gaps, default=0.0)
  return {
    'share': 1 - len(gaps) / places, 'places': places, 'different': len(gaps),
    'near_ties': sum(gap <= NEAR_TIE for gap in gaps),
    'largest_gap': largest if math.isfinite(largest) else None}


def table(record: Mapping[str, Any]) -> str:
  """The run as lines of text."""
  lines = []
  if 'play' in record:
    lines += _play_lines(record['play'])
  if 'decode' in record:
    lines += _decode_lines(record['decode'])
  if 'scaling' in record:
    lines += _scaling_lines(record['scaling'])
  return '\n'.join(lines)


def _play_lines(play: Mapping[str, Any]) -> list[str]:
  lines = [f'{"":<36}{"episodes/h":>11}{"env/s":>8}{"generated/s":>13}{"prefilled/s":>13}'
           f'{"prefilled":>11}  prefill, decode, host, environment %']

  def line(name: str, row: Mapping[str, Any]) -> str:
    split = ', '.join(f'{100 * row["split"][part]:.0f}' for part in _PARTS[:4])
    return (f'{name:<36}{row["episodes_per_hour"]:>11,.0f}{row["env_steps_per_s"]:>8.1f}'
            f'{row["generated_per_s"]:>13,.0f}{row["prefilled_per_s"]:>13,.0f}'
            f'{row["prefilled"]:>11,}  {split}')

  ours = play['ours']
  lines += [line('ours, free play', play['free']), line('ours, replay', ours)]
  lines += [line(_NAMES[name], row) for name, row in play['peers'].items()]
  after = '' if ours['after'] is None else (
    f'; its first turns, after the peers: {ours["after"]:.0%} of the speed before')
  lines.append(f'ours replays at {ours["setting"]}{after}')
  lines += [
    f'{name}: {accepted:.2f} tokens of a draft accepted a verifying step, '
    f'{ours["tastes"][name]:,.0f} episodes/h on the first turns (best: '
    f'{max(ours["tastes"].values()):,.0f})' for name, accepted in ours['drafts'].items()]
  lines += [
    f'{row["ratio"]:.2f} times {_NAMES[name]} ({row["setting"]}, {row["episodes"]} episodes); '
    f'at least {row["goal"]:g} times: '
    f'{"reached" if row["reached"] else "NOT reached"}' for name, row in play['peers'].items()]
  for name, found in play['agreement'].items():
    gap = 'more than 8 tokens' if found['largest_gap'] is None else (
      f'at most {found["largest_gap"]:.2g} logits')
    lines.append(
      f'{found["share"]:.2%} of {found["places"]} places have the likeliest token of '
      f'{_NAMES[name]}; of the {found["different"]} others {found["near_ties"]} are nearly tied, '
      f'{gap} apart')
  return lines


def _decode_lines(decode: Mapping[str, Any]) -> list[str]:
  lines = ['', f'Decoding beside {decode["bytes_per_s"] / 1e9:,.1f} GB/s measured on '
           f'{decode["device_name"]}:',
           f'{"dtype":<10}{"slots":>6}{"context":>9}{"tokens/s":>11}{"ms a step":>11}'
           f'{"share of bound":>16}{"bound by":>11}{"share of bandwidth":>20}']
  for row in decode['rows']:
    stated = row['share_of_stated_bandwidth']
    lines.append(
      f'{row["dtype"]:<10}{row["slots"]:>6}{row["context"]:>9}{row["tokens_per_s"]:>11,.1f}'
      f'{1e3 * row["step_s"]:>11.2f}{row["share_of_bound"]:>16.0%}{row["bound_by"]:>11}'
      f'{row["share_of_bandwidth"]:>20.0%}' + (f', {stated:.0%} of the stated' if stated else ''))
  for slots in sorted({row['slots'] for row in decode['rows']}):
    best = max((r for r in decode['rows'] if r['slots'] == slots), key=lambda r: r['tokens_per_s'])
    reached = 'reached' if best['share_of_bound'] >= DECODE_GOAL else 'NOT reached'
    lines.append(f'{slots} slots, {best["dtype"]}: {best["share_of_bound"]:.0%} of the bound; at '
                 f'least {DECODE_GOAL:.0%}: {reached}')
  return lines


def _scaling_lines(scaling: Mapping[str, Any]) -> list[str]:
  lines = ['', f'The first {scaling["turns"]} turns of each episode:']
  for key in ('slots', 'context'):
    for point in scaling[key]:
      said = (f'not measured: {point["error"]}' if 'error' in point
              else f'{point["episodes_per_hour"]:,.0f} episodes/hour')
      where = f'{point[key]} slots' if key == 'slots' else (
        f'{point[key]} tokens before each prompt, {scaling["context_slots"]} slots')
      lines.append(f'{where}: {said}')
  return lines


def plot(scaling: Mapping[str, Any]) -> str:
  """Episodes/hour over slots and over context as SVG, two panels, all axes logarithmic."""
  panels = [
    ('slots', f'Episodes/hour (of {scaling["turns"]} turns) by slots', 'slots'),
    ('context', f'by tokens before each prompt, {scaling["context_slots"]} slots', 'tokens')]
  left, top, width, height, gap = 64, 34, 300, 220, 90
  points = {key: [(p[key], p['episodes_per_hour']) for p in scaling[key] if 'error' not in p]
            for key, _, _ in panels}
  every = [value for found in points.values() for _, value in found]
  total_width = left + 2 * width + gap + 24
  text = lambda x, y, words, anchor='middle', extra='': (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{html.escape(words)}</text>')
  parts = [f'<rect width="{total_width}" height="{top + height + 54}" fill="#ffffff"/>']
  low = 10 ** math.floor(math.log10(min(every, default=1)))
  high = max(10 * low, 10 ** math.ceil(math.log10(max(every, default=10))))
  for number, (key, title, unit) in enumerate(panels):
    start, found = left + number * (width + gap), points[key]
    first, last = (min(v for v, _ in found), max(v for v, _ in found)) if found else (1, 2)
    span = math.log(max(last, 2 * first) / first)

    def place(value, rate, start=start, first=first, span=span):
      return (start + width * math.log(value / first) / span,
              top + height * (1 - math.log(rate / low) / math.log(high / low)))

    parts.append(text(start, 18, title, 'start', ' font-weight="bold"'))
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
      at = place(first, 10**power)[1]
      parts += [f'<path d="M{start} {at:.1f}h{width}" stroke="#d5d5d5"/>',
                text(start - 8, at + 4, f'{10**power:,}', 'end')]
    parts += [text(place(value, low)[0], top + height + 18, str(value)) for value, _ in found]
    parts.append(text(start + width / 2, top + height + 42, unit))
    places = [place(*point) for point in found]
    line = ' '.join(f'{x:.1f},{y:.1f}' for x, y in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#0b6bcb" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#0b6bcb"/>' for x, y in places]
  return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} '
          f'{top + height + 54}" font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n')
