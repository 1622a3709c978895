// Decoding on a CPU: products of few rows, and attention over a cache, each number of which is read
// once and where it lies.
//
// XLA's CPU backend writes the second factor of a bfloat16 product in another order before it
// multiplies, kernel or cache, at every call. For a training step that is little; for a step of a
// few rows it is most of the time.
//
// bfloat16 numbers come as bits. A word of 32 bits holds two: its halves, shifted, are float32.

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HINTSIGHT_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HINTSIGHT_TILES 0
#endif

namespace ffi = xla::ffi;

namespace {

// Lanes of a vector of float32, and rows of a block whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 4, kWideRows = 6;
#else
constexpr int kLanes = 8, kRows = 2, kWideRows = 3;
#endif
using Floats = float __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
using Words = uint32_t __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
using Ints = int32_t __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Words LoadWords(const uint16_t* p) { return *reinterpret_cast<const Words*>(p); }
inline Floats Load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void Store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }

// x in a register: else a compiler may load it again wherever it is used.
inline Floats Kept(Floats x) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#else
  asm("" : "+x"(x));
#endif
#endif
  return x;
}

inline Floats Low(Words w) { return (Floats)(w << 16); }
inline Floats High(Words w) { return (Floats)(w & 0xffff0000u); }

inline float Sum(Floats x) {
  // Halves are added until four lanes are left: lane after lane would wait for every sum.
  using Four = float __attribute__((vector_size(16)));
  Four parts[kLanes / 4];
  std::memcpy(parts, &x, sizeof(x));
  for (int count = kLanes / 8; count; count /= 2)
    for (int i = 0; i < count; ++i) parts[i] += parts[i + count];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}
inline float Largest(Floats x) {
  float largest = x[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, x[lane]);
  return largest;
}

// Where number i lies once the words' halves are apart: in each 2 kLanes the even before the odd.
inline int64_t Place(int64_t i) {
  int64_t lane = i % (2 * kLanes);
  return i - lane + lane / 2 + lane % 2 * kLanes;
}

