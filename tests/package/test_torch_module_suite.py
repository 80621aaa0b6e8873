"""torch's own module inputs, error inputs and test machinery, with StackedLSTM in the place of nn.LSTM.

``ModuleInfo`` and its inputs ship in the torch wheel; the checks that torch runs over them do not, so they are
written out here. Each runs for every dtype of the ModuleInfo, in train and in eval mode, on every input.
"""

import copy
import io
import itertools
import pickle

import torch
from torch.testing import make_tensor
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_modules import (
    FunctionInput,
    ModuleErrorEnum,
    ModuleInfo,
    ModuleInput,
    TrainEvalMode,
    module_error_inputs_torch_nn_RNN_GRU,
    module_inputs_torch_nn_LSTM,
    modules,
)
from torch.testing._internal.common_utils import TestCase, freeze_rng_state, gradcheck, gradgradcheck

from stacked_lstm_ext import StackedLSTM


def module_inputs_batched(module_info, device, dtype, requires_grad, training, **kwargs):
    """torch's inputs are all unbatched; these are the batched ones, with and without initial states."""

    def make(*shape):
        return make_tensor(shape, device=device, dtype=dtype, requires_grad=requires_grad)

    samples = []
    for bias, batch_first, bidirectional, proj_size in [
        (True, False, False, 0),
        (True, True, False, 2),
        (False, False, True, 0),
        (True, True, True, 2),
    ]:
        arguments = FunctionInput(
            input_size=2,
            hidden_size=3,
            num_layers=2,
            bias=bias,
            batch_first=batch_first,
            bidirectional=bidirectional,
            proj_size=proj_size,
        )
        states = 4 if bidirectional else 2
        samples.append(ModuleInput(constructor_input=arguments, forward_input=FunctionInput(make(4, 3, 2))))
        batch = 4 if batch_first else 3
        hx = (make(states, batch, proj_size or 3), make(states, batch, 3))
        samples.append(ModuleInput(constructor_input=arguments, forward_input=FunctionInput(make(4, 3, 2), hx)))
    return samples


def module_inputs(*args, **kwargs):
    return module_inputs_torch_nn_LSTM(*args, **kwargs) + module_inputs_batched(*args, **kwargs)


STACKED_LSTM = ModuleInfo(
    StackedLSTM,
    train_and_eval_differ=True,
    module_inputs_func=module_inputs,
    module_error_inputs_func=module_error_inputs_torch_nn_RNN_GRU,
)


def flatten(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flatten(v)]


