"""Runs anchorops-train with a small network in processes of its own, on one rank or several, which
get a signal at a chosen place. They are forked from one process that has imported everything."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

ROOT = Path(__file__).parents[2]
PLACES = {  # a function, and the place of its call that gets the signal
    "start": ("train", "build"),
    "step": ("train", "set_learning_rates"),
    "validation": ("ao", "confusion"),
    "prediction": ("commands", "predict"),
}


class Programs:
    """Starts the program in one process after another."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def run(self, words: str, ranks: int = 1, **at: Any) -> tuple[list[int], str]:
        """The exit status of each rank, and what they print. RANK stands for its number in words.

        at: place (of PLACES), call (the number of the call, from 0), signum, and rank, or None for
        all processes of all ranks; without a place nothing disturbs them.
        """
        before = len(self.log.read_text())
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        # in which the ranks meet; as the one of torchrun, it listens before they start
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        asked = {"words": words.split(), "ranks": ranks, "at": at, "port": store.port}
        stdin.write(json.dumps(asked) + "\n")
        stdin.flush()
        status = json.loads(stdout.readline())
        return status, self.log.read_text()[before:]


def _serve() -> None:
    import torch
    from PIL import Image

    import anchorops as ao
    from anchorops.train import __main__, commands, networks, train
    from tests.helpers.tiny_runs import small_network

    networks.build_model = small_network
    train.draw_predictions = lambda *_: Image.new("RGB", (1, 1))
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    modules = {"train": train, "ao": ao, "commands": commands}

    def start(words: list[str], at: dict[str, Any], environment: dict[str, str]) -> int:
        child = os.fork()
        if child:
            return child
        os.setsid()
        os.dup2(2, 1)
        os.environ.update(environment)
        rank = int(environment.get("RANK", 0))
        if at and at["rank"] in (None, rank):
            module, function = PLACES[at["place"]]
            before = getattr(modules[module], function)
            setattr(modules[module], function, _interrupting(before, at))
        sys.argv[1:] = [word.replace("RANK", str(rank)) for word in words]
        sys.exit(__main__.main())

    for line in sys.stdin:
        asked = json.loads(line)
        ranks, children = asked["ranks"], []
        for rank in range(ranks):
            several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            several |= {"LOCAL_WORLD_SIZE": ranks, "TORCHELASTIC_USE_AGENT_STORE": True}
            several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": asked["port"]}
            variables = {name: str(x) for name, x in several.items()} if ranks > 1 else {}
            children.append(start(asked["words"], asked["at"], variables))
        print(json.dumps(_wait_as_torchrun(children)), flush=True)


def _interrupting(function: Callable[..., Any], at: dict[str, Any]) -> Callable[..., Any]:
    calls = []

    def wrapped(*args: Any, **options: Any) -> Any:
        if len(calls) == at["call"]:
            os.killpg(os.getpgid(0), at["signum"])  # also the workers
        calls.append(None)
        return function(*args, **options)

    return wrapped


def _wait_as_torchrun(children: list[int], patience: float = 60.0) -> list[int]:
    """Their exit statuses. When one has failed, the others get SIGTERM."""
    status: dict[int, int] = {}
    asked, end = False, time.monotonic() + patience
    while len(status) < len(children):
        for child in children:
            if child not in status and (found := os.waitpid(child, os.WNOHANG))[0]:
                status[child] = os.waitstatus_to_exitcode(found[1])
        left = [child for child in children if child not in status]
        signum = signal.SIGKILL if time.monotonic() > end else signal.SIGTERM
        if signum == signal.SIGKILL or (any(status.values()) and not asked):
            asked = True
            for child in left:
                os.kill(child, signum)
        time.sleep(0.005)
    return [status[child] for child in children]


if __name__ == "__main__":
    _serve()
