"""Learning to branch: a trunk whose nodes choose their parents, at random at first, and end as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import is_available, is_initialized

from lightning_mtl.architectures.stages import Chain, check_alike, checked_tasks, mix, wanted_tasks
from lightning_mtl.task.names import check_task_name


class LTB(nn.Module):
    r"""Learning to branch: each node of a stage, and each task in the end, chooses which node before it reads from.

    .. math::
        d_j = \mathrm{onehot}\,\arg\max_i\, (\theta_{ji} + \epsilon_{ji}), \qquad
        x_j = \sum_i d_{ji}\, y_i, \qquad
        \epsilon_{ji} \sim \mathrm{Gumbel}(0, 1)

    for parent i and child j, the gradient of :math:`d_j` being that of
    :math:`\mathrm{softmax}((\theta_j + \epsilon_j) / \tau)`. So the choice follows the branching probabilities
    :math:`\mathrm{softmax}(\theta_j)`, which are trained together with the nodes. In evaluation each child takes its
    likeliest parent. After :meth:`harden` it does so for good, what no task reads is not computed, and the network is a
    tree.

    The noise of an optimizer step is a function of ``seed`` and the step's number: the same on every rank, in every
    micro-batch and after a resume. :class:`Branching`, a callback, draws it, lowers the temperature and hardens;
    without it, call :meth:`sample` before each training step. The trunk returns ``{task: features}``.

    Methods that measure gradients see the whole of it at the trunk and at the features. ``at="last_layer"`` means the
    logits until it is hardened, since no node's layer serves all tasks.

    Args:
        stages: The nodes of each stage, in the order the stages run. Nodes of the first stage take the trunk's inputs,
            the others one tensor. All nodes of a stage return the same shape. Nodes that start alike stay alike for
            long: initialize each anew.
        tasks: The tasks' names.
        seed: Of the noise.

    Attributes:
        logits: The trainable :math:`\theta`: ``[children, parents]`` for each stage but the first, ``[K, parents]`` for
            the tasks. The paper gives them an optimizer of their own: here a parameter group.
        tree: For each of these, each child's parent once hardened; None before.

    Raises:
        TypeError: If a node is no module, or, in the first batch, returns no tensor.
        ValueError: If a stage is empty or a module object comes twice, or, in the first batch, shapes differ.
        RuntimeError: In training, if no noise was drawn.

    Source: Guo, Lee and Ulbricht, Learning to Branch for Multi-Task Learning, 2020, arXiv:2006.01895.

    Deviations: the network goes on training after it is hardened, where the paper trains the tree found anew; for that,
    build the tree of :meth:`single_task` or load a hardened trunk with fresh nodes.

    Example:
        >>> trunk = LTB([[nn.Linear(4, 8), nn.Linear(4, 8)], [nn.Linear(8, 3), nn.Linear(8, 3)]], tasks=["a", "b"])
        >>> trunk.sample(step=0, temperature=5.0)
        >>> {task: list(features.shape) for task, features in trunk(torch.zeros(2, 4)).items()}
        {'a': [2, 3], 'b': [2, 3]}
        >>> _ = trunk.logits[1].data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> trunk.harden()
        >>> trunk.tree  # both nodes of the second stage read node 0; a task reads the node of its own
        [[0, 0], [0, 1]]
    """

    takes_tasks: ClassVar[bool] = True
    noise: Tensor
    temperature: Tensor
    learns: Tensor

    def __init__(self, stages: Sequence[Sequence[nn.Module]], tasks: Sequence[str], *, seed: int = 0) -> None:
        super().__init__()
        nodes: list[Any] = [node for stage in stages for node in stage]
        if wrong := [type(node).__name__ for node in nodes if not isinstance(node, nn.Module)]:
            raise TypeError(f"LTB(stages=...) must hold lists of modules, one list a stage; found a {wrong[0]}.")
        if not stages or not all(len(stage) for stage in stages):
            raise ValueError(f"LTB(stages=...) has {[len(stage) for stage in stages]} nodes a stage; each needs one.")
        if len({id(node) for node in nodes}) < len(nodes):
            raise ValueError("LTB(stages=...) holds the same module object twice; give each node its own.")
        self.tasks, self.seed = checked_tasks(tasks, "LTB"), seed
        for task in self.tasks:
            check_task_name(task)
        self.stages = nn.ModuleList(nn.ModuleList(stage) for stage in stages)
        self.sizes = [len(stage) for stage in stages]
        children = [*self.sizes[1:], len(self.tasks)]
        self.logits = nn.ParameterList(
            nn.Parameter(torch.zeros(*shape)) for shape in zip(children, self.sizes, strict=True)
        )
        self.register_buffer("noise", torch.zeros(sum(logits.numel() for logits in self.logits)), persistent=False)
        self.register_buffer("temperature", torch.ones(()), persistent=False)
        self.register_buffer("learns", torch.ones(()), persistent=False)
        self.sampled = False
        self.tree: list[list[int]] | None = None

    @property
    def hardened(self) -> bool:
        """Return whether every child has its one parent."""
        return self.tree is not None

    def sample(self, step: int, temperature: float, *, learns: bool = True) -> None:
        """Draw the noise of an optimizer step.

        Args:
            step: The step's number.
            temperature: τ above 0; the higher, the further the gradient spreads over parents not chosen.
            learns: Whether the logits get gradients; False warms the nodes up.

        Raises:
            ValueError: If the temperature is not above 0.
        """
        if not temperature > 0:
            raise ValueError(f"LTB.sample(temperature={temperature}) must be above 0.")
        drawn = np.random.default_rng([self.seed, step]).gumbel(size=self.noise.numel())
        self.noise.copy_(torch.from_numpy(drawn))
        self.temperature.fill_(temperature)
        self.learns.fill_(float(learns))
        self.sampled = True

    def harden(self) -> None:
        """Make each child's likeliest parent its only one; of equally likely ones the first."""
        self.tree = self.likeliest()

    def likeliest(self) -> list[list[int]]:
        """Return each child's likeliest parent, for each stage but the first and for the tasks."""
        return self.tree or [logits.detach().argmax(dim=1).tolist() for logits in self.logits]

    def probabilities(self) -> list[Tensor]:
        """Return the branching probabilities, ``[children, parents]`` each; 0 and 1 once hardened."""
        if self.tree is None:
            return [logits.detach().softmax(dim=1) for logits in self.logits]
        return [
            nn.functional.one_hot(torch.tensor(parents), size).float()
            for parents, size in zip(self.tree, self.sizes, strict=True)
        ]

    def forward(self, *inputs: Any, tasks: Sequence[str] | None = None, **named: Any) -> dict[str, Any]:  # noqa: ANN401
        """Run the stages; once hardened, only the nodes that ``tasks`` need."""
        wanted = wanted_tasks("LTB", self.tasks, tasks)
        if self.tree is not None:
            return self._run_tree(self.tree, wanted, inputs, named)
        values = [node(*inputs, **named) for node in self._nodes(0)]
        for depth in range(1, len(self.stages)):
            read = self._read(depth - 1, values)
            values = [node(value) for node, value in zip(self._nodes(depth), read, strict=True)]
        read = self._read(len(self.stages) - 1, values)
        return {task: value for task, value in zip(self.tasks, read, strict=True) if task in wanted}

    def single_task(self, task: str) -> nn.Module:
        """Return the nodes on the likeliest path to one task.

        Raises:
            ValueError: If there is no such task.
        """
        wanted_tasks("LTB", self.tasks, [task])
        position, path = self.tasks.index(task), []
        for parents in reversed(self.likeliest()):
            position = parents[position]
            path.append(position)
        return Chain([self._nodes(depth)[node] for depth, node in enumerate(reversed(path))])

    def get_extra_state(self) -> dict[str, Any]:
        """Return the tree, which no tensor holds, for a checkpoint."""
        return {"tree": self.tree}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the tree of a checkpoint.

        Raises:
            ValueError: If it is a tree of other stages or tasks.
        """
        tree = state["tree"]
        found = None if tree is None else [len(parents) for parents in tree]
        children = [len(logits) for logits in self.logits]
        if found is not None and found != children:
            raise ValueError(f"LTB's tree has {found} children a stage, and here are {children}, of tasks at the end.")
        self.tree = tree

    def _nodes(self, depth: int) -> list[nn.Module]:
        return list(self.stages[depth].children())

    def _read(self, depth: int, values: Sequence[Any]) -> list[Tensor]:
        """What each child reads of a stage's outputs."""
        check_alike("LTB", depth, values, [f"node {node}" for node in range(len(values))])
        return mix(self._choices(depth), values)

    def _choices(self, depth: int) -> Tensor:
        """``[children, parents]``, one 1 in each row."""
        logits = self.logits[depth]
        if not self.training:
            return nn.functional.one_hot(logits.detach().argmax(dim=1), logits.shape[1]).to(logits.dtype)
        if not self.sampled:
            raise RuntimeError(
                "LTB has no noise to choose by; add lightning_mtl.architectures.Branching() to the Trainer's "
                "callbacks, or call sample(step, temperature) before each training step."
            )
        first = sum(other.numel() for other in list(self.logits)[:depth])
        noisy = logits + self.noise[first : first + logits.numel()].view_as(logits)
        soft = (noisy / self.temperature).softmax(dim=1)
        hard = nn.functional.one_hot(noisy.detach().argmax(dim=1), logits.shape[1]).to(soft.dtype)
        # Straight through: the value is the hard choice, the gradient that of the soft one.
        choices: Tensor = hard + self.learns * (soft - soft.detach())
        return choices

    def _run_tree(
        self, tree: Sequence[Sequence[int]], wanted: Sequence[str], inputs: Sequence[Any], named: dict[str, Any]
    ) -> dict[str, Any]:
        # From the tasks back to the inputs: the nodes of each stage that some wanted task reads.
        needed = [{tree[-1][self.tasks.index(task)] for task in wanted}]
        for parents in reversed(tree[:-1]):
            needed.insert(0, {parents[child] for child in needed[0]})
        idle = None
        if self.training and is_available() and is_initialized():
            # DDP waits for the gradients of every parameter that it was made with. Before the nodes run, so that the
            # layer that runs last is one of theirs.
            idle = torch.stack([(p * 0).sum() for p in self.parameters() if p.requires_grad]).sum()
        values = {node: self._nodes(0)[node](*inputs, **named) for node in sorted(needed[0])}
        for depth in range(1, len(self.stages)):
            values = {node: self._nodes(depth)[node](values[tree[depth - 1][node]]) for node in sorted(needed[depth])}
        found = {task: values[tree[-1][self.tasks.index(task)]] for task in wanted}
        return found if idle is None else {task: value + idle.to(value.dtype) for task, value in found.items()}
