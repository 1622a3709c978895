"""A model and its adapters behind the OpenAI chat protocol.

  python serve.py --config=configs/serve.py:adapters=student:runs/distilled/adapter

prints where it listens; then, from any program:

  client = openai.OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')
  client.chat.completions.create(model='student', messages=[{'role': 'user', 'content': 'Hello'}])

Loading takes seconds, and a further few at the first request of each temperature. All models lie
side by side over one copy of the base, and share slots and dispatches.
Everything beyond the limits below is refused with a sentence. There is no encryption and no key: on
another host than loopback, put a proxy that has both before it.
"""

from configs import common

DEFAULTS = dict(
  # The policies: the base under its own name, and each adapter under the one given here.
  model='smollm2_135m',  # a name of models/registry.py, or the path of weights
  adapters='',  # NAME:FOLDER;NAME:FOLDER, PEFT folders such as the adapter/ of a training run
  base='',  # weights: '' published, 'random', or a path
  tokenizer='',  # path; '' is that of the weights
  shrink=False,  # a tiny random model of the same family, for dry runs (needs base=random)
  dtype='auto',  # operands of the products: bfloat16, float32; auto: the faster here
  base_quantization='none',  # as the adapters were trained: none, int8, int4, nf4
  # Where it listens.
  host='127.0.0.1',  # an IPv4 address of this machine; the default is reached from it alone
  port=8000,  # 0 is any that is free
  # Limits.
  slots=8,  # conversations at a time, of each temperature
  max_context=2048,  # tokens of a conversation with its reply
  max_new_tokens=512,  # of a reply
  queue=32,  # requests that wait; more are answered with 429
  max_request_bytes=1_000_000,  # larger ones are answered with 413
  max_connections=128,  # at a time; more are answered with 503
  engines=4,  # caches that are kept: one for each temperature that is asked for
  temperature=0.0,  # where a request names none
  seed=0,  # of the draws
  # Speed.
  decode_steps=8,
  cache_dtype='',  # of keys and values: float32, bfloat16, int8; '' is dtype
  lookup=0,  # most tokens of a draft that is copied from the context and verified in one step
  piece=16,  # most tokens before streamed text is sent on, and stop strings are looked for
)

HELP_KEYS = (
  'model', 'adapters', 'host', 'port', 'slots', 'max_context', 'max_new_tokens', 'temperature')


def get_config(arg=None):
  return common.make_config(arg, DEFAULTS)
