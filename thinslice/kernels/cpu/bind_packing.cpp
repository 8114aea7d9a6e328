#include "bind_packing.h"

#include "border.h"
#include "packing.h"

namespace thinslice {

namespace {

uint32_t py_quantize(Address x, int dtype, int64_t stride, int64_t rows, int64_t groups, int format,
                     Address panels) {
  QuantizeJob job;
  job.x = pointer<const void>(x);
  job.dtype = static_cast<Dtype>(dtype);
  job.stride = stride;
  job.rows = rows;
  job.groups = groups;
  job.format = static_cast<Format>(format);
  job.panels = pointer<uint8_t>(panels);
  const GilRelease release;
  return quantize(job);
}

uint32_t py_repack(Address blocks, int type, int64_t rows, int64_t groups, Address panels) {
  const RepackJob job = {pointer<const uint8_t>(blocks), static_cast<GgmlType>(type), rows, groups,
                         pointer<uint8_t>(panels)};
  const GilRelease release;
  return repack(job);
}

void py_convert(Address from, int from_dtype, Address to, int to_dtype, int64_t count) {
  const GilRelease release;
  convert(pointer<const void>(from), static_cast<Dtype>(from_dtype), pointer(to),
          static_cast<Dtype>(to_dtype), count);
}

}  // namespace

void bind_packing(nb::module_& m) {
  m.def("quantize", py_quantize);
  m.def("repack", py_repack);
  m.def("convert", py_convert);
  m.attr("NOT_FINITE") = static_cast<uint32_t>(kNotFinite);
  m.attr("TOO_LARGE") = static_cast<uint32_t>(kTooLarge);
}

}  // namespace thinslice
