"""Charts of the report as hand-written SVG: no library, text that scales, colours from the page.

Every chart has a 360 wide view box and its own column, so that its 11 px labels are about 11 px on
a telephone and on a wide screen. Colours are classes (`p-sft` and so on) that the style sheet fills
for light and dark; a shape per policy says the same without colour.
"""

import html
import math
from collections.abc import Sequence

WIDTH = 360
_LEFT, _RIGHT, _TOP = 42, 10, 12
_CHAR = 6.2  # Mean width of a character of an 11 px label.
SMOOTH_FROM = 30  # Records from which on a curve gets a running mean.


def css_name(policy: str) -> str:
  """The class of a policy's colour."""
  return 'p-' + ''.join(c if c.isalnum() else '-' for c in policy)


def _n(value: float) -> str:
  """A coordinate: two decimals at most, never 'nan', which would drop the whole shape."""
  return f'{value:.2f}'.rstrip('0').rstrip('.') if math.isfinite(value) else '0'


def compact(value: float) -> str:
  """A count for an axis: 950, 1.2k, 34k, 1.5M."""
  for limit, divisor, unit in ((1e3, 1, ''), (1e6, 1e3, 'k'), (math.inf, 1e6, 'M')):
    if abs(value) < limit:
      return f'{value / divisor:.3g}{unit}'
  return f'{value:.3g}'


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
  """Round numbers that cover [low, high], about `count` of them; integers if `whole`."""
  if not high > low:
    high = low + 1
  raw = (high - low) / count
  scale = 10 ** math.floor(math.log10(raw))
  step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999)
  if whole:
    step = max(1, math.ceil(step))
  first = math.floor(low / step + 1e-9)
  last = math.ceil(high / step - 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def marker(policy: str, x: float, y: float, size: float = 5) -> str:
  """A policy's shape: circle, square, triangle or diamond."""
  name = css_name(policy)
  if policy == 'base':
    return f'<circle class="mark {name}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(size)}"/>'
  points = {
    'base+hints': ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    'sft': ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
  }.get(policy, ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)))
  corners = ' '.join(f'{_n(x + size * 0.95 * dx)},{_n(y + size * 0.95 * dy)}' for dx, dy in points)
  return f'<polygon class="mark {name}" points="{corners}"/>'


def swatch(policy: str) -> str:
  """A policy's marker as a small picture of its own, for tables and legends."""
  return f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{marker(policy, 7, 7)}</svg>'


class _Plot:
  """One coordinate system inside a chart: scales, grid, axis labels."""

  def __init__(self, xs: Sequence[float], ys: Sequence[float], *, top: float, height: float,
               right: float = WIDTH - _RIGHT):
    self.x_ticks, self.y_ticks = list(xs), list(ys)
    self.top, self.bottom = top, top + height
    self.right = right
    self.parts: list[str] = []

  def x(self, value: float) -> float:
    low, high = self.x_ticks[0], self.x_ticks[-1]
    return _LEFT + (value - low) / (high - low) * (self.right - _LEFT)

  def y(self, value: float) -> float:
    low, high = self.y_ticks[0], self.y_ticks[-1]
    return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

  def grid(self, x_text, y_text, x_title: str = '', y_title: str = '', last: bool = True) -> None:
    for value in self.y_ticks:
      y = _n(self.y(value))
      self.parts.append(
        f'<line class="grid" x1="{_LEFT}" x2="{_n(self.right)}" y1="{y}" y2="{y}"/>')
      self.parts.append(
        f'<text class="tick" x="{_LEFT - 6}" y="{_n(self.y(value) + 3.5)}" '
        f'text-anchor="end">{html.escape(y_text(value))}</text>')
    self.parts.append(
      f'<line class="axis" x1="{_LEFT}" x2="{_n(self.right)}" y1="{_n(self.bottom)}" '
      f'y2="{_n(self.bottom)}"/>')
    if last:
      for value in self.x_ticks:
        anchor = 'end' if value == self.x_ticks[-1] else 'middle'
        self.parts.append(
          f'<text class="tick" x="{_n(self.x(value))}" y="{_n(self.bottom + 15)}" '
          f'text-anchor="{anchor}">{html.escape(x_text(value))}</text>')
      self.parts.append(
        f'<text class="title" x="{_n((_LEFT + self.right) / 2)}" y="{_n(self.bottom + 32)}" '
        f'text-anchor="middle">{html.escape(x_title)}</text>')
    if y_title:
      self.parts.append(
        f'<text class="title" x="{_LEFT}" y="{_n(self.top - 8)}">{html.escape(y_title)}</text>')

  def line(self, points: Sequence[tuple[float, float]], css: str, step: bool = False) -> None:
    """A line through the points; one that is not finite leaves a gap."""
    path, pen, before = [], 'M', 0.0
    for x, y in points:
      if not math.isfinite(y):
        pen = 'M'
        continue
      px, py = self.x(x), self.y(y)
      if step and pen == 'L':
        path.append(f'L{_n(px)} {_n(before)}')
      path.append(f'{pen}{_n(px)} {_n(py)}')
      pen, before = 'L', py
    if path:
      self.parts.append(f'<path class="line {css}" d="{"".join(path)}"/>')