inline uint16_t Rounded(float x) {  // To the nearest bfloat16, ties to even.
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
inline float AsFloat(uint16_t bits) {
  uint32_t u = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// Memory of a thread, kept for the next call.
template <typename T, int kUse>
T* Scratch(size_t count) {
  constexpr size_t kLine = 64;
  thread_local std::vector<char> memory;
  if (memory.size() < count * sizeof(T) + kLine) memory.resize(count * sizeof(T) + kLine);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
}

// Calls run(task) for all tasks, on the calling thread and on those of XLA's pool that are free.
// A thread of the pool that comes late finds nothing left and touches nothing of the caller's.
template <typename F>
void ForEach(ffi::ThreadPool& pool, int64_t tasks, const F& run) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, tasks, &run] {
    for (int64_t task; (task = state->next.fetch_add(1)) < tasks;) {
      run(task);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min(pool.num_threads(), tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (state->done.load(std::memory_order_acquire) < tasks) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// ---------------------------------------------------------------------------------------- products

constexpr int64_t kPanel = 32;  // Columns of a result that a task computes.
constexpr int kColumns = 4;  // Those whose sums stay in registers.
constexpr int kLine = 32;  // bfloat16 numbers of a line of a cache.
constexpr int64_t kDeep = 768;  // Numbers that are added up in one go.
constexpr int64_t kAhead = 4096;  // Bytes of a kernel that are asked for before they are needed.

// 2^x for x <= 0, to float32's precision; 0 far below.
inline Floats Exp2(Floats x) {
  x = x > -126.0f ? x : Floats{} - 126.0f;
  Ints whole = __builtin_convertvector(x - 0.5f, Ints);  // Truncated: the nearest, as x <= 0.
  Floats f = x - __builtin_convertvector(whole, Floats);
  // 2^f on [-1/2, 1/2], by its Taylor polynomial: the error is below 2^-26.
  Floats y = f * 1.5403530e-4f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  return y * (Floats)((whole + 127) << 23);
}
constexpr float kLog2E = 1.44269504f;

inline Floats Sigmoid(Floats x) {
  Floats small = Exp2((x > 0.0f ? -x : x) * kLog2E);
  return (x > 0.0f ? Floats{} + 1.0f : small) / (small + 1.0f);
}

// What a feed-forward multiplies its two products by; kPlain has one product.
enum Activation : int32_t { kPlain = 0, kSilu = 1, kGeluTanh = 2 };

inline Floats Activated(Floats x, int32_t activation) {
  if (activation == kSilu) return x * Sigmoid(x);
  // (1 + tanh(u)) / 2 is the sigmoid of 2 u.
  return x * Sigmoid((x + x * x * x * 0.044715f) * 1.5957691f);
}

// Calls f with the number of rows, as a constant, of each block of at most kMost.
template <int kMost, typename F>
void InBlocks(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + kMost <= rows; row += kMost) f(std::integral_constant<int, kMost>(), row);
  if constexpr (kMost > 1) {
    if (row < rows)
      InBlocks<kMost - 1>(rows - row, [&](auto count, int64_t next) { f(count, row + next); });
  }
}

// What x [., k] is before it is multiplied: itself, or its RMS norm with a scale [k]; of the rows
// that count.
struct Input {
  const float* x;
  const float* scale;  // nullptr: no norm.
  float eps;
  int64_t k;
  std::vector<int64_t> counted, others;  // Where they are in x.

  int64_t rows() const { return counted.size(); }

  // What a row is multiplied by besides the scale.
  float Factor(int64_t row) const {
    if (scale == nullptr) return 1;
    Floats squares = {};
    for (int64_t i = 0; i < k; i += kLanes) {
      Floats own = Load(x + counted[row] * k + i);
      squares += own * own;
    }
    return 1 / std::sqrt(Sum(squares) / k + eps);
  }
  Floats At(int64_t row, int64_t i, float factor) const {
    Floats own = Load(x + counted[row] * k + i) * factor;
    return scale == nullptr ? own : own * Load(scale + i);
  }
};

// kCount rows of x, in the order of `Place`, times four rows of a kernel [., k]. Added up as
// `WideDots` does it, so that a row's result does not depend on how many others there are.
template <int kCount>
void Dots(const float* x, int64_t k, const uint16_t* kernel, float* y) {
  for (int64_t begin = 0; begin < k; begin += kDeep) {
    Floats sums[kCount][kColumns] = {};
    for (int64_t i = begin; i < std::min(begin + kDeep, k); i += 2 * kLanes) {
      for (int c = 0; c < kColumns; ++c) {
        __builtin_prefetch(reinterpret_cast<const char*>(kernel + c * k + i) + kAhead);
        Words words = LoadWords(kernel + c * k + i);
        Floats low = Low(words), high = High(words);
        for (int r = 0; r < kCount; ++r) {
          sums[r][c] += low * Load(x + r * k + i);
          sums[r][c] += high * Load(x + r * k + i + kLanes);
        }
      }
    }
    for (int r = 0; r < kCount; ++r)
      for (int c = 0; c < kColumns; ++c) {
        float* place = y + r * kPanel + c;
        *place = (begin ? *place : 0) + Sum(sums[r][c]);
      }
  }
}

// `count` numbers of four rows of a kernel [., k] as float32, in the order of `Place`.
inline void Widen(const uint16_t* kernel, int64_t k, int64_t count, float* wide) {
  for (int c = 0; c < kColumns; ++c, kernel += k)
    for (int64_t i = 0; i < count; i += 2 * kLanes, wide += 2 * kLanes) {
      Words words = LoadWords(kernel + i);
      Store(wide, Low(words));
      Store(wide + kLanes, High(words));
    }
}

// Adds to y, of kCount rows, `Dots` of as many numbers as `Widen` made. Meanwhile those of a kernel
// that come `next` are asked for.
template <int kCount>
void WideDots(const float* x, int64_t k, const float* wide, int64_t count, const uint16_t* next,
              float* y) {
  Floats sums[kCount][kColumns] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int line = 0; line < kColumns * kLanes; line += kLine)
      __builtin_prefetch(next + (i + line) / kLanes % kColumns * k + i / kLine * kLine);
    Floats own[kCount];
    for (int r = 0; r < kCount; ++r) own[r] = Kept(Load(x + r * k + i));
    for (int c = 0; c < kColumns; ++c) {
      Floats column = Kept(Load(wide + c * count + i));
      for (int r = 0; r < kCount; ++r) sums[r][c] += own[r] * column;
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int c = 0; c < kColumns; ++c) y[r * kPanel + c] += Sum(sums[r][c]);
}

struct VectorProducts {
  struct Setup {};
  static constexpr int64_t kBlock = 16;  // Rows that are prepared together.
  using Number = float;

  // x in float32, rounded to bfloat16, in the order of `Place`: numbers of `Panel`'s first argument.
  static void Prepare(const Input& in, int64_t block, float* out) {
    for (int64_t row = block; row < std::min(block + kBlock, in.rows()); ++row) {
      float factor = in.Factor(row);
      for (int64_t i = 0; i < in.k; i += kLanes) {
        Floats own = in.At(row, i, factor);
        for (int lane = 0; lane < kLanes; ++lane)
          out[row * in.k + Place(i + lane)] = AsFloat(Rounded(own[lane]));
      }
    }
  }

  // y [rows, kPanel] of kPanel rows of a kernel.
  static void Panel(const float* x, int64_t rows, int64_t k, const uint16_t* kernel, float* y) {
    if (rows <= kRows) {
      for (int64_t column = 0; column < kPanel; column += kColumns)
        InBlocks<kRows>(rows, [&](auto count, int64_t row) {
          Dots<count>(x + row * k, k, kernel + column * k, y + row * kPanel + column);
        });
      return;
    }
    // So many that a core's first cache has the kernel's, and its second one all of the rows.
    constexpr int64_t kMost = 16 * kWideRows;
    float* wide = Scratch<float, 13>(kColumns * kDeep);
    std::fill(y, y + rows * kPanel, 0.0f);
    for (int64_t begin = 0; begin < rows; begin += kMost)
      for (int64_t column = 0; column < kPanel; column += kColumns)
        for (int64_t i = 0; i < k; i += kDeep) {
          const uint16_t* own = kernel + column * k + i;
          const int64_t count = std::min(kDeep, k - i);
          const uint16_t* next = own + (i + count < k ? count : kColumns * k - i);
          Widen(own, k, count, wide);
          InBlocks<kWideRows>(std::min(kMost, rows - begin), [&](auto many, int64_t row) {
            row += begin;
            WideDots<many>(x + row * k + i, k, wide, count, next, y + row * kPanel + column);
          });
        }
  }
};

#if HINTSIGHT_TILES
// Tiles of 16 x 32 bfloat16 (AMX): TDPBF16PS adds A [16, 32] times B [32, 16], whose rows lie in
// pairs, to C [16, 16] of float32. A are a kernel's rows, where they lie; B is x, and C is y
// transposed.
constexpr int64_t kTile = 16, kDepth = 32;

bool TilesAllowed() {
  // Linux gives a process the tiles' registers on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}

class Tiles {  // Configured for as long as it lives.
 public:
  Tiles() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = kTile;
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// 32 numbers of float32 as bfloat16.
inline void StoreRounded(uint16_t* out, __m512 first, __m512 second) {
  __m512bh both = _mm512_cvtne2ps_pbh(second, first);
  std::memcpy(out, &both, sizeof(both));
}

// out[i] = from[i * stride], 16 words of 32 bits.
inline __m512i Column(const void* from, int64_t stride) {
  const __m512i lines = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(stride));
  return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, lines, from, 4);
}

// C tiles 0 to 3: two of a kernel's rows times one or two (kTwo) of x.
template <bool kTwo>
void MultiplyTiles(const uint16_t* kernel, const uint16_t* x, int64_t k) {
  _tile_zero(0);
  _tile_zero(1);
  if (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < k; i += kDepth, x += kTile * kDepth) {
    _tile_loadd(4, kernel + i, 2 * k);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, kernel + kTile * k + i, 2 * k);
    _tile_dpbf16ps(1, 5, 6);
    if (kTwo) {
      _tile_loadd(7, x + kTile * k, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

struct TileProducts {
  using Setup = Tiles;
  static constexpr int64_t kBlock = kTile;
  using Number = uint16_t;

  // x as tiles of B, [rows / 16, k / 32, 16 pairs, 16 rows, 2], zeros behind the last row.
  static void Prepare(const Input& in, int64_t block, uint16_t* out) {
    uint16_t* rows = Scratch<uint16_t, 10>(kTile * in.k);
    for (int64_t r = 0; r < kTile; ++r) {
      uint16_t* own = rows + r * in.k;
      if (block + r >= in.rows()) {
        std::fill(own, own + in.k, 0);
        continue;
      }
      float factor = in.Factor(block + r);
      for (int64_t i = 0; i < in.k; i += kDepth)
        StoreRounded(own + i, (__m512)in.At(block + r, i, factor),
                     (__m512)in.At(block + r, i + kLanes, factor));
    }
    out += block * in.k;
    for (int64_t i = 0; i < in.k; i += 2, out += 2 * kTile)
      _mm512_store_si512(out, Column(rows + i, in.k / 2));
  }

  static void Panel(const uint16_t* x, int64_t rows, int64_t k, const uint16_t* kernel, float* y) {
    static_assert(kPanel == 2 * kTile);
    alignas(64) float sums[4][kTile][kTile];
    for (int64_t row = 0; row < rows; row += 2 * kTile) {
      bool two = row + kTile < rows;
      (two ? MultiplyTiles<true> : MultiplyTiles<false>)(kernel, x + row * k, k);
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      if (two) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
      }
      int64_t count = std::min<int64_t>(2 * kTile, rows - row);
      for (int64_t r = 0; r < count; ++r, y += kPanel) {
        const float* own = &sums[r / kTile * 2][0][r % kTile];
        _mm512_store_si512(y, Column(own, kTile));
        _mm512_store_si512(y + kTile, Column(own + kTile * kTile, kTile));
      }
    }
  }
};
#else
bool TilesAllowed() { return false; }
#endif

// y [rows, n] = x [rows, k] times the transpose of a kernel [n, k]; of a gated product, what the
// activation of that is, times x by a second kernel.
struct Product {
  const uint16_t* kernel;
  const uint16_t* second;
  float* y;
  int64_t n;
};

template <typename By>
void Multiply(ffi::ThreadPool& pool, const Input& in, const std::vector<Product>& products,
              const float* residual, int32_t activation) {
  const int64_t rows = in.rows(), k = in.k, blocks = (rows + By::kBlock - 1) / By::kBlock;
  auto* own = Scratch<typename By::Number, 0>(blocks * By::kBlock * k);
  ForEach(pool, blocks, [&](int64_t block) { By::Prepare(in, block * By::kBlock, own); });
  std::vector<int64_t> ends;  // Of each product's tasks.
  for (const Product& p : products)
    ends.push_back((ends.empty() ? 0 : ends.back()) + p.n / kPanel);
  ForEach(pool, ends.back(), [&](int64_t task) {
    [[maybe_unused]] typename By::Setup setup;
    int64_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const Product& p = products[i];
    const int64_t begin = (task - (i ? ends[i - 1] : 0)) * kPanel;
    float* first = Scratch<float, 11>(2 * rows * kPanel);
    float* second = first + rows * kPanel;
    By::Panel(own, rows, k, p.kernel + begin * k, first);
    if (activation != kPlain) By::Panel(own, rows, k, p.second + begin * k, second);
    auto finish = [&](int64_t row, int64_t c, Floats y) {
      int64_t place = row * p.n + begin + c;
      if (residual != nullptr) y += Load(residual + place);
      Store(p.y + place, y);
    };
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        Floats y = Load(first + row * kPanel + c);
        if (activation != kPlain)
          y = Activated(y, activation) * Load(second + row * kPanel + c);
        finish(in.counted[row], c, y);
      }
    for (int64_t row : in.others)
      for (int64_t c = 0; c < kPanel; c += kLanes) finish(row, c, Floats{});
  });
}

// Of the kernels, one for each result; or two for one, whose product is gated by an activation. The
// norm's scale and the residual have no elements where there is none, nor has `counts` where all
// rows count; of one that does not the product is zero.
ffi::Error Products(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                    ffi::Buffer<ffi::F32> residual, ffi::Buffer<ffi::PRED> counts,
                    ffi::RemainingArgs kernels, ffi::RemainingRets results, float eps,
                    int32_t activation) {
  Input in{x.typed_data(), scale.element_count() ? scale.typed_data() : nullptr, eps,
           x.dimensions()[1], {}, {}};
  for (int64_t row = 0; row < x.dimensions()[0]; ++row) {
    bool counted = counts.element_count() == 0 || counts.typed_data()[row];
    (counted ? in.counted : in.others).push_back(row);
  }
  std::vector<Product> products;
  for (size_t i = 0; i < results.size(); ++i) {
    auto kernel = kernels.get<ffi::AnyBuffer>(i);
    auto second = kernels.get<ffi::AnyBuffer>(activation == kPlain ? i : i + 1);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!kernel.has_value() || !second.has_value() || !result.has_value())
      return ffi::Error::InvalidArgument("a kernel or a result is not a buffer");
    products.push_back({static_cast<const uint16_t*>(kernel->untyped_data()),
                        static_cast<const uint16_t*>(second->untyped_data()),
                        static_cast<float*>((*result)->untyped_data()), kernel->dimensions()[0]});
  }
  auto multiply = Multiply<VectorProducts>;
#if HINTSIGHT_TILES
  if (TilesAllowed()) multiply = Multiply<TileProducts>;
#endif
  multiply(pool, in, products, residual.element_count() ? residual.typed_data() : nullptr,
           activation);
  return ffi::Error::Success();
}

// --------------------------------------------------------------------------------------- attention

constexpr float kMasked = -1e30f;
constexpr int64_t kStep = 64;  // Positions whose scores are computed together.

// Scores of kCount rows of q [., H] with keys [H, stride], 2 * kLanes * kWords positions. Meanwhile
// the same positions' values v and the next ones' keys are asked for.
template <int kCount, int kWords>
void Scores(const float* q, const uint16_t* k, int64_t stride, int64_t width, float* scores,
            int64_t scores_stride, const uint16_t* v) {
  constexpr int kOwn = kWords * 2 * kLanes;
  Floats even[kCount][kWords] = {}, odd[kCount][kWords] = {};
  for (int64_t h = 0; h < width; ++h, k += stride, v += kOwn) {
    for (int i = 0; i < kOwn; i += kLine) {
      __builtin_prefetch(k + kStep + i);
      __builtin_prefetch(v + i);
    }
    for (int w = 0; w < kWords; ++w) {
      Words words = LoadWords(k + w * 2 * kLanes);
      Floats low = Low(words), high = High(words);
      for (int r = 0; r < kCount; ++r) {
        even[r][w] += low * q[r * width + h];
        odd[r][w] += high * q[r * width + h];
      }
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int w = 0; w < kWords; ++w) {
      float* place = scores + r * scores_stride + w * 2 * kLanes;
      Store(place, even[r][w]);
      Store(place + kLanes, odd[r][w]);
    }
}

// Sums of values [count, width], 4 kLanes of them, by weights of kCount rows, in Scores' order;
// written in the order of `Place`.
template <int kCount>
void Weighted(const float* weights, int64_t weights_stride, const uint16_t* v, int64_t count,
              int64_t width, float* out) {
  Floats sums[kCount][4] = {};
  // Positions in pairs: an odd one's weight lies kLanes behind the even one's before it.
  for (int64_t i = 0; i < count; i += 2 * kLanes, weights += 2 * kLanes) {
    const int64_t here = std::min<int64_t>(2 * kLanes, count - i);
    for (int64_t lane = 0; lane < here; ++lane, v += width) {
      const float* own = weights + lane / 2 + lane % 2 * kLanes;
      for (int w = 0; w < 2; ++w) {
        Words words = LoadWords(v + w * 2 * kLanes);
        Floats low = Low(words), high = High(words);
        for (int r = 0; r < kCount; ++r) {
          float weight = own[r * weights_stride];
          sums[r][2 * w] += low * weight;
          sums[r][2 * w + 1] += high * weight;
        }
      }
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int w = 0; w < 4; ++w) Store(out + r * width + w * kLanes, sums[r][w]);
}

struct Sizes {
  int64_t batch, tokens, groups, heads, width, room, columns, rows;
};

// A part of a softmax's sum: of each row the largest score, the weights' sum and the values' sum.
struct Part {
  float* peak;
  float* total;
  float* sums;
};

// The two products of attention, by vectors and, below, by tiles.
struct ByVectors {
  struct Setup {};

  // Where a position's score, or a value's number, lies.
  static int64_t At(int64_t i) { return Place(i); }

  static void Score(const Sizes& z, const float* q, int64_t i, const uint16_t* k, int64_t k_stride,
                    const uint16_t* v, float* scores, int64_t stride) {
    constexpr int kWords = 2;
    constexpr int64_t kOwn = kWords * 2 * kLanes;
    for (int64_t end = i + kStep; i < end; i += kOwn, k += kOwn, v += kOwn * z.width)
      InBlocks<kRows>(z.rows, [&](auto rows, int64_t row) {
        Scores<rows, kWords>(
            q + row * z.width, k, k_stride, z.width, scores + row * stride + i, stride, v);
      });
  }

  static void Sum(const Sizes& z, const float* weights, int64_t stride, const uint16_t* v,
                  int64_t count, float* sums) {
    InBlocks<kRows>(z.rows, [&](auto rows, int64_t row) {
      for (int64_t h = 0; h < z.width; h += 4 * kLanes)
        Weighted<rows>(
            weights + row * stride, stride, v + h, count, z.width, sums + row * z.width + h);
    });
  }
};

#if HINTSIGHT_TILES
// Queries, and then weights, are A, 16 rows of them; keys and values are B, whose rows, h or
// positions, have to lie in pairs.
struct ByTiles {
  using Setup = Tiles;

  static int64_t At(int64_t i) { return i; }

  // 32 columns of `kDepth` rows: a tile of the first 4 of each 8 columns, and one of the others.
  static void Pair(const uint16_t* b, int64_t stride, uint16_t* tiles) {
    for (int64_t i = 0; i < kDepth; i += 2, tiles += 2 * kTile) {
      __m512i first = _mm512_loadu_si512(b + i * stride);
      __m512i second = _mm512_loadu_si512(b + (i + 1) * stride);
      _mm512_store_si512(tiles, _mm512_unpacklo_epi16(first, second));
      _mm512_store_si512(tiles + kTile * kDepth, _mm512_unpackhi_epi16(first, second));
    }
  }

  // Undoes the order of `Pair`'s columns for a row of two tiles' results.
  static void Join(const float* first, const float* second, float* out) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    __m512 a = _mm512_load_ps(first), b = _mm512_load_ps(second);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(out + kTile, _mm512_permutex2var_ps(a, high, b));
  }

  // x [z.rows, stride] in bfloat16, zeros behind the last row up to a whole tile.
  static const uint16_t* Operand(const Sizes& z, const float* x, int64_t stride) {
    int64_t rows = (z.rows + kTile - 1) / kTile * kTile;
    uint16_t* out = Scratch<uint16_t, 8>(rows * stride);
    for (int64_t i = 0; i < z.rows * stride; i += 2 * kTile)
      StoreRounded(out + i, _mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i + kTile));
    std::fill(out + z.rows * stride, out + rows * stride, 0);
    return out;
  }

  static void Score(const Sizes& z, const float* q, int64_t i, const uint16_t* k, int64_t k_stride,
                    const uint16_t* v, float* scores, int64_t stride) {
    const uint16_t* a = Operand(z, q, z.width);
    uint16_t* pairs = Scratch<uint16_t, 9>(z.width * kDepth);
    alignas(64) float sums[2][kTile][kTile];
    for (int64_t part = 0; part < 2; ++part, k += kDepth, i += kDepth) {
      for (int64_t h = 0; h < z.width; h += kDepth) {
        for (int64_t row = h; row < h + kDepth; ++row, v += kLine) {
          __builtin_prefetch(k + row * k_stride + 2 * kDepth);
          __builtin_prefetch(v);
        }
        Pair(k + h * k_stride, k_stride, pairs + h * kDepth);
      }
      for (int64_t row = 0; row < z.rows; row += kTile) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t h = 0; h < z.width; h += kDepth) {
          _tile_loadd(4, a + row * z.width + h, 2 * z.width);
          _tile_loadd(5, pairs + h * kDepth, 64);
          _tile_loadd(6, pairs + h * kDepth + kTile * kDepth, 64);
          _tile_dpbf16ps(0, 4, 5);
          _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        for (int64_t r = 0; r < std::min<int64_t>(kTile, z.rows - row); ++r)
          Join(sums[0][r], sums[1][r], scores + (row + r) * stride + i);
      }
    }
  }

  static void Sum(const Sizes& z, const float* weights, int64_t stride, const uint16_t* v,
                  int64_t count, float* sums) {
    const uint16_t* a = Operand(z, weights, stride);
    // Pairs of a block of positions; of all of them, where they are needed again.
    constexpr int64_t kWidth = 2 * kDepth, kPairs = kWidth * kDepth;
    int64_t next = z.rows > kTile ? kPairs : 0;
    uint16_t* pairs = Scratch<uint16_t, 9>(kPairs + next * stride / kDepth);
    alignas(64) float results[4][kTile][kTile];
    for (int64_t h = 0; h < z.width; h += kWidth)
      for (int64_t row = 0; row < z.rows; row += kTile) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        uint16_t* own = pairs;
        for (int64_t i = 0; i < count; i += kDepth, own += next) {
          if (row == 0) {
            const uint16_t* values = v + i * z.width + h;
            int64_t values_stride = z.width;
            if (i + kDepth > count) {  // What is behind the last position counts as zero.
              uint16_t* copy = Scratch<uint16_t, 4>(kPairs);
              std::fill(copy, copy + kPairs, 0);
              for (int64_t place = i; place < count; ++place)
                std::memcpy(copy + (place - i) * kWidth, v + place * z.width + h, 2 * kWidth);
              values = copy, values_stride = kWidth;
            }
            Pair(values, values_stride, own);
            Pair(values + kDepth, values_stride, own + kPairs / 2);
          }
          _tile_loadd(4, a + row * stride + i, 2 * stride);
          _tile_loadd(5, own, 64);
          _tile_loadd(6, own + kTile * kDepth, 64);
          _tile_dpbf16ps(0, 4, 5);
          _tile_dpbf16ps(1, 4, 6);
          _tile_loadd(5, own + kPairs / 2, 64);
          _tile_loadd(6, own + kPairs / 2 + kTile * kDepth, 64);
          _tile_dpbf16ps(2, 4, 5);
          _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, results[0], 64);
        _tile_stored(1, results[1], 64);
        _tile_stored(2, results[2], 64);
        _tile_stored(3, results[3], 64);
        for (int64_t r = 0; r < std::min<int64_t>(kTile, z.rows - row); ++r) {
          float* out = sums + (row + r) * z.width + h;
          Join(results[0][r], results[1][r], out);
          Join(results[2][r], results[3][r], out + kDepth);
        }
      }
  }
};
#endif

