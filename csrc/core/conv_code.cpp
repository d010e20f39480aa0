// The x86-64 AVX-512 tier of sparse_conv2d: a mask as straight-line machine code. A strip of output
// channels keeps one vector of pixels each in registers; every input vector that any of them needs
// is loaded once, followed by one fused multiply-add per surviving weight, whose value comes from a
// plain array by embedded broadcast. Positions are in the code, values are not: training never
// changes the code.
#include "core.h"
#include "sparse_conv.h"

namespace st::ST_ISA {
namespace {

enum Register { kRcx = 1, kRdx = 2, kRsi = 6, kRdi = 7 };  // sums' start, sums, values, pixels
constexpr int kInput = kStripOutputs;                      // the vector after the accumulators

// Counts the bytes, and writes them if there is a buffer.
struct Emitter {
  uint8_t* code;
  int64_t size;

  void byte(int b) {
    if (code) code[size] = static_cast<uint8_t>(b);
    ++size;
  }
  void word(int64_t w) {
    for (int i = 0; i < 4; ++i) byte(static_cast<int>(w >> (8 * i)) & 0xFF);
  }
  // EVEX.512 of vector `reg`, vector `source` and [base + disp] (Intel's manual, volume 2, 2.7).
  void vector(int map, int prefix, bool broadcast, int opcode, int reg, int source, Register base,
              int64_t disp) {
    byte(0x62);
    byte((reg & 8 ? 0 : 0x80) | 0x60 | (reg & 16 ? 0 : 0x10) | map);
    byte(((~source & 15) << 3) | 4 | prefix);
    byte(0x40 | (broadcast ? 0x10 : 0) | (source & 16 ? 0 : 8));
    byte(opcode);
    const bool small = prefix && disp % 4 == 0 && disp >= -512 && disp < 512;  // in steps of 4
    byte((small ? 0x40 : 0x80) | ((reg & 7) << 3) | base);
    if (small)
      byte(static_cast<int>(disp / 4) & 0xFF);
    else
      word(disp);
  }
  void load(int reg, Register base, int64_t disp) { vector(1, 0, false, 0x10, reg, 0, base, disp); }
  void store(int reg, Register base, int64_t disp) {
    vector(1, 0, false, 0x11, reg, 0, base, disp);
  }
  void broadcast(int reg, Register base, int64_t disp) {
    vector(2, 1, false, 0x18, reg, 0, base, disp);
  }
  void multiply_add(int reg, int source, Register base, int64_t disp) {
    vector(2, 1, true, 0xB8, reg, source, base, disp);
  }
  void advance_values(int64_t bytes) {  // add rsi, bytes
    byte(0x48), byte(0x81), byte(0xC6), word(bytes);
  }
  void leave() {  // vzeroupper; ret
    byte(0xC5), byte(0xF8), byte(0x77), byte(0xC3);
  }
};

struct Strip {
  int64_t first, count, group;
};

inline Strip strip_of(const Conv& c, int64_t strip) {
  const int64_t outputs = c.outputs / c.groups, strips = conv_strips(c) / c.groups;
  const int64_t group = strip / strips, i = strip % strips;
  const int64_t first = outputs * i / strips;
  return {group * outputs + first, outputs * (i + 1) / strips - first, group};
}

// Tests bit k of rows first, first + 1, ... of the mask.
inline uint32_t live_rows(const uint32_t* ST_RESTRICT words, int64_t stride, const Strip& strip,
                          int64_t k) {
  uint32_t live = 0;
  for (int64_t i = 0; i < strip.count; ++i)
    live |= (words[(strip.first + i) * stride + k / 32] >> (k % 32) & 1) << i;
  return live;
}

// The place of (row, k) among the values, which are in canonical order.
inline int32_t live_rank(const uint32_t* ST_RESTRICT row, int64_t k, int32_t first) {
  for (int64_t w = 0; w < k / 32; ++w) first += __builtin_popcount(row[w]);
  return first + __builtin_popcount(row[k / 32] & ((1u << (k % 32)) - 1));
}

using Entry = void (*)(const float* x, const float* values, float* sums, const float* start);

}  // namespace

int64_t conv_code(const uint32_t* ST_RESTRICT words, Conv conv, ConvPlan plan, CodeParts parts,
                  uint8_t* ST_RESTRICT code) {
  const int64_t channels = conv.channels / conv.groups, k = conv_columns(conv);
  const int64_t stride = row_words(k);
  place_columns(conv, plan, parts.columns);
  int64_t rank = 0;
  for (int64_t o = 0; o < conv.outputs; ++o) {
    parts.ranks[o] = static_cast<int32_t>(rank);
    live_columns(words + o * stride, k, [&](int64_t) { ++rank; });
  }
  Emitter out{code, 0};
  int32_t emitted = 0;
  for (int64_t s = 0; s < conv_strips(conv); ++s) {
    const Strip strip = strip_of(conv, s);
    parts.entries[s] = out.size;
    parts.values[s] = emitted;
    for (int i = 0; i < strip.count; ++i) out.broadcast(i, kRcx, 4 * i);
    int64_t at = -kCodeBias;  // of the next value, from rsi
    for (int64_t column = 0; column < k; ++column) {
      // All taps of a channel together: they read the same few cache lines.
      const int64_t at_k = column % (k / channels) * channels + column / (k / channels);
      uint32_t live = live_rows(words, stride, strip, at_k);
      if (live) out.load(kInput, kRdi, 4 * int64_t{parts.columns[at_k].offset});
      for (; live; live &= live - 1) {
        if (at == kCodeBias) {
          out.advance_values(8 * kCodeBias);
          at = -kCodeBias;
        }
        const int row = __builtin_ctz(live);
        out.multiply_add(row, kInput, kRsi, 4 * at++);
        const int64_t o = strip.first + row;
        if (code) parts.order[emitted] = live_rank(words + o * stride, at_k, parts.ranks[o]);
        ++emitted;
      }
    }
    for (int i = 0; i < strip.count; ++i) out.store(i, kRdx, 64 * kConvTile * i);
    out.leave();
  }
  return out.size;
}

void run_conv_code(const float* ST_RESTRICT x, const float* ST_RESTRICT values,
                   const float* ST_RESTRICT bias, float* ST_RESTRICT y, Conv conv, ConvPlan plan,
                   ConvScratch scratch, CodeParts parts, const uint8_t* ST_RESTRICT code,
                   float* ST_RESTRICT stream, int64_t live, int nthreads) {
  const float no_bias[kStripOutputs] = {};
  const int threads = threads_for(live, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < live; ++i) stream[i] = values[parts.order[i]];
  const int64_t group_floats = conv.channels / conv.groups * plan.channel_floats;
  const int64_t tiles = (plan.vectors + kConvTile - 1) / kConvTile;
  const auto work = [&](const float* planes, float* image_y, int64_t index, int64_t s0, int64_t s1,
                        int thread) {
    const Tile tile = tile_of(plan, index, tiles);
    float* const sums = scratch.sums + thread * conv_sums_floats(conv);
    for (int64_t s = s0; s < s1; ++s) {
      const Strip strip = strip_of(conv, s);
      const Entry entry = reinterpret_cast<Entry>(code + parts.entries[s]);
      const float* const from = planes + strip.group * group_floats + tile.base;
      const float* const start = bias ? bias + strip.first : no_bias;
      for (int64_t i = 0; i < tile.count; ++i)
        entry(from + 16 * i, stream + parts.values[s] + kCodeBias, sums + 16 * i, start);
      for (int64_t i = 0; i < strip.count; ++i)
        store_tile(sums + 16 * kConvTile * i, tile, conv, plan,
                   image_y + (strip.first + i) * conv.out_height * conv.out_width);
    }
  };
  over_images(x, y, conv, plan, conv_strips(conv), scratch.planes, tiles, nthreads, work);
}

}  // namespace st::ST_ISA
