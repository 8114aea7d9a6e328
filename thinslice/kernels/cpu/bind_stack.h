// The border of stack.h; thinslice/kernels/native_stack.py checks every argument.
#pragma once

#include <nanobind/nanobind.h>

namespace thinslice {

void bind_stack(nanobind::module_& m);

}  // namespace thinslice
