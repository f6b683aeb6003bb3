"""A trace read as a dense block or as a transition: what stands where, or what it does that neither of them does."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ..fallback.anatomy import CONVS, NORMS, SWITCHES, is_everywhere
from ..fallback.description import (
    BlockDescription,
    DropoutPlace,
    Place,
    ResidualDescription,
    StagePlaces,
    TransitionDescription,
    other_tensors,
)
from .trace import DROPOUTS, Node, Trace, kept_settings, pieces_of, rate

_CONV = frozenset({"conv1d", "conv2d", "conv3d"})
_RELU = frozenset({"relu", "leaky_relu"})
_NORM = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm"})
_POOL = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"})
_ADD = frozenset({"add", "add_", "__iadd__"})
_MUL = frozenset({"mul", "mul_", "__imul__"})
_RESIDUAL_PARTS = frozenset({"input", "cat", *_ADD, *_MUL, *_RELU, *_CONV})
_PARTS = frozenset({"input", "batch_norm", "cat", *_RELU, *_CONV, *_POOL, *DROPOUTS})


class _Chain(NamedTuple):
    """Norm-relu-convs one after the other: the nodes of each, what is dropped out after each, and what they read."""

    stages: list[tuple[Node, Node, Node]]
    dropouts: list[Node | None]
    source: Node


class _Row(NamedTuple):
    """Children that are called one after the other: before the layers, as the layers, after them."""

    before: Sequence[str] = ()
    layers: Sequence[str] = ()
    after: Sequence[str] = ()


@dataclass
class Reading:
    """What a module was found to be.

    Attributes:
        description: of a dense block or transition; None where it is none.
        reasons: what keeps it from being one where it looks like one; empty where it does not.
        hints: what it does that may be the reason why it does not.
    """

    description: Any = None
    reasons: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def read_block(module: nn.Module, trace: Trace) -> Reading:
    """A module that returns its input beside what norm-relu-convs make of it, and of each other's results."""
    if _is_around_another(trace) or not any(n.op == "cat" and _is_dense(pieces_of(n)) for n in trace.nodes):
        return Reading(hints=_foreign(module, trace))
    result, row = trace.result, _row(trace)
    while result is not None and result.op != "cat":
        result = next((call.given for call in row if call.returned is result), None)
    if result is None:
        return Reading(reasons=_foreign(module, trace) or ["it does not return what it concatenates"])
    chains, base, layers, returns_new = _layers(trace, result)
    around = _around(row, base, result, len(layers))
    if around is None:
        if any(call.path and call.returned is result for call in trace.calls):
            return Reading(hints=_foreign(module, trace))  # the block is a module inside
        reasons = _foreign(module, trace)
        return Reading(reasons=reasons or ["not all that it does around its layers is done by its children"])
    foreign = _foreign(module, trace, [*around.before, *around.after])
    if foreign:
        return Reading(reasons=foreign)
    prepends = not returns_new and len(layers) > 0 and pieces_of(result)[-1] is base
    order = _order_reasons(result, base, layers, chains, prepends, returns_new)
    if order:
        return Reading(reasons=order)
    taken = [chains[id(layer)] for layer in layers]
    places = _places(module, [*around.before, *around.after])
    parts = [node for chain in taken for stage in chain.stages for node in stage]
    left = _left_over(module, trace, places, parts, [*around.before, *around.after])
    if left:
        return Reading(reasons=left)
    number_of = {place.path: number for number, place in enumerate(places)}
    dropouts = tuple(tuple(_dropout(module, node, number_of) for node in chain.dropouts) for chain in taken)
    read = {dropout.module for layer in dropouts for dropout in layer if dropout is not None}
    return Reading(
        BlockDescription(
            tuple(places),
            _settings(module, places, read),
            _switches(module, places),
            tuple(tuple(_stage(stage, number_of) for stage in chain.stages) for chain in taken),
            dropouts,
            before=tuple(around.before),
            units=tuple(around.layers),
            after=tuple(around.after),
            prepends=prepends,
            returns_new=returns_new,
        )
    )


