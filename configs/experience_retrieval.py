"""Experience retrieval from end to end: ExpRAG and ExpRAG-LoRA (arXiv 2603.18272).

  python -m experiments.experience_retrieval \
    --config=configs/experience_retrieval.py:model=smollm2_135m --workdir=runs/experience

`setting` is a set of defaults that everything else overrides:

  demo       SmolLM2-135M, generated houses: 32 skills trained on (easy), 12 never seen (hard). The
             default of smollm2_135m and of a model folder; about 30 minutes on 2 CPU cores.
  houses     the same with every row of the paper's main table, and more games.
  small      these rows with experiments/small_decoder, 1.8 million parameters: on CPUs it trains
             ten to twenty times as fast as SmolLM2-135M.
  small_demo the part of them that shows the method; `make demo-experience`.
  household  generated games of ALFWorld's own six task types, three of them easy.
  alfworld   SmolLM2-135M on ALFWorld's own games, the paper's split by task type.
  paper      the paper's setting in full. The default of every other name of models/registry.py.
  scienceworld        a decoder of a million parameters on ScienceWorld, trained there from random
                      weights in the first stage: 7 short easy task types, 2 short hard ones.
  scienceworld_smollm2  SmolLM2-135M there, its task types split into 17 and 13.
  scienceworld_paper  likewise the paper's setting in full, at most 5 variations a task in the test.

`recipe` is a set of training defaults likewise: ours; paper (rank 8, attention only, constant
rate) and paper_scienceworld (for more epochs); earlier, that of earlier agent training (full
sequence, one epoch, arXiv 2510.01375).
`--dry_run` walks every stage with a shrunken random model and a few games.
"""

import os

from configs import common, from_scratch
from data import errors

# arXiv 2603.18272: task types of ALFWorld that are trained on, and those that never are.
EASY_TYPES = 'look_at_obj_in_light,pick_clean_then_place_in_recep,pick_and_place_simple'
HARD_TYPES = (
  'pick_cool_then_place_in_recep,pick_heat_then_place_in_recep,pick_two_obj_and_place')

_DEMO_ROWS = (
  'lora,lora+matched,exprag_lora_dropout+matched,exprag_lora_dropout+mismatched,'
  'exprag_lora_dropout')

DEFAULTS = dict(
  setting='',  # demo, houses, small, household, alfworld, paper...; '' is the model's own
  recipe='ours',  # ours, paper, paper_scienceworld, earlier
  model='smollm2_135m',  # a name of models/registry.py, or the path of weights
  base='',  # weights: '' published, 'random', or a path
  tokenizer='',
  # In the place of `model`: one that the first stage trains from random weights, by this setting of
  # configs/from_scratch.py.
  decoder='',
  shrink=False,
  dtype='auto',  # operands of the products: bfloat16, float32; auto: the faster here
  play_dtype='',  # likewise of those that play; '' is dtype, or where it is auto what plays faster
  base_quantization='none',  # kernels of the frozen base: none, int8, int4, nf4
  seed=0,
  start_adapter='',  # PEFT folder that every policy starts from; '' is none
  # Tasks: three kinds of them. Easy ones are trained on; hard ones are in the index only; the
  # validation's ('' for none) and houses of easy ones choose between checkpoints.
  env='household',
  data='generated',  # 'generated', or the folder of the real games
  easy_skills='easy',
  hard_skills='hard',
  validation_skills='loop',
  easy_types='make_state',
  hard_types='make_state',
  # MiniLM takes tasks with the same thing for alike rather than those of the same skill: with 24
  # types of things it finds one of the same skill for 37 % of the easy tasks and 75 % of the hard
  # ones (256 in the index, K = 2), with 4 for 93 % and all of them; BM25 for all.
  env_options='num_appliances:5-5;num_surfaces:1-2;num_things:2-3;num_thing_types:4',
  env_workers=-1,  # processes that run the environments; 0 is this one, -1 as they need
  train_split='train',
  eval_split='valid_unseen',
  validation_split='valid_seen',
  validation_skip=0,  # tasks of the validation split that are left out before it
  index_games=256,  # of each split: in its index, the easy ones also trained on; 0 is all
  eval_games=50,  # of each split, played by every row; 0 is all
  validation_games=24,  # of each of its kinds of tasks, for each checkpoint
  # POLICY[+CONDITION], each on both splits; see experiments/experience_rows.py.
  evaluate=_DEMO_ROWS,
  # The bank: beside the successes, failures of an expert that errs on purpose.
  failures=0.125,  # share of the index's games on which it errs
  error_rate=0.5,  # per decision
  failure_steps=6,  # environment steps that it is given
  # Agent.
  agent='plain',  # plain, react, stateact
  layout='paper_b',
  prompt='short',
  max_env_steps=10,
  max_calls=14,
  max_new_tokens=24,
  max_context=1024,
  # Memory, the same in training and in play.
  experience_k=2,  # episodes in a prompt
  experience_retrieval='minilm',  # an encoder of retrieval/encoders.py, bm25, random
  query='static',  # of play; training contexts are always retrieved once
  experience_format='summary',  # chat, flat, summary
  outcomes='all',
  same_type=False,
  diversity=0.0,
  block_order='best_first',
  memory_tokens=0,
  exact_below=20_000,
  leaves_searched=0.2,
  grow=12,  # tasks between two additions of a growing index
  hint_bank='',  # JSON of python -m retrieval.hints: hints stand in every memory, too
  k=3,  # hints in a prompt
  retrieval='minilm',  # of hints
  # Demonstrations and retrieval dropout.
  expert_knows='rules',  # rules, nothing, shown (what the memory shows)
  dropout_memory=0.3,  # probability of another memory in training, of exprag_lora_dropout
  dropout_mismatched=0.5,  # share of those that get experiences of other kinds of tasks
  dropout_draws=2,  # times that every demonstration draws
  # The joined method: the teacher's successes without their memory teach the student.
  teacher='exprag_lora_dropout',  # frozen, exprag_lora, exprag_lora_dropout
  teacher_splits='easy,hard',  # whose training tasks it plays
  teacher_games=128,  # of each
  # Training.
  rank=16,
  alpha=32.0,
  dropout=0.0,
  targets='q,k,v,o,gate,up,down',
  learning_rate=1e-3,
  schedule='linear',
  warmup_fraction=0.1,
  weight_decay=0.01,
  loss_on='action',
  epochs=2.5,
  row_len=1024,
  batch_rows=1,
  grad_accum=1,
  max_invalid=2,
  candidates=1,  # checkpoints of which rollouts choose the best; 1 is the last one
  # Speed.
  mesh='auto',  # of training: sizes data,fsdp,tensor
  slots=32,
  decode_steps=8,
)

