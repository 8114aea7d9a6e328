#include "paged.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace thinslice {

namespace {

void check_range(int64_t value, int64_t end, const char* what) {
  if (value >= 0 && value < end) return;
  throw std::invalid_argument(std::string(what) + " " + std::to_string(value) +
                              " is outside 0.." + std::to_string(end - 1));
}

void check_sequence(const AttentionJob& job, int64_t sequence) {
  const int64_t start = job.query_starts[sequence], end = job.query_starts[sequence + 1];
  const int64_t context = job.context_lens[sequence];
  if (start > end || context < end - start) {
    throw std::invalid_argument("sequence " + std::to_string(sequence) + " has " +
                                std::to_string(end - start) + " new tokens in a context of " +
                                std::to_string(context));
  }
  const int64_t num_blocks = (context + job.block_size - 1) / job.block_size;
  if (num_blocks > job.max_blocks) {
    throw std::invalid_argument("a context of " + std::to_string(context) + " needs " +
                                std::to_string(num_blocks) + " blocks, the table has " +
                                std::to_string(job.max_blocks));
  }
  // Blocks that lie before the window of the first new token may be gone.
  const int64_t first_pos = context - (end - start);
  const int64_t first_seen = job.window ? std::max<int64_t>(0, first_pos + 1 - job.window) : 0;
  for (int64_t i = first_seen / job.block_size; i < num_blocks; ++i) {
    check_range(job.block_tables[sequence * job.max_blocks + i], job.num_blocks, "block");
  }
}

void check(const AttentionJob& job) {
  if (job.query_starts[0] != 0 || job.query_starts[job.num_sequences] != job.num_tokens) {
    throw std::invalid_argument("query_starts must run from 0 to the number of tokens");
  }
  for (int64_t s = 0; s < job.num_sequences; ++s) check_sequence(job, s);
}

// Rows a thread takes at a time when a row is `dim` elements: about 16 KiB.
int64_t row_grain(int64_t dim) { return std::max<int64_t>(1, 4096 / dim); }

struct Piece {
  int64_t sequence;
  int64_t first_row;
  int64_t last_row;
};

// Longest first: late pieces of a prompt see more positions.
std::vector<Piece> pieces_of(const AttentionJob& job) {
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < job.num_sequences; ++s) {
    const int64_t end = job.query_starts[s + 1];
    for (int64_t row = job.query_starts[s]; row < end; row += kAttentionTokens) {
      pieces.push_back({s, row, std::min<int64_t>(end, row + kAttentionTokens)});
    }
  }
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

}  // namespace

void rope(const RopeJob& job) {
  for (int64_t i = 0; i < job.num_tokens; ++i) {
    check_range(job.positions[i], job.num_positions, "position");
  }
  const KernelTable& table = kernels();
  parallel_for(job.num_tokens, row_grain(job.num_heads * job.head_dim),
               [&](int64_t first, int64_t last) { table.rope(job, first, last); });
}

void write_kv(const WriteKvJob& job) {
  for (int64_t i = 0; i < job.num_tokens; ++i) {
    check_range(job.slots[i], job.num_blocks * job.block_size, "slot");
  }
  const KernelTable& table = kernels();
  parallel_for(job.num_tokens, row_grain(2 * job.num_kv_heads * job.head_dim),
               [&](int64_t first, int64_t last) { table.write_kv(job, first, last); });
}

void attention(const AttentionJob& job) {
  check(job);
  const ScratchLease lease;
  const std::vector<Piece> pieces = pieces_of(job);
  const KernelTable& table = kernels();
  const std::size_t bytes = table.attention_scratch_floats(job) * sizeof(float);
  const int64_t items = static_cast<int64_t>(pieces.size()) * job.num_kv_heads;
  parallel_for(items, 1, [&](int64_t first, int64_t last) {
    float* scratch = reinterpret_cast<float*>(thread_scratch(bytes));
    for (int64_t i = first; i < last; ++i) {
      const Piece& piece = pieces[i / job.num_kv_heads];
      table.attention(job, piece.sequence, piece.first_row, piece.last_row, i % job.num_kv_heads,
                      scratch);
    }
  });
}

}  // namespace thinslice