def _svg(parts: Sequence[str], height: float, label: str) -> str:
  return (f'<svg class="chart" viewBox="0 0 {WIDTH} {_n(height)}" role="img" '
          f'aria-label="{html.escape(label)}">{"".join(parts)}</svg>')


def _percent(value: float) -> str:
  return f'{100 * value:.0f}%'


def _place_label(text: str, x: float, y: float, taken: list, plot: _Plot) -> tuple[float, float]:
  """Left end and baseline of a label: the first place beside its point that is free."""
  width = len(text) * _CHAR
  places = [(x + dx, y + dy)
            for dy in (-8, 16, -22, 30, -36, 44, -50, -64, -78, -92) for dx in (9, -9 - width)]
  boxes = [(left, base - 10, left + width, base + 3) for left, base in places]

  def free(box) -> bool:
    inside = (box[0] >= _LEFT and box[2] <= plot.right and box[1] >= plot.top - 4
              and box[3] <= plot.bottom)
    return inside and not any(
      box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
      for other in taken)

  best = next((i for i, box in enumerate(boxes) if free(box)), 0)
  taken.append(boxes[best])
  return places[best]


def success_against_tokens(
  rows: Sequence[dict], tokens: dict[str, Sequence[float]], x_title: str
) -> str:
  """Success rate against tokens per episode, both with 95 % intervals."""
  plot = _Plot(ticks(0, max(t[2] for t in tokens.values())), ticks(0, 1), top=28, height=200)
  plot.grid(compact, _percent, x_title, 'games solved')
  points = []
  taken = []
  for row in rows:
    mean, low, high = tokens[row['id']]
    x, y = plot.x(mean), plot.y(row['success_rate'])
    y_low, y_high = (plot.y(v) for v in row['success_ci95'])
    taken += [(x - 7, y - 7, x + 7, y + 7), (x - 1, y_high, x + 1, y_low)]
    name = css_name(row['id'])
    tip = (f'{row["id"]}: {100 * row["success_rate"]:.1f} % solved '
           f'({100 * row["success_ci95"][0]:.1f} to {100 * row["success_ci95"][1]:.1f}), '
           f'{mean:.0f} tokens ({low:.0f} to {high:.0f})')
    points.append(
      f'<g><title>{html.escape(tip)}</title>'
      f'<line class="bar {name}" x1="{_n(x)}" x2="{_n(x)}" y1="{_n(y_low)}" y2="{_n(y_high)}"/>'
      f'<line class="bar {name}" x1="{_n(x - 4)}" x2="{_n(x + 4)}" y1="{_n(y_low)}" '
      f'y2="{_n(y_low)}"/>'
      f'<line class="bar {name}" x1="{_n(x - 4)}" x2="{_n(x + 4)}" y1="{_n(y_high)}" '
      f'y2="{_n(y_high)}"/>'
      f'<line class="bar {name}" x1="{_n(plot.x(low))}" x2="{_n(plot.x(high))}" y1="{_n(y)}" '
      f'y2="{_n(y)}"/>{marker(row["id"], x, y)}</g>')
  labels = []
  for row in rows:
    x, y = plot.x(tokens[row['id']][0]), plot.y(row['success_rate'])
    left, base = _place_label(row['id'], x, y, taken, plot)
    labels.append(f'<text class="label {css_name(row["id"])}" x="{_n(left)}" y="{_n(base)}">'
                  f'{html.escape(row["id"])}</text>')
  return _svg(plot.parts + points + labels, 270, f'Success against {x_title}')


