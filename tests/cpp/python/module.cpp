// Python module of the CUDA kernels as the SIMT checker runs them, launchers included. Tensors come
// as they are in Python; their contents are copied to the checker's memory and back. What the
// checker finds is raised as checked_cuda.Error. tests/checked_cuda.py puts smt_ext's operators on
// top.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "block_grad.h"
#include "block_score.h"
#include "dequantize.h"
#include "device_tensor.h"
#include "gather_blocks.h"
#include "gather_columns.h"
#include "grad_norm.h"
#include "planted.h"
#include "sparse_adamw.h"

namespace smt_ext::testing {

using Tensors = std::vector<py::object>;

static Memory workspace(std::size_t bytes) { return allocate(bytes, 16, "workspace"); }

static void gather_columns(const py::object& x_TK, const py::object& col_blocks_C, int64_t L,
                           const py::object& out_TU) {
  const DeviceTensor x(x_TK, "x", Use::input), col_blocks(col_blocks_C, "col_blocks", Use::input),
      out(out_TU, "out", Use::output);
  cuda::gather_columns({x.dtype(), out.dtype(), x.size(0), x.size(1), out.size(1), L, x.data(),
                        x.stride(0), x.stride(1), col_blocks.indices(), out.packed()},
                       nullptr);
  for (const DeviceTensor* t : {&x, &col_blocks, &out}) t->finish();
}

static void block_grad(const Tensors& dys_TN, const py::object& x_TU, const py::object& rows_S,
                       const py::object& slots_S, const py::object& out_SLL, bool accumulate,
                       bool tf32, const py::object& tiles_NW, const py::object& lone_M) {
  std::vector<DeviceTensor> dys;
  dys.reserve(dys_TN.size());
  for (const py::object& dy : dys_TN) dys.emplace_back(dy, "dy", Use::input);
  const DeviceTensor x(x_TU, "x_cols", Use::input), rows(rows_S, "rows", Use::input),
      slots(slots_S, "slots", Use::input),
      out(out_SLL, "out", accumulate ? Use::in_place : Use::output);
  cuda::BlockGradArgs args{x.dtype(),
                           out.dtype(),
                           x.size(0),
                           x.size(1),
                           out.size(1),
                           rows.numel(),
                           {},
                           {x.data(), x.stride(0), x.stride(1)},
                           rows.indices(),
                           slots.indices(),
                           out.packed(),
                           accumulate,
                           tf32};
  int32_t first_row = 0;
  for (std::size_t i = 0; i < dys.size(); ++i) {
    const DeviceTensor& dy = dys[i];
    args.dys[i] = {{dy.data(), dy.stride(0), dy.stride(1)}, dy.size(1), first_row};
    first_row += static_cast<int32_t>((dy.size(1) + args.L - 1) / args.L);
  }
  std::optional<DeviceTensor> tiles, lone;
  if (!tiles_NW.is_none()) {
    tiles.emplace(tiles_NW, "tiles", Use::input);
    lone.emplace(lone_M, "lone", Use::input);
    args.tiles = tiles->indices(), args.n_tiles = tiles->size(0);
    args.shape = tile_shape(args.L, tiles->size(1));
    args.lone = lone->indices(), args.n_lone = lone->numel();
  }
  const Memory memory = workspace(cuda::block_grad_workspace_bytes(args));
  cuda::block_grad(args, memory.get(), nullptr);
  if (tiles) tiles->finish(), lone->finish();
  for (const DeviceTensor& dy : dys) dy.finish();
  for (const DeviceTensor* t : {&x, &rows, &slots, &out}) t->finish();
}

template <bool Gather>
static void copy_blocks(const py::object& w_NK, const py::object& blocks_SLL,
                        const py::object& rows_S, const py::object& cols_S) {
  const DeviceTensor w(w_NK, "w", Gather ? Use::input : Use::in_place),
      blocks(blocks_SLL, "blocks", Gather ? Use::output : Use::input),
      rows(rows_S, "rows", Use::input), cols(cols_S, "cols", Use::input);
  (Gather ? cuda::gather_blocks : cuda::scatter_blocks)(
      {w.dtype(), blocks.dtype(), w.size(0), w.size(1), blocks.size(1), blocks.size(0), w.data(),
       w.stride(0), w.stride(1), rows.indices(), cols.indices(), blocks.packed()},
      nullptr);
  for (const DeviceTensor* t : {&w, &blocks, &rows, &cols}) t->finish();
}

// Four bits if there is a table, eight if it is None.
static void dequantize(const py::object& q_any, const py::object& absmax_any,
                       const py::object& code_16, int64_t group, const py::object& blocks_SLL,
                       const py::object& rows_S, const py::object& cols_S,
                       const py::object& out_NK) {
  const int bits = code_16.is_none() ? 8 : 4;
  const DeviceTensor q(q_any, "q", Use::input), absmax(absmax_any, "absmax", Use::input),
      code(bits == 8 ? absmax_any : code_16, "code", Use::input),
      blocks(blocks_SLL, "blocks", Use::input), rows(rows_S, "rows", Use::input),
      cols(cols_S, "cols", Use::input), out(out_NK, "out", Use::output);
  cuda::dequantize_with_blocks(
      {out.dtype(), blocks.dtype(), bits, out.size(0), out.size(1), blocks.size(1), blocks.size(0),
       group, q.data(), static_cast<const float*>(absmax.data()),
       static_cast<const float*>(code.data()), blocks.data(), rows.indices(), cols.indices(),
       out.packed()},
      nullptr);
  for (const DeviceTensor* t : {&q, &absmax, &code, &blocks, &rows, &cols, &out}) t->finish();
}

static void sparse_adamw(const Tensors& weights, const Tensors& blocks, const Tensors& grads,
                         const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                         const Tensors& masters, const Tensors& rows, const Tensors& cols,
                         const py::object& step, const py::object& lr, const py::object& grad_scale,
                         const py::object& found_inf, double beta1, double beta2, double eps,
                         double weight_decay, int64_t seed, const Tensors& origins) {
  std::vector<DeviceTensor> all;
  const auto on_device = [&](const py::object& tensor, const char* name, Use use) -> DeviceTensor& {
    return all.emplace_back(tensor, name, use);
  };
  all.reserve(9 * blocks.size() + 4);  // references stay valid
  std::vector<cuda::AdamWLayer> layers;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const DeviceTensor& w = on_device(weights.at(i), "weights", Use::in_place);
    const DeviceTensor& b = on_device(blocks.at(i), "blocks", Use::in_place);
    const DeviceTensor& g = on_device(grads.at(i), "grads", Use::input);
    const DeviceTensor& m = on_device(exp_avgs.at(i), "exp_avgs", Use::in_place);
    const DeviceTensor& v = on_device(exp_avg_sqs.at(i), "exp_avg_sqs", Use::in_place);
    const DeviceTensor& row = on_device(rows.at(i), "rows", Use::input);
    const DeviceTensor& col = on_device(cols.at(i), "cols", Use::input);
    float* master = nullptr;
    if (!masters.empty()) {
      master = on_device(masters.at(i), "masters", Use::in_place).packed<float>();
    }
    const DeviceTensor& o = origins.empty() ? b : on_device(origins.at(i), "origins", Use::input);
    layers.push_back({w.dtype(), b.dtype(), w.size(0), w.size(1), b.size(1), b.size(0), w.data(),
                      w.stride(0), w.stride(1), row.indices(), col.indices(), b.packed(),
                      g.packed(), m.packed(), v.packed(), master,
                      origins.empty() ? nullptr : o.packed(), o.dtype()});
  }
  const cuda::AdamWOptions options{on_device(step, "step", Use::input).number(),
                                   on_device(lr, "lr", Use::input).number(),
                                   on_device(grad_scale, "grad_scale", Use::input).number(),
                                   on_device(found_inf, "found_inf", Use::input).number(),
                                   beta1,
                                   beta2,
                                   eps,
                                   weight_decay,
                                   seed};
  const auto n = static_cast<int64_t>(layers.size());
  const Memory memory = workspace(cuda::sparse_adamw_workspace_bytes(n));
  cuda::sparse_adamw(layers.data(), n, options, memory.get(), nullptr);
  for (const DeviceTensor& t : all) t.finish();
}

