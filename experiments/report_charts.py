"""Charts of the report as hand-written SVG: no library, text that scales, colours from the page.

Every chart has a 360 wide view box and its own column, so that its 11 px labels are about 11 px on
a telephone and on a wide screen. Colours are classes (`c0` and so on) that the style sheet fills
for light and dark; a shape per policy says the same without colour.
"""

import html
import itertools
import math
from collections.abc import Sequence

WIDTH = 360
_LEFT, _RIGHT = 42, 16
_CHAR = 7.2  # Widest mean width of a character of a bold 11 px label, of the fonts asked for.
_LABEL = 13  # Height of a label.
SMOOTH_FROM = 30  # Records from which on a curve gets a running mean.


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


class Looks:
  """Colour and shape of each policy of a run: the usual ones look the same in every report."""

  # The style sheet's c0 to c9; the place of a name is its colour.
  _USUAL = ('base', 'base+hints', 'sft', 'distilled', 'base+random', 'base+fixed', 'sft+hints',
            'distilled+hints', 'base+self-hints', 'warm_start')
  # Corners around the middle, in units of the size; none is a circle.
  _SHAPES = (
    (),
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
    ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2),
     (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
    ((-1.2, 0), (0.9, -1.15), (0.9, 1.15)),
    ((1.2, 0), (-0.9, -1.15), (-0.9, 1.15)),
    ((0, -1.25), (1.2, -0.35), (0.75, 1.05), (-0.75, 1.05), (-1.2, -0.35)),
  )

  def __init__(self, policies: Sequence[str]):
    """Gives a policy that is not a usual one the first place that no other has."""
    self._places = {p: self._USUAL.index(p) for p in policies if p in self._USUAL}
    free = (i for i in itertools.count() if i not in self._places.values())
    for policy in policies:
      if policy not in self._places:
        self._places[policy] = next(free)

  def css(self, policy: str) -> str:
    """The class of a policy's colour; what is no policy of the run has the warm start's."""
    place = self._places.get(policy, self._USUAL.index('warm_start'))
    return f'c{place % len(self._USUAL)}'

  def marker(self, policy: str, x: float, y: float, size: float = 5) -> str:
    """A policy's shape around a point."""
    corners = self._SHAPES[self._places.get(policy, 0) % len(self._SHAPES)]
    if not corners:
      return f'<circle class="mark {self.css(policy)}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(size)}"/>'
    points = ' '.join(
      f'{_n(x + size * 0.95 * dx)},{_n(y + size * 0.95 * dy)}' for dx, dy in corners)
    return f'<polygon class="mark {self.css(policy)}" points="{points}"/>'

  def swatch(self, policy: str) -> str:
    """A policy's marker as a small picture of its own, for tables and legends."""
    return (f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">'
            f'{self.marker(policy, 7, 7)}</svg>')


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
        self.parts.append(
          f'<text class="tick" x="{_n(self.x(value))}" y="{_n(self.bottom + 15)}" '
          f'text-anchor="middle">{html.escape(x_text(value))}</text>')
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


def _label(text: str, x: float, y: float, css: str, taken: list, plot: _Plot) -> str:
  """A label beside its point, in the nearest place that covers nothing; a line leads to a far one.

  Args:
    text: the label.
    x, y: its point.
    css: class of its colour.
    taken: boxes (left, top, right, bottom) that are in use; the label's is added.
    plot: where it has to stay, but for the right edge, which may be the chart's.
  """
  width = len(text) * _CHAR
  places = sorted(
    ((x + side, y + dy) for dx in (9, 26, 44, 66, 90) for side in (dx, -dx - width)
     for i in range(9) for dy in (-8 - 14 * i, 16 + 14 * i)),
    key=lambda place: math.hypot(max(place[0] - x, x - place[0] - width), place[1] - 4 - y))

  def cost(place) -> int:
    """Boxes that are covered, labels above all; more than all of them for a place outside."""
    left, base = place
    box = (left, base - 10, left + width, base - 10 + _LABEL)
    outside = (left < _LEFT or box[2] > WIDTH - 4 or box[1] < plot.top - 4
               or box[3] > plot.bottom)
    return 1000 * outside + sum(
      10 if other[3] - other[1] == _LABEL else 1 for other in taken
      if box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3])

  left, base = min(places, key=cost)
  taken.append((left, base - 10, left + width, base - 10 + _LABEL))
  edge = left - 2 if left > x else left + width + 2
  far = math.hypot(edge - x, base - 4 - y) > 20
  lead = (f'<path class="lead-line {css}" d="M{_n(x)} {_n(y)}L{_n(edge)} {_n(base - 4)}"/>'
          if far else '')
  return (f'{lead}<text class="label {css}" x="{_n(left)}" y="{_n(base)}">'
          f'{html.escape(text)}</text>')


