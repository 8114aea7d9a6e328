"""Have the user's browser show the chat page."""

import os
import sys
import webbrowser
from ipaddress import ip_address
from threading import Thread

from thinslice.cli.console import note

# Where none of them is set, webbrowser finds browsers that draw in the terminal, and wait for it.
_DESKTOP = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")


def page_address(host: str, port: int) -> str:
    """Where a browser of this machine finds a server that listens on an address."""
    found = ip_address(host)
    if found.is_unspecified:
        host = "127.0.0.1" if found.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_page(address: str) -> None:
    """Show an address, and hold nobody up; one line tells where no browser does."""
    Thread(target=_open, args=(address,), name="thinslice-browser", daemon=True).start()


def _open(address: str) -> None:
    has_desktop = sys.platform in ("darwin", "win32") or any(map(os.environ.get, _DESKTOP))
    try:
        is_open = has_desktop and webbrowser.open(address)
    except (webbrowser.Error, OSError):
        is_open = False
    if not is_open:
        note(f"no browser opened {address}")
