"""Contenders that are PyTorch models in this process: untouched, compiled, and with fastattn's layers."""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.contenders.runner import Generated, Runner, Stages, TrainStep
from fastattn.bench.contenders.source import DTYPES, Kind, Source
from fastattn.bench.contenders.stamps import forced_logits, greedy_config, greedy_tokens
from fastattn.bench.timing import MissingError
from fastattn.verification.state import training

__all__ = [
    "TorchRunner",
    "compiled",
    "compiled_reduce_overhead",
    "eager",
    "fastattn",
    "fastattn_graph",
    "fastattn_padded",
    "flex",
    "require_cpp_compiler",
    "sdpa",
]

Inputs = Mapping[str, Tensor]


class TorchRunner(Runner):
    """A transformers model in PyTorch.

    Args:
        model: an independent copy, on its device and in its dtype; it becomes the runner's own.
        kind: what it is.
        compile: makes what is called in the model's stead; it is given the model or its encoder.
    """

    def __init__(
        self, model: Any, kind: Kind, compile: Callable[[nn.Module], Callable[..., Any]] | None = None
    ) -> None:
        self.model = model
        self._compiled = compile is not None
        wrap = compile or (lambda module: module)
        # torch.compile compiles when it is called: of the two only what a workload needs.
        self._whole = wrap(model)
        self._forward = wrap(model.get_encoder()) if kind == "encoder-decoder" else self._whole
        self._taken = inspect.signature(self.model.forward).parameters
        self._options: dict[str, Any] = {}
        if kind in ("decoder", "encoder-decoder"):
            model.generation_config = greedy_config(model)
        if kind == "decoder":
            self._options = self._accepted(use_cache=True, logits_to_keep=1)
        self._training: ExitStack | None = None
        self._gradients: dict[str, Tensor] = {}
        self._targets: dict[torch.Size, Tensor] = {}

    def forward(self, inputs: Inputs) -> Any:
        self._set_training(False)
        with torch.inference_mode():
            return self._forward(**inputs, **self._options)

    def generate(self, inputs: Inputs, new_tokens: int) -> Generated:
        if self._compiled:
            raise TypeError("the model is compiled for whole batches; its decoding would run uncompiled")
        self._set_training(False)
        return greedy_tokens(self.model, inputs, new_tokens)

    def logits(self, inputs: Inputs, tokens: Tensor) -> Tensor:
        self._set_training(False)
        return forced_logits(self.model, inputs, tokens)

    def train_step(self, inputs: Inputs) -> TrainStep:
        self._set_training(True)
        # A cache is of no use to a loss; transformers' Trainer leaves it out as well.
        options = self._accepted(use_cache=False)
        # The last step's gradients go before there are new ones, also where its result is still held.
        self._gradients.clear()
        self.model.zero_grad(set_to_none=True)
        with torch.inference_mode(False), torch.enable_grad():
            begin = self._now_ms()
            output = self._whole(**inputs, **options)
            loss = output.loss if "labels" in inputs else self._distance(output[0], inputs["attention_mask"])
            middle = self._now_ms()
            loss.backward()
            end = self._now_ms()
        self._gradients = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return TrainStep(loss.detach(), self._gradients, middle - begin, end - middle)

    def _distance(self, states: Tensor, mask: Tensor) -> Tensor:
        """The mean squared distance at real positions from a fixed target, in fp32.

        The mean square alone would not do: a layer norm holds it, and gradients would be all rounding.
        """
        if states.shape not in self._targets:
            numbers = torch.arange(states.numel(), device=states.device, dtype=torch.float32)
            self._targets[states.shape] = numbers.sin().view(states.shape)
        target = self._targets[states.shape]
        if states.shape[:2] == mask.shape:
            states, target = states[mask != 0], target[mask != 0]
        return (states.float() - target).square().mean()

    def _accepted(self, **options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in self._taken}

    def _set_training(self, wanted: bool) -> None:
        """Training mode with nothing random in it, and gradients wanted; or evaluation, without either."""
        if wanted == (self._training is not None):
            return
        if self._training is None:
            self._training = ExitStack()
            self._training.enter_context(training(self.model))
        else:
            self._training.close()
            self._training = None
            self._gradients.clear()
            self.model.zero_grad(set_to_none=True)
        for parameter in self.model.parameters():
            parameter.requires_grad_(wanted and parameter.is_floating_point())

    def _now_ms(self) -> float:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3