_ALL_ROWS = (
  'frozen,frozen+matched,frozen+mismatched,lora,lora+matched,lora+mismatched,exprag_lora+matched,'
  'exprag_lora+mismatched,exprag_lora,exprag_lora_dropout+matched,exprag_lora_dropout+mismatched,'
  'exprag_lora_dropout,exprag_lora_dropout+random,distilled')
_OFFICIAL = dict(
  easy_skills='official',
  hard_skills='official',
  validation_skills='',
  easy_types=EASY_TYPES,
  hard_types=HARD_TYPES,
  env_options='',
  max_env_steps=50,
  max_calls=60,
  failure_steps=20,
)

# Which task types are easy and which hard: envs/scienceworld.py, by what rule where the paper does
# not say it. A task's own limits hold: 30 to 480 environment steps.
_SCIENCEWORLD = dict(
  env='scienceworld',
  easy_skills='official',
  hard_skills='official',
  validation_skills='',
  easy_types='easy',
  hard_types='hard',
  env_options='test_variations:5',
  eval_split='test',
  validation_split='dev',
  evaluate=_ALL_ROWS,
  error_rate=0.1,
  max_env_steps=0,
  max_calls=0,
  failure_steps=500,
  max_new_tokens=32,
)

# ReAct's thoughts say which state is wanted just before they say what makes it: a decoder of four
# layers copies a rule from the memory there, and not for a goal that stands elsewhere. Where the
# memory shows no way the expert finds one, label by label in the order of the room, so that
# retrieval dropout teaches what to do without a memory; that takes 16 steps.
_SMALL = dict(
  model=from_scratch.PUBLISHED, agent='react', expert_knows='shown',
  env_options=f'{DEFAULTS["env_options"]};expert_in_order:true',
  max_env_steps=16, max_calls=44, max_new_tokens=40, max_context=1152, row_len=1152,
  experience_format='summary', dropout_memory=0.6, dropout_mismatched=0.2,
  rank=32, alpha=64.0, learning_rate=2e-3, batch_rows=2)

