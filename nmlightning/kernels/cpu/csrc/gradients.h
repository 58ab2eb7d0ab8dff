// The passes of backward that every statistic has. The first leaves bits for the second: whether
// x > μ, and, where no gradient of a residual tells, what the ReLU let pass.
#pragma once

#include <memory>

#include "batch_norm.h"

namespace nmlightning {

inline Fused fused_of(const auto& of) {
  return !of.y ? NOTHING : of.grad_residual ? ADD_RELU : RELU;
}

struct BackwardBits {
  std::unique_ptr<Bits[]> own;
  Bits *above, *passed;  // or null

  // Of x > μ those given, or own ones to be written if any are asked for.
  BackwardBits(const Layout& layout, const uint32_t* given, bool asked, bool relu) {
    const int64_t words = SignBits{layout}.words() * 4 / sizeof(Bits);
    const bool writes = asked && !given;
    own.reset(new Bits[(writes + relu) * words]);
    above = writes ? own.get() : reinterpret_cast<Bits*>(const_cast<uint32_t*>(given));
    passed = relu ? own.get() + writes * words : nullptr;
  }
};

// Returns Σg and Σ g · (x − mean), or, without x, Σ g · (y − bias − residual): where g is not 0 that
// is weight · x̂; (2, width). Writes bits, and g for the residual.
template <Fused fused, bool by_x, bool marks, class T>
std::vector<double> first_pass(const Slab& slab, const Backward<T>& of, const BackwardBits& bits) {
  const int64_t length = slab.run_length();
  return slab.sums([&](auto at) {
    return [&, centre = at(by_x ? of.channels.mean : of.bias)](Run run) {
      const T *grad = of.grad + run.offset, *y = of.y + run.offset, *x = of.x + run.offset;
      const T* residual = of.residual + run.offset;
      T* grad_residual = of.grad_residual + run.offset;
      Bits *above = bits_of(bits.above, run, length), *passed = bits_of(bits.passed, run, length);
      return [=, &centre](auto in) {
        auto g = in(grad);
        if constexpr (fused != NOTHING) g = given(g, in(y));
        if constexpr (fused == RELU) in.mark(passed, in(y), decltype(g){});
        if constexpr (fused == ADD_RELU) in.write(grad_residual, g);
        auto d = in(by_x ? x : y) - in(centre);
        if constexpr (marks) in.mark(above, in(x), in(centre));
        if constexpr (fused == ADD_RELU && !by_x) d -= in(residual);
        return Terms{g, g * d};
      };
    };
  });
}

// Writes the gradients by weight and bias, by x where it is kept, and what first_pass does.
template <class T>
void write_gradients_of_learned(const Slab& slab, const Backward<T>& to, const BackwardBits& bits) {
  std::vector<double> totals;
  with_fused(fused_of(to), [&](auto fused) {
    if constexpr (fused != NOTHING)
      if (!to.x) return void(totals = first_pass<fused, false, false>(slab, to, bits));
    with_flag(bits.above != nullptr, [&](auto marks) {
      totals = first_pass<fused, true, marks>(slab, to, bits);
    });
  });
  for (int64_t c = slab.first(), i = 0; c < slab.last(); c++, i++) {
    const double product = totals[slab.width() + i];
    to.grad_bias[c] = float(totals[i]);
    to.grad_weight[c] = float(to.x        ? product * to.channels.inverse[c]
                              : to.weight ? product / to.weight[c]
                                          : product);
  }
}

// Writes grad_x = gain · g + (x > mean ? above : below), or + below where there are no such bits.
template <class T>
void write_gradient(const Slab& slab, const Backward<T>& to, const BackwardBits& bits,
                    const float* above, const float* below) {
  const int64_t length = slab.run_length();
  with_flag(bits.passed != nullptr, [&](auto masked) {
    with_flag(above != nullptr, [&](auto two_valued) {
      slab.each_place_in_parallel([&](auto at) {
        return [&, gain = at(to.channels.gain), low = at(below),
                high = at(two_valued ? above : below)](Run run) {
          const T* grad = (to.grad_residual ? to.grad_residual : to.grad) + run.offset;
          T* grad_x = to.grad_x + run.offset;
          const Bits* sign = bits_of(bits.above, run, length);
          const Bits* passed = bits_of(bits.passed, run, length);
          return [=, &gain, &low, &high](auto in) {
            auto g = in(grad);
            if constexpr (masked) g = in.choose(passed, g, decltype(g){});
            g *= in(gain);
            if constexpr (two_valued)
              g += in.choose(sign, in(high), in(low));
            else
              g += in(low);
            in.write(grad_x, g);
          };
        };
      });
    });
  });
}

}  // namespace nmlightning