// Attention of queries q [rows, H], in units of log2, over `count` positions of keys [H, k_stride]
// and values [., H], of which there are `room`.
//   mask(row, scores): makes the scores kMasked of the positions that a row does not see.
template <typename By, typename Mask>
void Attend(const Sizes& z, const float* q, const uint16_t* k, int64_t k_stride, const uint16_t* v,
            int64_t count, int64_t room, const Mask& mask, const Part& part) {
  int64_t stride = (count + kStep - 1) / kStep * kStep;
  float* scores = Scratch<float, 3>(z.rows * stride);
  for (int64_t i = 0; i < count; i += kStep) {
    const uint16_t* own = k + i;
    int64_t own_stride = k_stride;
    if (i + kStep > room) {  // Nothing is read behind the last position.
      uint16_t* copy = Scratch<uint16_t, 4>(z.width * kStep);
      for (int64_t h = 0; h < z.width; ++h)
        std::memcpy(copy + h * kStep, k + h * k_stride + i, (room - i) * sizeof(uint16_t));
      own = copy, own_stride = kStep;
    }
    By::Score(z, q, i, own, own_stride, v + i * z.width, scores, stride);
  }
  for (int64_t row = 0; row < z.rows; ++row) {
    float* own = scores + row * stride;
    mask(row, own);
    for (int64_t i = count; i < stride; ++i) own[By::At(i)] = kMasked;
    Floats peaks = Floats{} + kMasked;
    for (int64_t i = 0; i < stride; i += kLanes) {
      Floats x = Load(own + i);
      peaks = x > peaks ? x : peaks;
    }
    float peak = Largest(peaks);
    Floats totals = {};
    for (int64_t i = 0; i < stride; i += kLanes) {
      Floats x = Load(own + i);
      x = x > kMasked / 2 ? Exp2(x - peak) : Floats{};
      totals += x;
      Store(own + i, x);
    }
    part.peak[row] = peak;
    part.total[row] = Sum(totals);
  }
  By::Sum(z, scores, stride, v, count, part.sums);
}