SETTINGS = {
  'demo': {},
  'houses': dict(
    evaluate=_ALL_ROWS, index_games=480, eval_games=120, teacher_games=240, epochs=6.0,
    candidates=3, experience_format='chat', row_len=1408),
  'small': dict(
    _SMALL, evaluate=_ALL_ROWS, index_games=480, eval_games=120, teacher_games=240, epochs=9.0,
    candidates=3),
  'small_demo': dict(
    _SMALL, evaluate=f'frozen,{_DEMO_ROWS}', index_games=320, eval_games=100, epochs=6.0),
  'household': dict(
    _OFFICIAL, evaluate=_ALL_ROWS, env_options='num_receptacles:6-12',
    max_context=4096, row_len=2048),
  # valid_unseen, the paper's test, is not in every copy of the data: eval_split takes any split.
  'alfworld': dict(
    _OFFICIAL, data=os.path.join('${HINTSIGHT_DATA}', 'alfworld', 'json_2.1.1'),
    evaluate=_ALL_ROWS, index_games=240, eval_games=60, teacher_games=60,
    eval_split='valid_seen', validation_split='train', validation_skip=240,
    max_context=4096, row_len=2048),
  'paper': dict(
    _OFFICIAL, data=os.path.join('${HINTSIGHT_DATA}', 'alfworld', 'json_2.1.1'),
    recipe='paper', evaluate=_ALL_ROWS, index_games=0, eval_games=0, teacher_games=0,
    eval_split='valid_unseen', validation_split='valid_seen', prompt='full', failures=0.0,
    experience_retrieval='qwen3_embedding', experience_format='chat',
    max_calls=100, max_new_tokens=32, max_context=16384, row_len=8192, slots=64),
  'scienceworld': dict(
    _SCIENCEWORLD, decoder='scienceworld', dtype='float32',
    easy_types=from_scratch.SHORT_EASY_TYPES,
    hard_types='chemistry-mix-paint-secondary-color,chemistry-mix-paint-tertiary-color',
    env_options='', evaluate='frozen,lora,exprag_lora+matched',
    index_games=24, eval_games=18, failures=0.0, experience_k=1, max_env_steps=30, max_calls=32,
    max_context=2560, row_len=1536, rank=32, alpha=64.0, learning_rate=2e-3, epochs=6.0,
    # One game at a time: on two cores a second simulator takes longer to start than it saves.
    slots=1, env_workers=0),
  'scienceworld_smollm2': dict(
    _SCIENCEWORLD, index_games=85, eval_games=65, teacher_games=65, epochs=4.0,
    max_context=8192, row_len=4096, slots=8),
  'scienceworld_paper': dict(
    _SCIENCEWORLD, recipe='paper_scienceworld', index_games=0, eval_games=0, teacher_games=0,
    prompt='full', failures=0.0, experience_retrieval='qwen3_embedding',
    experience_format='chat', max_context=32768, row_len=16384, slots=32),
}

# arXiv 2603.18272; 9 epochs on ALFWorld, 29 on ScienceWorld.
_PAPER = dict(
  rank=8, alpha=16.0, dropout=0.1, targets='q,k,v,o', learning_rate=5e-5, schedule='constant',
  warmup_fraction=0.0, weight_decay=0.0, loss_on='action', epochs=9.0, batch_rows=2,
  grad_accum=4, candidates=9)

RECIPES = {
  'ours': {},
  'paper': _PAPER,
  'paper_scienceworld': {**_PAPER, 'epochs': 29.0, 'candidates': 10},
  # arXiv 2510.01375.
  'earlier': dict(
    rank=64, alpha=128.0, dropout=0.1, targets='q,k,v,o,gate,up,down', learning_rate=2e-4,
    schedule='linear', warmup_fraction=0.1, weight_decay=0.01, loss_on='all', epochs=1.0,
    batch_rows=2, grad_accum=4),
}

HELP_KEYS = (
  'setting', 'recipe', 'model', 'base', 'data', 'index_games', 'eval_games', 'experience_k',
  'experience_format')


def get_config(arg=None):
  values = common.parse_arg(arg, DEFAULTS)
  model, setting = values['model'], values['setting']
  if not setting:
    small = model == DEFAULTS['model'] or os.path.exists(model)
    setting = 'demo' if small else 'paper'
  if setting not in SETTINGS:
    raise errors.UserError(f'There is no setting {setting!r}; there are {", ".join(SETTINGS)}.')
  chosen = {**DEFAULTS, 'model': model, **SETTINGS[setting], 'setting': setting}
  recipe = common.parse_arg(arg, chosen)['recipe']
  if recipe not in RECIPES:
    raise errors.UserError(f'There is no recipe {recipe!r}; there are {", ".join(RECIPES)}.')
  return common.make_config(arg, {**chosen, **RECIPES[recipe], 'recipe': recipe})
