"""The environments of the peers, each made once: TRL's is that of the parity tests, tunix's lies beside this file.

    python -m benchmarks.peers.environments     makes both, which takes minutes
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from parity import environment

HERE = pathlib.Path(__file__).resolve().parent


class Peer(NamedTuple):
    """A library at the same work."""

    folder: pathlib.Path
    packages: tuple[str, ...]
    imports: str
    script: pathlib.Path


PEERS = {
    "TRL": Peer(environment.FOLDER, environment.PACKAGES, environment.IMPORTS, HERE / "trl_side.py"),
    "tunix": Peer(HERE / ".venv-tunix", ("google-tunix==0.1.7", "jax==0.10.2", "jaxlib==0.10.2"), "tunix.rl.rl_cluster",
                  HERE / "tunix_side.py"),
}  # fmt: skip


def make(name: str) -> str:
    """Makes a peer's environment if it is not there; returns "" or, in a line, why it could not."""
    peer = PEERS[name]
    return environment.make(peer.folder, peer.packages, peer.imports)


def command(name: str) -> list[str]:
    """What starts a peer's worker, but for its arguments."""
    return [str(PEERS[name].folder / "bin" / "python"), str(PEERS[name].script)]


if __name__ == "__main__":
    for name in PEERS:
        problem = make(name)
        print(f"{name}'s environment could not be made: {problem}" if problem else f"{name}'s environment is there")
