"""Registration of torch operators: what one computes, its shapes, and its gradient, which is an operator too.

An ``autograd.Function`` would hide attention from selective recompute and break ``torch.compile``'s graph. As
operators, the forward can be marked MUST_SAVE, so that recompute keeps what it returned and neither computes nor
communicates twice. The compiler and every dispatch mode see one node.

They are registered with ``torch.library.Library`` rather than by ``torch.library.custom_op``, and joined by a node of
our own. Forward and backward of a layer cost 25 µs beside an ``autograd.Function``'s, where ``custom_op`` costs 75.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longctx.ambient import apart
from longctx.errors import ConfigError

NAMESPACE = "longctx"
HANDLES = ("plan", "run")  # an argument of such a name begins the context, which both passes are given alike

# What runs behind each operator, for tools that look inside (a dispatch mode sees an operator as one call).
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Gradient:
    """Describes the backward pass of an operator, which becomes the operator ``<name>_backward``.

    ``run``: takes the gradient of the first output, then what ``saves`` names, then the forward's context; returns the
    gradients of the inputs that ``of`` names. ``saves``: names of inputs and outputs; all of them by default. ``of``:
    all inputs by default. ``shapes``: of what ``run`` returns, by the same arguments; like those inputs by default,
    which are then among the saved.
    """

    run: Callable[..., Any]
    saves: tuple[str, ...] | None = None
    of: tuple[str, ...] | None = None
    shapes: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Value:
    """Describes a tensor, or a list of them, that an operator takes or returns."""

    name: str
    many: bool

    def declared(self, prefix: str = "") -> str:
        return f"Tensor{'[]' if self.many else ''} {prefix}{self.name}"


def define_operator(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    shapes: Callable[..., Any],
    gradient: Gradient | None = None,
) -> Any:
    """Registers ``longctx::<name>``, which changes none of its arguments, and returns it.

    ``schema``: arguments and named results in torch's form, such as ``(Tensor q, Tensor plan, str group) -> (Tensor
    out, Tensor lse)``: inputs first, then the context. ``forward``: what it runs. ``shapes``: empty tensors like its
    results, by the same arguments. ``gradient``: of the first result by the inputs; all others have none.
    """
    inputs, context, outputs = _read(schema)
    operator = _register(name, schema, forward, shapes)
    if gradient is None:
        _join(Differentiation(operator, inputs, outputs))
        return operator
    known = {value.name: value for value in (*inputs, *outputs)}
    saves = tuple(known) if gradient.saves is None else gradient.saves
    saved = tuple(known[one] for one in saves)
    of = inputs if gradient.of is None else tuple(known[one] for one in gradient.of)
    taken = ", ".join([outputs[0].declared("d"), *(value.declared() for value in saved), *context])
    returned = ", ".join(value.declared("d") for value in of)
    made_shapes = gradient.shapes or _like(saved, of)
    backward = _register(f"{name}_backward", f"({taken}) -> ({returned})", gradient.run, made_shapes)
    _join(Differentiation(backward, (outputs[0], *saved), of))
    _join(Differentiation(operator, inputs, outputs, backward, saved, of))
    return operator


def _read(schema: str) -> tuple[tuple[Value, ...], list[str], tuple[Value, ...]]:
    """Inputs, the declarations of the context, and outputs."""
    given, returned = (side.strip().removeprefix("(").removesuffix(")").split(",") for side in schema.split("->"))
    declared = [one.strip() for one in given]
    inputs = [*itertools.takewhile(_is_input, declared)]
    return _values(inputs), declared[len(inputs) :], _values(returned)


def _is_input(declared: str) -> bool:
    kind, name = declared.split()
    return kind in ("Tensor", "Tensor[]") and name not in HANDLES


def _values(declared: Iterable[str]) -> tuple[Value, ...]:
    return tuple(Value(name, kind == "Tensor[]") for kind, name in map(str.split, declared))


def _unseen(run: Callable[..., Any]) -> Callable[..., Any]:
    """Hides what runs behind an operator from Dynamo, which would compile plans and messages into graphs.

    Dynamo looks at every frame that a compiled caller leaves to Python, and at what that calls. Nothing is imported.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(run.__code__, dynamo._FrameExecStrategy(skip, skip))
    return run


def _register(name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    run = _unseen(apart(_unseen(run)))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _unseen(_refuses_batching(name)), "FuncTorchBatched")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_LIBRARY)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    IMPLEMENTATIONS[operator] = operator.python_body = run  # by which ``sim`` finds it, which knows nothing of ours
    return operator


