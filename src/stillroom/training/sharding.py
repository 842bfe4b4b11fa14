"""One student trained by several processes, each with a part of its weights, by PyTorch's FSDP2 (`fully_shard`).

Every process runs all of `train_student.train`. They share out each step's examples and what is stored of the weights;
each layer's weights are gathered for as long as it computes. One process leads: it alone writes files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.utils._pytree import tree_map

from stillroom.models.forward import blocks_of
from stillroom.models.precision import is_sharded, release_memory
from stillroom.training.distillation_student import DistillationStudent

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one student together, and which of them this is. Alone, nothing is exchanged."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a step: every `size`-th example, since a step's examples are ordered by length."""
        return items[self.rank :: self.size]

    def largest_part(self, count: int) -> int:
        """How many of `count` examples the process with the most has."""
        return -(-count // self.size)

    def summed(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Numbers of the same names, added up over all processes; float64, on the CPU."""
        if self.size == 1:
            return values
        names = sorted(values)
        added = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        dist.all_reduce(added)
        return dict(zip(names, added.tolist(), strict=True))


ALONE = Ranks()


def shard(student: DistillationStudent, ranks: Ranks, device: torch.device) -> DistillationStudent:
    """Shard a student over the processes' devices, in place; returns one that is whole.

    Alone, that is the student itself, as it was. Else it is a copy in the CPU's memory of every process: what is
    saved and scored, once `fill` has brought it the weights. The student's device must be the CPU, so that none has to
    hold more than one layer and its own part.
    """
    if ranks.size == 1:
        return student
    whole = copy.deepcopy(student)
    _shard(student, ranks, device)
    return whole


def _shard(student: DistillationStudent, ranks: Ranks, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in blocks_of(student.model):
        fully_shard(block, mesh=mesh)
    sharded: Any = fully_shard(student, mesh=mesh, reshard_after_forward=True)
    for module in sharded.modules():
        if hasattr(module, "set_gradient_divide_factor"):  # a loss is divided by the whole step's counts already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def fill(whole: DistillationStudent, student: DistillationStudent) -> None:
    """Gather the student's weights into the whole one; every process takes part."""
    if whole is student:
        return
    places = whole.state_dict()
    for name, tensor in student.state_dict().items():
        places[name].copy_(gathered(tensor))


@torch.no_grad()
def spread(whole: DistillationStudent, student: DistillationStudent) -> None:
    """Give each process its part of the whole one's weights."""
    if whole is student:
        return
    places = student.state_dict()
    for name, tensor in whole.state_dict().items():
        places[name].copy_(part_of(tensor, places[name]))


def gathered(values: Any, here: bool = True) -> Any:
    """Tensors at any depth, whole and on the CPU where they are sharded.

    Every process takes part; one that is not to have them `here` gets None in their place.
    """

    def whole(value: Any) -> Any:
        if not is_sharded(value):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if here else None

    return tree_map(whole, values)


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor's part in this process, sharded as `like` is; itself where that is whole."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(value.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def whole_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, sharded or not."""
    norm: Any = torch.nn.utils.get_total_norm(tensors)
    whole: Tensor = norm.full_tensor() if is_sharded(norm) else norm
    return whole


@torch.no_grad()
def scored_by_all(
    model: transformers.PreTrainedModel,
    in_place: bool,
    ranks: Ranks,
    device: torch.device,
    score: Callable[[transformers.PreTrainedModel], T],
) -> T:
    """What `score` finds with a model in the CPU's memory, sharded for it; every process finds the same.

    `in_place`: whether the model itself may be sharded, or only a copy of it.
    """
    student = DistillationStudent(model if in_place else copy.deepcopy(model))
    student.eval()
    _shard(student, ranks, device)
    found: T = student(score, student.model)
    del student
    release_memory()  # its parts refer to each other, and would stay into the next epoch
    return found
