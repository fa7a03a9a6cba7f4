"""Where there is no GPU, Triton's kernels run in its interpreter. It has to know before they are
defined: before kernels.py is imported. And no test may reach beyond this machine.
"""

import os
import socket

import pytest
import torch

torch.set_num_threads(1)  # two workers share two cores
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def reached(monkeypatch):
    """The addresses and names beyond this machine that a test asked for: refused, and in the end
    none, however well the refusal was caught.
    """
    asked, connect, resolve = [], socket.socket.connect, socket.getaddrinfo
    here = "localhost", "127.0.0.1", "::1", None

    def only_here(host, go):
        if host not in here:
            asked.append(host)
            raise OSError(f"no network in a test: {host}")
        return go()

    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda self, to: only_here(
            to[0] if isinstance(to, tuple) else None, lambda: connect(self, to)
        ),
    )
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *more, **kw: only_here(host, lambda: resolve(host, *more, **kw)),
    )
    yield asked
    assert asked == []