def read_transition(module: nn.Module, trace: Trace) -> Reading:
    """A module that returns ``pool(dropout(conv(relu(norm(x)))))``, the pooling and the dropout perhaps missing."""
    pool = trace.result if trace.result is not None and trace.result.op in _POOL else None
    end = trace.result if pool is None else pool.inputs[0]
    chain = None if end is None else _chain(end, {id(trace.nodes[0])})
    foreign = _foreign(module, trace)
    if _is_around_another(trace):
        return Reading(hints=foreign)
    if foreign or chain is None or len(chain.stages) != 1 or chain.source is not trace.nodes[0]:
        return Reading(reasons=foreign or ["it is no norm, ReLU, convolution and pooling in a row"])
    places = _places(module, [])
    reasons = _left_over(module, trace, places, [*chain.stages[0], *([] if pool is None else [pool])], [])
    number_of = {place.path: number for number, place in enumerate(places)}
    dropout = _dropout(module, chain.dropouts[0], number_of)
    pooling = None
    if pool is not None:
        pooling = number_of[pool.caller] if _is_torchs(module, pool.caller) else None
        if pooling is None and not _halves(pool):
            reasons.append("its pooling is not of window and stride 2")
    if reasons:
        return Reading(reasons=reasons)
    stage = _stage(chain.stages[0], number_of)
    settings = _settings(module, places, [] if dropout is None else [dropout.module])
    return Reading(TransitionDescription(tuple(places), settings, (), stage, pool is not None, pooling, dropout))


def read_residual(module: nn.Module, trace: Trace) -> Reading:
    """A dense block without norms: convolutions, each followed by an activation, and perhaps one more and the input added."""
    first, end = trace.nodes[0], trace.result
    hints = [f"{caller or 'its forward'} {remark}" for caller, remark in trace.remarks]
    hints += [_described(module, node) for node in trace.nodes if node.op not in _RESIDUAL_PARTS]
    if end is None or _is_around_another(trace):
        return Reading(hints=hints)
    seen, scale, residual = [end], 1.0, False
    if end.op in _ADD and any(node is first for node in end.inputs) and len(end.inputs) == 2 and not _scaled(end):
        residual, end = True, next((node for node in end.inputs if node is not first), first)
        seen.append(end)
    if end.op in _MUL and len(end.inputs) == 1:
        numbers = [value for value in end.arguments.values() if isinstance(value, int | float)]
        scale, end = float(numbers[0]) if len(numbers) == 1 else 0.0, end.inputs[0]
        seen.append(end)
    last = end if end.op in _CONV and len(end.inputs) == 1 else None
    pieces = pieces_of(end if last is None else last.inputs[0])
    layers = [_then_activation(piece, pieces[:number]) for number, piece in enumerate(pieces[1:], 1)]
    if pieces[0] is not first or not layers or None in layers or (last is None and len(seen) > 1):
        return Reading(hints=list(dict.fromkeys(hints)))
    convs = [conv for conv in layers if conv is not None]
    parts = [*seen, *([] if last is None else [last]), *convs, *pieces]
    places = _places(module, [])
    reasons = [f"{caller or 'its forward'} {remark}" for caller, remark in trace.remarks]
    accounted = {id(node) for node in parts}
    for node in trace.nodes:
        if node.op != "cat" and id(node) not in accounted:
            reasons.append(_described(module, node))
    reasons += _left_over(module, trace, places, [*convs, *pieces[1:], *([] if last is None else [last])], [])
    if not scale:
        reasons.append("it multiplies by 0, or by what is no number")
    if reasons:
        return Reading(reasons=list(dict.fromkeys(reasons)))
    number_of = {place.path: number for number, place in enumerate(places)}
    slopes = map(_slope, pieces[1:])
    return Reading(
        ResidualDescription(
            tuple(places),
            _settings(module, places),
            (),
            tuple((number_of[conv.owner or ""], slope) for conv, slope in zip(convs, slopes, strict=True)),
            None if last is None else number_of[last.owner or ""],
            scale,
            residual,
        )
    )


