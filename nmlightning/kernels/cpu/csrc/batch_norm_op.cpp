// A batch norm in training as one operator: forward, its node in autograd's graph, and the running
// statistics. What it cannot do it leaves to the formula, and then has changed nothing.
//
// The node is torch's for functions in C++, so that hooks, saved tensors and compiled autograd are
// as of any other. It is made after the kernels have run, and only where a gradient is asked for.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "sign_bits.h"
#include "tensors.h"

namespace nmlightning {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr float SMALLEST_WEIGHT = 1e-30f;  // its products with gradients are normal floats

// The norm, and the dtypes of what is learned; −1: there is none.
struct BatchNormSpec {
  int64_t k;  // how many |x − μ| are the largest, 0 for L1, or minus the chunks of Range
  double constant, eps;
  Fused fused;
  int weight, bias;
};

// What backward needs of the channels, with their variance behind it, and then of the spec: in one
// tensor, since each allocation takes as long as a small norm's arithmetic. That has no k, which
// may be no float.
struct Kept {
  static constexpr int64_t ROWS = 6, SPEC = 5;
  Tensor held;
  int64_t length;
  float* data;

  explicit Kept(const Tensor& held)
      : held(held), length((held.numel() - SPEC) / ROWS), data(held.data_ptr<float>()) {}
  Kept(const Layout& layout, const BatchNormSpec& of)
      : Kept(allocate({ROWS * layout.length() + SPEC})) {
    float* to = row(ROWS);
    for (double value :
         {of.constant, of.eps, double(of.fused), double(of.weight), double(of.bias)})
      *to++ = float(value);
  }

  float* row(int64_t i) const { return data + i * length; }
  float* variance() const { return row(5); }
  Channels channels() const { return {row(0), row(1), row(2), row(3), row(4)}; }
  // By the deviations, (C, k), Range's signs, (C, 2, chunks), or an undefined tensor for L1.
  BatchNormSpec spec(const Tensor& deviations) const {
    const float* of = row(ROWS);
    const int64_t k = deviations.defined() ? deviations.numel() / deviations.size(0) : 0;
    return {k, of[0], of[1], Fused(int(of[2])), int(of[3]), int(of[4])};
  }
};

// How large y may be, over the weight, for x̂ to follow from it: see kernels/cpu/backend.py.
double reach_without_x(at::ScalarType type, Fused fused) {
  if (type == at::kFloat) return 14.5;
  return fused == ADD_RELU ? -1 : 1.77;
}

// Whether x̂ = (y − residual − bias) / weight is near enough x − μ over σ to do without x. The
// rounding of y then is an error of x̂ below limit · (half a unit in the last place of 1). Where
// bias is negative, y > 0 is below |weight · x̂|, so only a large positive one harms.
bool learned_within(double limit, Fused fused, const float* weight, const float* bias, int64_t c) {
  for (int64_t i = 0; i < c; i++) {
    const float size = weight ? std::fabs(weight[i]) : 1.f;
    const bool reached = size >= SMALLEST_WEIGHT && size <= 1 / SMALLEST_WEIGHT &&
                         (fused == ADD_RELU || bias[i] <= limit * size);
    if (!reached) return false;
  }
  return limit >= 0;
}

// The same for what a residual makes of y: its root mean square within limit · |weight|.
bool squares_within(double limit, const float* weight, const std::vector<double>& squares,
                    int64_t count) {
  for (size_t i = 0; i < squares.size(); i++) {
    const double size = weight ? std::fabs(weight[i]) : 1;
    if (!(std::sqrt(squares[i] / double(count)) <= limit * size)) return false;
  }
  return true;
}

// What forward makes: y, what backward needs of the channels, and what it needs instead of x: for
// L1 the words of its signs, for the k largest their positions and deviations.
struct Forwarding {
  const BatchNormSpec& spec;
  const Tensor& x;
  Layout layout;
  Optional residual;
  Values weight, bias;
  Kept kept;
  Tensor y, first, second;
  bool x_free;