def _refuses_batching(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError(f"longctx::{name} {TRANSFORMED}")

    return refuse


TRANSFORMED = (
    "exchanges tensors between ranks as they are, and torch.func's vmap, grad and jvp would take it apart; nearest "
    "valid: loss.backward() or torch.autograd.grad, with sequences in the batch dim"
)


def _transformed(tensors: Iterable[Any]) -> bool:
    """Whether a transform of torch.func is at work, or a tensor carries a tangent of forward-mode derivatives."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(one).tangent is not None for one in _flat(tensors) if isinstance(one, Tensor))


def _like(saved: Sequence[Value], of: Sequence[Value]) -> Callable[..., Any]:
    """Empty gradients like the inputs, which are found among a backward operator's arguments."""
    places = [1 + list(saved).index(value) for value in of]

    def shapes(*arguments: Any) -> Any:
        made = tuple(
            [one.new_empty(one.shape) for one in found] if value.many else found.new_empty(found.shape)
            for value, found in zip(of, (arguments[place] for place in places), strict=True)
        )
        return made if len(made) > 1 else made[0]

    return shapes


@dataclass(frozen=True)
class Differentiation:
    """Holds what autograd must know of an operator: without ``backward``, that it has no gradient."""

    operator: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    backward: Any = None
    saved: tuple[Value, ...] = ()
    of: tuple[Value, ...] = ()

    @cached_property
    def places(self) -> list[int]:
        """Returns where what is saved stands among inputs and outputs."""
        every = (*self.inputs, *self.outputs)
        return [every.index(value) for value in self.saved]

    @cached_property
    def asked(self) -> list[bool]:
        """Returns which inputs have a gradient."""
        return [value in self.of for value in self.inputs]

    def gradients(self, dout: Any, kept: Sequence[Any], context: Sequence[Any]) -> list[Any]:
        """Returns the gradients of the inputs, None for those that have none."""
        if self.backward is None:
            raise ConfigError(f"{self.operator} has no gradient: second derivatives of it are not there")
        if dout is None:
            return [None] * len(self.inputs)
        found = self.backward(dout, *kept, *context)
        grads = iter((found,) if len(self.of) == 1 else found)
        return [next(grads) if asked else None for asked in self.asked]


def _join(known: Differentiation) -> None:
    """Tells autograd; the tensors of a node are flat, so that lists are taken apart and put together again."""
    operator, below, after = known.operator, torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    lists = any(value.many for value in (*known.inputs, *known.outputs))
    node = (_list_node if lists else _node)(known)

    def run(keyset: Any, *arguments: Any) -> Any:
        if _transformed(arguments):
            raise ConfigError(f"{operator} {TRANSFORMED}")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return node(keyset, arguments)
        with below():
            return operator.redispatch(keyset & after, *arguments)

    _LIBRARY.impl(operator._schema.name.removeprefix(f"{NAMESPACE}::"), _unseen(run), "Autograd", with_keyset=True)


Run = Callable[[Any, tuple[Any, ...]], Any]  # an operator by its arguments, recorded


def _node(known: Differentiation) -> Run:
    """Of an operator whose inputs and outputs are tensors. torch leaves out arguments that equal their defaults."""
    operator, below, after = known.operator, torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    count, alone, places = len(known.inputs), len(known.outputs) == 1, known.places

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            with below():
                result = operator.redispatch(keyset & after, *arguments)
            every = (*arguments[:count], *((result,) if alone else result))
            ctx.handles = _keep(ctx, [every[place] for place in places], arguments[count:])
            ctx.set_materialize_grads(False)
            if not alone:
                ctx.mark_non_differentiable(*result[1:])
            return result

        @staticmethod
        def backward(ctx: Any, dout: Any, *_: None) -> Any:
            kept, context = _kept(ctx)
            return (None, *known.gradients(dout, kept, context), *(None,) * len(context))

    return lambda keyset, arguments: Node.apply(keyset, *arguments)


def _list_node(known: Differentiation) -> Run:
    """Of an operator of which some inputs or outputs are lists."""
    operator, below, after = known.operator, torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    count, alone, places, many = len(known.inputs), len(known.outputs) == 1, known.places, known.outputs[0].many

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, call: _Call, *flat: Any) -> Any:
            arguments = _grouped(flat, call.given)
            with below():
                result = operator.redispatch(keyset & after, *arguments)
            results = (result,) if alone else result
            kept = [(*arguments[:count], *results)[place] for place in places]
            call.found, ctx.call, ctx.saved = _lengths(results), call, _lengths(kept)
            ctx.handles = _keep(ctx, _flat(kept), arguments[count:])
            ctx.set_materialize_grads(many)  # of a list's tensors some may have no gradient
            ctx.mark_non_differentiable(*_flat(results[1:]))
            return tuple(_flat(results))

        @staticmethod
        def backward(ctx: Any, *douts: Any) -> Any:
            kept, context = _kept(ctx)
            dout = list(douts[: ctx.call.found[0]]) if many else douts[0]
            grads = known.gradients(dout, _grouped(kept, ctx.saved), context)
            lengths = ctx.call.given[:count]
            by_tensor = [
                [None] * length if grad is None and length != SINGLE else grad
                for grad, length in zip(grads, lengths, strict=True)
            ]
            return (None, None, *_flat(by_tensor), *(None,) * len(context))

    def run(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        call = _Call(_lengths(arguments))
        results = _grouped(Node.apply(keyset, call, *_flat(arguments)), call.found)
        return results[0] if alone else tuple(results)

    return run


def _keep(ctx: Any, kept: Sequence[Tensor], context: Sequence[Any]) -> int:
    """Keeps tensors for the backward pass, and the context, of which the first are handles: how many."""
    handles = sum(isinstance(one, Tensor) for one in context)
    ctx.save_for_backward(*kept, *context[:handles])
    ctx.names = context[handles:]
    return handles


def _kept(ctx: Any) -> tuple[Sequence[Tensor], Sequence[Any]]:
    """Likewise, tensors and the context."""
    saved = ctx.saved_tensors
    first = len(saved) - ctx.handles
    return saved[:first], (*saved[first:], *ctx.names)


SINGLE = -1  # the length of what is no list


@dataclass
class _Call:
    """How long the lists are that an operator was given, and those that it returned."""

    given: list[int]
    found: list[int] = field(default_factory=list)


def _lengths(values: Iterable[Any]) -> list[int]:
    return [len(one) if isinstance(one, list | tuple) else SINGLE for one in values]


def _flat(values: Iterable[Any]) -> list[Any]:
    return [*itertools.chain.from_iterable(one if isinstance(one, list | tuple) else (one,) for one in values)]


def _grouped(flat: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
    rest = iter(flat)
    return [next(rest) if length == SINGLE else [*itertools.islice(rest, length)] for length in lengths]