class GraphRunner(TorchRunner):
    """A model whose forward is replayed from a CUDA graph, one for every shape it has been given."""

    # Before a capture, on a side stream: libraries make their workspaces in the first calls.
    _WARM_UP = 3

    def __init__(self, model: nn.Module, kind: Kind) -> None:
        super().__init__(model, kind)
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Any]] = {}

    def forward(self, inputs: Inputs) -> Any:
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in sorted(inputs.items()))
        with torch.inference_mode():
            if key not in self._graphs:
                self._graphs[key] = self._capture(inputs)
            graph, static, output = self._graphs[key]
            for name, tensor in static.items():
                tensor.copy_(inputs[name])
            graph.replay()
            # The next replay writes into the graph's own memory.
            return {name: x.clone() for name, x in output.items() if isinstance(x, Tensor)}

    def _capture(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Any]:
        static = {name: x.clone() for name, x in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self._WARM_UP):
                super().forward(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = super().forward(static)
        return graph, static, output


def eager(source: Source, precision: str, stages: Stages) -> Runner:
    """The untouched model with transformers' own attention written out: the reference, in fp32."""
    return TorchRunner(_untouched(source, "eager", precision, stages), source.kind)


def sdpa(source: Source, precision: str, stages: Stages) -> Runner:
    """The untouched model with torch's scaled_dot_product_attention."""
    return TorchRunner(_untouched(source, "sdpa", precision, stages), source.kind)


def flex(source: Source, precision: str, stages: Stages) -> Runner:
    """The untouched model with torch's FlexAttention.

    Raises:
        MissingError: the benchmark does not run on a GPU, or the model has no FlexAttention.
    """
    _require_cuda(source, "FlexAttention")
    return TorchRunner(_untouched(source, "flex_attention", precision, stages), source.kind)


def _compile_every_shape(source: Source) -> None:
    """Lift dynamo's limit on graphs of one function while the benchmark runs: past it, it would run the model
    uncompiled and say nothing.
    """
    from torch._dynamo import config

    raised = config.patch(recompile_limit=max(1000, config.recompile_limit))
    source.resources.enter_context(raised)


def compiled(source: Source, precision: str, stages: Stages) -> Runner:
    """`torch.compile` of the SDPA model; it compiles in the first call of every shape.

    Raises:
        MissingError: the benchmark runs on a CPU and there is no C++ compiler.
    """
    if source.device.type == "cpu":
        require_cpp_compiler()
    _compile_every_shape(source)
    return TorchRunner(_untouched(source, "sdpa", precision, stages), source.kind, _compile)


def compiled_reduce_overhead(source: Source, precision: str, stages: Stages) -> Runner:
    """`torch.compile(mode="reduce-overhead")` of the SDPA model.

    Raises:
        MissingError: the benchmark does not run on a GPU.
    """
    _require_cuda(source, "CUDA graphs, all that this mode adds to torch.compile's default")
    _compile_every_shape(source)
    return TorchRunner(_untouched(source, "sdpa", precision, stages), source.kind, _compile_into_graphs)


def fastattn(source: Source, precision: str, stages: Stages) -> Runner:
    """The model after `fastattn.optimize`, encoders on real tokens alone.

    Raises:
        MissingError: no layer of the model could be swapped.
    """
    return TorchRunner(_fused(source, "auto", precision, stages), source.kind)


def fastattn_padded(source: Source, precision: str, stages: Stages) -> Runner:
    """The model after `fastattn.optimize(padding="padded")`: what the layers give, padding computed too.

    Raises:
        MissingError: no layer of the model could be swapped.
    """
    return TorchRunner(_fused(source, "padded", precision, stages), source.kind)


def fastattn_graph(source: Source, precision: str, stages: Stages) -> Runner:
    """The model after `fastattn.optimize(padding="padded")`, replayed from a CUDA graph: a graph's shapes
    cannot depend on how many tokens are real.

    Raises:
        MissingError: no layer of the model could be swapped, or the benchmark does not run on a GPU.
    """
    _require_cuda(source, "CUDA graphs")
    return GraphRunner(_fused(source, "padded", precision, stages), source.kind)


def require_cpp_compiler() -> None:
    """Raise MissingError where torch.compile would find no C++ compiler: asks the lookup it uses itself."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # a private module: where it has moved, look for the compilers it would look for
        found = any(map(shutil.which, ("g++", "clang++", "cl")))
    else:
        try:
            found = bool(get_cpp_compiler())
        except Exception:
            found = False
    if not found:
        raise MissingError("C++ compiler: install g++ or clang++")


def _untouched(source: Source, attention: str, precision: str, stages: Stages) -> nn.Module:
    with stages("load model"):
        model: Any = source.untouched()
        # A module of another library than transformers has one attention.
        if hasattr(model, "set_attn_implementation"):
            try:
                model.set_attn_implementation(attention)
            except (ValueError, ImportError) as error:
                raise MissingError(f"{attention} attention of {type(model).__name__}: {error}") from error
        return _placed(model, source, precision)


def _fused(source: Source, padding: str, precision: str, stages: Stages) -> nn.Module:
    with stages("swap"):
        model = source.fused(padding=padding)
    with stages("load model"):
        return _placed(model, source, precision)


def _placed(model: nn.Module, source: Source, precision: str) -> nn.Module:
    placed: nn.Module = model.to(source.device, DTYPES[precision]).eval()
    return placed


def _require_cuda(source: Source, what: str) -> None:
    if source.device.type != "cuda":
        raise MissingError(f"GPU: {what}")


def _compile(module: nn.Module) -> Callable[..., Any]:
    # One graph a shape, its best case: by default a second shape would be served by a slower dynamic graph.
    return torch.compile(module, dynamic=False)


def _compile_into_graphs(module: nn.Module) -> Callable[..., Any]:
    call = torch.compile(module, dynamic=False, mode="reduce-overhead")

    def step(**inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        output = call(**inputs)
        if torch.is_grad_enabled():
            return output
        # The next call, of another contender too, may write into the graphs' memory.
        return {name: x.clone() for name, x in output.items() if isinstance(x, Tensor)}

    return step
