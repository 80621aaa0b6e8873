// csrc/torch/bindings.cpp: the Python module _C: a call and a step without the dispatcher, and everything that is not a
// tensor operator: plans, schedules, facts about the build, and switches for tests.
#include <ATen/Config.h>
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "../cpu/fingerprint.h"
#include "../cpu/kernels.h"
#include "../cpu/stack_cpu.h"
#include "../cpu/workspace.h"
#include "../cuda/architectures.h"
#include "../diagonal/diagonal.h"
#include "../driver/gate_kernels.h"
#include "../persistent/bindings.h"
#include "../persistent/persistent.h"
#include "../stack/stack.h"
#include "../stack/wavefront.h"
#include "cpu_call.h"
#include "eager.h"
#include "last_run.h"
#include "packed_cache.h"
#include "prepare.h"
#include "step.h"

namespace stacked_lstm {
namespace {

using at::Tensor;
using at::TensorList;
namespace py = pybind11;

// An option as Python has it: one value, or a sequence with an entry for each layer or boundary.
template <typename T>
T option_from(const py::handle& value, const T*) {
  return value.cast<T>();
}
template <typename T>
PerLayer<T> option_from(const py::handle& value, const PerLayer<T>*) {
  if (py::isinstance<py::sequence>(value)) return PerLayer<T>(value.cast<std::vector<T>>());
  return value.cast<T>();
}
LinkKind option_from(const py::handle& value, const LinkKind*) { return link_named(value.cast<std::string>()); }
template <typename T>
py::object option_to(const T& option) {
  return py::cast(option);
}
template <typename T>
py::object option_to(const PerLayer<T>& option) {
  if (option.each.empty()) return py::cast(option.every);
  return py::tuple(py::cast(option.each));
}

py::object option_to(LinkKind option) { return py::str(kLinkNames[static_cast<int>(option)]); }

py::dict describe(const Schedule& schedule, int64_t directions) {
  py::list phases;
  for (int64_t p = 0; p < schedule.phases; ++p) {
    const Phase& phase = schedule.phase[p];
    phases.append(py::dict(py::arg("first_layer") = phase.first_layer, py::arg("last_layer") = phase.last_layer,
                           py::arg("layer_groups") = phase.layer_groups, py::arg("unit_slices") = phase.unit_slices));
  }
  std::string why = "one worker: more would cost more than they save";
  if (schedule.batch_slices > 1) {
    why = "the batch is shared out: the slices need nothing of each other";
  } else if (schedule.phase[0].layer_groups > 1) {
    why = directions == 2 ? "the two directions of a layer run side by side" : "layers run side by side, a chunk apart";
  } else if (schedule.phase[0].unit_slices > 1) {
    why = "the units of each layer are shared out";
  }
  return py::dict(py::arg("backend") = "cpu", py::arg("isa") = cpu::isa(), py::arg("threads") = schedule.workers(),
                  py::arg("batch_slices") = schedule.batch_slices, py::arg("chunk_steps") = schedule.chunk_steps,
                  py::arg("fill_steps") = schedule.fill_steps(directions), py::arg("phases") = phases,
                  py::arg("predicted_us") = schedule.predicted_us, py::arg("binds") = schedule.binds,
                  py::arg("why") = why);
}

py::dict describe(const diagonal::DiagonalCounts& counts) {
  const Diagonals& schedule = counts.schedule;
  const std::string why = schedule.directions == 2
                              ? "the two directions of a layer run side by side, the layers in turn"
                          : schedule.depth == 1 ? "one layer: its steps in turn"
                          : schedule.runs == 1  ? "all layers side by side, each a chunk behind the one below"
                                                : "all layers side by side, each a chunk behind the one below, in " +
                                                      std::to_string(schedule.runs) + " runs of layers of one width";
  return py::dict(
      py::arg("backend") = "diagonal", py::arg("chunk_steps") = schedule.chunk_steps,
      py::arg("input_steps") = schedule.input_chunks * schedule.chunk_steps,
      py::arg("diagonals") = schedule.diagonals(), py::arg("launches") = counts.launches,
      py::arg("products") = counts.products, py::arg("why") = why,
      py::arg("binds") = schedule.runs == 1 ? "two launches a diagonal" : "two launches a run and diagonal");
}

const char* name_of(persistent::Product product, at::ScalarType type) {
  if (type != at::kFloat) return "tensor cores";
  return product == persistent::Product::tensor ? "tensor cores, as TF32" : "multiply-adds of float32";
}

// A pass of a plan: the blocks of each layer, how they exchange h (or dh), and when they hand it on.
py::dict describe_launches(const persistent::Pass& pass, const StackShape& shape, bool backward) {
  const persistent::Cut& cut = pass.cut;
  const int64_t last = pass.last_layer - 1, lanes = (pass.last_layer - pass.first_layer) * shape.directions;
  py::list layers;
  for (int64_t layer = pass.first_layer; layer <= last; ++layer) {  // backward begins at the top
    const int64_t before = (backward ? last - layer : layer - pass.first_layer) * shape.directions;
    layers.append(py::dict(py::arg("layer") = layer, py::arg("first_block") = before * cut.blocks,
                           py::arg("blocks") = shape.directions * cut.blocks));
  }
  py::dict described(
      py::arg("first_layer") = pass.first_layer, py::arg("last_layer") = pass.last_layer, py::arg("layers") = layers,
      py::arg("exchange") = cut.exchange == persistent::Exchange::cluster ? "cluster" : "l2",
      py::arg("blocks") = pass.copies * lanes * cut.blocks, py::arg("blocks_lane") = cut.blocks,
      py::arg("units_block") = cut.block_units(), py::arg("splits") = cut.splits, py::arg("pieces") = cut.pieces,
      py::arg("m_tiles") = cut.unit_tiles, py::arg("tiles") = cut.batch_tiles, py::arg("chunk_steps") = cut.chunk_steps,
      py::arg("inputs_in_shared") = cut.inputs_in_shared, py::arg("batch_groups") = pass.batch_groups,
      py::arg("copies") = pass.copies, py::arg("rounds") = pass.rounds);
  if (backward) {
    described["segment_steps"] = pass.segment_steps;
    described["products_beside"] = pass.products_beside;
  }
  return described;
}

py::dict describe_launches(const persistent::Decision& decision, const StackShape& shape, at::ScalarType type,
                           bool backward) {
  const persistent::Plan& plan = decision.plan(backward);
  py::list passes;
  for (const persistent::Pass& pass : plan.passes) passes.append(describe_launches(pass, shape, backward));
  return py::dict(py::arg("backend") = "persistent", py::arg("passes") = passes,
                  py::arg("launches") = persistent::launches(plan, shape),
                  py::arg("product") = name_of(decision.product, type), py::arg("predicted_us") = plan.predicted_us,
                  py::arg("step_us") = plan.step_us, py::arg("binds") = plan.binds,
                  py::arg("why") = decision.choice.reason);
}

persistent::Pass pass_of(const py::dict& d) {
  const auto number = [&](const char* name, int64_t otherwise) {
    return d.contains(name) ? d[name].cast<int64_t>() : otherwise;
  };
  const auto small = [&](const char* name, int otherwise) { return static_cast<int>(number(name, otherwise)); };
  persistent::Pass pass;
  pass.first_layer = number("first_layer", 0);
  pass.last_layer = number("last_layer", 1);
  pass.cut.product = number("exact", 0) ? persistent::Product::exact : persistent::Product::tensor;
  pass.cut.exchange = number("l2", 0) ? persistent::Exchange::l2 : persistent::Exchange::cluster;
  pass.cut.batch_tiles = small("tiles", 1);
  pass.cut.pieces = small("pieces", 2);
  pass.cut.splits = small("splits", 1);
  pass.cut.unit_tiles = small("m_tiles", 0);
  pass.cut.groups = small("groups", 1);
  pass.cut.blocks = small("blocks", 1);
  pass.cut.chunk_steps = small("chunk_steps", 1);
  pass.cut.inputs_in_shared = number("inputs_in_shared", 1) != 0;
  pass.batch_groups = number("batch_groups", 1);
  pass.copies = number("copies", pass.batch_groups);
  pass.rounds = (pass.batch_groups + pass.copies - 1) / std::max<int64_t>(pass.copies, 1);
  pass.segment_steps = number("segment_steps", std::numeric_limits<int>::max());
  pass.products_beside = number("products_beside", 0) != 0;
  return pass;
}

at::ScalarType dtype_named(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "float64") return at::kDouble;
  if (name == "bfloat16") return at::kBFloat16;
  TORCH_CHECK_VALUE(name == "float16", "dtype should be float32, float64, bfloat16 or float16, got: ", name);
  return at::kHalf;
}

// What the operators' backends `persistent` and `auto` do with a call of such a stack.
py::dict gpu_plan(const StackOptions& options, int64_t seq_len, int64_t batch_size, const std::string& dtype,
                  const std::string& device, const std::string& saving) {
  const StackShape shape = prepare(options, seq_len, batch_size);
  const at::ScalarType type = dtype_named(dtype);
  const auto decision = persistent::decide({shape, options, saving_of(saving), type, at::Device(device)});
  py::dict plan(py::arg("persistent") = decision->choice.persistent, py::arg("why_not") = decision->why_not,
                py::arg("reason") = decision->choice.reason, py::arg("persistent_us") = decision->choice.persistent_us,
                py::arg("diagonal_us") = decision->choice.diagonal_us);
  if (decision->why_not.empty()) {
    plan["forward"] = describe_launches(*decision, shape, type, false);
    if (saving_of(saving) != Saving::none) plan["backward"] = describe_launches(*decision, shape, type, true);
  }
  return plan;
}

// (output, h_n, c_n), or None if `step` (step.h) declines, or if an argument is not a tensor or is of a subclass, which
// may override what torch's functions do.
py::object step_once(const py::handle& input, const py::handle& h_0, const py::handle& c_0, const py::list& weights,
                     const StackOptions& options, bool frozen, const py::handle& reset) {
  thread_local std::vector<Tensor> tensors;  // keeps its memory between calls, but no tensors
  const struct Emptied {
    ~Emptied() { tensors.clear(); }  // while this thread holds the GIL
  } emptied;
  for (const py::handle& argument : {input, h_0, c_0}) {
    if (!THPVariable_CheckExact(argument.ptr())) return py::none();
    tensors.push_back(THPVariable_Unpack(argument.ptr()));
  }
  for (const py::handle weight : weights) {
    if (!THPVariable_CheckExact(weight.ptr())) return py::none();
    tensors.push_back(THPVariable_Unpack(weight.ptr()));
  }
  const bool resets = !reset.is_none();
  if (resets && !THPVariable_CheckExact(reset.ptr())) return py::none();
  const StepArguments arguments{tensors[0],
                                tensors[1],
                                tensors[2],
                                TensorList(tensors).slice(3),
                                options,
                                frozen,
                                resets ? &THPVariable_Unpack(reset.ptr()) : nullptr};
  std::optional<StepResults> results;
  {
    const py::gil_scoped_release others_may_run;
    TorchPlatform platform;
    results = step(arguments, free_threads(), platform);
  }
  if (!results) return py::none();
  std::optional<Run>& last = last_run();
  if (!last) last.emplace();
  Run& run = *last;  // keeps its memory: a step allocates nothing but its results
  run.how = results->schedule, run.device = "cpu", run.backward = false, run.saving = Saving::none;
  run.shape = *results->shape, run.type = tensors[0].scalar_type();
  return py::make_tuple(std::move(results->output), std::move(results->h_n), std::move(results->c_n));
}

// A call of the module by the fast path of eager.h; None if that declines. `h_0` and `c_0` None: zeros. `dropout`: the rate
// in effect, or the rates of all boundaries.
py::object call(const py::handle& input, const py::handle& batch_sizes, const py::handle& h_0, const py::handle& c_0,
                const py::list& weights, const py::handle& seed, const StackOptions& options, const py::handle& dropout,
                const std::string& backend, bool frozen, const py::handle& lengths, const py::handle& resets) {
  StackOptions in_effect = options;
  in_effect.dropout = option_from(dropout, &in_effect.dropout);
  std::vector<Tensor> tensors;
  tensors.reserve(weights.size());
  for (const py::handle weight : weights) {
    if (!THPVariable_CheckExact(weight.ptr())) return py::none();
    tensors.push_back(THPVariable_Unpack(weight.ptr()));
  }
  const auto ordinary = [](const py::handle& tensor) {
    return tensor.is_none() || THPVariable_CheckExact(tensor.ptr());
  };
  const auto optional = [](const py::handle& tensor) {
    return tensor.is_none() ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(tensor.ptr()));
  };
  if (!THPVariable_CheckExact(input.ptr()) || !ordinary(batch_sizes) || !ordinary(h_0) || !ordinary(c_0) ||
      !ordinary(seed) || !ordinary(lengths) || !ordinary(resets)) {
    return py::none();
  }
  const EagerCall arguments{THPVariable_Unpack(input.ptr()),
                            optional(batch_sizes),
                            optional(h_0),
                            optional(c_0),
                            tensors,
                            optional(seed),
                            in_effect,
                            backend,
                            frozen,
                            optional(lengths),
                            optional(resets)};
  std::optional<EagerResults> results;
  {
    const py::gil_scoped_release others_may_run;
    results = call_eagerly(arguments);
  }
  if (!results) return py::none();
  return py::make_tuple(std::move(results->output), std::move(results->h_n), std::move(results->c_n));
}

