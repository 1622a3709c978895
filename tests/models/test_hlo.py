"""Collectives are read from a program's text: kinds, groups, bytes, loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models import hlo, sharding

# As the TPU compiler writes it: a loop of two steps unrolled by the counter, an all-gather that is
# started inside the loop and finished in another fusion, metadata over several lines.
TPU = '''HloModule jit_f

%start (p0: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p0), channel_id=7, GROUPS, dimensions={0}
  ROOT %c = (bf16[4,8], bf16[16,8]) custom-call(%all-gather.1), TARGET="AsyncCollectiveStart"
}

%done (p1: bf16[4,8]) -> bf16[16,8] {
  %p1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p1), channel_id=7, GROUPS, dimensions={0}
}

%body (p: (f32[8], u32[], /*index=2*/bf16[4,8])) -> (f32[8], u32[], bf16[4,8]) {
  %two = u32[] constant(2)
  %p = (f32[8]{0}, u32[]{:T(128)}, /*index=2*/bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %w = bf16[4,8]{1,0} get-tuple-element(%p), index=2
  %f = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %g = bf16[16,8]{1,0} fusion(%w), kind=kCustom, calls=%done, frontend_attributes={a={
"note":"spread over lines"
}}, metadata={op_name="f"}
  %cp = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, PAIRS
  %y = f32[8]{0} collective-permute-done(%cp)
  %next = u32[] add(%i, %two)
  ROOT %t = (f32[8]{0}, u32[], bf16[4,8]{1,0}) tuple(%y, %next, %w)
}

%cond (q: (f32[8], u32[], bf16[4,8])) -> pred[] {
  %q = (f32[8]{0}, u32[], bf16[4,8]{1,0}) parameter(0)
  %j = u32[] get-tuple-element(%q), index=1
  %limit = u32[] constant(6)
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[8], b: bf16[4,8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %init = (f32[8]{0}, u32[], bf16[4,8]{1,0}) tuple(%a, %zero, %b)
  %loop = (f32[8]{0}, u32[], bf16[4,8]{1,0}) while(%init), condition=%cond, body=%body
  %r = f32[8]{0} get-tuple-element(%loop), index=0
  ROOT %sum = f32[8]{0} all-reduce(%r), channel_id=9, IOTA, to_apply=%add
}
'''
TPU = TPU.replace('GROUPS', "replica_groups=mesh['a'=2,'b'=4] {'b'}").replace(
  'PAIRS', 'source_target_pairs={{0,1},{1,0}}').replace(
  'IOTA', 'replica_groups=[2,4]<=[4,2]T(1,0)').replace('TARGET', 'custom_call_target')


def test_loops_spread_collectives_and_slices():
  by_kind = {t.kind: t for t in hlo.collectives(TPU, 8, num_slices=2)}
  assert set(by_kind) == {'all-gather', 'all-reduce', 'collective-permute'}
  gather, permute, reduce = (
    by_kind[kind] for kind in ('all-gather', 'collective-permute', 'all-reduce'))
  # 0, 2, 4: three runs; each sends its part to the three others of its group.
  assert (gather.count, gather.group, gather.sent) == (3, 4, 3 * 16 * 8 * 2 * 3 / 4)
  assert not gather.across
  assert (permute.count, permute.sent) == (3, 3 * 8 * 4)
  # Groups {0, 2, 4, 6} and {1, 3, 5, 7}: devices 4 to 7 are the other slice.
  assert (reduce.group, reduce.sent, reduce.across) == (4, 2 * 8 * 4 * 3 / 4, True)
  assert hlo.summary(hlo.collectives(TPU, 8))['all-gather'] == {'bytes': 576.0, 'count': 3}


def test_a_computation_of_another_core_ends():
  end = '"AsyncCollectiveStart"\n}'
  text = TPU.replace(end, f'{end}, execution_thread="sparsecore"')
  assert text != TPU and hlo.parse(text) == hlo.parse(TPU)


def test_what_a_runtime_sends_to_other_slices():
  send = ('  %s = (f32[8]{0}, u32[], token[]) send(%r), channel_id=11, is_host_transfer=true, '
          'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}\n')
  text = TPU.replace('  ROOT %sum', send + '  ROOT %sum')
  (sent,) = [t for t in hlo.collectives(text, 8, num_slices=4) if t.kind == hlo.BETWEEN]
  assert (sent.sent, sent.count, sent.across) == (8 * 4 * 2 * 3 / 4, 1, True)


def test_a_loop_whose_end_depends_on_the_data_runs_as_often_as_it_is_told():
  text = TPU.replace('compare(%j, %limit), direction=LT', 'and(%j, %limit)')
  (gather,) = [t for t in hlo.collectives(text, 8, dynamic_trips=11) if t.kind == 'all-gather']
  assert gather.count == 11


@pytest.mark.parametrize('notation, groups', [
  ('replica_groups={{0,2},{1,3}}', [[0, 2], [1, 3]]),
  ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
  ('replica_groups=[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
  ("replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
  ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", [[0, 1, 2, 3]]),
  ("replica_groups=mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
  ("replica_groups=mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
  ('no groups', [[0, 1, 2, 3]]),
])
def test_notations_of_groups(notation, groups):
  assert sorted(map(sorted, hlo._groups(f', {notation}, x', 4))) == groups


def test_a_compiled_program_of_this_machine():
  mesh = sharding.make_mesh(2, 2, 2)
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

  @functools.partial(
    jax.jit, in_shardings=(place('data'), place('fsdp', 'tensor')), out_shardings=place())
  def f(x, w):
    # A column split, then a sum over the split axis: all-reduces over tensor, in a loop of 5.
    body = lambda x, _: (jnp.tanh(jnp.tanh(x @ w) @ w.T), None)
    return jax.lax.scan(body, x, None, length=5)[0]

  shapes = (jax.ShapeDtypeStruct((4, 8), np.float32), jax.ShapeDtypeStruct((8, 8), np.float32))
  found = hlo.collectives(f.lower(*shapes).compile().as_text(), 8)
  assert any(t.count == 5 and t.kind == 'all-reduce' for t in found)
  assert all(t.group in (2, 4, 8) and t.sent > 0 for t in found)