def solved_by_call(curves: dict[str, Sequence[float]]) -> str:
  """Share of the games that are solved within a number of model calls, one curve a policy."""
  last = max(1, max(len(c) for c in curves.values()) - 1)
  # The policies' names stand to the right of where their curves end.
  plot = _Plot(ticks(0, last, whole=True), ticks(0, 1), top=28, height=200,
               right=WIDTH - 14 - max(map(len, curves)) * _CHAR)
  plot.grid(lambda v: f'{v:g}', _percent, 'model calls', 'games solved within')
  labels, below = [], plot.bottom + 14
  for policy, curve in sorted(curves.items(), key=lambda item: item[1][-1]):
    # A policy whose episodes all ended early stays at its level to the end of the axis.
    plot.line([*enumerate(curve), (plot.x_ticks[-1], curve[-1])], css_name(policy), step=True)
    below = min(plot.y(curve[-1]) + 4, below - 13)
    labels.append(f'<text class="label {css_name(policy)}" x="{_n(plot.right + 6)}" '
                  f'y="{_n(below)}">{html.escape(policy)}</text>')
  return _svg(plot.parts + labels, 270, 'Games solved within a number of model calls')


def running_mean(values: Sequence[float], width: int) -> list[float]:
  """Mean over the `width` records around each; fewer at the ends, none that is not finite."""
  smooth = []
  for i in range(len(values)):
    near = [v for v in values[max(0, i - width // 2):i + width // 2 + 1] if math.isfinite(v)]
    smooth.append(sum(near) / len(near) if near else math.nan)
  return smooth


def learning_curve(records: Sequence[dict[str, float]], css: str, label: str) -> str:
  """Loss and, under it, token accuracy of one training."""
  steps = [r['step'] for r in records]
  loss = [r['loss'] for r in records]
  accuracy = [r.get('accuracy', math.nan) for r in records]
  finite = [v for v in loss if math.isfinite(v)] or [0.0]
  x_ticks = ticks(0, max(steps), whole=True)
  upper = _Plot(x_ticks, ticks(min(0.0, min(finite)), max(finite)), top=28, height=120)
  upper.grid(lambda v: f'{v:g}', lambda v: f'{v:g}', y_title='loss on action tokens', last=False)
  lower = _Plot(x_ticks, [0, 0.5, 1], top=182, height=70)
  lower.grid(lambda v: f'{v:g}', _percent, 'optimizer step', 'token accuracy')
  width = max(3, len(records) // 12)
  for plot, values in ((upper, loss), (lower, accuracy)):
    points = list(zip(steps, values, strict=True))
    if len(records) >= SMOOTH_FROM:
      plot.line(points, f'{css} faint')
      points = list(zip(steps, running_mean(values, width), strict=True))
    plot.line(points, css)
  return _svg(upper.parts + lower.parts, 294, label)


def interval(low: float, middle: float, high: float, policy: str, reach: float = 0) -> str:
  """A value with its interval, for a table cell: on 0 to 1, or with `reach` on -reach to reach."""
  place = (lambda v: 60 + 56 * v / reach) if reach else (lambda v: 4 + 112 * v)
  name = css_name(policy)
  zero = '<line class="axis" x1="60" x2="60" y1="0" y2="20"/>' if reach else ''
  ends = ''.join(
    f'<line class="bar {name}" x1="{_n(place(v))}" x2="{_n(place(v))}" y1="6" y2="14"/>'
    for v in (low, high))
  return (
    '<svg class="interval" viewBox="0 0 120 20" aria-hidden="true">'
    f'<line class="grid" x1="4" x2="116" y1="10" y2="10"/>{zero}'
    f'<line class="bar {name}" x1="{_n(place(low))}" x2="{_n(place(high))}" y1="10" y2="10"/>'
    f'{ends}{marker(policy, place(middle), 10, 3.2)}</svg>')


def shares(counts: dict[str, int], order: Sequence[str]) -> str:
  """Counts as one stacked bar; which is which stands in the table beside it."""
  total, left, parts = max(1, sum(counts.values())), 0.0, []
  for name in order:
    width = 100 * counts.get(name, 0) / total
    if width:
      parts.append(
        f'<rect class="t-{name}" x="{_n(left)}" width="{_n(width)}" y="0" height="10">'
        f'<title>{html.escape(name)}: {counts[name]}</title></rect>')
    left += width
  return (f'<svg class="shares" viewBox="0 0 100 10" preserveAspectRatio="none" '
          f'aria-hidden="true">{"".join(parts)}</svg>')