// Sets the `formula` that a backward pass calls if no kernel can compute it; see ops.py.
void set_python_formula(py::object formula) {
  const auto* kept = new py::object(std::move(formula));  // never destroyed: the interpreter may end first
  set_formula([kept](const std::array<Tensor, 3>& flowing, const EagerSaved& saved, const std::vector<bool>& needs) {
    const py::gil_scoped_acquire gil;
    const StackOptions& o = saved.options;
    const py::tuple found = (*kept)(py::make_tuple(flowing[0], flowing[1], flowing[2]),
                                    py::make_tuple(saved.input, saved.batch_sizes, saved.h_0, saved.c_0, saved.weights,
                                                   saved.seed, saved.lengths, saved.resets),
                                    saved.output, saved.reserve, needs,
                                    py::make_tuple(o.bias, o.num_layers, o.bidirectional, option_to(o.proj_size),
                                                   option_to(o.dropout), option_to(o.link)),
                                    o.recompute ? "recompute" : "full", saved.backend, o.bf16_weights);
    std::vector<Tensor> gradients;
    const auto add = [&](const py::handle& one) { gradients.push_back(one.is_none() ? Tensor() : one.cast<Tensor>()); };
    for (size_t n = 0; n < 3; ++n) add(found[n]);
    for (const py::handle one : found[3].cast<py::list>()) add(one);
    return gradients;
  });
}

