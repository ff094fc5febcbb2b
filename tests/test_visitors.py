"""The web page and its visitors: who may enter, how many, and that none can stop the others."""
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager

import psutil
import pytest
from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from tokenlabel import page, store
from tokenlabel.files import seal

PROTOCOL = page.PROTOCOL
pytestmark = pytest.mark.slow
SERVE = ("import sys; from pathlib import Path; from tokenlabel import page; page.count_places = lambda: int(sys.argv[3]); "
         "page.serve(Path(sys.argv[1]), port=int(sys.argv[2]), idle=int(sys.argv[4]))")
NOTEBOOK = page.Path(page.__file__).parents[1] / "nbs" / "workshop" / "explorer.ipynb"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(folder, cache=None, places=10, idle=300):
    "A server of its own: its address with the token, and its process."
    log = folder / "server.log"
    env = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    env |= {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    if cache: env["TOKENLABEL_CACHE"] = str(cache)
    command = [sys.executable, "-P", "-c", SERVE, str(NOTEBOOK), str(free_port()), str(places), str(idle)]
    with log.open("w") as out:
        server = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=env)
    try:
        for _ in range(3000):  # five minutes, on a busy machine
            if found := re.search(r"explorer is at (\S+)", log.read_text()): break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found[1], server
    finally:
        children = server.children(recursive=True) if server.is_running() else []
        server.send_signal(signal.SIGINT)
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        left = psutil.wait_procs(children, timeout=10)[1]
        for child in left: child.kill()
        assert not left, f"still there after Ctrl-C: {left}"


async def get(address, **headers):
    "Status and text of a page."
    try: response = await AsyncHTTPClient().fetch(HTTPRequest(address, headers=headers, request_timeout=120, connect_timeout=60))
    except HTTPClientError as error: response = error.response
    return response.code, response.body.decode(), response.headers


class Visitor:
    "A page as a browser shows it, without the browser."
    async def enter(self, address):
        self.base, self.token = address.split("/?token=")
        status, text, self.headers = await get(address)
        assert status == 200, text
        self.text = text
        return self

    @property
    def kernel(self): return re.search(r'"kernelId": "([\w-]+)"', self.text)[1]

    async def connect(self, protocols=(PROTOCOL,), **headers):
        url = f"{self.base.replace('http', 'ws')}/api/kernels/{self.kernel}/channels?token={self.token}&session_id={uuid.uuid4()}"
        self.socket = await websocket_connect(HTTPRequest(url, headers=headers, connect_timeout=60), subprotocols=list(protocols))
        return self

    async def send(self, kind, **content):
        header = dict(msg_id=uuid.uuid4().hex, msg_type=kind, username="", session="visitor", date="", version="5.3")
        message = dict(header=header, parent_header={}, metadata=dict(version="1.0.0"), content=content)
        await self.socket.write_message(serialize_msg_to_ws_v1(message, "shell", lambda part: json.dumps(part).encode()), binary=True)

    async def messages(self):
        while (message := await self.socket.read_message()) is not None:
            channel, parts = deserialize_msg_from_ws_v1(message)
            yield json.loads(parts[0])["msg_type"], json.loads(parts[3])

    async def press(self, name):  # as the page does
        await self.send("comm_open", comm_id="control", target_name="jupyter.widget.control", data={})
        await self.send("comm_msg", comm_id="control", data=dict(method="request_states"))
        async for kind, content in self.messages():
            if kind == "comm_msg" and content["data"].get("method") == "update_states": break
        [button] = [id for id, widget in content["data"]["states"].items() if widget["state"].get("description") == name]
        await self.send("comm_msg", comm_id=button, data=dict(method="custom", content=dict(event="click")))

    async def step(self, least):
        "Wait until a run has taken that many steps."
        async for kind, content in self.messages():
            found = re.search(r"after step (\d+)", json.dumps(content)) if kind == "comm_msg" else None
            if found and int(found[1]) >= least: return