static void grad_norm(const Tensors& tensors, const py::object& out) {
  std::vector<DeviceTensor> grads;
  std::vector<cuda::Gradient> list;
  for (const py::object& tensor : tensors) {
    const DeviceTensor& grad = grads.emplace_back(tensor, "grads", Use::input);
    list.push_back({grad.packed(), grad.numel(), grad.dtype()});
  }
  const DeviceTensor norm(out, "norm", Use::output);
  const auto n = static_cast<int64_t>(list.size());
  const Memory memory = workspace(cuda::grad_norm_workspace_bytes(list.data(), n));
  cuda::grad_norm(list.data(), n, norm.number(), memory.get(), nullptr);
  for (const DeviceTensor& grad : grads) grad.finish();
  norm.finish();
}

static void block_score(const py::object& g_NK, int64_t L, Metric metric,
                        const py::object& score_RC) {
  const DeviceTensor g(g_NK, "g", Use::input), score(score_RC, "score", Use::output);
  cuda::block_score({g.dtype(), metric, g.size(0), g.size(1), L, g.data(), g.stride(0), g.stride(1),
                     score.packed()},
                    nullptr);
  for (const DeviceTensor* t : {&g, &score}) t->finish();
}

static void block_score_fused(const py::object& dy_TN, const py::object& x_TK, int64_t L,
                              Metric metric, const py::object& score_RC, bool tf32) {
  const DeviceTensor dy(dy_TN, "dy", Use::input), x(x_TK, "x", Use::input),
      score(score_RC, "score", Use::output);
  const cuda::BlockScoreFusedArgs args{dy.dtype(),     metric,   dy.size(0),  dy.size(1),
                                       x.size(1),      L,        dy.data(),   dy.stride(0),
                                       dy.stride(1),   x.data(), x.stride(0), x.stride(1),
                                       score.packed(), tf32};
  const Memory memory = workspace(cuda::block_score_fused_workspace_bytes(args));
  cuda::block_score_fused(args, memory.get(), nullptr);
  for (const DeviceTensor* t : {&dy, &x, &score}) t->finish();
}