def success_against_tokens(
  rows: Sequence[dict], tokens: dict[str, Sequence[float]], x_title: str, looks: Looks
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
    taken += [(x - 7, y - 7, x + 7, y + 7), (x - 3, y_high, x + 3, y_low),
              (plot.x(low), y - 2, plot.x(high), y + 2)]
    name = looks.css(row['id'])
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
      f'y2="{_n(y)}"/>{looks.marker(row["id"], x, y)}</g>')
  labels = [
    _label(row['id'], plot.x(tokens[row['id']][0]), plot.y(row['success_rate']),
           looks.css(row['id']), taken, plot)
    for row in sorted(rows, key=lambda row: -row['success_rate'])]
  return _svg(plot.parts + points + labels, 270, f'Success against {x_title}')


def _spread(heights: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
  """Ascending heights moved apart to `gap`, as little as that needs, inside [top, bottom]."""
  gap = min(gap, (bottom - top) / max(1, len(heights) - 1))
  groups = []  # [sum of the wanted middles, heights in it]; a group is laid out around its mean
  for height in heights:
    groups.append([height, 1])
    while len(groups) > 1:
      (total, n), (late, m) = groups[-2:]
      if total / n + gap * n / 2 <= late / m - gap * m / 2:
        break
      groups[-2:] = [[total + late, n + m]]
  placed = []
  for total, n in groups:
    placed += [total / n + gap * (i - (n - 1) / 2) for i in range(n)]
  for i in range(len(placed)):  # Pushed down from the top edge, then up from the bottom edge.
    placed[i] = max(placed[i], top + gap * i)
  for i in range(len(placed)):
    placed[-1 - i] = min(placed[-1 - i], bottom - gap * i)
  return placed


def solved_by_call(curves: dict[str, Sequence[float]], looks: Looks) -> str:
  """Share of the games that are solved within a number of model calls, one curve a policy."""
  last = max(1, max(len(c) for c in curves.values()) - 1)
  # The policies' names stand to the right of where their curves end.
  plot = _Plot(ticks(0, last, whole=True), ticks(0, 1), top=28, height=200,
               right=WIDTH - 22 - max(map(len, curves)) * _CHAR)
  plot.grid(lambda v: f'{v:g}', _percent, 'model calls', 'games solved within')
  labels = []
  ranked = sorted(curves.items(), key=lambda item: -item[1][-1])
  ends = [plot.y(curve[-1]) for _, curve in ranked]
  places = _spread(ends, 13, plot.top - 8, plot.bottom + 10)
  for (policy, curve), end, place in zip(ranked, ends, places, strict=True):
    name = looks.css(policy)
    # A policy whose episodes all ended early stays at its level to the end of the axis.
    plot.line([*enumerate(curve), (plot.x_ticks[-1], curve[-1])], name, step=True)
    labels.append(
      f'<path class="lead-line {name}" d="M{_n(plot.right)} {_n(end)}L{_n(plot.right + 9)} '
      f'{_n(place)}"/><text class="label {name}" x="{_n(plot.right + 12)}" '
      f'y="{_n(place + 4)}">{html.escape(policy)}</text>')
  return _svg(plot.parts + labels, 270, 'Games solved within a number of model calls')


def running_mean(values: Sequence[float], width: int) -> list[float]:
  """Mean over the `width` records around each; fewer at the ends, none that is not finite."""
  smooth = []
  for i in range(len(values)):
    near = [v for v in values[max(0, i - width // 2):i + width // 2 + 1] if math.isfinite(v)]
    smooth.append(sum(near) / len(near) if near else math.nan)
  return smooth


def learning_curve(
  records: Sequence[dict[str, float]], css: str, label: str, top: float | None = None
) -> str:
  """Loss and, under it, token accuracy of one training.

  Args:
    records: of metrics.jsonl.
    css: class of the colour.
    label: what a screen reader says of the picture.
    top: the loss up to which the axis goes, so that trainings can be compared; None is the largest.
  """
  steps = [r['step'] for r in records]
  loss = [r['loss'] for r in records]
  accuracy = [r.get('accuracy', math.nan) for r in records]
  finite = [v for v in loss if math.isfinite(v)] or [0.0]
  x_ticks = ticks(0, max(steps), whole=True)
  top = max(finite) if top is None else top
  upper = _Plot(x_ticks, ticks(min(0.0, min(finite)), top), top=28, height=120)
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


def interval(
  low: float, middle: float, high: float, policy: str, looks: Looks, reach: float = 0
) -> str:
  """A value with its interval, for a table cell: on 0 to 1, or with `reach` on -reach to reach."""
  place = (lambda v: 60 + 56 * v / reach) if reach else (lambda v: 4 + 112 * v)
  name = looks.css(policy)
  zero = '<line class="axis" x1="60" x2="60" y1="0" y2="20"/>' if reach else ''
  ends = ''.join(
    f'<line class="bar {name}" x1="{_n(place(v))}" x2="{_n(place(v))}" y1="6" y2="14"/>'
    for v in (low, high))
  return (
    '<svg class="interval" viewBox="0 0 120 20" aria-hidden="true">'
    f'<line class="grid" x1="4" x2="116" y1="10" y2="10"/>{zero}'
    f'<line class="bar {name}" x1="{_n(place(low))}" x2="{_n(place(high))}" y1="10" y2="10"/>'
    f'{ends}{looks.marker(policy, place(middle), 10, 3.2)}</svg>')


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