@pytest.fixture(scope="module")
def cache(tiny_folder, tmp_path_factory):
    "A cache whose default model is a tiny one."
    cache = tmp_path_factory.mktemp("cache")
    folder = shutil.copytree(tiny_folder, cache / store.DEFAULT["folder"])
    seal(folder, "model")
    return cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The current folder of the server, with files that nobody should execute."
    folder = tmp_path_factory.mktemp("page")
    for name in ("voila", "voila_config", "multiprocessing", "torch", "ipykernel"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    return folder


@pytest.fixture(scope="module")
def workshop(cache, folder):
    "A page for ten visitors on a tiny model."
    with serving(folder, cache) as (address, server): yield address, server


def kernels(server): return [child for fork in server.children() for child in fork.children()]


def memory(server): return sum(process.memory_full_info().pss for process in [server, *server.children(recursive=True)])


def forbidden(address, **headers): return asyncio.run(get(address, **headers))[0] in (400, 403)


def test_only_the_token_in_the_address_starts_a_kernel(workshop):
    address, server = workshop
    base, token = address.split("?token=")
    _, text, headers = asyncio.run(get(base))
    assert "lacks its token" in text and forbidden(base + "?token=wrong") and token not in text
    assert forbidden(address, Host="evil.example:80"), "a name that was bound to this address"
    assert forbidden(address, Origin="http://evil.example")
    assert not kernels(server)


def test_a_file_voila_py_of_the_current_folder_is_not_executed(workshop, folder):
    assert not (folder / "executed").exists()


def test_a_cookie_opens_what_the_page_loads_but_starts_no_kernel(workshop):
    address, server = workshop
    visitor = asyncio.run(Visitor().enter(address))
    cookie = visitor.headers["Set-Cookie"].split(";")[0]
    assert "SameSite=Strict" in visitor.headers["Set-Cookie"]
    assert asyncio.run(get(f"{visitor.base}/api/kernels/{visitor.kernel}", Cookie=cookie))[0] == 200
    assert forbidden(visitor.base + "/", Cookie=cookie) and len(kernels(server)) == 1
    async def refused(**settings):
        with pytest.raises(HTTPClientError, match="40[03]"): await visitor.connect(**settings)
    asyncio.run(refused(protocols=()))
    asyncio.run(refused(Origin="http://evil.example"))
    address = f"{visitor.base}/api/kernels/{visitor.kernel}?token={visitor.token}"
    assert asyncio.run(close(address)) == 204


async def close(address): return (await AsyncHTTPClient().fetch(address, method="DELETE")).code


def test_ten_visitors_share_four_gigabytes_and_none_stops_the_others(workshop):
    address, server = workshop
    async def visit():
        visitors = await asyncio.gather(*[Visitor().enter(address) for _ in range(10)])
        await asyncio.gather(*[visitor.connect() for visitor in visitors])
        assert len({visitor.kernel for visitor in visitors}) == 10 == len(kernels(server))
        for visitor in visitors[:3]: await visitor.press("Run")
        await asyncio.wait_for(asyncio.gather(*[visitor.step(5) for visitor in visitors[:3]]), 120)
        used = memory(server)
        assert used < 4e9, f"{used / 1e9:.1f} GB"
        await visitors[0].socket.write_message(b"\xff" * 8, binary=True)  # says that it has 2 ** 64 - 1 parts
        visitors[2].socket.close()  # during a run
        status, text, headers = await get(address + "&feature=numbers")
        assert status == 200 and "number 1 in the queue" in text and len(kernels(server)) == 10
        assert "feature=numbers" in headers["Refresh"], "who waits with a link gets what the link says"
        again = address.split("?")[0] + headers["Refresh"].split("url=")[1]
        await close(f"{visitors[1].base}/api/kernels/{visitors[1].kernel}?token={visitors[1].token}")
        assert "number 2 in the queue" in (await get(address))[1] and "kernelId" in (await get(again))[1]
        await visitors[9].press("Run")
        await asyncio.wait_for(visitors[9].step(3), 60)
        for _ in range(10): assert (await asyncio.wait_for(get(address.split("?")[0]), 10))[0] == 403, "the server answers"
    asyncio.run(visit())


def test_the_server_imports_no_pytorch():
    code = "import sys; from tokenlabel import page; assert not {'torch', 'transformers', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_that_cannot_be_loaded_is_said_in_one_line(monkeypatch):
    page.say_fault()  # all is well
    monkeypatch.setattr(page, "FAULT", "weights.safetensors is cut off")
    with pytest.raises(SystemExit, match="^tokenlabel: weights.safetensors is cut off$"): page.say_fault()


@pytest.mark.parametrize("screen, terminal, opens", [(":0", True, True), ("", True, False), (":0", False, False)])
def test_a_browser_opens_where_somebody_sees_it_and_the_token_stays_private(monkeypatch, tmp_path, screen, terminal, opens):
    opened = []
    monkeypatch.setattr(page.webbrowser, "open", lambda address: opened.append(address) or True)
    monkeypatch.setattr(page.sys, "platform", "linux")
    monkeypatch.setattr(page.sys, "stdout", type("Out", (), {"isatty": lambda self: terminal})())
    monkeypatch.setenv("DISPLAY", screen)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert page.open_browser("http://127.0.0.1:1/?token=secret&x=1", tmp_path) == opens == bool(opened)
    if opens: assert "secret" not in opened[0] and "token=secret&amp;x=1" in (tmp_path / "open.html").read_text()
