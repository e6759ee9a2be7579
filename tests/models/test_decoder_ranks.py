"""The decoder on two gloo ranks, with DDP and with FSDP2: the steps of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tokenpack.models.decoder.blocks import DecoderLayer

from ..trainer.setting import on_ranks
from .grid import Options, make_batch, make_model

STEPS = 3
MODELS = {
    "dense": (Options(), {"tie_word_embeddings": False}),
    "latent, tied": (Options(attention="mla", positions="learned"), {}),
    # Without the balancing loss, which is that of each rank's tokens.
    "experts": (Options(ffn="moe"), {"router_aux_loss_coef": 0, "router_bias_update_rate": 0.02}),
}


def build(name):
    options, changes = MODELS[name]
    return make_model(options, **changes).train()


def sequences(rank):
    """The stream and the boundaries of a rank's sequences; of all without a rank."""
    batch = make_batch((5, 1, 9))
    ends = {None: (0, 3), 0: (0, 2), 1: (2, 3)}[rank]
    bounds = batch.cu_seqlens[ends[0] : ends[1] + 1]
    return batch.stream[:, bounds[0] : bounds[-1]], bounds - bounds[0]


def train(model, step_of, rank=None, world=1):
    """The loss of each step, as SGD makes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    stream, bounds = sequences(rank)
    losses = []
    for _ in range(STEPS):
        # DDP and FSDP average gradients over ranks, so multiply by the number of ranks.
        loss = model(stream, cu_seqlens=bounds, labels=stream, num_items_in_batch=12).loss * world
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step_of(model)
        total = loss.detach() / world
        if rank is not None:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def update_bias(model):
    model = getattr(model, "module", model)
    if model.config.router_bias_update_rate:
        model.update_router_bias()


def whole_weights(model):
    state = model.state_dict()
    return {
        name.removeprefix("module."): (
            value.full_tensor() if hasattr(value, "full_tensor") else value
        ).clone()
        for name, value in state.items()
    }


def train_on_rank(rank, names, how):
    dist.init_process_group("gloo")
    results = {}
    for name in names:
        model = build(name)
        if how == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            if not model.config.tie_word_embeddings:  # a tied head is sharded with the embedding
                fully_shard(model.lm_head, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        losses = train(wrapped, update_bias, rank, 2)
        results[name] = losses, whole_weights(wrapped)
    if how == "fsdp2":
        results["dtypes"] = dtypes_in_half_precision(init_device_mesh("cpu", (2,)))
    dist.barrier()
    return results


def dtypes_in_half_precision(mesh):
    """Of hidden states and of cos and sin in a block, under FSDP's mixed precision."""
    model, seen = build("dense"), []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        attention = block.self_attn
        attention.register_forward_pre_hook(
            lambda module, given: seen.append((given[0].dtype, given[1].rotation[0].dtype))
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    stream, bounds = sequences(None)
    model(stream, cu_seqlens=bounds, labels=stream).loss.backward()
    return set(seen)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(how):
    expected = {}
    for name in MODELS:
        model = build(name)
        expected[name] = train(model, update_bias), whole_weights(model)
    for results in on_ranks(2, train_on_rank, tuple(MODELS), how):
        for name, (losses, weights) in expected.items():
            got_losses, got_weights = results[name]
            assert got_losses == pytest.approx(losses, abs=1e-5), name
            assert losses[-1] < losses[0]
            assert got_weights.keys() == weights.keys()
            for key, value in weights.items():
                assert torch.allclose(got_weights[key], value, atol=1e-5), (name, key)
            assert name != "experts" or any("correction_bias" in key for key in weights)
        if how == "fsdp2":
            assert results["dtypes"] == {(torch.bfloat16, torch.float32)}


def test_lora_trains_the_same_packed_and_padded():
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(build("latent, tied"), options).train()
    batch = make_batch()
    labels = batch.left_ids.masked_fill(~batch.left_mask, -100)
    gradients = []
    for arguments in (
        {"input_ids": batch.stream, "cu_seqlens": batch.cu_seqlens, "labels": batch.stream},
        {"input_ids": batch.left_ids, "attention_mask": batch.left_mask, "labels": labels},
    ):
        model.zero_grad()
        model(**arguments).loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append(copy.deepcopy(trained))
    packed, padded = gradients
    assert packed.keys() == padded.keys()
    assert all("lora_" in name for name in packed)
    assert len({name.split(".")[-4] for name in packed}) >= 6  # attention and feed-forward
    scale = max(gradient.abs().max() for gradient in padded.values())
    for name, gradient in packed.items():
        assert (gradient - padded[name]).abs().max() <= 1e-5 * scale, name
    merged = model.merge_and_unload()
    assert any(isinstance(module, DecoderLayer) for module in merged.modules())