// Queries [B, T, N, H] over what the `slots` [B] of a cache hold, keys [., K, H, S] and values
// [., K, S, H], of which each row sees `lengths`, and over a tail [B, K, H, W] and [B, K, W, H],
// whose columns stand at `places` [B, W]. The queries' own keys and values [B, T, K, H] are put into
// its columns from `step` on. Queries and new keys are rotated by tables [B, T, H / 2], if there are.
// Of a row that does not count, by `counts` [B] if that has elements, the result is zero, and its
// tail stays as it is.
struct Arguments {
  ffi::ThreadPool pool;
  ffi::Buffer<ffi::F32> q, new_k, new_v, cos, sin;
  ffi::AnyBuffer k, v, tail_k, tail_v;
  ffi::Buffer<ffi::S32> lengths, step, places, slots;
  ffi::Buffer<ffi::PRED> counts;
  ffi::ResultBuffer<ffi::F32> out;
  int64_t window;
};

// x [H] times `factor`, rotated.
inline void Rotate(const float* x, int64_t width, const float* cos, const float* sin, float factor,
                   float* out) {
  const int64_t half = width / 2;
  for (int64_t h = 0; h < half; ++h) {
    float first = x[h] * factor, second = x[half + h] * factor;
    out[h] = cos == nullptr ? first : first * cos[h] - second * sin[h];
    out[half + h] = cos == nullptr ? second : second * cos[h] + first * sin[h];
  }
}

