"""Serves a model and its adapters behind the OpenAI chat protocol.

  python serve.py --config=configs/serve.py:adapters=student:runs/distilled/adapter

See configs/serve.py for every key. Concurrent requests share the engine's dispatches, and a
conversation that goes on computes its new tokens only.
"""

import ipaddress
import signal
import sys
import threading

import ml_collections
from absl import flags

from configs import cli, common
from configs import serve as config_lib
from data import errors


def check(config: ml_collections.ConfigDict) -> None:
  """Raises errors.UserError for what can be wrong, before anything is loaded."""
  common.check_engine(config)
  for key in ('queue', 'max_context', 'max_new_tokens', 'max_request_bytes', 'max_connections',
              'engines', 'piece'):
    if config[key] < 1:
      raise errors.UserError(f'{key} must be at least 1.')
  if not 0 <= config.port < 2**16:
    raise errors.UserError(f'port={config.port} does not lie in 0..65535.')
  if config.max_new_tokens >= config.max_context:
    raise errors.UserError(
      f'max_new_tokens={config.max_new_tokens} leaves no room for messages in '
      f'max_context={config.max_context}.')
  try:
    ipaddress.IPv4Address(config.host)
  except ValueError:
    raise errors.UserError(
      f'host={config.host} is no IPv4 address; 127.0.0.1 is this machine alone.') from None


def make_server(config: ml_collections.ConfigDict, base=None):
  """Loads the model and binds the address.

  Args:
    config: as configs/serve.py makes it.
    base: an `agents.policy.Base` that is loaded already; None loads what the config names.

  Returns:
    An `agents.chat_server.ChatServer`; whoever ends it closes its scheduler, too.

  Raises:
    errors.UserError: a key is wrong, or the address is taken.
  """
  check(config)
  adapters = common.read_adapters(
    config.adapters, base.name if base is not None else config.model)

  from agents import policy

  config = config.copy_and_resolve_references()
  config.dtype = policy.settle_dtype(config, base)
  for folder in adapters.values():
    policy.check_adapter(folder)
  if base is None:
    base = policy.load_base(
      config.model, config.base, tokenizer=config.tokenizer, shrink=config.shrink,
      dtype=config.dtype, base_quantization=config.base_quantization, seed=config.seed)
    adapters = common.read_adapters(config.adapters, base.name)
  if config.max_context > base.config.max_position:
    raise errors.UserError(
      f'max_context={config.max_context} is more than the {base.config.max_position} positions '
      f'that {base.name} was trained for; set max_context to that or less.')

  from agents import chat, chat_server
  from inference import Engine, SamplingConfig
  from models.adapters import prepare

  # All policies side by side in each engine, and one copy of the weights for all engines; the base
  # that is loaded here is given up.
  model, tokenizer = prepare(base.policies(list(adapters.values()))), base.tokenizer

  def make_engine(sampling: chat.Sampling) -> Engine:
    return Engine(
      model, num_slots=config.slots, max_len=config.max_context, stop_ids=tokenizer.stop_ids,
      sampling=SamplingConfig(temperature=sampling.temperature, top_p=sampling.top_p),
      **policy.engine_options(config))

  scheduler = chat.Scheduler(
    tokenizer, make_engine, list(adapters), max_context=config.max_context,
    max_waiting=config.queue, max_engines=config.engines, piece=config.piece)
  try:
    return chat_server.ChatServer(
      (config.host, config.port), tokenizer, scheduler,
      max_new_tokens=config.max_new_tokens, temperature=config.temperature,
      max_request_bytes=config.max_request_bytes, max_connections=config.max_connections)
  except OSError as error:
    scheduler.close()
    raise errors.UserError(
      f'{config.host}:{config.port} cannot be bound ({error.strerror}); take another port.'
    ) from error


def main(_):
  config = flags.FLAGS.config or config_lib.get_config()
  server = make_server(config)
  host, port = server.server_address[:2]
  if not server.loopback:
    print(f'{host} is reached from other machines, without a key.', file=sys.stderr)
  names = ', '.join(server.scheduler.models)
  print(f'serving {names} at http://{host}:{port}/v1', flush=True)
  # A signal's handler runs in this thread, which `serve_forever` holds.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
  try:
    server.serve_forever(poll_interval=0.2)
  finally:
    server.server_close()
    server.scheduler.close()


if __name__ == '__main__':
  cli.define_config_flags(workdir=False)
  cli.run(main, required=())
