import pytest

from data.errors import UserError
from models import decoder, registry
from models.decoder import to_params

KNOWN = {
  'smollm2_135m': 134_515_008,
  'qwen25_0.5b': 494_032_768,
  'qwen25_1.5b': 1_543_714_304,
  'qwen25_3b': 3_085_938_688,
  'qwen25_7b': 7_615_616_512,
  'qwen25_14b': 14_770_033_664,
  'llama31_8b': 8_030_261_248,
  'qwen3_0.6b': 596_049_920,
  'qwen3_4b': 4_022_468_096,
  'qwen3_8b': 8_190_735_360,
  'qwen3_14b': 14_768_307_200,
  'qwen3_embedding_0.6b': 595_776_512,
  'gemma3_4b': 3_880_263_168,
  'ministral3_8b': 8_489_553_920,
}


@pytest.mark.parametrize('name', KNOWN)
def test_counts_and_shapes_equal_transformers(name):
  pytest.importorskip('torch')
  from tests.models import torch_reference

  config = registry.get_config(name)
  assert registry.count_params(config) == KNOWN[name]
  model = torch_reference.build(config, device='meta')
  assert model.num_parameters() == KNOWN[name]
  shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
  ours = {k: v.shape for k, v in to_params(decoder.abstract(config).frozen).items()}
  table = torch_reference.names(config)
  assert set(table) == set(ours)
  for flat, (pattern, transposed) in table.items():
    theirs = shapes[pattern.format(config.num_layers - 1)]
    theirs = theirs[::-1] if transposed else theirs
    assert ours[flat] == ((config.num_layers, *theirs) if '{}' in pattern else theirs), flat


def test_unknown_names_list_the_near_ones():
  with pytest.raises(UserError, match='qwen25_7b'):
    registry.get_config('qwen2.5_7b')
  with pytest.raises(UserError, match='rope_theta'):
    registry.get_config('qwen25_7b', rope_tetha=1.0)
  with pytest.raises(UserError, match='float16'):
    registry.get_config('qwen25_7b', dtype='float16')


def test_shrink_keeps_the_architecture():
  for name in registry.CONFIGS:
    config = registry.get_config(name)
    tiny = registry.shrink(config)
    assert registry.count_params(tiny) < 200_000
    for field in ('family', 'tie_embeddings', 'qkv_bias', 'rope_scaling', 'rope_theta'):
      assert getattr(tiny, field) == getattr(config, field)