def _then_activation(node: Node, read: Sequence[Node]) -> Node | None:
    """The convolution of the pieces ``read`` that an activation follows, whose result is ``node``."""
    conv = node.inputs[0] if node.op in _RELU and len(node.inputs) == 1 else None
    if conv is None or conv.op not in _CONV or not conv.owner or len(conv.inputs) != 1:
        return None
    return conv if list(map(id, pieces_of(conv.inputs[0]))) == list(map(id, read)) else None


def _scaled(add: Node) -> bool:
    """Whether an addition takes one of its terms several times."""
    return bool({"alpha", 2} & add.arguments.keys())


def _is_around_another(trace: Trace) -> bool:
    """Whether a module inside does all that it does."""
    first = trace.nodes[0]
    return any(call.path and call.given is first and call.returned is trace.result for call in trace.calls)


def _is_dense(pieces: Sequence[Node]) -> bool:
    """Whether one is made by a convolution of what a norm gives, and another of what that norm reads."""
    for made in pieces:
        for conv in (node for node in _ancestors([made]) if node.op in _CONV):
            others = {id(node) for node in _ancestors([piece for piece in pieces if piece is not made], _CONV)}
            norms = [node for node in _ancestors(conv.inputs, _CONV) if node.op in _NORM and id(node) not in others]
            if any(id(node) in others for norm in norms for node in _ancestors(norm.inputs, _CONV)):
                return True
    return False


def _ancestors(nodes: Iterable[Node], as_far_as: Collection[str] = ()) -> Iterable[Node]:
    """The nodes and all that they are made of, not beyond operators of ``as_far_as``."""
    seen, waiting = set[int](), list(nodes)
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += [] if node.op in as_far_as else node.inputs


def _chain(end: Node, starts: Collection[int]) -> _Chain | None:
    """One or two norm-relu-convs that end in ``end`` and read a concatenation or one of ``starts``."""
    stages: list[tuple[Node, Node, Node]] = []
    dropouts: list[Node | None] = []
    node = end
    while len(stages) < 2:
        dropout = node if node.op in DROPOUTS else None
        conv = node if dropout is None else dropout.inputs[0]
        if conv.op not in _CONV or len(conv.inputs) != 1 or not conv.owner:
            return None
        relu = conv.inputs[0]
        norm = relu.inputs[0] if relu.op in _RELU else relu
        if norm is relu or norm.op != "batch_norm" or len(norm.inputs) != 1 or not norm.owner:
            return None
        stages.insert(0, (norm, relu, conv))
        dropouts.insert(0, dropout)
        node = norm.inputs[0]
        if node.op == "cat" or id(node) in starts:
            return _Chain(stages, dropouts, node)
    return None


def _layers(trace: Trace, result: Node) -> tuple[dict[int, _Chain], Node | None, list[Node], bool]:
    """What the pieces of ``result`` are: the chains that made them, what all layers read, the layers, only the layers?"""
    first = trace.nodes[0]
    ends = {id(piece) for node in trace.nodes if node.op == "cat" for piece in pieces_of(node)} | {id(first)}
    pieces = sorted(pieces_of(result), key=trace.nodes.index)
    chains = {id(piece): chain for piece in pieces if (chain := _chain(piece, ends)) is not None}
    layers = sorted((p for p in pieces if id(p) in chains), key=lambda p: len(pieces_of(chains[id(p)].source)))
    rest = [piece for piece in pieces if id(piece) not in chains]
    if not rest and len(layers) > 1 and pieces_of(chains[id(layers[1])].source) == layers[:1]:
        rest, layers = layers[:1], layers[1:]  # what is in front of the layers is a norm-relu-conv, too
    if rest:
        return chains, rest[0] if len(rest) == 1 else None, layers, False
    return chains, pieces_of(chains[id(layers[0])].source)[0], layers, True