// What a stack is: stack/options.h. Python's StackOptions (stacked_lstm_ext/options.py) makes one of these for itself.
void bind_options(py::module_& m) {
  py::class_<StackOptions> options(m, "StackOptions");
  options.def(py::init([](const py::kwargs& given) {
    StackOptions made;
    size_t known = 0;
    for_each_option([&](const char* name, auto field) {
      if (!given.contains(name)) return;
      made.*field = option_from(given[name], &(made.*field));
      ++known;
    });
    if (known != given.size())
      throw py::type_error("an option that no stack has, in " + py::repr(given).cast<std::string>());
    return made;
  }));
  options.def(py::self == py::self);
  for_each_option([&](const char* name, auto field) {
    options.def_property_readonly(name, [field](const StackOptions& made) { return option_to(made.*field); });
  });
  options.def_static("fields", [] {
    std::vector<std::string> names;
    for_each_option([&](const char* name, auto) { names.emplace_back(name); });
    return names;
  });
}

py::dict build_info() {
  py::list isas;
  isas.append("default");
  if (cpu::kernels_avx2<float>()) isas.append("avx2");
  if (cpu::kernels_avx512<float>()) isas.append("avx512");
  if (cpu::kernels_avx512_bf16<float>()) isas.append("avx512_bf16");
  py::object cuda = py::none();
  py::list archs;
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  cuda = py::str(STACKED_LSTM_EXT_CUDA_VERSION);
  for (const std::string& arch : split_archs(STACKED_LSTM_EXT_CUDA_ARCHS)) archs.append(arch);
#endif
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  const std::string compiler = "gcc " __VERSION__;
#else
  const std::string compiler = "unknown";
#endif
  return py::dict(py::arg("version") = STACKED_LSTM_EXT_VERSION, py::arg("torch") = TORCH_VERSION,
                  py::arg("compiler") = compiler, py::arg("cpp_standard") = static_cast<int64_t>(__cplusplus),
                  py::arg("isas") = isas, py::arg("cuda") = cuda, py::arg("cuda_archs") = archs);
}

}  // namespace
}  // namespace stacked_lstm

