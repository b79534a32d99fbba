"""`sheepop serve`: a checkpoint, an address, and the server between them."""

import json
import socket
from pathlib import Path

from sheepop.data.chat_template import load_chat_template
from sheepop.generation.batching import Engine
from sheepop.generation.runner import NaiveRunner, runner_for
from sheepop.generation.terminal import check_combination, load_model_and_tokenizer, load_speculator
from sheepop.models.pretrained import resolve_checkpoint
from sheepop.models.quantized_layers import Quantization
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import log, warn

LEAST_NEW_TOKENS = 4096  # that a request may ask for, however short the context
LARGEST_PORT = 2**16 - 1
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


def serve(
    checkpoint: Path,
    *,
    host: str,
    port: int,
    name: str | None,
    batch_size: int,
    max_queue: int,
    max_new_tokens: int | None,
    api_key: str | None,
    grace_seconds: float,
    optimized: bool,
    quantization: Quantization | None,
    int8_cache: bool,
    speculate: str | None,
    device: str,
    as_json: bool,
) -> int:
    """Serve a model until SIGINT or SIGTERM comes; return the exit status, 130 or 143.

    The address is taken before the model is loaded, so that one that cannot be had is known at once.

    Raises:
        ConfigError: a package is missing, the address cannot be had, or options do not fit.
        CheckpointError: the checkpoint cannot be used.
    """
    try:
        from sheepop.serving.process import run
        from sheepop.serving.served_model import ServedModel
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sheepop"):
            raise
        raise ConfigError(
            f"Serving needs the package {error.name}, which is not installed. Install it with: pip install "
            "'sheepop[serve]'"
        ) from None
    for option, value in (("--max-queue", max_queue), ("--max-new-tokens", max_new_tokens), ("--grace", grace_seconds)):
        if value is not None and value < 0:
            raise ConfigError(f"{option} is {value}, but must be at least 0.")
    check_combination(
        prompt=None,
        prompts=None,
        output=None,
        optimized=optimized,
        speculate=speculate,
        grammar=None,
        int8_cache=int8_cache,
        compiles=False,
    )
    with bind(host, port) as listener:
        model, tokenizer = load_model_and_tokenizer(checkpoint, device, quantization)
        engine = Engine(
            model,
            max_batch_size=batch_size,
            int8_cache=int8_cache,
            runner=runner_for(model) if optimized else NaiveRunner(model),
            speculator=load_speculator(speculate, model, tokenizer, max_batch_size=batch_size),
        )
        served = ServedModel(
            name or checkpoint.resolve().name,
            tokenizer,
            engine,
            max(model.config.max_seq_len, LEAST_NEW_TOKENS) if max_new_tokens is None else max_new_tokens,
            load_chat_template(resolve_checkpoint(checkpoint)),
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

        def on_ready() -> None:
            log(f"{served.name} is served at {address} (the page), {address}/v1 (the API). Ctrl+C ends.")
            if api_key is None and host not in LOCAL_HOSTS:
                warn("whoever reaches this machine can use the model; --api-key asks them for a key")
            if as_json:
                print(json.dumps({"url": address, "model": served.name}), flush=True)

        number = run(
            served,
            listener,
            max_waiting=max_queue,
            api_key=api_key or None,
            grace_seconds=grace_seconds,
            on_ready=on_ready,
        )
    log("The server has ended.")
    return 128 + number


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has an address and does not listen yet; port 0 is any that is free.

    Raises:
        ConfigError: the address cannot be had.
    """
    if not 0 <= port <= LARGEST_PORT:  # the system would take the rest of a division
        raise ConfigError(f"--port is {port}, but must be from 0 (any that is free) to {LARGEST_PORT}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"The address {host}, port {port}, cannot be had: {why}. Name another --host or --port; --port 0 takes any "
            "that is free."
        ) from None
    return listener