def _order_reasons(
    result: Node,
    base: Node | None,
    layers: Sequence[Node],
    chains: dict[int, _Chain],
    prepends: bool,
    returns_new: bool,
) -> list[str]:
    """Where pieces stand elsewhere than in a dense block."""
    if base is None:
        return ["it concatenates what is neither its input nor made by norms, ReLUs and convolutions"]

    def are(pieces: Sequence[Node], expected: Sequence[Node]) -> bool:
        return [id(p) for p in pieces] == [id(p) for p in (expected[::-1] if prepends else expected)]

    for number, layer in enumerate(layers):
        if not are(pieces_of(chains[id(layer)].source), [base, *layers[:number]]):
            return ["its layers do not each read its input and the features of all layers before, in order"]
    if not are(pieces_of(result), [*([] if returns_new else [base]), *layers]):
        return ["it returns features in another order than its layers read them"]
    return []


def _row(trace: Trace) -> list[Any]:
    """The calls of children that begin with the input and each take the result of the one before."""
    row, node = [], trace.nodes[0]
    for call in trace.calls:
        if call.path and "." not in call.path and call.given is node and call.returned is not node:
            row.append(call)
            node = call.returned
    return row if node is trace.result else []


def _around(row: Sequence[Any], base: Node | None, result: Node, layers: int) -> _Row | None:
    """Which children are called before the layers, as layers, and after them; None where that is not all."""
    if (not row or row[-1].returned is result) and (base is None or base.op == "input"):
        return _Row()
    names, made = [call.path for call in row], [row[0].given, *(call.returned for call in row)] if row else []
    if base not in made or result not in made or len(set(names)) != len(names):
        return None
    start, end = made.index(base), made.index(result)
    return _Row(names[:start], names[start:end], names[end:]) if end - start == layers else None


def _foreign(module: nn.Module, trace: Trace, elsewhere: Collection[str] = ()) -> list[str]:
    """The operators that no dense block or transition has, except in the children ``elsewhere``."""
    reasons = [
        f"{caller or 'its forward'} {remark}"
        for caller, remark in trace.remarks
        if caller.partition(".")[0] not in elsewhere
    ]
    for node in trace.nodes:
        if node.op not in _PARTS and node.caller.partition(".")[0] not in elsewhere:
            reasons.append(_described(module, node))
    return list(dict.fromkeys(reasons))


def _described(module: nn.Module, node: Node) -> str:
    if _is_torchs(module, node.caller) and not isinstance(module.get_submodule(node.caller), (*NORMS, *CONVS)):
        return f"{node.caller} is a {type(module.get_submodule(node.caller)).__name__}"
    return f"{node.caller or 'its forward'} calls {node.op}"


def _is_torchs(module: nn.Module, path: str) -> bool:
    part = module.get_submodule(path)
    return bool(path) and not part._modules and type(part).__module__.startswith("torch.nn.modules.")


def _left_over(
    module: nn.Module, trace: Trace, places: Sequence[Place], parts: Sequence[Node], elsewhere: Collection[str]
) -> list[str]:
    """What is neither a layer's nor elsewhere: modules with parameters, norms and convolutions called besides."""
    reasons = []
    owners = [node.owner for node in parts if node.owner]
    if len(set(owners)) != len(owners):
        reasons.append("it uses a norm or a convolution more than once")
    for place in places:
        part = module.get_submodule(place.path)
        held = place.path not in owners and (part._parameters or part._buffers)
        others = not all(is_none for _, is_none in place.tensors)
        if (place.kinds or not place.path) and (held or others):
            reasons.append(f"{place.path or 'it'} has parameters or buffers that are no part of a layer")
    accounted = {id(node) for node in parts}
    for node in trace.nodes:
        if node.op in _CONV | _RELU | _POOL | {"batch_norm"} and node.caller.partition(".")[0] not in elsewhere:
            if id(node) not in accounted:
                reasons.append(f"{node.caller or 'its forward'} calls {node.op} besides")
            elif node.owner and not isinstance(module.get_submodule(node.owner or ""), (*NORMS, *CONVS)):
                reasons.append(f"{node.owner} is a {type(module.get_submodule(node.owner or '')).__name__}")
    return reasons