template <typename By>
void AttendCache(Arguments& in) {
  auto shape = in.q.dimensions();
  Sizes z;
  z.batch = shape[0], z.tokens = shape[1], z.width = shape[3];
  z.heads = in.k.dimensions()[1], z.room = in.k.dimensions()[3];
  z.groups = shape[2] / z.heads, z.columns = in.tail_k.dimensions()[3];
  z.rows = z.groups * z.tokens;
  auto bits = [](ffi::AnyBuffer& x) { return static_cast<uint16_t*>(x.untyped_data()); };
  const uint16_t *k = bits(in.k), *v = bits(in.v);
  uint16_t *tail_k = bits(in.tail_k), *tail_v = bits(in.tail_v);
  const float *q = in.q.typed_data(), *new_k = in.new_k.typed_data(), *new_v = in.new_v.typed_data();
  const float* cos = in.cos.element_count() ? in.cos.typed_data() : nullptr;
  const float* sin = in.sin.typed_data();
  const int32_t *lengths = in.lengths.typed_data(), *places = in.places.typed_data();
  const int32_t* slots = in.slots.typed_data();
  const int64_t step = in.step.typed_data()[0], window = in.window;
  float* out = in.out->typed_data();

  // A task is a chunk of what a slot has in the cache, for one head; the first one is the tail's,
  // too. Of each there is a part of the softmax. Few slots are cut finer, for all threads to help;
  // those that do not count are slots, too: what a row comes to must not depend on the others.
  struct Task {
    int64_t row, head, chunk, chunks;
  };
  const int64_t chunk = z.batch * z.heads >= 8 * in.pool.num_threads() ? 2048 : 512;
  std::vector<int64_t> first(z.batch), parts(z.batch);
  std::vector<Task> tasks;
  int64_t all_parts = 0;
  for (int64_t b = 0; b < z.batch; ++b) {
    if (in.counts.element_count() && !in.counts.typed_data()[b]) {
      const int64_t size = z.tokens * shape[2] * z.width;
      std::fill(out + b * size, out + (b + 1) * size, 0.0f);
      continue;
    }
    int64_t length = std::clamp<int64_t>(lengths[b], 0, z.room);
    if (window) {
      int64_t oldest = places[b * z.columns + step];
      first[b] = std::min(std::max<int64_t>(oldest - window + 1, 0), length) / 64 * 64;
    }
    int64_t chunks = (length - first[b] + chunk - 1) / chunk;
    parts[b] = all_parts;
    all_parts += (chunks + 1) * z.heads;
    for (int64_t head = 0; head < z.heads; ++head)
      for (int64_t i = 0; i < std::max<int64_t>(chunks, 1); ++i)
        tasks.push_back({b, head, i, chunks});
  }
  float* numbers = Scratch<float, 7>(all_parts * z.rows * (z.width + 2));
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[z.batch * z.heads]);
  for (const Task& task : tasks) left[task.row * z.heads + task.head] = task.chunk + 1;
  auto part = [&](const Task& task, int64_t index) {
    int64_t place = parts[task.row] + task.head * (task.chunks + 1) + index;
    float* own = numbers + place * z.rows * (z.width + 2);
    return Part{own, own + z.rows, own + 2 * z.rows};
  };
  const float scale = kLog2E / std::sqrt(float(z.width));

  ForEach(in.pool, tasks.size(), [&](int64_t index) {
    [[maybe_unused]] typename By::Setup setup;
    const Task& task = tasks[index];
    const int64_t b = task.row, pair = b * z.heads + task.head;
    const int32_t* own_places = places + b * z.columns;
    // Where row r of the queries, G x T, is in q and out.
    auto at = [&](int64_t row) {
      int64_t group = row / z.tokens, token = row % z.tokens;
      return ((b * z.tokens + token) * z.groups * z.heads + task.head * z.groups + group) * z.width;
    };
    auto place = [&](int64_t row) { return int64_t{own_places[step + row % z.tokens]}; };
    float* own_q = Scratch<float, 5>(z.rows * z.width);
    // The tables of a token.
    auto table = [&](const float* all, int64_t token) {
      return cos == nullptr ? nullptr : all + (b * z.tokens + token) * z.width / 2;
    };
    for (int64_t row = 0; row < z.rows; ++row)
      Rotate(q + at(row), z.width, table(cos, row % z.tokens), table(sin, row % z.tokens), scale,
             own_q + row * z.width);
    if (task.chunk < task.chunks) {
      int64_t begin = first[b] + task.chunk * chunk;
      int64_t count = std::min<int64_t>(chunk, std::min<int64_t>(lengths[b], z.room) - begin);
      auto mask = [&](int64_t row, float* scores) {
        if (!window) return;
        int64_t hidden = std::min(place(row) - window + 1 - begin, count);
        for (int64_t i = 0; i < hidden; ++i) scores[By::At(i)] = kMasked;
      };
      int64_t held = (slots[b] * z.heads + task.head) * z.room * z.width;
      Attend<By>(z, own_q, k + held + begin, z.room, v + held + begin * z.width, count,
                 z.room - begin, mask, part(task, task.chunk));
    }
    if (task.chunk == 0) {
      auto mask = [&](int64_t row, float* scores) {
        for (int64_t i = 0; i < step + z.tokens; ++i) {
          int64_t there = own_places[i];
          if (there > place(row) || (window && there <= place(row) - window))
            scores[By::At(i)] = kMasked;
        }
      };
      uint16_t* own_k = tail_k + pair * z.width * z.columns;
      uint16_t* own_v = tail_v + pair * z.width * z.columns;
      float* rotated = Scratch<float, 12>(z.width);
      for (int64_t token = 0; token < z.tokens; ++token) {
        int64_t from = ((b * z.tokens + token) * z.heads + task.head) * z.width;
        Rotate(new_k + from, z.width, table(cos, token), table(sin, token), 1, rotated);
        for (int64_t h = 0; h < z.width; ++h) {
          own_k[h * z.columns + step + token] = Rounded(rotated[h]);
          own_v[(step + token) * z.width + h] = Rounded(new_v[from + h]);
        }
      }
      Attend<By>(z, own_q, own_k, z.columns, own_v, step + z.tokens, z.columns, mask,
                 part(task, task.chunks));
    }
    if (left[pair].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    // The last one adds up the parts.
    float* sums = Scratch<float, 6>(z.width);
    for (int64_t row = 0; row < z.rows; ++row) {
      float peak = kMasked, total = 0;
      for (int64_t i = 0; i <= task.chunks; ++i) peak = std::max(peak, part(task, i).peak[row]);
      std::fill(sums, sums + z.width, 0.0f);
      for (int64_t i = 0; i <= task.chunks; ++i) {
        Part one = part(task, i);
        float factor = std::exp2(one.peak[row] - peak);
        total += factor * one.total[row];
        for (int64_t h = 0; h < z.width; ++h) sums[h] += factor * one.sums[row * z.width + h];
      }
      for (int64_t h = 0; h < z.width; ++h) out[at(row) + h] = sums[By::At(h)] / total;
    }
  });
}