  Forwarding(const BatchNormSpec& spec, const Tensor& x, const Optional& added,
             const Optional& weight, const Optional& bias)
      : spec(spec), x(x), layout(layout_of(x)), weight(weight, 1),
        bias(Values::or_zeros(bias, layout)), kept(layout, spec), y(allocate_like(x)) {
    if (added) residual = added->contiguous(format_of(x));
    const double limit = reach_without_x(x.scalar_type(), spec.fused);
    x_free = spec.fused != NOTHING && learned_within(limit, spec.fused, this->weight.data,
                                                     this->bias.data, layout.channels);
    std::vector<double> squares(x_free && spec.fused == ADD_RELU ? layout.channels : 0);
    with_type(x, [&]<class T>(T*) { run<T>(squares.empty() ? nullptr : squares.data()); });
    x_free = x_free && squares_within(limit, this->weight.data, squares, layout.count());
  }

  bool bounded() const {
    return all_within(kept.variance(), layout.channels, 0, HUGE_SCALE * HUGE_SCALE);
  }

  // A copy of channels: what is returned to a user may be changed in place.
  Tensor copy(const float* channels) const {
    const Tensor found = allocate({layout.channels});
    std::copy(channels, channels + layout.channels, found.data_ptr<float>());
    return found;
  }

 private:
  template <class T>
  void run(double* squares) {
    const Channels channels = kept.channels();
    const Forward<T> to{{data<T>(x), data<T>(residual), data<T>(y), channels.mean, channels.gain,
                         bias.data},
                        spec.fused, weight.data, kept.variance(), channels};
    const Settings settings{spec.constant, spec.eps};
    if (spec.k < 0) {
      const int64_t chunks = -spec.k;
      first = allocate({layout.channels, 2, chunks}, at::kLong);
      second = allocate({layout.channels, 2, chunks});
      range_forward<T>(layout, settings, to, chunks, data<int64_t>(first), data<float>(second),
                       squares);
    } else if (spec.k) {
      first = allocate({layout.channels, spec.k}, at::kLong);
      second = allocate({layout.channels, spec.k});
      largest_forward<T>(layout, settings, to, spec.k, data<int64_t>(first), data<float>(second),
                         squares);
    } else {
      if (x_free) first = allocate({SignBits{layout}.words()}, at::kInt);
      l1_forward<T>(layout, settings, to, x_free ? data<uint32_t>(first) : nullptr, squares);
    }
  }
};

// What is saved, in this order: the formula's second derivative takes the first two.
enum Saved { X, WEIGHT, Y, RESIDUAL, FIRST, SECOND, BIAS, KEPT };

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Returns the gradients by x, the residual if there is one, the weight and the bias.
Gradients gradients(const Tensor& given, const variable_list& saved) {
  const Kept kept(saved[KEPT]);
  const BatchNormSpec spec = kept.spec(saved[SECOND]);
  const Tensor &x = saved[X], &y = saved[Y], &like = x.defined() ? x : y;
  const Layout layout = layout_of(like);
  const bool added = spec.fused == ADD_RELU;
  const Values weight(saved[WEIGHT], 1);
  const Values bias = x.defined() ? Values({}, 1) : Values::or_zeros(saved[BIAS], layout);
  TORCH_CHECK(given.scalar_type() == like.scalar_type(), "expected a gradient of y's dtype");
  const Tensor grad = given.contiguous(format_of(like)), grad_x = allocate_like(like);
  const Tensor grad_residual = added ? allocate_like(like) : Tensor();
  const Tensor grad_weight = allocate({layout.channels}), grad_bias = allocate({layout.channels});
  with_type(like, [&]<class T>(T*) {
    const Backward<T> to{data<T>(grad), data<T>(x), data<T>(y), data<T>(saved[RESIDUAL]),
                         weight.data, bias.data, kept.channels(), data<T>(grad_x),
                         data<T>(grad_residual), data<float>(grad_weight), data<float>(grad_bias)};
    if (spec.k)
      largest_backward<T>(layout, to, spec.k, data<int64_t>(saved[FIRST]),
                          data<float>(saved[SECOND]));
    else
      l1_backward<T>(layout, to, data<uint32_t>(saved[FIRST]));
  });
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

Gradients batch_norm_backward_op(const Tensor& grad, const Optional& x, const Optional& weight,
                                 const Optional& y, const Optional& residual, const Optional& first,
                                 const Optional& second, const Optional& bias, const Tensor& kept) {
  const auto given = [](const Optional& tensor) { return tensor.value_or(Tensor()); };
  auto found = gradients(grad, {given(x), given(weight), given(y), given(residual), given(first),
                                given(second), given(bias), kept});
  if (!std::get<1>(found).defined()) std::get<1>(found) = allocate({0});
  return found;
}

// By the dispatcher: mapped by torch, and differentiated by what kernels/autograd.py registers.
Gradients dispatched(const Tensor& grad, const variable_list& saved) {
  static const auto backward = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("nmlightning::batch_norm_backward", "")
                                   .typed<decltype(batch_norm_backward_op)>();
  const auto given = [&](Saved i) { return saved[i].defined() ? Optional(saved[i]) : Optional(); };
  return backward.call(grad, given(X), given(WEIGHT), given(Y), given(RESIDUAL), given(FIRST),
                       given(SECOND), given(BIAS), saved[KEPT]);
}

struct BatchNormNode : torch::autograd::Function<BatchNormNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional&,
                        const Optional& weight, const Optional& bias, const Forwarding& made) {
    const Tensor none;
    const bool selected = made.spec.k != 0;
    ctx->save_for_backward({made.x_free ? none : x, weight.value_or(none),
                            made.spec.fused ? made.y : none,
                            made.x_free ? made.residual.value_or(none) : none,
                            selected || made.x_free ? made.first : none, made.second,
                            made.x_free ? bias.value_or(none) : none, made.kept.held});
    return made.y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor& grad = grads[0];
    const variable_list saved = ctx->get_saved_variables();
    const BatchNormSpec spec = Kept(saved[KEPT]).spec(saved[SECOND]);
    const bool plainly = !at::GradMode::is_enabled() && is_plain(grad);
    const auto [by_x, by_residual, by_weight, by_bias] =
        plainly ? gradients(grad, saved) : dispatched(grad, saved);
    const auto in = [](int dtype, const Tensor& gradient) {
      if (dtype < 0) return Tensor();
      const auto type = at::ScalarType(dtype);
      return gradient.scalar_type() == type ? gradient : gradient.to(type);
    };
    return {by_x, spec.fused == ADD_RELU ? by_residual : Tensor(), in(spec.weight, by_weight),
            in(spec.bias, by_bias), Tensor()};
  }
};

