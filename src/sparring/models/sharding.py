"""One model spread over the processes with PyTorch's FSDP2: for a ranker whose training does not fit one device.

Every process holds a part of each weight, of its gradient and of the optimiser's moments; a layer's weights are whole
only while that layer computes. Both models stay in one job: the other one may be replicated (DDP). accelerate's own
FSDP shards all models of a job or none, so PyTorch's `fully_shard`, which accelerate calls, is called here.

Weights come and go as whole tensors (`whole_state`, `put`): a file written by a sharded run is that of any other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sparring.distributed import processes, rank
from sparring.models.batching import Batches

M = TypeVar("M", bound=nn.Module)


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread the model over all processes, in place; its repeated layers one by one, the rest together.

    All processes must hold the same weights. Each part is moved to ``device`` only when it is cut, so that the whole
    model never has to fit there. Nothing with one process, but the move.
    """
    if processes() == 1:
        model.to(device)
        return
    mesh = init_device_mesh(device.type, (processes(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # True: no root weights are left over from a forward


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers: members of every list of modules of one type, outermost lists only."""
    found: list[nn.Module] = []
    for child in model.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList) else []
        if members and len({type(member) for member in members}) == 1:
            found += members
        else:
            found += blocks(child)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread this model."""
    return isinstance(model, FSDPModule)


def whole(value: Tensor) -> Tensor:
    """The full tensor; where it is spread, every process must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value  # type: ignore[no-any-return,no-untyped-call]


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor; the tensor itself where it is not spread."""
    return value.to_local() if isinstance(value, DTensor) else value  # type: ignore[no-any-return,no-untyped-call]


def like(value: Tensor, target: Tensor) -> Tensor:
    """A full tensor, the same in every process, spread as ``target`` is; itself where that is not spread."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def put(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a parameter or buffer, spread or not."""
    with torch.no_grad():
        target.copy_(like(value, target))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Full parameters and buffers that a model saves, each once, on the CPU; empty but for the main process.

    Every process must call it.
    """
    found: dict[str, Tensor] = {}
    for name, value in distinct(model).items():
        gathered = whole(value)
        if rank() == 0:
            found[name] = gathered.cpu().contiguous()
    return found


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a model saves, each once, as they are spread."""
    named = {name: value.detach() for name, value in model.named_parameters()}
    seen = {local(value).data_ptr() for value in named.values()}
    others = {key: value for key, value in model.state_dict().items() if key not in named}
    return named | {key: value for key, value in others.items() if local(value).data_ptr() not in seen}


def put_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `whole_state`'s tensors into a model of the same shape. Every process must hold them.

    Raises: KeyError when a tensor is missing or not the model's.
    """
    own = distinct(model)
    if own.keys() != state.keys():
        raise KeyError(f"{sorted(own.keys() ^ state.keys())[:4]}")
    for name, value in state.items():
        put(own[name], value)


def outline(model: M) -> M:
    """A copy of a model without its weights: parameters have their shapes and no memory. `filled` brings them back."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def filled(outlined: M, state: Mapping[str, Tensor], device: torch.device) -> M:
    """An `outline` with weights, on ``device``, in evaluation mode; parameters that share memory still do."""
    memo: dict[int, nn.Parameter] = {}
    for name, parameter in outlined.named_parameters():
        memo[id(parameter)] = nn.Parameter(state[name].to(device), requires_grad=parameter.requires_grad)
    for module in outlined.modules():
        for key, own in module._parameters.items():
            if own is not None:
                module._parameters[key] = memo[id(own)]
    for name, value in outlined.named_buffers():
        if name in state:
            value.copy_(state[name])
    return outlined.to(device).eval()


def level(batches: Batches, device: torch.device) -> Batches:
    """As many chunks as the process with the most has: layers are gathered chunk by chunk, by all processes together.

    What is added is a row that is there already; nobody reads its result, and its gradient is zero.
    """
    counts = torch.tensor([len(batches.inputs)], device=device)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
    missing = int(counts) - len(batches.inputs)
    if not missing:
        return batches
    row = {name: values[-1:] for name, values in batches.inputs[-1].items()}
    more = [{name: values.clone() for name, values in row.items()} for _ in range(missing)]
    return replace(batches, inputs=[*batches.inputs, *more])
