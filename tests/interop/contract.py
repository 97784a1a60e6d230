"""torchrun's contract of environment variables, seen from the ranks and held against its documentation
(https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables").

  contract.py rank DIRECTORY                 one rank: meets the others at MASTER_ADDR:MASTER_PORT, as torch's TCPStore does (rank 0
                                             listens, all connect), and writes what it was given to DIRECTORY/RANK.json
  contract.py check DIRECTORY N,N,... KIND   ranks of each node, in the order of the nodes; KIND is `node` where a launcher has all
                                             ranks of its node, `rank` where the scheduler started a launcher for each rank
"""

import json
import os
import pathlib
import socket
import sys
import time

NAMES = [
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID",
]
PATIENCE_S = 30


def node() -> str:
    """The scheduler's own word for the node, which the launcher has no part in."""
    for name in ("SLURMD_NODENAME", "OMPI_MCA_orte_local_daemon_uri"):
        if name in os.environ:
            return os.environ[name]
    return os.environ.get("SSH_CONNECTION", "here here here here").split()[2]


def call(address: tuple[str, int], word: bytes) -> bytes:
    """Says a word to rank 0 and waits for its answer; rank 0 may not listen yet."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            with socket.create_connection(address, timeout=PATIENCE_S) as stream:
                stream.sendall(word + b"\n")
                return stream.makefile("rb").readline()
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def meet(rank: int, world: int, address: tuple[str, int]) -> list[int]:
    if rank > 0:
        return json.loads(call(address, str(rank).encode()))
    streams, heard = [], [0]
    with socket.create_server((socket.gethostbyname(address[0]), address[1])) as server:
        server.settimeout(PATIENCE_S)
        while len(heard) < world:
            stream, _ = server.accept()
            heard.append(int(stream.makefile("rb").readline()))
            streams.append(stream)
    for stream in streams:
        stream.sendall(json.dumps(heard).encode() + b"\n")
        stream.close()
    return heard


def be_rank(directory: pathlib.Path) -> None:
    given = {name: os.environ[name] for name in NAMES if name in os.environ}
    met = meet(int(given["RANK"]), int(given["WORLD_SIZE"]), (given["MASTER_ADDR"], int(given["MASTER_PORT"])))
    scheduler_local = os.environ.get("SLURM_LOCALID") or os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
    scheduler_rank = os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK")
    said = {"given": given, "met": sorted(met), "node": node(), "scheduler": [scheduler_rank, scheduler_local]}
    (directory / f"{given['RANK']}.json").write_text(json.dumps(said))


def faults(said: list[dict], nodes: list[int], kind: str):
    world = sum(nodes)
    if len(said) != world:
        yield f"{len(said)} ranks instead of {world}"
        return
    ranks = [{name: rank["given"].get(name) for name in NAMES} for rank in said]
    expected = list(range(world))
    if sorted(int(rank["RANK"]) for rank in ranks) != expected:
        yield f"RANK is not 0 to {world - 1}, each once"
    for name, value in {"WORLD_SIZE": world, "ROLE_WORLD_SIZE": world, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}.items():
        yield from (f"{name} of rank {rank['RANK']}: expected {value}, found {rank[name]}" for rank in ranks if rank[name] != str(value))
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        if len(values := {rank[name] for rank in ranks}) != 1 or None in values:
            yield f"{name} differs: {values}"
    yield from (f"rank {rank['RANK']} has ROLE_RANK {rank['ROLE_RANK']}" for rank in ranks if rank["ROLE_RANK"] != rank["RANK"])
    yield from (f"rank {one['given']['RANK']} met {one['met']}" for one in said if one["met"] != expected)
    by_node: dict[str, list[dict]] = {}
    for one in sorted(said, key=lambda one: int(one["given"]["RANK"])):
        by_node.setdefault(one["node"], []).append(one)
    if [len(group) for group in by_node.values()] != nodes:
        yield f"ranks of the nodes: expected {nodes}, found {[len(group) for group in by_node.values()]}"
    for place, (name, group) in enumerate(by_node.items()):
        local = sorted(int(one["given"]["LOCAL_RANK"]) for one in group)
        if local != list(range(len(group))):
            yield f"LOCAL_RANK on {name}: expected 0 to {len(group) - 1}, found {local}"
        for one in group:
            given = one["given"]
            if given["LOCAL_WORLD_SIZE"] != str(len(group)):
                yield f"LOCAL_WORLD_SIZE of rank {given['RANK']}: expected {len(group)}, found {given['LOCAL_WORLD_SIZE']}"
            # A worker group is what a launcher starts.
            group_rank = place if kind == "node" else int(given["RANK"])
            if given["GROUP_RANK"] != str(group_rank):
                yield f"GROUP_RANK of rank {given['RANK']}: expected {group_rank}, found {given['GROUP_RANK']}"
            if kind == "rank" and one["scheduler"] != [given["RANK"], given["LOCAL_RANK"]]:
                yield f"rank {given['RANK']}, local rank {given['LOCAL_RANK']} is {one['scheduler']} to the scheduler"


def main() -> int:
    _, mode, directory, *rest = sys.argv
    if mode == "rank":
        be_rank(pathlib.Path(directory))
        return 0
    said = [json.loads(path.read_text()) for path in sorted(pathlib.Path(directory).glob("*.json"))]
    found = list(faults(said, [int(count) for count in rest[0].split(",")], rest[1]))
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