// The tail's results are its operands.
ffi::Error CacheAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q,
                          ffi::Buffer<ffi::F32> new_k, ffi::Buffer<ffi::F32> new_v,
                          ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin, ffi::AnyBuffer k,
                          ffi::AnyBuffer v, ffi::AnyBuffer tail_k, ffi::AnyBuffer tail_v,
                          ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> step,
                          ffi::Buffer<ffi::S32> places, ffi::Buffer<ffi::S32> slots,
                          ffi::Buffer<ffi::PRED> counts, ffi::ResultBuffer<ffi::F32> out,
                          ffi::Result<ffi::AnyBuffer> tail_k_out,
                          ffi::Result<ffi::AnyBuffer> tail_v_out, int64_t window) {
  if (tail_k.untyped_data() != tail_k_out->untyped_data() ||
      tail_v.untyped_data() != tail_v_out->untyped_data())
    return ffi::Error::Internal("the tail was not donated");
  if (int64_t begin = step.typed_data()[0], end = begin + q.dimensions()[1];
      begin < 0 || end > tail_k.dimensions()[3])
    return ffi::Error::InvalidArgument("the tail has no columns for these tokens");
  Arguments in{pool, q, new_k, new_v, cos, sin, k, v, tail_k, tail_v,
               lengths, step, places, slots, counts, out, window};
  auto attend = AttendCache<ByVectors>;
#if HINTSIGHT_TILES
  // A tile has 16 rows, whether they are queries or not.
  int64_t rows = q.dimensions()[1] * q.dimensions()[2] / k.dimensions()[1];
  if (rows > kRows && TilesAllowed()) attend = AttendCache<ByTiles>;
#endif
  attend(in);
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------- a cache's new tokens, logits

// Puts a tail, keys [B, K, H, W] and values [B, K, W, H], at `places` [B, W] of a cache, keys
// [B, K, H, S] and values [B, K, S, H], which is its result; those outside nowhere.
ffi::Error Absorb(ffi::ThreadPool pool, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer tail_k,
                  ffi::AnyBuffer tail_v, ffi::Buffer<ffi::S32> places_in,
                  ffi::Result<ffi::AnyBuffer> k_out, ffi::Result<ffi::AnyBuffer> v_out) {
  if (k.untyped_data() != k_out->untyped_data() || v.untyped_data() != v_out->untyped_data())
    return ffi::Error::Internal("the cache was not donated");
  auto shape = k.dimensions();
  const int64_t heads = shape[1], width = shape[2], room = shape[3];
  const int64_t columns = tail_k.dimensions()[3];
  auto bits = [](ffi::AnyBuffer& x) { return static_cast<uint16_t*>(x.untyped_data()); };
  const int32_t* places = places_in.typed_data();
  ForEach(pool, shape[0], [&](int64_t b) {
    for (int64_t pair = b * heads; pair < (b + 1) * heads; ++pair) {
      uint16_t *to_k = bits(k) + pair * width * room, *to_v = bits(v) + pair * width * room;
      const uint16_t* from_k = bits(tail_k) + pair * width * columns;
      const uint16_t* from_v = bits(tail_v) + pair * width * columns;
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t place = places[b * columns + i];
        if (place < 0 || place >= room) continue;
        std::memcpy(to_v + place * width, from_v + i * width, width * sizeof(uint16_t));
      }
      for (int64_t h = 0; h < width; ++h)
        for (int64_t i = 0; i < columns; ++i) {
          const int64_t place = places[b * columns + i];
          if (place >= 0 && place < room) to_k[h * room + place] = from_k[h * columns + i];
        }
    }
  });
  return ffi::Error::Success();
}

