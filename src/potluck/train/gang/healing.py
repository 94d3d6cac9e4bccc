"""How does a member that is behind get the whole state from one that is not?

The state is one safetensors file, never a pickle: a machine of the gang may be anybody's. Numbers, strings and the
shape of nested state dicts travel as JSON in a tensor of their own. `Giver` serves the file over HTTP below a secret that
only members learn; the same file is what `gang.save` writes.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potluck.errors import BadInput, PotluckError
from potluck.train import tensorio

_TREE = "potluck.json"
_OFFER_S = 60.0  # that a newcomer waits for the file to be ready


def save(path: Path, tree: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, numbers, strings, None and tensors. BadInput names what else is in it."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_freeze(tree, "", tensors), separators=(",", ":")).encode()
    tensors[_TREE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensorio.save(path, tensors)


def check(tree: dict[str, Any]) -> None:
    """BadInput if `save` could not write it."""
    _freeze(tree, "", {})


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote."""
    tensors, _ = tensorio.load(path)
    if _TREE not in tensors:
        raise BadInput(f"{path} is not the state of a gang")
    text = bytes(tensorio.as_bytes(tensors.pop(_TREE)))
    tree = _thaw(json.loads(text), tensors)
    if not isinstance(tree, dict):
        raise BadInput(f"{path} is not the state of a gang")
    return tree


def _freeze(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        pairs = []
        for key, inner in value.items():
            if not isinstance(key, str | int):
                raise BadInput(f"{place} has a key {key!r}: only strings and whole numbers can be kept")
            pairs.append([key, _freeze(inner, f"{place}/{key}", tensors)])
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_freeze(inner, f"{place}/{i}", tensors) for i, inner in enumerate(value)]}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()  # a number of numpy's
    raise BadInput(
        f"{place} is a {type(value).__name__}, which cannot be kept without pickle: "
        "a state_dict may hold tensors, numbers, strings, lists, tuples and dicts"
    )


def _thaw(frozen: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(frozen, dict):
        return frozen
    ((kind, value),) = frozen.items()
    match kind:
        case "tensor":
            return tensors[value]
        case "dict":
            return {key: _thaw(inner, tensors) for key, inner in value}
        case "tuple":
            return tuple(_thaw(inner, tensors) for inner in value)
        case _:
            return [_thaw(inner, tensors) for inner in value]


# --- over the network -----------------------------------------------------------------------------------------------


class Giver:
    """Offers this member's state to those that are behind."""

    def __init__(self, address: str, save: Callable[[Path], None]) -> None:
        self._save = save
        self.folder = Path(tempfile.mkdtemp(prefix="potluck-gang-"))
        self._ready = threading.Condition()
        self._offered: tuple[int, Path] | None = None
        self._failed = -1
        self._secret = secrets.token_urlsafe(24)
        self._server = _server(address, self._secret, self._wait)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="potluck-giver", daemon=True).start()
        host, port = address, self._server.server_address[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/{self._secret}"

    def offer(self, step: int) -> None:
        """Copy the state as it is now. The training may go on at once."""
        path = self.folder / f"{step}-{secrets.token_hex(4)}.safetensors"
        try:
            self._save(path)
        except BaseException:
            with self._ready:
                self._failed = step
                self._ready.notify_all()
            raise
        with self._ready:
            if self._offered is not None:
                self._offered[1].unlink(missing_ok=True)
            self._offered = (step, path)
            self._ready.notify_all()

    def _wait(self, step: int) -> Path | None:
        with self._ready:
            self._ready.wait_for(lambda: self._failed == step or self._has(step), _OFFER_S)
            return self._offered[1] if self._offered is not None and self._has(step) else None

    def _has(self, step: int) -> bool:
        return self._offered is not None and self._offered[0] == step

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self.folder, ignore_errors=True)


def take(url: str, step: int, *, silence_s: float, use: Callable[[Path], None]) -> None:
    """Fetch the state after `step` steps and `use` it. A giver that says nothing for `silence_s` is given up."""
    with tempfile.TemporaryDirectory(prefix="potluck-gang-") as folder:
        path = Path(folder) / "state.safetensors"
        fetch(url, step, path, silence_s=silence_s)
        use(path)


def fetch(url: str, step: int, path: Path, *, silence_s: float) -> None:
    """The same, into a file."""
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach a neighbour
        with direct.open(f"{url}/{step}", timeout=silence_s) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            expected = int(answer.headers["Content-Length"])
            if file.tell() != expected:
                raise PotluckError(f"the state ended after {file.tell()} of {expected} bytes")
    except OSError as error:
        raise PotluckError(f"the state of step {step} did not arrive: {error}") from error


def _server(address: str, secret: str, wait: Callable[[int], Path | None]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given, _, step = self.path.strip("/").rpartition("/")
            path = wait(int(step)) if step.isdecimal() and secrets.compare_digest(given, secret) else None
            try:
                if path is None:
                    self.send_error(404)
                    return
                with path.open("rb") as file:
                    self.send_response(200)
                    self.send_header("Content-Length", str(path.stat().st_size))
                    self.end_headers()
                    shutil.copyfileobj(file, self.wfile, 1 << 20)
            except OSError:
                return  # the newcomer died, or a newer state is offered: it asks again

        def log_message(self, *args: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer((address, 0), Handler)
    server.daemon_threads = True
    return server