class TestModule(TestCase):
    def samples(self, module_info, device, dtype, training, requires_grad=False):
        """(module, positional arguments, keyword arguments, sample) for every input."""
        for sample in module_info.module_inputs_func(
            module_info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
        ):
            made = sample.constructor_input
            module = module_info.module_cls(*made.args, **made.kwargs, device=device, dtype=dtype)
            module.train(training)
            yield module, sample.forward_input.args, sample.forward_input.kwargs, sample

    @modules([STACKED_LSTM])
    def test_forward(self, device, dtype, module_info, training):
        for module, args, kwargs, sample in self.samples(module_info, device, dtype, training):
            with freeze_rng_state():
                output = module(*args, **kwargs)
            if sample.reference_fn is not None:
                self.assertEqual(output, sample.reference_fn(module, *args, **kwargs))
            stock = torch.nn.LSTM(*sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
            stock.load_state_dict(module.state_dict())
            self.assertEqual(output, stock(*args, **kwargs))

    @modules([STACKED_LSTM])
    def test_factory_kwargs(self, device, dtype, module_info, training):
        for _, _, _, sample in self.samples(module_info, device, dtype, training):
            made = sample.constructor_input
            for kwargs in ({"dtype": dtype}, {"device": "meta", "dtype": dtype}, {"device": device, "dtype": dtype}):
                module = module_info.module_cls(*made.args, **made.kwargs, **kwargs)
                for parameter in module.parameters():
                    self.assertEqual(parameter.dtype, dtype)
                    self.assertEqual(parameter.device.type, kwargs.get("device", "cpu"))

    @modules([STACKED_LSTM])
    def test_repr(self, device, dtype, module_info, training):
        for module, _, _, sample in self.samples(module_info, device, dtype, training):
            stock = torch.nn.LSTM(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            self.assertEqual(str(module), "Stacked" + repr(stock))

    @modules([STACKED_LSTM])
    def test_pickle_and_save(self, device, dtype, module_info, training):
        for module, args, kwargs, _ in self.samples(module_info, device, dtype, training):
            with freeze_rng_state():
                output = module(*args, **kwargs)
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            for again in (
                pickle.loads(pickle.dumps(module)),
                torch.load(file, weights_only=False),
                copy.deepcopy(module),
            ):
                self.assertEqual(again.training, training)
                with freeze_rng_state():
                    self.assertEqual(again(*args, **kwargs), output)

    @modules([STACKED_LSTM])
    def test_non_contiguous_tensors(self, device, dtype, module_info, training):
        def spread(value):
            """The same numbers with a stride of two in the last dimension."""
            if isinstance(value, tuple):
                return tuple(spread(v) for v in value)
            wide = torch.empty(*value.shape, 2, dtype=value.dtype, device=value.device)
            wide[..., 0] = value.detach()
            return wide[..., 0].requires_grad_(value.requires_grad)

        for module, args, kwargs, _ in self.samples(module_info, device, dtype, training, requires_grad=True):
            got = []
            for fed in (args, spread(args)):
                leaves = [*flatten(fed), *module.parameters()]
                with freeze_rng_state():
                    output = flatten(module(*fed, **kwargs))
                    upstream = [torch.randn_like(t) for t in output]
                    got.append((output, torch.autograd.grad(output, leaves, upstream)))
            self.assertEqual(got[0], got[1])

    def check_gradients(self, check, module_info, device, training, every=1):
        samples = self.samples(module_info, device, torch.float64, training, requires_grad=True)
        for module, args, _, _ in itertools.islice(samples, 0, None, every):
            names = [name for name, _ in module.named_parameters()]
            inputs = flatten(args)

            def call(*tensors, module=module, names=names, inputs=inputs):
                fed, weights = tensors[: len(inputs)], tensors[len(inputs) :]
                args = (fed[0],) if len(fed) == 1 else (fed[0], (fed[1], fed[2]))
                with freeze_rng_state():
                    output = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), args)
                return tuple(flatten(output))

            leaves = (*inputs, *(p.detach().requires_grad_() for p in module.parameters()))
            self.assertTrue(check(call, leaves, fast_mode=True))

    # Without dropout, training and evaluation are one computation (test_module_generic.py shows it): once is enough.
    @modules([STACKED_LSTM], allowed_dtypes=[torch.float64], train_eval_mode=TrainEvalMode.train_only)
    def test_grad(self, device, dtype, module_info, training):
        self.check_gradients(gradcheck, module_info, device, training)

    @modules([STACKED_LSTM], allowed_dtypes=[torch.float64], train_eval_mode=TrainEvalMode.train_only)
    def test_gradgrad(self, device, dtype, module_info, training):
        # Every third of the 40 inputs has every value of every option, and takes seconds.
        self.check_gradients(gradgradcheck, module_info, device, training, every=3)

    @modules([STACKED_LSTM])
    def test_memory_format(self, device, dtype, module_info, training):
        for module, args, kwargs, _ in self.samples(module_info, device, dtype, training):
            before = module(*args, **kwargs)
            module.to(memory_format=torch.channels_last)
            self.assertEqual(module(*args, **kwargs), before)
            for tensor in flatten(before):
                self.assertTrue(tensor.is_contiguous() or module.batch_first)

    @modules([STACKED_LSTM])
    def test_to_other_dtype_and_back(self, device, dtype, module_info, training):
        other = torch.float32 if dtype == torch.float64 else torch.float64
        for module, args, kwargs, _ in self.samples(module_info, device, dtype, training):
            module.to(other)
            for parameter, flat in zip(module.parameters(), module._flat_weights, strict=True):
                self.assertIs(parameter, flat)
                self.assertEqual(parameter.dtype, other)
            module.to(dtype)
            for tensor in flatten(module(*args, **kwargs)):
                self.assertEqual(tensor.dtype, dtype)

    @modules([STACKED_LSTM])
    def test_errors(self, device, dtype, module_info, training):
        for case in module_info.module_error_inputs_func(
            module_info, device=device, dtype=dtype, requires_grad=False, training=training
        ):
            made, fed = case.module_error_input.constructor_input, case.module_error_input.forward_input
            if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    module_info.module_cls(*made.args, **made.kwargs)
            else:
                module = module_info.module_cls(*made.args, **made.kwargs)
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    module(*fed.args, **fed.kwargs)


instantiate_device_type_tests(TestModule, globals(), only_for=("cpu",))