// Of each row of logits [R, V]: the largest, the first place that has it, and the sum of exp(x -
// the largest).
ffi::Error Peaks(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits,
                 ffi::ResultBuffer<ffi::F32> peaks, ffi::ResultBuffer<ffi::S32> places,
                 ffi::ResultBuffer<ffi::F32> totals) {
  const int64_t vocab = logits.dimensions()[1];
  ForEach(pool, logits.dimensions()[0], [&](int64_t row) {
    const float* x = logits.typed_data() + row * vocab;
    const int64_t whole = vocab / kLanes * kLanes;
    Floats most = Floats{} - INFINITY;
    for (int64_t i = 0; i < whole; i += kLanes) {
      Floats own = Load(x + i);
      most = own > most ? own : most;
    }
    float peak = Largest(most);
    for (int64_t i = whole; i < vocab; ++i) peak = std::max(peak, x[i]);
    Floats sums = {};
    for (int64_t i = 0; i < whole; i += kLanes) sums += Exp2((Load(x + i) - peak) * kLog2E);
    float total = Sum(sums);
    for (int64_t i = whole; i < vocab; ++i) total += std::exp(x[i] - peak);
    int64_t place = 0;
    while (place < vocab - 1 && x[place] != peak) ++place;
    peaks->typed_data()[row] = peak;
    places->typed_data()[row] = place;
    totals->typed_data()[row] = total;
  });
  return ffi::Error::Success();
}

}  // namespace

// For how many rows `Products` are faster than XLA's. With the CPU's matrix instructions 64 rows of
// 576 by 1536 take 0.7 of XLA's time, 256 as long. Without bfloat16 instructions 16 to 64 rows take
// 0.75, 512 between 0.7 and 1. With them, but no tiles, XLA has products for which it uses them.
extern "C" int HintsightMostRows() {
  if (TilesAllowed()) return 128;
#if defined(__AVX512BF16__)
  return 16;
#else
  return INT_MAX;
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(HintsightProducts, Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<float>("eps")
                                  .Attr<int32_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(HintsightCacheAttention, CacheAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(HintsightAbsorb, Absorb,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(HintsightPeaks, Peaks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