// One element, counted from the first one in memory.
static void touch_tensor(const py::object& tensor, Use use, int64_t element, bool write) {
  const DeviceTensor t(tensor, "tensor", use);
  touch(static_cast<float*>(t.data()) + element, write);
  t.finish();
}

static void bind_checker(py::module_& m) {
  py::register_exception<simt::Error>(m, "Error", PyExc_RuntimeError);

  py::class_<simt::Config>(m, "Config")
      .def_readwrite("seed", &simt::Config::seed, "of the order of blocks, warps and lanes")
      .def_property(
          "multiprocessors", [](const simt::Config& c) { return c.device.multiprocessors; },
          [](simt::Config& c, int n) { c.device.multiprocessors = n; });
  m.attr("config") = py::cast(&simt::config(), py::return_value_policy::reference);

  py::class_<simt::GlobalTraffic>(m, "GlobalTraffic")
      .def_readonly("requests", &simt::GlobalTraffic::requests)
      .def_readonly("sectors", &simt::GlobalTraffic::sectors)
      .def_readonly("ideal_sectors", &simt::GlobalTraffic::ideal_sectors)
      .def_readonly("bytes", &simt::GlobalTraffic::bytes)
      .def_property_readonly("excess", &simt::GlobalTraffic::excess);
  py::class_<simt::SharedTraffic>(m, "SharedTraffic")
      .def_readonly("requests", &simt::SharedTraffic::requests)
      .def_readonly("wavefronts", &simt::SharedTraffic::wavefronts)
      .def_readonly("ideal_wavefronts", &simt::SharedTraffic::ideal_wavefronts)
      .def_property_readonly("conflicts", &simt::SharedTraffic::conflicts);
  const auto tuple_of = [](const dim3& d) { return py::make_tuple(d.x, d.y, d.z); };
  py::class_<simt::Stats>(m, "Stats")
      .def_readonly("kernel", &simt::Stats::kernel)
      .def_property_readonly("grid", [=](const simt::Stats& s) { return tuple_of(s.grid); })
      .def_property_readonly("block", [=](const simt::Stats& s) { return tuple_of(s.block); })
      .def_readonly("global_load", &simt::Stats::global_load)
      .def_readonly("global_store", &simt::Stats::global_store)
      .def_readonly("async_load", &simt::Stats::async_load)
      .def_readonly("shared_load", &simt::Stats::shared_load)
      .def_readonly("shared_store", &simt::Stats::shared_store)
      .def_readonly("async_store", &simt::Stats::async_store)
      .def_readonly("ldmatrix", &simt::Stats::ldmatrix)
      .def_readonly("mma", &simt::Stats::mma)
      .def_readonly("plain_global", &simt::Stats::plain_global)
      .def_readonly("plain_shared", &simt::Stats::plain_shared)
      .def("__repr__", &simt::Stats::report);
  m.def("last_stats", py::overload_cast<const std::string&>(&simt::last_stats), py::arg("kernel"));
}

