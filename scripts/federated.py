"""BAFFLE on a real federated engine: Flower, a server and one process for every client, on loopback.

    python scripts/federated.py --rounds 20 model.widths=[32] algo.clients=4 data=digits
    python scripts/federated.py --rounds 20 --dtype float64 --check algo.clients=4

The words after the options are those of ``train.py``, with ``algo=baffle`` understood. Every process makes the same net
from the run's seed; what goes over the wire are the seed and number of a round and K numbers a client, and the bytes
printed are the lengths of these messages. ``--check`` runs the simulated federation too and prints the largest
difference of a parameter between both. Flower wants other versions of packages than the rest of this project pins: an
environment of its own, ``pip install -c constraints-federated.txt -e '.[federated]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import warnings

import torch

from onward.compose import compose
from onward.errors import OnwardError
from onward.federated import Coordinator, Replica, simulated

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def flower():
    """Flower's server and client modules, or an error that says how to get them."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        import flwr.client
        import flwr.server
    except ImportError as error:
        raise SystemExit("Flower is not here: pip install -c constraints-federated.txt -e '.[federated]', in an "
                         "environment of its own") from error
    return flwr


def serve(args: argparse.Namespace, replica: Replica) -> None:
    """The server's process: rounds over Flower, then the figures."""
    fl = flower()
    from flwr.common import Code, FitIns, GetPropertiesIns, Parameters
    from flwr.server.strategy import Strategy

    empty = Parameters([], "")
    server = Coordinator(replica.rule, replica.engine, replica.dtype)

    class Scalars(Strategy):
        """Messages of the coordinator in the config of a fit, the clients' in its metrics; no parameters anywhere."""

        def initialize_parameters(self, client_manager):
            client_manager.wait_for(len(server.sent))
            self.number = {}
            for proxy in client_manager.all().values():
                found = proxy.get_properties(GetPropertiesIns({}), timeout=60, group_id=None)
                self.number[proxy.cid] = int(found.properties["client"])
            return empty

        def configure_fit(self, server_round, parameters, client_manager):
            messages = server.ask(server_round - 1)
            return [(proxy, FitIns(empty, {"round": messages[c]})) for proxy in client_manager.all().values()
                    if (c := self.number[proxy.cid]) in messages]

        def aggregate_fit(self, server_round, results, failures):
            if failures:
                raise SystemExit(f"a client failed: {failures[0]}")
            server.gather(server_round - 1, {self.number[proxy.cid]: answer.metrics["report"] for proxy, answer in
                                             results if answer.status.code == Code.OK})
            return empty, {}

        def configure_evaluate(self, server_round, parameters, client_manager):
            return []

        def aggregate_evaluate(self, server_round, results, failures):
            return None, {}

        def evaluate(self, server_round, parameters):
            return None

    fl.server.start_server(server_address=args.address, config=fl.server.ServerConfig(num_rounds=args.rounds),
                           strategy=Scalars())
    replica.follow(server.history)
    found = {"clients": len(server.sent), "rounds": args.rounds, "bytes_up": server.up, "bytes_down": server.down,
             "bytes_of_one_model": replica.parameters().numel() * replica.dtype.itemsize, **replica.test()}
    if args.check:
        alone = simulated(compose(args.overrides), args.rounds, replica.dtype)
        found["largest_difference"] = float((alone.parameters() - replica.parameters()).abs().max())
        found["simulated_bytes"] = [int(alone.rule.wire.up), int(alone.rule.wire.down)]
    print(json.dumps(found, indent=1))


def join(args: argparse.Namespace, replica: Replica) -> None:
    """A client's process: answers until the server ends."""
    fl = flower()

    class Member(fl.client.NumPyClient):
        def get_properties(self, config):
            return {"client": args.client}

        def fit(self, parameters, config):
            return [], 1, {"report": replica.answer(config["round"], args.client)}

    fl.client.start_client(server_address=args.address, client=Member().to_client(), insecure=True)


def start(args: argparse.Namespace, words: list[str], clients: int) -> int:
    """Start the server and the clients, wait, and stop whoever is left."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    base = [sys.executable, __file__, "--address", address, *words]
    quiet = {"stderr": None if args.verbose else subprocess.DEVNULL}
    server = subprocess.Popen([*base, "--role", "server"], **quiet)
    members = [subprocess.Popen([*base, "--role", "client", "--client", str(c)], stdout=subprocess.DEVNULL, **quiet)
               for c in range(clients)]
    try:
        return server.wait(args.timeout)
    except subprocess.TimeoutExpired:
        print(f"the federation did not end within {args.timeout:g} s (--timeout, --verbose)", file=sys.stderr)
        return 1
    finally:
        for process in [server, *members]:
            if process.poll() is None:
                process.terminate()
        for process in [server, *members]:
            process.wait(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--check", action="store_true", help="compare with the simulated federation")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--verbose", action="store_true", help="show what Flower logs")
    for hidden in ("role", "address"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    args = parser.parse_intermixed_args()
    if args.rounds < 1:
        parser.error("--rounds: a positive number of rounds")
    words = sys.argv[1:]
    args.overrides = ["algo=baffle", *args.overrides]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        replica = Replica(compose(args.overrides), DTYPES[args.dtype])
    except OnwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.role is None:
        flower()
        return start(args, words, replica.rule.federation.clients)
    (serve if args.role == "server" else join)(args, replica)
    return 0


if __name__ == "__main__":
    sys.exit(main())