PYBIND11_MODULE(_C, m) {
  using namespace stacked_lstm;
  bind_options(m);
  m.def("build_info", &build_info);
  m.def("isa", &cpu::isa);
  m.def("cpu_plan", [](const StackOptions& options, int64_t seq_len, int64_t batch_size, int64_t threads,
                       bool double_precision, bool backward, bool bf16_storage) {
    const StackShape shape = prepare(options, seq_len, batch_size);
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
    threads = 1;
#endif
    const cpu::Storage storage = bf16_storage ? cpu::Storage::bf16 : cpu::Storage::same;
    return describe(cpu::plan(shape, threads, double_precision ? 8 : 4, storage, backward), shape.directions);
  });
  m.def("share_batch", [](const std::vector<int64_t>& batch_sizes, int64_t slices) {
    StackShape shape;
    shape.steps = static_cast<int64_t>(batch_sizes.size());
    shape.batch = batch_sizes.at(0);
    shape.packed_rows.assign(1, 0);
    for (const int64_t size : batch_sizes) shape.packed_rows.push_back(shape.packed_rows.back() + size);
    return share_batch(shape, slices).first;
  });
  m.def("force_cpu_schedule", [](const py::object& wanted) {
    force_cpu_schedule(std::nullopt);
    if (wanted.is_none()) return;
    Schedule schedule;
    schedule.batch_slices = wanted["batch_slices"].cast<int64_t>();
    schedule.chunk_steps = wanted["chunk_steps"].cast<int64_t>();
    const auto phases = wanted["phases"].cast<std::vector<py::dict>>();
    TORCH_CHECK_VALUE(phases.size() == 1 || phases.size() == 2, "phases should be 1 or 2, got: ", phases.size());
    schedule.phases = static_cast<int64_t>(phases.size());
    for (size_t p = 0; p < phases.size(); ++p) {
      const auto field = [&](const char* name) { return phases[p][name].cast<int64_t>(); };
      schedule.phase[p] = {field("first_layer"), field("last_layer"), field("layer_groups"), field("unit_slices")};
    }
    force_cpu_schedule(schedule);
  });
  // The whole schedule, for tests: each worker's chunks in the order in which it takes them, each chunk with what it
  // must wait for. Entries are (layer, direction, batch_slice, unit_slice, chunk, ((layer, direction, chunks), …)).
  m.def("cpu_schedule", [](const StackOptions& options, int64_t seq_len, int64_t batch_size, int64_t threads,
                           bool double_precision, bool backward) {
    const StackShape shape = prepare(options, seq_len, batch_size);
    const Schedule schedule = cpu::plan(shape, threads, double_precision ? 8 : 4, cpu::Storage::same, backward);
    const int64_t directions = shape.directions, lanes = shape.lanes();
    py::list workers;
    for (int64_t worker = 0; worker < schedule.workers(); ++worker) {
      py::list tasks;
      schedule.for_each_position(directions, worker, [&](int64_t position, const WorkerPlace& place) {
        const int64_t lane = lane_at(position, lanes, backward);
        for (int64_t chunk = 0; chunk < schedule.chunks(seq_len); ++chunk) {
          const Needs n = needs(schedule, seq_len, directions, position, chunk);
          py::list waits;
          for (int64_t p = n.first_position; p < n.first_position + n.positions; ++p) {
            const int64_t other = lane_at(p, lanes, backward);
            waits.append(py::make_tuple(other / directions, other % directions, n.chunks));
          }
          tasks.append(py::make_tuple(lane / directions, lane % directions, place.batch_slice, place.slice, chunk,
                                      py::tuple(waits)));
        }
      });
      workers.append(tasks);
    }
    return workers;
  });
  m.def("last_run", []() -> py::object {
    if (!last_run()) return py::none();
    const Run& last = *last_run();
    py::dict run;
    if (const auto* schedule = std::get_if<Schedule>(&last.how)) run = describe(*schedule, last.shape.directions);
    if (const auto* counts = std::get_if<diagonal::DiagonalCounts>(&last.how)) run = describe(*counts);
    if (const auto* counts = std::get_if<persistent::PersistentCounts>(&last.how)) {
      run = describe_launches(*counts->decision, last.shape, last.type, last.backward);
      run["launches"] = counts->launches;
      run["products"] = counts->products;
    }
    run["device"] = last.device;
    run["pass"] = last.backward ? "backward" : "forward";
    run["saving"] = name_of(last.saving);
    run["layers"] = last.shape.depth();
    run["seq_len"] = last.shape.steps;
    run["batch_size"] = last.shape.batch;
    return run;
  });
  m.def("cpu_workspace_bytes", &cpu::workspace_bytes);
  m.def("step", &step_once);
  m.def("call", &call);
  m.def("set_formula", &set_python_formula);
  m.def("clear_last_run", [] { last_run().reset(); });
  m.def("drop_packed", [](uintptr_t first_weight) { drop_packed(reinterpret_cast<const void*>(first_weight)); });
  m.def("packed_counts", [] {
    const PackedCounts counts = packed_counts();
    return py::dict(py::arg("stacks") = counts.stacks, py::arg("bytes") = counts.bytes, py::arg("noted") = counts.noted,
                    py::arg("hits") = counts.hits);
  });
  m.def("diagonal_plan", [](const StackOptions& options, int64_t seq_len, int64_t batch_size, bool double_precision,
                            bool backward, const std::string& saving) {
    const StackShape shape = prepare(options, seq_len, batch_size);
    const int64_t bytes = double_precision ? 8 : 4;
    return describe(diagonal::predict(shape, options, saving_of(saving), bytes, backward, true, true));
  });
  // What the persistent kernels would do on a GPU that need not be present, and the predicted time.
  persistent::bind_persistent_plan(m);
  m.def("force_diagonal_chunk", [](std::optional<int64_t> steps) {
    TORCH_CHECK_VALUE(!steps || *steps > 0, "a chunk should have at least one step, got: ", steps.value_or(0));
    diagonal::force_chunk(steps);
  });
  // Why a GPU of this compute capability cannot run kernels built for `archs` (by default, those of this build).
  m.def(
      "cuda_obstacle",
      [](int major, int minor, const std::optional<std::string>& archs) {
        if (archs) return cuda_obstacle(*archs, major, minor);
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
        return cuda_obstacle(STACKED_LSTM_EXT_CUDA_ARCHS, major, minor);
#else
        return std::string("this build has no CUDA kernels");
#endif
      },
      py::arg("major"), py::arg("minor"), py::arg("archs") = py::none());
  // For tests: the driver of the diagonal schedule runs these kernels on the CPU (`table`: the address of a
  // gates::GateTable; 0: the usual kernels). So a test can run it with the CUDA kernels on the emulator.
  m.def("_use_gate_kernels",
        [](uintptr_t table) { driver::use_host_gate_kernels(reinterpret_cast<const gates::GateTable*>(table)); });
  // For tests: the persistent kernels' driver runs these kernels on the CPU (`table`: the address of a
  // persistent::PersistentTable; 0: none). `watchdog`: the kernels report a wait that took too long.
  m.def(
      "_use_persistent_kernels",
      [](uintptr_t table, bool watchdog) {
        persistent::use_host_kernels(reinterpret_cast<const persistent::PersistentTable*>(table), watchdog);
      },
      py::arg("table"), py::arg("watchdog") = false);
  m.def("gpu_plan", &gpu_plan);
  // Why a path cannot run a stack with these options, or "".
  m.def(
      "obstacle",
      [](const std::string& path, const StackOptions& options, const std::string& dtype, bool lengths, bool resets,
         bool states, bool trains) {
        TORCH_CHECK_VALUE(path == "cpu" || path == "diagonal" || path == "persistent",
                          "path should be one of cpu, diagonal, persistent, got: ", path);
        const Path named = path == "cpu" ? Path::cpu : path == "diagonal" ? Path::diagonal : Path::persistent;
        return obstacle(named, options, element_type(dtype_named(dtype)), {lengths, resets, states, trains});
      },
      py::arg("path"), py::arg("options"), py::arg("dtype"), py::arg("lengths") = false, py::arg("resets") = false,
      py::arg("states") = false, py::arg("trains") = false);
  m.def("force_persistent_device", [](const py::object& device) {
    persistent::force_device(device.is_none() ? std::nullopt : std::optional(persistent::device_of(device)));
  });
  m.def("force_persistent_passes", [](bool backward, const std::optional<std::vector<py::dict>>& wanted) {
    if (!wanted) return persistent::force_passes(backward, std::nullopt);
    std::vector<persistent::Pass> passes;
    for (const py::dict& pass : *wanted) passes.push_back(pass_of(pass));
    persistent::force_passes(backward, std::move(passes));
  });
  // The fingerprint (cpu/fingerprint.h) of the contents of this memory.
  m.def("fingerprint", [](const std::vector<std::pair<uintptr_t, int64_t>>& ranges, int64_t part, int64_t parts) {
    std::vector<cpu::Bytes> memory;
    for (const auto& [data, bytes] : ranges) memory.push_back({reinterpret_cast<const void*>(data), bytes});
    const cpu::Fingerprint found = cpu::fingerprint(memory, part, parts);
    return std::pair(found.low, found.high);
  });
  m.def("cpu_maths", [](uintptr_t x, int64_t n, uintptr_t sigmoid, uintptr_t tanh, bool double_precision) {
    if (double_precision) {
      cpu::kernels<double>().maths(reinterpret_cast<const double*>(x), n, reinterpret_cast<double*>(sigmoid),
                                   reinterpret_cast<double*>(tanh));
    } else {
      cpu::kernels<float>().maths(reinterpret_cast<const float*>(x), n, reinterpret_cast<float*>(sigmoid),
                                  reinterpret_cast<float*>(tanh));
    }
  });
}
