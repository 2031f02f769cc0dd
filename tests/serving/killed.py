"""A client in a process of its own, to be killed in the middle of an answer."""

import json
import signal
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

# Reads until the text it waits for has come, says so, and takes no more.
_CLIENT = """
import socket, sys, threading
host, port, until = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
client = socket.create_connection((host, port))
client.sendall(sys.stdin.buffer.read())
seen = b""
while until not in seen:
    data = client.recv(1000)
    assert data, seen
    seen += data
print("here", flush=True)
threading.Event().wait()
"""


def kill_client(address: str, body: dict[str, Any], until: str) -> None:
    """Asks for a chat from another process, which dies once it has read the text `until`."""
    url, content = urlsplit(address), json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {url.netloc}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    command = [sys.executable, "-c", _CLIENT, str(url.hostname), str(url.port), until]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as client:
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(head.encode() + content)
        client.stdin.close()
        assert client.stdout.readline() == b"here\n"
        client.kill()
    assert client.returncode == -signal.SIGKILL
