"""`python -m cs_lm serve`: a local page to prompt trained models, and OpenAI-style endpoints.

The page is at http://127.0.0.1:8000/. Clients find /v1/models, /v1/completions and
/v1/chat/completions. Requests that come together are decoded together. SIGTERM and Ctrl-C let the
running requests end first.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.run import DTYPES
from cs_lm.config.shared import (
    checkpoint_setting,
    device_setting,
    validate_checkpoint,
    validate_run,
)
from cs_lm.device import resolve_device
from cs_lm.errors import Problem, UserError, missing_package
from cs_lm.serving.engine import Engine
from cs_lm.training.run_dir import RunFolder, load_trained

LOOPBACK = ("127.0.0.1", "localhost", "::1")
API_KEY = "CS_LM_API_KEY"
_LAST_WORDS_S = 5  # for the errors of the requests that the end of the server stops


@dataclass(frozen=True)
class ServeConfig:
    out_dir: tuple[str, ...] = setting((), "folders of runs, each of which is a model; required")
    checkpoint: str = checkpoint_setting()
    host: str = setting("127.0.0.1", "address to listen on; another than loopback needs a key")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    api_key: str | None = setting(
        None, f"what clients must send as bearer token; better in the variable {API_KEY}"
    )
    max_rows: int = setting(16, "answers that a model decodes at the same time")
    max_queue: int = setting(64, "requests of a model that may wait")
    max_connections: int = setting(256, "open connections")
    max_body_bytes: int = setting(1 << 20, "largest request", "bytes")
    request_timeout_s: float = setting(300.0, "longest time of a request", "s")
    drain_timeout_s: int = setting(30, "time that running requests get at the end", "s")
    device: str = device_setting()
    dtype: str = setting(
        "float32", "of the weights; bfloat16 is quicker and less exact", choices=DTYPES
    )

    def validate(self) -> list[Problem]:
        found = validate_run(self.out_dir)
        if not 0 <= self.port < 1 << 16:
            found.append(Problem("--port", f"got {self.port}", "0 to 65535"))
        names = ("max_rows", "max_queue", "max_connections", "max_body_bytes", "drain_timeout_s")
        for name in (*names, "request_timeout_s"):
            value = getattr(self, name)
            if not 1 <= value < float("inf"):
                found.append(Problem(f"--{name}", f"got {value}", "1 or more"))
        if self.api_key == "":
            found.append(Problem("--api_key", "is empty", "at least one character"))
        if self.host not in LOOPBACK and not (self.api_key or os.environ.get(API_KEY)):
            what = f"got {self.host!r}, which other machines may reach"
            fix = f"set {API_KEY}, or listen on 127.0.0.1"
            found.append(Problem("--host", what, "an API key with it", fix))
        return found + validate_checkpoint(self.checkpoint)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ServeConfig, "python -m cs_lm serve", __doc__, argv)
    try:
        import uvicorn

        from cs_lm.serving.app import Limits, build_app
    except ImportError:
        raise UserError(missing_package("serve", "starlette and uvicorn", "serve")) from None
    listener = _listener(config.host, config.port)
    engines = _engines(config)
    app = build_app(
        engines,
        Limits(config.max_body_bytes, request_s=config.request_timeout_s),
        config.api_key or os.environ.get(API_KEY) or None,
        (*LOOPBACK, config.host.lower()) if config.host in LOOPBACK else None,
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            """A signal ends the server after its requests, with exit status 0."""
            numbers = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def shutdown(self, sockets=None):
            """Requests that do not end in time get an error, which ends them."""
            late = asyncio.create_task(self._stop_engines())
            try:
                await super().shutdown(sockets)
            finally:
                late.cancel()

        async def _stop_engines(self):
            await asyncio.sleep(config.drain_timeout_s)
            for engine in engines.values():
                await asyncio.to_thread(engine.stop)

    server = Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=config.max_connections,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=config.drain_timeout_s + _LAST_WORDS_S,
            h11_max_incomplete_event_size=1 << 16,
        )
    )
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"http://{host}:{listener.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
    server.run([listener])
    print("the server has ended", file=sys.stderr)
    return 0


def _engines(config: ServeConfig) -> dict[str, Engine]:
    device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
    engines: dict[str, Engine] = {}
    for path in config.out_dir:
        folder = RunFolder(path)
        name = folder.path.resolve().name
        if name in engines:
            raise UserError(f"--out_dir: got two runs named {name!r}; rename one of the folders")
        trained = load_trained(folder, config.checkpoint, device, dtype)
        engines[name] = Engine(
            trained.model,
            trained.tokenizer,
            config.max_rows,
            config.max_queue,
            trained.template,
        )
    return engines


def _listener(host: str, port: int) -> socket.socket:
    """Raises: UserError for an address or a port that cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # clients that come before the server is ready wait
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host, --port: cannot listen on {host} port {port} ({reason}); choose another one"
        ) from None
    return listener
