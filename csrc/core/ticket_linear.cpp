#include "core.h"
#include "linear_rows.h"
#include "philox.h"

namespace st::ST_ISA {
namespace {

// Signs come from the caller's plane, or are made 64 units (4,096 weights) at a time.
struct TicketRow {
  static constexpr int64_t kChunkWords = 128;
  const uint32_t* words;
  const uint32_t* plane;
  uint64_t unit;
  int64_t words_a_row;
  uint32_t key, high;
  Vec sigma;
  uint32_t word = 0, negative = 0;
  uint32_t made[kChunkWords];

  void next(int64_t first) {
    const int64_t w = first >> 5;
    word = words[w];
    if (plane) {
      negative = plane[w];
      return;
    }
    if (w % kChunkWords == 0) {
      const int64_t left = words_a_row - w;
      philox_run<true>(unit + w / 2, (left < kChunkWords ? left : kChunkWords) / 2, key, high,
                       made);
    }
    negative = made[w % kChunkWords];
  }
  Vec weights(int64_t, int64_t, int half) const {
    return keep(flip(sigma, negative >> (16 * half) & 0xFFFF), word >> (16 * half) & 0xFFFF);
  }
};

template <typename T>
void run(const T* x, const uint32_t* words, const uint32_t* signs, const T* bias, T* y,
         int64_t batch, int64_t rows, int64_t k, float sigma, uint32_t key, uint32_t high,
         int nthreads) {
  const int64_t words_a_row = row_words(k);
  const auto source = [=](int64_t row) {
    TicketRow ticket;
    ticket.words = words + row * words_a_row;
    ticket.plane = signs ? signs + row * words_a_row : nullptr;
    ticket.unit = static_cast<uint64_t>(row * (words_a_row / 2));
    ticket.words_a_row = words_a_row;
    ticket.key = key;
    ticket.high = high;
    ticket.sigma = broadcast(sigma);
    return ticket;
  };
  linear_rows(x, bias, y, batch, rows, k, source, nthreads);
}

}  // namespace

void ticket_linear(const void* ST_RESTRICT x, const uint32_t* ST_RESTRICT words,
                   const uint32_t* ST_RESTRICT signs, const void* ST_RESTRICT bias,
                   void* ST_RESTRICT y, Dtype dtype, int64_t batch, int64_t rows, int64_t k,
                   float sigma, uint32_t key, uint32_t high, int nthreads) {
  if (dtype == Dtype::f32)
    run(static_cast<const float*>(x), words, signs, static_cast<const float*>(bias),
        static_cast<float*>(y), batch, rows, k, sigma, key, high, nthreads);
  else
    run(static_cast<const bf16*>(x), words, signs, static_cast<const bf16*>(bias),
        static_cast<bf16*>(y), batch, rows, k, sigma, key, high, nthreads);
}

}  // namespace st::ST_ISA
