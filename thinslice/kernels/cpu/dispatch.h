// The kernels in use: the newest instruction set the processor has, or the one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace thinslice {

std::vector<std::string> available_isas();  // newest first
const KernelTable& kernels();
void set_isa(const std::string& name);  // throws std::invalid_argument

}  // namespace thinslice
