"""What a compiled program sends to other devices, read from its text.

Collectives inside loops count as often as the loop runs. One that the compiler spreads over several
fused computations (a start, steps beside other work, an end) counts where it starts.
"""

import collections
import dataclasses
import math
import re

import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

# Between slices the TPU compiler sums within each first, and hands a device's part to a runtime
# that all-reduces it over the network.
BETWEEN = 'all-reduce between slices'
_RUNTIME = 'handler_name="xla_megascale_runtime"'

_WIDTHS = {
  'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4,
  's64': 8, 'u64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8}
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
# What a core beside the main one computes says so behind it.
_END = re.compile(r'^\}(, execution_thread="\w+")?$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|branch_computations)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: `name = shape opcode(operands), attributes`."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device sends by one collective.

  Attributes:
    kind: one of KINDS, or BETWEEN.
    group: devices that take part together.
    sent: bytes a device sends, in a ring, over all runs of the loops around it.
    count: how often it runs.
    across: devices of different slices take part.
  """

  kind: str
  group: int
  sent: float
  count: int
  across: bool


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if depth == 0:
      return i
  raise ValueError(f'unbalanced: {text[:80]}')


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Computations by name, and the name of the entry."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if current is None:
      if head := _HEAD.match(line):
        current = computations.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
    elif _END.match(line):
      current = None
    elif found := _INSTRUCTION.match(line):
      rest = re.sub(r'/\*.*?\*/', '', found[3])
      end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
      shape, rest = rest[:end], rest[end:].lstrip()
      opening = rest.index('(')
      end = _closing(rest, opening)
      operands = tuple(re.findall(r'%([\w.\-]+)', rest[opening:end]))
      current.append(Instruction(
        found[2], shape, rest[:opening], operands or (rest[opening + 1 : end],), rest[end + 1 :],
        bool(found[1])))
  return computations, entry


def _sizes(shape: str) -> list[float]:
  """Bytes of each array in a shape."""
  return [
    _WIDTHS.get(dtype, 0) * math.prod(int(d) for d in dims.split(',') if d)
    for dtype, dims in re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', shape)]


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
  """The groups of devices of a collective, in any of the text's notations."""
  if found := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    return [[int(i) for i in pair.split(',')] for pair in re.findall(r'\{?(\d+,\d+)', found[1])]
  if found := re.search(r'replica_groups=\{(\{.*?\})\}', attributes):
    return [[int(i) for i in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', found[1])]
  if found := re.search(
      r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    ints = lambda text: [int(i) for i in text.split(',')]
    ids = np.arange(math.prod(ints(found[2]))).reshape(ints(found[2]))
    if found[3]:
      ids = ids.transpose(ints(found[3]))
    return ids.reshape(ints(found[1])).tolist()
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? \{([^}]*)\}",
                        attributes):
    # mesh['a'=4,'b'=2] {'a'}, or a part of an axis: 'a':(before)size.
    axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])]
    dims, chosen = [], []
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[3])
    for name, size in axes:
      own = [(int(a), int(b)) for n, a, b in parts if n == name and b]
      whole = any(n == name and not b for n, a, b in parts)
      at = 1
      for before, part in sorted(own):
        if before > at:
          dims.append(before // at)
        chosen.append(len(dims))
        dims.append(part)
        at = before * part
      if at < size or not own:
        if whole:
          chosen.append(len(dims))
        dims.append(size // at)
    ids = np.arange(math.prod(dims)).reshape(dims)
    rest = [i for i in range(len(dims)) if i not in chosen]
    width = math.prod(dims[i] for i in chosen)
    return ids.transpose(rest + chosen).reshape(-1, width).tolist()
  return [list(range(num_devices))]


def _constant(instructions: dict[str, Instruction], name: str) -> int | None:
  """The value of an integer constant, also through copies."""
  found = instructions.get(name)
  while found is not None and found.opcode in ('copy', 'bitcast', 'convert'):
    found = instructions.get(found.operands[0])
  if found is not None and found.opcode == 'constant' and found.operands[0].lstrip('-').isdigit():
    return int(found.operands[0])
  return None


def trip_count(
  computations: dict[str, list[Instruction]], caller: list[Instruction], loop: Instruction
) -> int | None:
  """How often a loop that counts to a constant runs; None for every other."""
  if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(found[1])
  name = lambda key: re.search(rf'{key}=%?([\w.\-]+)', loop.attributes)[1]
  condition = {i.name: i for i in computations[name('condition')]}
  body = {i.name: i for i in computations[name('body')]}
  test = next(i for i in condition.values() if i.root)
  if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
    return None
  counter, limit = condition.get(test.operands[0]), _constant(condition, test.operands[1])
  if limit is None or counter is None or counter.opcode != 'get-tuple-element':
    return None
  index = int(re.search(r'index=(\d+)', counter.attributes)[1])
  # Loops start at 0 and step by 1 unless their text says otherwise: the compiler unrolls some.
  step, start = 1, 0
  result = next(i for i in body.values() if i.root)
  if result.opcode == 'tuple' and (new := body.get(result.operands[index])):
    if new.opcode == 'add':
      found = [c for c in (_constant(body, operand) for operand in new.operands) if c is not None]
      step = found[0] if found else 1
  outer = {i.name: i for i in caller}
  given = outer.get(loop.operands[0])
  if given is not None and given.opcode == 'tuple':
    start = _constant(outer, given.operands[index]) or 0
  return max(-(-(limit - start) // step), 0)


def collectives(
  text: str, num_devices: int, *, num_slices: int = 1, dynamic_trips: int = 1
) -> list[Traffic]:
  """Every collective of a compiled program.

  Args:
    text: of the compiled module, after partitioning.
    num_devices: that it runs on.
    num_slices: equal parts of the devices, in order.
    dynamic_trips: runs of a loop whose end depends on the data.
  """
  computations, entry = parse(text)
  found = []

  def channel(instruction: Instruction) -> str | None:
    match = re.search(r'channel_id=(\d+)', instruction.attributes)
    return match[1] if match else None

  starts = {name for name, lines in computations.items()
            if any('"AsyncCollectiveStart"' in line.attributes for line in lines)}
  spread = {channel(line) for name in starts for line in computations[name]} - {None}

  def visit(name: str, times: int, inside: tuple[str, ...]):
    for instruction in computations[name]:
      opcode = instruction.opcode.removesuffix('-start')
      if opcode in KINDS and (name in starts or channel(instruction) not in spread):
        found.append(
          _traffic(instruction, opcode, times, num_devices, num_devices // num_slices))
      if instruction.opcode == 'send' and _RUNTIME in instruction.attributes:
        sent = 2 * (num_slices - 1) / num_slices * _sizes(instruction.shape)[0]
        found.append(Traffic(BETWEEN, num_slices, sent * times, times, True))
      if instruction.opcode == 'while':
        trips = trip_count(computations, computations[name], instruction)
        trips = dynamic_trips if trips is None else trips
      else:
        trips = 1
      for called in _CALLED.findall(instruction.attributes):
        for target in re.findall(r'[\w.\-]+', called):
          if target in computations and target not in inside:
            visit(target, times * trips, (*inside, target))

  visit(entry, 1, (entry,))
  return found


def _traffic(
  instruction: Instruction, kind: str, times: int, num_devices: int, slice_size: int
) -> Traffic:
  groups = _groups(instruction.attributes, num_devices)
  size = len(groups[0]) if groups else 1
  arrays = _sizes(instruction.shape)
  started = instruction.opcode.endswith('-start')
  if kind == 'collective-permute':
    sent = arrays[0]
    # In a ring, as the compiler's own loops use it.
    size = min(2 * len({i for pair in groups for i in pair}), num_devices)
  else:
    # An asynchronous start shows its operands and its results.
    result = sum(arrays) * size / (size + 1) if started and kind == 'all-gather' else sum(arrays)
    if kind == 'reduce-scatter':
      result = (sum(arrays) / (size + 1) if started else sum(arrays)) * size
    share = (size - 1) / size
    sent = result * share * (2 if kind == 'all-reduce' else 1)
  across = any(len({i // slice_size for i in group}) > 1 for group in groups)
  return Traffic(kind, size, sent * times, times, across)


def summary(traffic: list[Traffic]) -> dict[str, dict[str, float]]:
  """By kind: bytes that a device sends, and how many collectives run."""
  kinds = collections.defaultdict(lambda: {'bytes': 0.0, 'count': 0})
  for one in traffic:
    kinds[one.kind]['bytes'] += one.sent
    kinds[one.kind]['count'] += one.count
  return dict(sorted(kinds.items()))
