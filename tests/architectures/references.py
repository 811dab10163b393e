"""The architectures written out once more in plain tensors, slowly, from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, layer_norm, max_pool2d, relu

State = Mapping[str, Tensor]


def mlp(state: State, name: str, x: Tensor, expert: int | None = None) -> Tensor:
    """Linear, tanh, linear; of an expert of its own, or of one in a stack, whose weights lie the other way round."""

    def linear(layer: int, y: Tensor) -> Tensor:
        weight, bias = state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"]
        return y @ weight.T + bias if expert is None else y @ weight[expert] + bias[expert]

    return linear(2, torch.tanh(linear(0, x)))


def softmax(scores: Tensor) -> Tensor:
    return scores.exp() / scores.exp().sum(1, keepdim=True)


def mixed(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(outputs[0])
    for e, output in enumerate(outputs):
        total = total + weights[:, e : e + 1] * output
    return total


def mmoe(state: State, x: Tensor, tasks: Sequence[str], num_experts: int, *, stacked: bool) -> dict[str, Tensor]:
    outputs = [mlp(state, "experts", x, e) if stacked else mlp(state, f"experts.{e}", x) for e in range(num_experts)]
    return {task: mixed(softmax(x @ state[f"gates.{task}.weight"].T), outputs) for task in tasks}


def ple(
    state: State, x: Tensor, tasks: Sequence[str], levels: int, task_experts: int, shared_experts: int
) -> dict[str, Tensor]:
    streams = dict.fromkeys([*tasks, "shared"], x)
    for level in range(levels):
        prefix = f"levels.{level}"
        outputs = {
            stream: [
                mlp(state, f"{prefix}.experts.{stream}", streams[stream], e)
                for e in range(shared_experts if stream == "shared" else task_experts)
            ]
            for stream in streams
        }
        everything = [output for found in outputs.values() for output in found]
        after = {}
        for stream in streams:
            if stream == "shared" and level == levels - 1:
                continue
            weights = softmax(streams[stream] @ state[f"{prefix}.gates.{stream}.weight"].T)
            seen = everything if stream == "shared" else [*outputs[stream], *outputs["shared"]]
            after[stream] = mixed(weights, seen)
        streams = after
    return streams


def selectors(z: Tensor, num_experts: int, gamma: float) -> Tensor:
    """``[B, k, bits]`` to ``[B, k, E]``, expert by expert and bit by bit."""
    columns = []
    for expert in range(num_experts):
        probability = torch.ones_like(z[..., 0])
        for bit in range(math.ceil(math.log2(num_experts))):
            t = z[..., bit]
            cubic = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
            on = torch.where(t <= -gamma / 2, 0.0, torch.where(t >= gamma / 2, 1.0, cubic))
            probability = probability * (on if expert // 2**bit % 2 else 1 - on)
        columns.append(probability)
    return torch.stack(columns, -1)


def dselect_k(
    state: State, x: Tensor, tasks: Sequence[str], num_experts: int, num_selected: int, gamma: float, *, static: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The outputs, the entropy of all selectors and what keeps them reachable, means over the samples."""
    outputs = [mlp(state, "experts", x, e) for e in range(num_experts)]
    found, entropy, reachable = {}, torch.zeros((), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
    for task in tasks:
        gate = f"gates.{task}"
        if static:
            alpha = state[f"{gate}.alpha"].expand(len(x), -1)
            z = state[f"{gate}.z"].expand(len(x), -1, -1)
        else:
            alpha = x @ state[f"{gate}.alpha.weight"].T + state[f"{gate}.alpha.bias"]
            z = (x @ state[f"{gate}.z.weight"].T + state[f"{gate}.z.bias"]).view(len(x), num_selected, -1)
        r, share = selectors(z, num_experts, gamma), softmax(alpha)
        weights = torch.zeros(len(x), num_experts, dtype=x.dtype)
        for i in range(num_selected):
            weights = weights + share[:, i : i + 1] * r[:, i]
            entropy = entropy - (r[:, i] * torch.log(r[:, i] + 1e-6)).sum(1).mean()
            reachable = reachable + (1 / (r[:, i].sum(1) + 1e-6)).mean()
        found[task] = mixed(weights, outputs)
    return found, entropy, reachable


def normed(state: State, name: str, x: Tensor, *, maps: bool) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    if maps:
        return batch_norm(x, None, None, weight, bias, training=True)
    return layer_norm(x, weight.shape, weight, bias)


def projected(state: State, name: str, at: int, x: Tensor, *, maps: bool, padding: int = 0) -> Tensor:
    """A convolution, or a linear map, and its norm."""
    weight = state[f"{name}.{at}.weight"]
    y = conv2d(x, weight, padding=padding) if maps else x @ weight.T + state[f"{name}.{at}.bias"]
    return normed(state, f"{name}.{at + 1}", y, maps=maps)


def mask(state: State, name: str, x: Tensor, *, maps: bool) -> Tensor:
    return 1 / (1 + torch.exp(-projected(state, name, 3, relu(projected(state, name, 0, x, maps=maps)), maps=maps)))


def mtan_maps(state: State, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """Two stages: a pair of convolutions, then max pooling, a convolution and a ReLU."""
    u1 = torch.tanh(conv2d(x, state["stages.0.0.0.weight"], state["stages.0.0.0.bias"], padding=1))
    p1 = conv2d(u1, state["stages.0.1.weight"], state["stages.0.1.bias"], padding=1)
    u2 = p2 = torch.tanh(conv2d(max_pool2d(p1, 2), state["stages.1.1.weight"], state["stages.1.1.bias"], padding=1))
    found = {}
    for task in tasks:
        first = mask(state, f"attention.{task}.0", u1, maps=True) * p1
        passed = max_pool2d(relu(projected(state, "passing.0", 0, first, maps=True, padding=1)), 2)
        found[task] = mask(state, f"attention.{task}.1", torch.cat([u2, passed], 1), maps=True) * p2
    return found


def mtan_tokens(state: State, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """Two stages, each linear with a tanh."""
    p1 = torch.tanh(x @ state["stages.0.0.weight"].T + state["stages.0.0.bias"])
    p2 = torch.tanh(p1 @ state["stages.1.0.weight"].T + state["stages.1.0.bias"])
    found = {}
    for task in tasks:
        first = mask(state, f"attention.{task}.0", p1, maps=False) * p1
        passed = relu(projected(state, "passing.0", 0, first, maps=False))
        found[task] = mask(state, f"attention.{task}.1", torch.cat([p2, passed], -1), maps=False) * p2
    return found
