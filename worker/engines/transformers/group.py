"""The processes that compute one model together: how they meet, and how rank 0 tells the others what comes next.

They are told who they are by the environment variables that torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT. What rank 0 tells goes as msgpack through a broadcast of bytes: nothing here unpickles anything.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import msgpack
import torch
import torch.distributed as dist

from ..base import EngineLoadError
from .devices import first_line

#: Time for all processes to import torch and to come.
_MEETING = timedelta(minutes=5)
#: Time for one collective operation of the model. Loading is among them, and one process may read much longer than
#: another; a forward that hangs is seen by the worker, by the age of its step.
_OPERATION = timedelta(hours=2)
#: Time that followers wait for the next call: as long as the worker may be idle.
_IDLE = timedelta(days=365)
#: Bytes of the first broadcast of a message: enough for a decode of hundreds of rows. Only what is longer needs a
#: second one.
_HEAD_BYTES = 8192
_LENGTH_BYTES = 8
_TENSOR = 1
_NUMBERS = (torch.bool, torch.uint8, torch.int32, torch.int64)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*_NUMBERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


class Group:
    """This process's place among those of one worker.

    Attributes:
        rank: 0 for the one that is the worker.
        size: how many there are.
        device: where this one computes.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        """Take part in a process group that is initialised; see `join`."""
        self.rank = rank
        self.size = size
        self.device = device
        # Apart from the model's own group, and always on the host: no call waits for what runs on a GPU.
        self._control = dist.new_group(backend="gloo", timeout=_IDLE)

    def tell(self, message: Any) -> None:
        """Send the others a message; to be called by rank 0.

        Args:
            message: what msgpack can carry, and tensors.
        """
        body = msgpack.packb(message, default=_pack_tensor)
        frame = len(body).to_bytes(_LENGTH_BYTES, "big") + body
        head = frame[:_HEAD_BYTES].ljust(_HEAD_BYTES, b"\0")
        self._broadcast(bytearray(head))
        if len(frame) > _HEAD_BYTES:
            self._broadcast(bytearray(frame[_HEAD_BYTES:]))

    def hear(self) -> Any:
        """Wait for the next message of rank 0, and return it; its tensors are on this process's device."""
        head = self._broadcast(bytearray(_HEAD_BYTES))
        length = int.from_bytes(head[:_LENGTH_BYTES], "big")
        body = bytes(head[_LENGTH_BYTES : _LENGTH_BYTES + length])
        if len(body) < length:
            body += self._broadcast(bytearray(length - len(body)))
        return msgpack.unpackb(body, ext_hook=self._unpack_tensor, strict_map_key=False)

    def least(self, number: int) -> int:
        """Return the least of the numbers with which all processes call this."""
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, op=dist.ReduceOp.MIN, group=self._control)
        return int(numbers[0])

    def leave(self) -> None:
        """Close the connections to the others."""
        dist.destroy_process_group()

    def _broadcast(self, data: bytearray) -> bytearray:
        """Send the bytes, or have them overwritten by those of rank 0."""
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), src=0, group=self._control)
        return data

    def _unpack_tensor(self, code: int, data: bytes) -> Any:
        if code != _TENSOR:
            raise ValueError(f"msgpack extension {code} is unknown")
        dtype, shape, raw = msgpack.unpackb(data)
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return flat.view(_DTYPES[dtype]).reshape(shape).to(self.device)


def _pack_tensor(value: Any) -> msgpack.ExtType:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a {type(value).__name__} cannot be sent to the other processes")
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(_TENSOR, msgpack.packb([str(value.dtype).removeprefix("torch."), list(value.shape), raw]))


def join(device: torch.device, size: int) -> Group:
    """Meet the other processes of this worker.

    Args:
        device: `cpu`, or `cuda` for the one with the number LOCAL_RANK.
        size: how many processes there must be.

    Raises:
        EngineLoadError: the environment does not tell who this process is, or the others do not come.
    """
    try:
        rank, local_rank, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise EngineLoadError(
            f"tensor_parallel={size} is for processes that are started together, as `zmq-worker --tensor-parallel "
            f"{size}` does: the environment does not tell {error}"
        ) from error
    if world != size:
        raise EngineLoadError(f"tensor_parallel={size}, but WORLD_SIZE is {world}")
    more: dict[str, Any] = {}
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        more["device_id"] = device
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_meet(rank, size, address, port),
            rank=rank,
            world_size=size,
            timeout=_OPERATION,
            **more,
        )
        return Group(rank, size, device)
    except Exception as error:
        raise EngineLoadError(f"rank {rank} cannot reach the other processes: {first_line(error)}") from error


def _meet(rank: int, size: int, address: str, port: int) -> Any:
    """Return the store that the processes find each other by."""
    how: dict[str, Any] = {"world_size": size, "timeout": _MEETING, "is_master": rank == 0}
    if rank == 0:
        # By itself it would listen on all interfaces of the machine, and anyone there could put addresses into it.
        how["master_listen_fd"] = socket.create_server((address, port)).detach()
    torch_distributed: Any = dist  # its stubs leave the stores out
    return torch_distributed.TCPStore(address, port, **how)
