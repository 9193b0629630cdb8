"""One micro-batch's forward and backward pass as a CUDA graph: the kernels of both, launched at once.

A host launches some hundred kernels a micro-batch, and where they are short the GPU waits for it. The graph is made of
the kernels that would run without it, so the bits are the same.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

WARM_UP = 3
"""Passes before the capture, which may not allocate for the first time or compile: as torch's documentation does."""


class MicroBatchGraph:
    """Called with token ids on the device; leaves each parameter's gradient in its `grad` and returns the loss.

    `passes` computes (objective, cross-entropy) of a micro-batch. The gradients lie in memory of the graph, which the
    next call overwrites: they must have been added up by then. Parameters must stay where they are.
    """

    def __init__(
        self, passes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._passes, self._parameters = passes, list(parameters.values())
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self._graph is None:
            self._graph = self._capture(inputs, targets)
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss.clone()

    def _capture(self, inputs: Tensor, targets: Tensor) -> torch.cuda.CUDAGraph:
        self._inputs, self._targets = inputs.clone(), targets.clone()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self._compute()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._compute()
        self._gradients = [parameter.grad for parameter in self._parameters]
        return graph

    def _compute(self) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        objective, cross_entropy = self._passes(self._inputs, self._targets)
        objective.backward()
        return cross_entropy.detach()
