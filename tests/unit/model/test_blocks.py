"""What every block of every model owes to the rules that train it."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp

from onward.errors import ConfigError, Unsupported
from onward.model.cnn import cnn
from onward.model.coordinate_net import coordinate_net
from onward.model.deepfm import deepfm
from onward.model.gnn import gnn
from onward.model.locally_connected import locally_connected
from onward.model.mlp import mlp
from onward.model.mobilenet_v3 import mobilenet_v3
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.snn import snn
from onward.model.transformer import transformer

MODELS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "mobilenet_v3": mobilenet_v3, "transformer": transformer,
          "gnn": gnn, "rnn": rnn, "locally_connected": locally_connected, "deepfm": deepfm,
          "coordinate_net": coordinate_net, "snn": snn}
CONF = Path(__file__).parents[3] / "conf" / "model"

CASES = [
    ("mlp", "image", {"widths": [7, 6]}),
    ("mlp", "graph", {"widths": [7], "norm": "rms"}),
    ("cnn", "image", {"channels": [8, 6], "norm": "batch"}),
    ("cnn", "image", {"channels": [8], "norm": "group", "pooling": "avg", "activation": "gelu"}),
    ("cnn", "image", {"channels": [8], "norm": "layer", "pooling": "none", "kernel_size": 5,
                      "readout": "flatten"}),
    ("cnn", "image", {"channels": [10, 20], "class_groups": "alternate", "norm": "batch"}),
    ("locally_connected", "image", {"channels": [5, 4]}),
    ("locally_connected", "image", {"channels": [8], "norm": "batch", "kernel_size": 3, "stride": 2, "bias": False}),
    ("resnet", "image", {"width": 4}),
    ("resnet", "image", {"width": 4, "norm": "none", "shortcut": "projection", "activation": "tanh"}),
    ("resnet", "image", {"width": 4, "norm": "group", "branch_init": "zero"}),
    ("resnet", "image", {"width": 4, "granularity": "layer"}),
    ("mobilenet_v3", "image", {"width": 0.25}),
    ("mobilenet_v3", "image", {"width": 0.25, "norm": "none", "hidden": 12, "activation": "silu"}),
    ("mobilenet_v3", "image", {"width": 0.25, "norm": "group", "granularity": "layer"}),
    ("transformer", "image", {"dim": 8, "depth": 2, "heads": 2}),
    ("transformer", "sequence", {"dim": 8, "depth": 1, "heads": 2, "norm": "rms", "activation": "relu"}),
    ("transformer", "tokens", {"dim": 8, "depth": 2, "heads": 2}),
    ("transformer", "labelled_text", {"dim": 8, "depth": 1, "heads": 1, "norm": "none"}),
    ("transformer", "tokens", {"dim": 8, "depth": 2, "heads": 2, "granularity": "sublayer"}),
    ("deepfm", "labelled_text", {"embedding": 3, "widths": [6, 4]}),
    ("deepfm", "labelled_text", {"embedding": 2, "widths": [6], "norm": "batch", "activation": "tanh"}),
    ("coordinate_net", "flat", {"features": 5, "widths": [7, 6]}),
    ("coordinate_net", "flat", {"features": 5, "widths": [7], "scale": 1, "norm": "layer", "activation": "gelu"}),
    ("gnn", "graph", {"layer": "gcn", "widths": [6, 4], "norm": "batch"}),
    ("gnn", "graph", {"layer": "sage", "widths": [6, 4], "norm": "layer"}),
    ("gnn", "graph", {"layer": "gat", "widths": [6, 4], "heads": 2, "activation": "elu"}),
    ("rnn", "sequence", {"cell": "rnn", "widths": [5, 4]}),
    ("rnn", "image", {"cell": "lstm", "widths": [5], "norm": "layer"}),
    ("rnn", "tokens", {"cell": "gru", "widths": [5, 4], "embedding": 6}),
    ("rnn", "labelled_text", {"cell": "lstm", "widths": [5], "readout": "mean", "embedding": 6}),
    ("snn", "image", {"widths": [7, 6], "steps": 3}),
    ("snn", "flat", {"widths": [7], "steps": 4, "norm": "layer", "readout": "last"}),
    ("snn", "sequence", {"widths": [5, 4], "decay": 0.5}),
    ("snn", "tokens", {"widths": [5], "embedding": 6}),
]
IDS = [f"{name}-{kind}-{'-'.join(map(str, options.values()))}" for name, kind, options in CASES]


@pytest.fixture
def built(request, make):
    """(stack, spec, x, context, inputs of every block) in float64 and training mode."""
    name, kind, options = request.param
    spec = getattr(make, kind)()
    stack = MODELS[name](spec, **options).double()
    x, context = make.samples(spec), make.as_graph(make.adjacency()) if kind == "graph" else None
    inputs, h = [], x
    with torch.no_grad():
        for block in stack.blocks:
            inputs.append(h)
            h = block(h, context)
    return stack, spec, x, context, inputs


def every_case(test):
    return pytest.mark.parametrize("built", CASES, ids=IDS, indirect=True)(test)


@every_case
def test_forward_is_activate_after_pre_activation_and_shapes_are_as_declared(built):
    stack, spec, x, context, inputs = built
    dims = {"flat": 1, "map": 3, "sequence": 2, "nodes": 1}
    shape = spec.input_shape
    for block, h in zip(stack.blocks, inputs, strict=True):
        assert block.in_shape == shape
        out = block(h, context)
        assert torch.equal(block.activate(block.pre_activation(h, context)), out)
        assert out.shape == (len(x), *block.out_shape)
        assert len(block.out_shape) == dims[block.layout]
        shape = block.out_shape
    per_step = (spec.input_shape[0],) if spec.task.per_position else ()
    assert stack(x, context).shape == (len(x), *per_step, spec.task.n_outputs)


@every_case
def test_forward_mode_derivative_equals_the_gradient_along_the_tangent(built):
    stack, _, _, context, inputs = built
    for block, h in zip(stack.blocks, inputs, strict=True):
        params = {k: p.detach() for k, p in block.named_parameters()}
        weight = torch.randn(len(h), *block.out_shape, dtype=torch.float64)
        along = {k: torch.randn_like(p) for k, p in params.items()}
        # Tokens have no derivative: a real argument that changes nothing stands in for them.
        x = torch.zeros(1, dtype=torch.float64) if block.takes_tokens else h
        along_x = torch.randn_like(x)

        def loss(p, x, block=block, h=h, weight=weight):
            # Batch norm counts in place, which a transform allows only on tensors of its own.
            own = {k: b.clone() for k, b in block.named_buffers()}
            read = h if block.takes_tokens else x
            return (functional_call(block, {**p, **own}, (read, context)) * weight).sum() + 0 * x.sum()

        by_params, by_x = grad(loss, argnums=(0, 1))(params, x)
        backward = sum((by_params[k] * along[k]).sum() for k in params) + (by_x * along_x).sum()
        value, forward = jvp(loss, (params, x), (along, along_x))
        assert value == loss(params, x)
        assert abs(forward - backward) <= 1e-10 * (1 + abs(backward))
        # Dual numbers without a transform, on the block itself: how forward gradients run.
        with forward_ad.dual_level():
            duals = {k: forward_ad.make_dual(p, along[k]) for k, p in params.items()}
            dual = h if block.takes_tokens else forward_ad.make_dual(x, along_x)
            out = functional_call(block, duals, (dual, context))
            tangent = forward_ad.unpack_dual(out).tangent
        assert abs((tangent * weight).sum() - backward) <= 1e-10 * (1 + abs(backward))
        assert all(torch.isfinite(b).all() for b in block.buffers())


@every_case
def test_a_copy_and_a_pickle_compute_the_same(built):
    stack, _, x, context, _ = built
    stack.eval()
    out = stack(x, context)
    assert torch.equal(copy.deepcopy(stack)(x, context), out)
    assert torch.equal(pickle.loads(pickle.dumps(stack))(x, context), out)


@pytest.mark.parametrize(("name", "kinds"), [
    ("mlp", ["tokens"]),
    ("cnn", ["flat", "sequence", "tokens", "graph"]),
    ("resnet", ["flat", "sequence", "tokens", "graph"]),
    ("mobilenet_v3", ["flat", "sequence", "tokens", "graph"]),
    ("transformer", ["flat", "graph"]),
    ("gnn", ["flat", "image", "sequence", "tokens"]),
    ("rnn", ["flat", "graph"]),
    ("snn", ["graph"]),
    ("deepfm", ["flat", "image", "sequence", "graph"]),
    ("coordinate_net", ["image", "sequence", "tokens", "graph"]),
])
def test_data_that_a_model_cannot_read_are_refused_by_name(name, kinds, make):
    for kind in kinds:
        spec = getattr(make, kind)()
        with pytest.raises(Unsupported, match=f"model={name} reads .* but data={spec.name} is {spec.layout}"):
            MODELS[name](spec)


@pytest.mark.parametrize(("name", "kind", "key", "value"), [
    *[("mlp", "flat", "widths", bad) for bad in ([], [0], [5, -1], 5, "abc", [2.5], [True])],
    ("mlp", "flat", "norm", None), ("mlp", "flat", "activation", "rleu"), ("mlp", "flat", "dropout", 1.0),
    ("cnn", "image", "channels", [8, 8, 8, 8]), ("cnn", "image", "channels", []),
    ("cnn", "image", "kernel_size", 4), ("cnn", "image", "kernel_size", 0), ("cnn", "image", "pooling", "mx"),
    ("cnn", "image", "readout", "last"), ("cnn", "image", "norm", "rms"), ("cnn", "image", "dropout", -0.1),
    ("resnet", "image", "depth", 9), ("resnet", "image", "depth", 2), ("resnet", "image", "width", 0),
    ("resnet", "image", "shortcut", "none"), ("resnet", "image", "branch_init", "one"),
    ("resnet", "image", "norm", "rms"), ("resnet", "image", "activation", None),
    ("cnn", "image", "class_groups", "all"), ("resnet", "image", "granularity", "layers"),
    ("mobilenet_v3", "image", "width", 0), ("mobilenet_v3", "image", "width", True),
    ("mobilenet_v3", "image", "hidden", -1), ("mobilenet_v3", "image", "norm", "rms"),
    ("mobilenet_v3", "image", "activation", "hardswisch"), ("mobilenet_v3", "image", "granularity", "unit"),
    ("transformer", "image", "patch_size", 3), ("transformer", "image", "patch_size", 0),
    ("transformer", "image", "heads", 5), ("transformer", "sequence", "depth", 0),
    ("transformer", "sequence", "dim", -8), ("transformer", "tokens", "norm", "batch"),
    ("transformer", "tokens", "granularity", "layer"),
    ("deepfm", "labelled_text", "embedding", 0), ("deepfm", "labelled_text", "widths", []),
    ("deepfm", "labelled_text", "norm", "group"), ("deepfm", "labelled_text", "dropout", 1.0),
    ("deepfm", "labelled_text", "activation", "step"),
    ("coordinate_net", "flat", "features", 0), ("coordinate_net", "flat", "widths", [0]),
    *[("coordinate_net", "flat", "scale", bad) for bad in (0, -1.0, float("inf"), "wide", True)],
    ("coordinate_net", "flat", "activation", "sine"), ("coordinate_net", "flat", "norm", "group"),
    ("gnn", "graph", "layer", "gin"), ("gnn", "graph", "widths", 64), ("gnn", "graph", "norm", "group"),
    ("gnn", "graph", "dropout", "half"),
    ("rnn", "sequence", "cell", "ltsm"), ("rnn", "sequence", "widths", [0]),
    ("rnn", "tokens", "embedding", 0),
    ("rnn", "sequence", "norm", "batch"), ("rnn", "sequence", "readout", "flatten"),
    ("snn", "image", "steps", 0), ("snn", "image", "decay", 1.0), ("snn", "image", "decay", "slow"),
    ("snn", "image", "slope", 0.0), ("snn", "image", "widths", []), ("snn", "image", "readout", "first"),
    ("snn", "sequence", "norm", "batch"),
])
def test_a_bad_value_is_refused_by_key(name, kind, key, value, make):
    with pytest.raises(ConfigError) as refusal:
        MODELS[name](getattr(make, kind)(), **{key: value})
    assert (refusal.value.key, refusal.value.value) == (f"model.{key}", value)
    assert refusal.value.valid


@pytest.mark.parametrize("name", MODELS)
def test_the_config_names_every_argument_and_builds(name, make):
    path = CONF / f"{name}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith(f"# python train.py model={name}")
    config = yaml.safe_load(path.read_text())
    assert config.pop("_target_") == f"onward.model.{name}.{name}"
    defaults = {k: p.default for k, p in inspect.signature(MODELS[name]).parameters.items() if k != "spec"}
    assert config == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    reads = {"gnn": make.graph, "deepfm": make.labelled_text, "coordinate_net": make.flat}
    assert len(MODELS[name](reads.get(name, make.image)(), **config)) >= 1
