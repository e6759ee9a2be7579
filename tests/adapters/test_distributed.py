"""Two gloo processes on the CPU, under DDP and FSDP2, train like one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tokenpack import packing_stats, patch_model

from ..trainer.setting import on_ranks
from .models import BY_NAME, LLAMA, NLLB, T5

STEPS = 3


def halves(batch, rank):
    return {key: value[rank::2] for key, value in batch.items()}


def targets_in(case, batch):
    labels = batch["labels"][:, 1:] if case.labels == "causal" else batch["labels"]
    return int((labels != -100).sum())


def even_rows(case, seed):
    batch = case.batch("right", seed)
    return {key: torch.cat([value, value[:1].flip(0)]) for key, value in batch.items()}


def train(case, model, parameters, rank=None, world=1):
    """Losses of a few steps of SGD, of the whole batch, also if this rank has a part of it."""
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses = []
    for step in range(STEPS):
        batch = even_rows(case, step)
        count = targets_in(case, batch)
        if rank is not None:
            batch = halves(batch, rank)
        # DDP and FSDP average gradients over ranks, so multiply by the number of ranks.
        loss = model(**batch, num_items_in_batch=count).loss * world
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        if rank is not None:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def train_on_rank(rank, name, how):
    dist.init_process_group("gloo")
    case = BY_NAME[name]
    model = patch_model(case.build(), strict=True)
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        blocks = set(type(model)._no_split_modules)
        for module in list(model.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        if "head" in how:  # FSDP gathers the head's weight only in the head's forward
            fully_shard(model.get_output_embeddings(), mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    losses = train(case, wrapped, wrapped.parameters(), rank, world=2)
    assert packing_stats(model).packed_calls == STEPS
    assert packing_stats(model).loss == "fused with the head, without logits"
    dist.barrier()
    return losses


@pytest.mark.parametrize("case", [T5, NLLB, LLAMA], ids=lambda case: case.model)
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "fsdp2 with a sharded head"])
def test_two_processes_train_like_one(case, how):
    if "head" in how and case is not LLAMA:
        pytest.skip("its head is tied to the embedding and is sharded with it")
    single = patch_model(case.build())
    expected = train(case, single, single.parameters())
    assert expected == pytest.approx(train_padded(case), abs=1e-5)
    for losses in on_ranks(2, train_on_rank, case.model, how):
        assert losses == pytest.approx(expected, abs=1e-5)


def train_padded(case):
    """The same steps on the padded model with its mean loss."""
    model = copy.deepcopy(case.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        loss = model(**even_rows(case, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