// ---- running statistics ----

bool holds_channels(const Optional& values, int64_t channels) {
  return !values || (is_plain(*values) && values->dim() == 1 && values->size(0) == channels &&
                     at::isFloatingType(values->scalar_type()));
}

bool can_move(const Tensor& running, int64_t channels) {
  return holds_channels(running, channels) && running.scalar_type() == at::kFloat &&
         running.is_contiguous();
}

// Moves the running statistics towards a batch's in channels where these and the result are finite,
// and counts the batch; or returns false, and has not.
bool move_statistics(const Tensor& running_mean, const Tensor& running_var, const Optional& batches,
                     const float* mean, const float* variance, int64_t channels,
                     std::optional<double> momentum) {
  if (!(momentum && can_move(running_mean, channels) && can_move(running_var, channels) &&
        (!batches || (is_plain(*batches) && batches->scalar_type() == at::kLong &&
                      batches->numel() == 1))))
    return false;
  const auto move = [=](const Tensor& running, const float* own, const float* other) {
    float* to = running.data_ptr<float>();
    for (int64_t c = 0; c < channels; c++) {
      const float moved = to[c] + float(*momentum) * (own[c] - to[c]);
      if (std::isfinite(own[c]) && std::isfinite(other[c]) && std::isfinite(moved)) to[c] = moved;
    }
    running.unsafeGetTensorImpl()->bump_version();
  };
  move(running_mean, mean, variance);
  move(running_var, variance, mean);
  if (!batches) return true;
  *batches->data_ptr<int64_t>() += 1;
  batches->unsafeGetTensorImpl()->bump_version();
  return true;
}

