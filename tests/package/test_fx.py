"""torch.fx: a StackedLSTM is a leaf of a symbolic trace, exactly where torch.nn.LSTM is one."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.fx import Interpreter, Tracer, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrizations

from stacked_lstm_ext import StackedLSTM, convert_lstm


class Net(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        output, (h, _) = self.lstm(x)
        return self.head(output.relu()), h


class StockChild(nn.LSTM):
    def extra(self):
        return 1


class OurChild(StackedLSTM):
    def extra(self):
        return 1


def stock():
    torch.manual_seed(0)
    return Net(nn.LSTM(3, 5, 2))


def converted(**options):
    return convert_lstm(stock(), **options)


def nodes(graph):
    return [(node.op, str(node.target)) for node in graph.nodes]


def normed(net):
    parametrizations.weight_norm(net.lstm, "weight_hh_l0")
    return net


LEAVES = {
    "converted": converted,
    "as_lstm": lambda: converted(as_lstm=True),
    "made by its constructor": lambda: Net(StackedLSTM(3, 5, 2)),
    "deep copy": lambda: copy.deepcopy(converted()),
    "shallow copy": lambda: Net(copy.copy(StackedLSTM(3, 5, 2))),
    "unpickled": lambda: pickle.loads(pickle.dumps(converted())),
    "skip_init": lambda: Net(nn.utils.skip_init(StackedLSTM, 3, 5, 2)),
    "parametrized after": lambda: normed(converted()),
    "parametrized before": lambda: convert_lstm(normed(stock())),
    "replicated": lambda: Net(StackedLSTM(3, 5, 2)._replicate_for_data_parallel()),
}


@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES)
def test_a_trace_has_the_nodes_that_nn_lstm_gives(make):
    graph = symbolic_trace(make()).graph
    assert nodes(graph) == nodes(symbolic_trace(stock()).graph)
    assert ("call_module", "lstm") in nodes(graph)


def test_the_traced_model_computes_and_trains_the_same():
    net, x = converted(), torch.randn(4, 2, 3)
    graph = symbolic_trace(net)
    assert graph.lstm is net.lstm
    torch.testing.assert_close(graph(x), stock()(x))
    torch.testing.assert_close(Interpreter(graph).run(x), net(x))
    graph(x)[0].sum().backward()
    assert all(p.grad is not None for p in net.lstm.parameters())


def test_shapes_propagate():
    graph = symbolic_trace(converted())
    ShapeProp(graph).propagate(torch.randn(4, 2, 3))
    (lstm,) = graph.graph.find_nodes(op="call_module", target="lstm")
    output, (h, c) = lstm.meta["tensor_meta"]
    assert (output.shape, h.shape, c.shape) == ((4, 2, 5), (2, 2, 5), (2, 2, 5))


@pytest.mark.parametrize("as_lstm", [False, True])
def test_a_traced_model_pickles_and_saves(as_lstm):
    net, x = converted(as_lstm=as_lstm), torch.randn(4, 2, 3)
    graph = symbolic_trace(net)
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(graph)), torch.load(file, weights_only=False)):
        assert type(again.lstm) is type(net.lstm)
        torch.testing.assert_close(again(x), net(x))
        assert nodes(symbolic_trace(again).graph) == nodes(graph.graph)


def test_the_class_says_where_it_is_and_a_pickle_holds_no_more_than_before():
    lstm = StackedLSTM(3, 5)
    assert StackedLSTM.__module__ == type(lstm).__module__ == "stacked_lstm_ext.module"
    assert lstm.__module__ == "torch.nn" and "__module__" not in lstm.__getstate__()
    assert repr(lstm) == "StackedLSTM(3, 5)"
    assert "__module__" not in vars(lstm.to_torch()) and lstm.to_torch().__module__ == nn.LSTM.__module__


@pytest.mark.parametrize("child", [StockChild, OurChild])
def test_a_subclass_is_traced_through_unless_a_tracer_says_otherwise(child):
    """nn.LSTM's are, and cannot be. A class that convert_lstm makes stands where the user's stands, so it is no leaf either."""
    nets = [Net(child(3, 5, 2))] + ([convert_lstm(Net(child(3, 5, 2)))] if child is StockChild else [])

    class Leaves(Tracer):
        def is_leaf_module(self, module, path):
            return isinstance(module, child) or super().is_leaf_module(module, path)

    for net in nets:
        with pytest.raises(torch.fx.proxy.TraceError):
            symbolic_trace(net)
        assert nodes(Leaves().trace(net)) == nodes(symbolic_trace(stock()).graph)


def test_a_tracer_for_which_nothing_is_a_leaf_sees_what_it_would_of_nn_lstm():
    class NoLeaves(Tracer):
        def is_leaf_module(self, module, path):
            return False

    for net in (stock(), converted()):
        with pytest.raises(torch.fx.proxy.TraceError):
            NoLeaves().trace(net)


@pytest.mark.filterwarnings("ignore")
def test_quantization_by_fx_leaves_it_as_it_leaves_nn_lstm():
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping()
    x, results = torch.randn(4, 2, 3), []
    for net in (stock(), converted()):
        prepared = quantize.prepare_fx(net.eval(), mapping, (x,))
        prepared(x)
        results.append(quantize.convert_fx(prepared)(x))
        assert type(prepared.lstm) is type(net.lstm)
    torch.testing.assert_close(*results)


def test_compiled_code_still_guards_the_attributes():
    """torch.compile can be told to set none on modules of torch.nn.modules: this is none of those."""
    torch._dynamo.reset()
    net, x = converted(), torch.randn(4, 2, 3)
    net.lstm.eval()
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
    function = torch.compile(net, backend="eager", fullgraph=True, options=options)
    torch.testing.assert_close(function(x), net(x))
    net.lstm.dropout = 1.0
    net.lstm.train()
    torch.testing.assert_close(function(x), net(x))  # all of the first layer's output is dropped
    net.lstm.num_layers = 1
    assert function(x)[1].shape == (1, 2, 5)
    torch._dynamo.reset()
