"""The page's command line: python -m pipeline.page [--port 7860].

The page stands before the same `Service` as the other doors. It listens on this machine alone unless told otherwise, and asks
no other host for anything.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import tempfile
import threading
from pathlib import Path

from fastapi import HTTPException
from fastapi.responses import FileResponse
from nicegui import app, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipeline.job import logs, signals
from pipeline.page.tab import Tab
from pipeline.page.view import View
from pipeline.run import Service
from pipeline.settings import BadSetting, Settings

LOOPBACK = ("127.0.0.1", "localhost")
KEEP_SEC = 5.0  # a tab whose browser has been away for so long is closed
# an uploaded file is never a page of this site, whatever it holds
HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox", "Cache-Control": "no-store"}


def add_routes(service: Service, root: Path, tabs: dict[str, Tab]) -> None:
    """The page, with a new tab for each visit, and the files of the tabs that are open."""
    @ui.page("/", title="MuseTalk worker", reconnect_timeout=KEEP_SEC)
    def page() -> None:
        tab = Tab(service, root)
        tabs[tab.id] = tab
        ui.context.client.on_delete(tab.close)
        View(tab, int(service.settings.max_download_mb * 1e6))

    @app.get("/files/{tab}/{name}")
    def file(tab: str, name: str) -> FileResponse:
        path = tabs[tab].served(name) if tab in tabs else None
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, headers=HEADERS)


def serve(host: str, port: int) -> None:
    """Serve until a signal comes."""
    if host in LOOPBACK:  # another site's name may be made to mean this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    print(f"http://{host}:{port}/", flush=True)
    ui.run(host=host, port=port, show=False, reload=False, show_welcome_message=False, favicon="💬",
           timeout_graceful_shutdown=2)


def check_free(host: str, port: int) -> None:
    """Raises OSError when nothing can listen there."""
    with socket.create_server((host, port)):
        pass


def main() -> int:
    """Exit code: 0 done, 1 it cannot start, 128 and the signal's number when one ended it."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.page", description="A local page to try and tune the worker.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    logs.setup("ERROR")
    logging.getLogger("nicegui").setLevel("ERROR")  # it warns of every address that somebody mistypes
    signals.exit_on_signals()
    tabs: dict[str, Tab] = {}
    with tempfile.TemporaryDirectory(prefix="musetalk-page-") as folder:
        try:
            check_free(options.host, options.port)
            service = Service(Settings.for_shell().model_copy(update={
                "storage": "local", "local_storage_dir": Path(folder, "films"), "local_input_root": Path("/")}))
            threading.Thread(target=service.engine.warm_up, daemon=True).start()
            add_routes(service, Path(folder), tabs)
            serve(options.host, options.port)
        except BadSetting as e:
            parser.exit(1, f"error: {e}\n")
        except (OSError, OverflowError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            parser.exit(1, f"error: {options.host}:{options.port}: {reason}; choose another --port or --host\n")
        finally:
            for tab in tabs.values():
                tab.close()
            for tab in tabs.values():
                tab.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
