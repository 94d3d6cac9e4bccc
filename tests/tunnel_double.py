"""A stand-in for cloudflared and ngrok: says what they say, and is a real relay, TLS outside and plain TCP inside.

Run as a program that is called `cloudflared` or `ngrok` (see tunnel_kit.py). The folder TUNNEL_DOUBLE holds

    cert.pem, key.pem     for the public names
    mood                  "refuse": no tunnel today; "mute": says nothing; "stubborn": does not leave when asked to
    starts                one line of JSON for every start: pid, argv, address
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import sys
from pathlib import Path

FOLDER = Path(os.environ["TUNNEL_DOUBLE"])
NAME = os.environ["TUNNEL_DOUBLE_NAME"]


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def main() -> int:
    mood = (FOLDER / "mood").read_text() if (FOLDER / "mood").exists() else ""
    starts = FOLDER / "starts"
    number = len(starts.read_text().splitlines()) if starts.exists() else 0
    hub_port = int(re.findall(r"127\.0\.0\.1:(\d+)", " ".join(sys.argv))[0])
    if mood == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            theirs, ours = await asyncio.open_connection("127.0.0.1", hub_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, ours), copy(theirs, writer))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(FOLDER / "cert.pem", FOLDER / "key.pem")
    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    host = f"quiet-words-{number}.trycloudflare.com" if NAME == "cloudflared" else f"a{number}b.ngrok-free.app"
    address = f"https://{host}:{port}"
    with starts.open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "address": address}) + "\n")
    if mood == "refuse":
        REFUSALS[NAME]()
        return 1
    if mood != "mute":
        WELCOMES[NAME](address, hub_port)
    async with server:
        await server.serve_forever()
    return 0


def cloudflared_opens(address: str, port: int) -> None:
    inside = max(len(address), 88) + 4
    for text in (
        "Thank you for trying Cloudflare Tunnel. Doing so, without a Cloudflare account, is a quick way to experiment and "
        "try it out. However, be aware that these account-less Tunnels have no uptime guarantee, are subject to the "
        "Cloudflare Online Services Terms of Use (https://www.cloudflare.com/website-terms/), and Cloudflare reserves "
        "the right to investigate your use of Tunnels for violations of such terms.",
        "Requesting new quick Tunnel on trycloudflare.com...",
        "+" + "-" * inside + "+",
        "|"
        + "  Your quick Tunnel has been created! Visit it at (it may take some time to be reachable):".ljust(inside)
        + "|",
        "|" + f"  {address}".ljust(inside) + "|",
        "+" + "-" * inside + "+",
        "Cannot determine default configuration path. No file [config.yml config.yaml] in [~/.cloudflared]",
        f"Settings: map[config:/dev/null no-autoupdate:true url:http://127.0.0.1:{port}]",
        "Registered tunnel connection connIndex=0 event=0 ip=198.41.200.13 location=fra03 protocol=quic",
    ):
        print(f"2026-09-19T12:00:00Z INF {text}", file=sys.stderr, flush=True)


def cloudflared_refuses() -> None:
    print("2026-09-19T12:00:00Z INF Requesting new quick Tunnel on trycloudflare.com...", file=sys.stderr)
    print(
        'failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": dial tcp: lookup '
        "api.trycloudflare.com: no such host",
        file=sys.stderr,
    )


def ngrok_opens(address: str, port: int) -> None:
    for text in (
        'msg="no configuration paths supplied"',
        'msg="starting web service" obj=web addr=127.0.0.1:4040 allow_hosts=[]',
        'msg="client session established" obj=tunnels.session',
        f'msg="started tunnel" obj=tunnels name=command_line addr=http://127.0.0.1:{port} url={address}',
    ):
        print(f"t=2026-09-19T12:00:00+0000 lvl=info {text}", flush=True)


def ngrok_refuses() -> None:
    reason = "authentication failed: Usage of ngrok requires a verified account and authtoken."
    print(f't=2026-09-19T12:00:00+0000 lvl=eror msg="failed to auth" obj=tunnels.session err="{reason}"')
    for line in (reason, "", "Sign up for an account: https://dashboard.ngrok.com/signup", "", "ERR_NGROK_4018"):
        print(f"ERROR:  {line}", file=sys.stderr)


WELCOMES = {"cloudflared": cloudflared_opens, "ngrok": ngrok_opens}
REFUSALS = {"cloudflared": cloudflared_refuses, "ngrok": ngrok_refuses}

if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