PYBIND11_MODULE(checked_cuda, m) {
  m.doc() = "CUDA kernels of smt_ext, run on the CPU by the SIMT checker.";
  bind_checker(m);
  py::enum_<Use>(m, "Use")
      .value("input", Use::input)
      .value("output", Use::output)
      .value("in_place", Use::in_place);
  py::enum_<Metric>(m, "Metric")
      .value("mean_abs", Metric::mean_abs)
      .value("mean", Metric::mean)
      .value("l1", Metric::l1)
      .value("l2", Metric::l2);
  using py::arg;
  m.def("gather_columns", gather_columns, arg("x"), arg("col_blocks"), arg("block_size"),
        arg("out"));
  m.def("block_grad", block_grad, arg("dys"), arg("x_cols"), arg("rows"), arg("slots"), arg("out"),
        arg("accumulate"), arg("tf32"), arg("tiles"), arg("lone"));
  m.def("gather_blocks", copy_blocks<true>, arg("w"), arg("out"), arg("rows"), arg("cols"));
  m.def("scatter_blocks", copy_blocks<false>, arg("w"), arg("blocks"), arg("rows"), arg("cols"));
  m.def("dequantize", dequantize, arg("q"), arg("absmax"), arg("code"), arg("group"), arg("blocks"),
        arg("rows"), arg("cols"), arg("out"));
  m.def("sparse_adamw", sparse_adamw, arg("weights"), arg("blocks"), arg("grads"), arg("exp_avgs"),
        arg("exp_avg_sqs"), arg("masters"), arg("rows"), arg("cols"), arg("step"), arg("lr"),
        arg("grad_scale"), arg("found_inf"), arg("beta1"), arg("beta2"), arg("eps"),
        arg("weight_decay"), arg("seed"), arg("origins") = Tensors());
  m.def("grad_norm", grad_norm, arg("grads"), arg("out"));
  m.def("block_score", block_score, arg("g"), arg("block_size"), arg("metric"), arg("score"));
  m.def("block_score_fused", block_score_fused, arg("dy"), arg("x"), arg("block_size"),
        arg("metric"), arg("score"), arg("tf32"));
  m.def("touch", touch_tensor, arg("tensor"), arg("use"), arg("element"), arg("write"));
}

}  // namespace smt_ext::testing