bool track_op(const Tensor& running_mean, const Tensor& running_var, const Optional& batches,
              const Tensor& mean, const Tensor& variance, std::optional<double> momentum) {
  const int64_t c = mean.numel();
  return can_move(mean, c) && can_move(variance, c) &&
         move_statistics(running_mean, running_var, batches, data<float>(mean),
                         data<float>(variance), c, momentum);
}

// ---- the operator ----

bool has_tangent(const Optional& tensor) { return tensor && tensor->_fw_grad(0).defined(); }

bool requires_grad(const Optional& tensor) { return tensor && tensor->requires_grad(); }

bool can_normalise(int64_t k, const Tensor& x, const Optional& residual, const Optional& weight,
                   const Optional& bias, Fused fused) {
  if (!is_plain(x) || x.dim() < 2 || !(x.is_contiguous() || is_channels_last(x))) return false;
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) return false;
  const int64_t channels = x.size(1), count = channels ? x.numel() / channels : 0;
  if (count < 2 || k > count || -2 * k > count) return false;
  if (k < 0 && count > std::numeric_limits<int32_t>::max()) return false;
  if (!(holds_channels(weight, channels) && holds_channels(bias, channels))) return false;
  if (residual.has_value() != (fused == ADD_RELU)) return false;
  if (residual && !(is_plain(*residual) && residual->sizes() == x.sizes() &&
                    residual->scalar_type() == x.scalar_type()))
    return false;
  return !(has_tangent(x) || has_tangent(residual) || has_tangent(weight) || has_tangent(bias));
}

// Returns y; and mean and variance unless it has moved the running statistics; or nothing, where
// the formula is to compute the norm.
variable_list batch_norm_op(int64_t k, const Tensor& x, const Optional& residual,
                            const Optional& weight, const Optional& bias,
                            const Optional& running_mean, const Optional& running_var,
                            const Optional& batches, double constant, double eps,
                            std::optional<double> momentum,
                            std::optional<c10::string_view> follows) {
  const Fused fused = !follows ? NOTHING : *follows == "relu" ? RELU : ADD_RELU;
  if (!can_normalise(k, x, residual, weight, bias, fused)) return {};
  const auto dtype = [](const Optional& learned) { return learned ? int(learned->scalar_type()) : -1; };
  const BatchNormSpec spec{k, constant, eps, fused, dtype(weight), dtype(bias)};
  const bool differentiated = at::GradMode::is_enabled() &&
      (x.requires_grad() || requires_grad(residual) || requires_grad(weight) || requires_grad(bias));
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Forwarding made(spec, x, residual, weight, bias);
  if (!made.bounded()) return {};
  variable_list found{made.y};
  const float *mean = made.kept.row(0), *variance = made.kept.variance();
  // Before anything is saved: a checkpoint ends its second forward there, and counts as torch's.
  if (!(running_mean && running_var &&
        move_statistics(*running_mean, *running_var, batches, mean, variance,
                        made.layout.channels, momentum)))
    found = {made.y, made.copy(mean), made.copy(variance)};
  if (differentiated) found[0] = BatchNormNode::apply(x, residual, weight, bias, made);
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmlightning, m) {
  m.def("batch_norm", batch_norm_op);
  m.def("track", track_op);
  m.def("batch_norm_backward", torch::dispatch(c10::DispatchKey::CPU, batch_norm_backward_op));
  // Modes, traces and transforms see the formula's operations.
  for (const auto key : {c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Tracer,
                         c10::DispatchKey::FuncTorchDynamicLayerFrontMode}) {
    m.impl("batch_norm", torch::dispatch(key, cannot(batch_norm_op)));
    m.impl("track", torch::dispatch(key, cannot(track_op)));
  }
}

}  // namespace nmlightning
