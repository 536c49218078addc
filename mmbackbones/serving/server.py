"""Uvicorn, which says where it listens once it does."""

from typing import Any

import uvicorn
from fastapi import FastAPI

__all__ = ['run_app']


class _Server(uvicorn.Server):
    """Prints a line as soon as clients are let in.

    Args:
        config: of uvicorn.
        what: is served.
    """

    def __init__(self, config: uvicorn.Config, what: str) -> None:
        super().__init__(config)
        self._what = what

    async def startup(self, sockets: list | None = None) -> None:
        """Bind, listen, say so."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f'[{host}]' if ':' in host else host
            # Flushed: whoever waits for the line reads it through a pipe.
            print(f'serving {self._what} at http://{host}:{port}/', flush=True)


def run_app(app: FastAPI, **options: Any) -> None:
    """Answer until SIGTERM or Ctrl-C.

    Args:
        app: of `create_app`.
        options: of `uvicorn.Config`: `host`, `port`, ... Port 0 takes a free one.

    Raises:
        ValueError: the app failed to start.
    """
    service = app.state.service
    info = service.backend.info
    what = (
        f'{service.name!r} ({service.backend.name}, {info.task}, '
        f'{len(info.classes)} classes)'
    )
    config = uvicorn.Config(app, log_level='warning', backlog=4096, **options)
    server = _Server(config, what)
    server.run()
    if not server.started:  # a port in use ends the process within uvicorn
        raise ValueError('the server did not start; see the log')
