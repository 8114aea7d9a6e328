// The border of what fills packed matrices; see thinslice/kernels/native_pack.py.
#pragma once

#include <nanobind/nanobind.h>

namespace thinslice {

void bind_packing(nanobind::module_& m);

}  // namespace thinslice
