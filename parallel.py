"""parallel.py: several processes that train one model, and models that are dealt out to them.

scale.py runs in one process, or under torchrun in several: one on each GPU (nccl), or all on the
CPU (gloo). Each has its own rows of a batch and the gradient of those; what is common is made by
`all_sum`, a sum over the processes. Rank 0 writes, saves, prints and heeds signals (`Team`); who
loses another process ends with a line that says so. A model too large for one GPU is sharded by
torch's own fully_shard (FSDP2; Rajbhandari et al. 2020, arXiv 1910.02054): each process keeps a
slice of every weight, gradient and moment, and a block's weights are gathered when it is computed.
"""

import io
import os
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as whole_state
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from experiment import SIGNALS, Run, UserError
from model import GPT


class LostProcess(UserError):
    """What one process knows and rank 0 may not: printed by whichever rank it happens to."""


def world():
    """This process's rank, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(x):
    """The sum of a tensor over the processes, in each of them; without torchrun, the tensor."""
    if not dist.is_initialized():
        return x
    total = x.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    try:
        dist.all_reduce(total)
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as e:
        lost = f"rank {world()[0]} lost another process of this run ({type(e).__name__})"
        raise LostProcess(lost) from None
    return total.to(x.device)


def join(device):
    """Under torchrun, meet the other processes: one on each GPU (nccl), or all on the CPU (gloo).

    Only rank 0 prints.
    """
    if not dist.is_torchelastic_launched():
        return
    local = int(os.environ["LOCAL_RANK"])
    if device != "cpu" and local >= torch.cuda.device_count():
        raise LostProcess(
            f"process {local + 1} of this machine finds no {device} device of its own"
        )
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if world()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class Team(Run):
    """A Run of several processes: rank 0 writes, saves and heeds signals, the others follow it."""

    alone = False

    def begin(self, also):
        self.silent = world()[0] > 0
        if not self.silent:
            super().begin(also)
        else:
            self.metrics = io.FileIO(os.devnull, "w")
            self.handlers = {s: signal.signal(s, signal.SIG_IGN) for s in SIGNALS}
        try:
            all_sum(torch.zeros(1))  # the others wait for rank 0's folder
        except LostProcess:
            if not self.silent:
                raise
            raise UserError("rank 0 says what is wrong with its folder") from None

    def write(self, name, content):
        if not self.silent:
            super().write(name, content)

    def save(self):
        if not self.silent:
            super().save()

    def time_to_keep(self):
        """Rank 0 decides: each may hold a part of what is kept."""
        decides = super().time_to_keep() and not self.silent
        return bool(all_sum(torch.tensor(float(decides))))


def sum_gradients(model):
    """What data parallelism is: each process has the gradient of its own rows, the batch's is their
    sum, and all take the same step. A sum, not a mean: each loss is already divided by the counts
    of the whole batch. A sharded model has done it in its backward pass.
    """
    if not isinstance(model, FSDPModule):
        for p in model.parameters():
            p.grad = all_sum(p.grad)


def place(model, config, device):
    """The model where it trains. With --shard each process keeps a slice of every weight; a block's
    are gathered when it is computed, and the gradients are summed slice by slice."""
    if not config.shard:
        return model.to(device)
    mesh = dist.init_device_mesh(device, (world()[1],))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    return model


def plain(model, dtype):
    """The model as one whole, to sample from: a copy if it is sharded or of another dtype.

    With --shard all processes have to call it.
    """
    dtype = getattr(torch, dtype)
    if not isinstance(model, FSDPModule) and model.lm_head.weight.dtype == dtype:
        return model
    with torch.device("meta"):  # shapes without memory
        whole = GPT(model.config)
    weights = model.state_dict()
    for name, w in weights.items():
        weights[name] = (w.full_tensor() if isinstance(model, FSDPModule) else w).to(dtype)
    whole.load_state_dict(weights, assign=True)
    if model.config.tie:
        whole.lm_head.weight = whole.wte.weight
    return whole


def handles(model, optimizer):
    """What a run saves and restores. Of a sharded model: the whole of it, in rank 0's memory."""
    if not isinstance(model, FSDPModule):
        return model, optimizer
    options = whole_state.StateDictOptions
    gather, deal = options(full_state_dict=True, cpu_offload=True), options(full_state_dict=True)
    weights = SimpleNamespace(
        state_dict=partial(whole_state.get_model_state_dict, model, options=gather),
        load_state_dict=partial(whole_state.set_model_state_dict, model, options=deal),
    )
    moments = SimpleNamespace(
        state_dict=partial(whole_state.get_optimizer_state_dict, model, optimizer, options=gather),
        load_state_dict=partial(
            whole_state.set_optimizer_state_dict, model, optimizer, options=deal
        ),
    )
    return weights, moments


def together(main):
    """A decorator of main: what is wrong in all processes, rank 0 alone says."""

    def run():
        try:
            main()
        except UserError as e:
            if os.environ.get("RANK", "0") != "0" and not isinstance(e, LostProcess):
                time.sleep(10)  # torchrun ends all when the first one goes: rank 0 speaks before
                raise SystemExit(2) from None
            raise
        if dist.is_initialized():
            dist.destroy_process_group()

    return run
