"""Ray Serve's own server in each replica, which must not listen on the network."""

import os
from pathlib import Path
from typing import Any


def close_network_port(folder: Path) -> None:
    """Have Ray Serve's gRPC server in this process, which nothing here calls, listen on a socket in `folder` only.

    Ray Serve 2.60 opens it in each replica on all addresses, without the token that all other ports of Ray ask for. It
    unpickles what it is sent, so whoever reaches the port can run code. No option closes it.

    Args:
        folder: Folder that no other user can open.
    """
    from ray.serve._private import replica

    names = vars(replica)
    add_port = names["add_port_to_grpc_server"]

    def add_socket(server: Any, _: str) -> Any:
        return add_port(server, f"unix:{folder / f'replica-{os.getpid()}'}")

    names["add_port_to_grpc_server"] = add_socket