def _places(module: nn.Module, elsewhere: Collection[str]) -> list[Place]:
    """Every module inside; of the children ``elsewhere`` only that they are there."""
    places = [Place(0, "", "", (), len(module._modules), other_tensors(module))]

    def add(parent: int, prefix: str, owner: nn.Module) -> None:
        for name, child in owner._modules.items():
            if child is not None:
                path = prefix + name
                outside = path in elsewhere
                tensors = () if outside else other_tensors(child)
                places.append(Place(parent, name, path, () if outside else _kinds(child), len(child._modules), tensors))
                if not outside:
                    add(len(places) - 1, f"{path}.", child)

    add(0, "", module)
    return places


def _kinds(module: nn.Module) -> tuple[type, ...]:
    """What a module may be replaced by: norms by norms, convolutions by convolutions, whose settings are looked at."""
    families: tuple[tuple[Any, ...], ...] = (NORMS, CONVS)
    return next((family for family in families if type(module) in family), (type(module),))


def _settings(module: nn.Module, places: Sequence[Place], rates: Collection[int | None] = ()) -> tuple[Any, ...]:
    """The attributes of all modules that nothing else looks at; ``rates`` are the dropouts whose rate something does."""
    found = []
    for number, place in enumerate(places):
        part = module.get_submodule(place.path)
        if place.kinds or not number:
            ignored = {*SWITCHES, "inplace", *(["p"] if number in rates else [])}
            ignored |= _OF_NORMS_AND_CONVS if isinstance(part, (*NORMS, *CONVS)) else set()
            settings = {name: value for name, value in kept_settings(part).items() if name not in ignored}
            found += [(number, settings)] if settings else []
    return tuple(found)


_OF_NORMS_AND_CONVS = vars(nn.Conv2d(1, 1, 1)).keys() | vars(nn.SyncBatchNorm(1)).keys()
"""What :func:`fused_densenet.fallback.anatomy.stage_reasons` looks at, and what is none of the module's doing."""


def _switches(module: nn.Module, places: Sequence[Place]) -> tuple[str, ...]:
    paths = [place.path for place in places if place.kinds or not place.path]
    return tuple(path for path in paths if not vars(module.get_submodule(path)).keys().isdisjoint(SWITCHES))


def _stage(nodes: tuple[Node, Node, Node], number_of: dict[str, int]) -> StagePlaces:
    norm, relu, conv = nodes
    activation = relu.caller if relu.caller not in ("", norm.owner) else ""
    return StagePlaces(
        number_of[norm.owner or ""], number_of[activation] or None, number_of[conv.owner or ""], _slope(relu)
    )


def _slope(relu: Node) -> float:
    """Of an activation for negative numbers."""
    if relu.op != "leaky_relu":
        return 0.0
    slope: float = relu.arguments.get("negative_slope", relu.arguments.get(1, 0.01))
    return slope


def _dropout(module: nn.Module, node: Node | None, number_of: dict[str, int]) -> DropoutPlace | None:
    if node is None:
        return None
    follows = number_of[node.caller]
    owner = follows if _is_torchs(module, node.caller) else None
    return DropoutPlace(owner, rate(node.arguments), follows, DROPOUTS[node.op])


def _halves(pool: Node) -> bool:
    """Whether an average pooling that was called as a function is of window and stride 2."""
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = {names[key] if isinstance(key, int) else key: value for key, value in pool.arguments.items()}
    sizes = [given["kernel_size"], given.get("stride") or given["kernel_size"], given.get("padding") or 0]
    plain = not given.get("ceil_mode") and given.get("divisor_override") is None
    return plain and all(map(is_everywhere, sizes, (2, 2, 0)))
