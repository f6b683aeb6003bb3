// Vectors of the accumulation type: AVX-512, AVX2, NEON, or four lanes of the compiler's own for every other machine.
//
// Included once by each instruction set's file, which defines FD_ISA (a namespace) and, where it has them, FD_AVX512,
// FD_AVX512_BF16, FD_AVX2, FD_NEON or FD_NEON_BF16.

#include <cstdint>
#include <cstring>

#if defined(FD_AVX512) || defined(FD_AVX2)
#include <immintrin.h>
#elif defined(FD_NEON)
#include <arm_neon.h>
#endif

#if defined(FD_AVX512_BF16) || defined(FD_NEON_BF16)
#define FD_PAIRED
#endif

namespace fused_densenet::FD_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A>
struct Vec;

#if defined(FD_AVX512)

template <>
struct Vec<float> {
  static constexpr int size = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
};
template <>
struct Vec<double> {
  static constexpr int size = 8;
  __m512d v;
  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec all(double x) { return {_mm512_set1_pd(x)}; }
};
using VecF = Vec<float>;
using VecD = Vec<double>;

inline __mmask16 lanes16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline __mmask8 lanes8(int n) { return static_cast<__mmask8>((1u << n) - 1u); }

inline VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline VecF load(const float* p, int n) { return n >= 16 ? load(p) : VecF{_mm512_maskz_loadu_ps(lanes16(n), p)}; }
inline void store(float* p, VecF x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, VecF x, int n) {
  if (n >= 16)
    store(p, x);
  else
    _mm512_mask_storeu_ps(p, lanes16(n), x.v);
}
inline VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline VecD load(const double* p, int n) { return n >= 8 ? load(p) : VecD{_mm512_maskz_loadu_pd(lanes8(n), p)}; }
inline void store(double* p, VecD x) { _mm512_storeu_pd(p, x.v); }
inline void store(double* p, VecD x, int n) {
  if (n >= 8)
    store(p, x);
  else
    _mm512_mask_storeu_pd(p, lanes8(n), x.v);
}

inline __m256i load_16_bits(const void* p, int n) {
  return n >= 16 ? _mm256_loadu_si256(static_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(lanes16(n), p);
}
inline void store_16_bits(void* p, __m256i x, int n) {
  if (n >= 16)
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  else
    _mm256_mask_storeu_epi16(p, lanes16(n), x);
}
inline VecF widen(__m256i b) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))}; }
inline __m256i narrow(VecF x) {
#if defined(FD_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline VecF load(const bf16* p, int n) { return widen(load_16_bits(p, n)); }
inline void store(bf16* p, VecF x, int n) { store_16_bits(p, narrow(x), n); }
inline __m256i narrow_to(const bf16*, VecF x) { return narrow(x); }
inline VecF widen_from(const bf16*, __m256i b) { return widen(b); }
inline __m256i narrow_to(const f16*, VecF x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline VecF widen_from(const f16*, __m256i b) { return {_mm512_cvtph_ps(b)}; }
inline VecF load(const f16* p, int n) { return widen_from(p, load_16_bits(p, n)); }
inline void store(f16* p, VecF x, int n) { store_16_bits(p, narrow_to(p, x), n); }

// Past the caches, to where a vector is aligned.
inline void stream(float* p, VecF x) { _mm512_stream_ps(p, x.v); }
inline void stream(double* p, VecD x) { _mm512_stream_pd(p, x.v); }
inline void fence() { _mm_sfence(); }

inline VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF larger(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }  // where one is a NaN: b
inline VecF where_positive(VecF pre, VecF x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(pre.v, _mm512_setzero_ps(), _CMP_NLE_UQ), x.v)};
}
inline VecF where_positive(VecF pre, VecF x, VecF otherwise) {
  return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(pre.v, _mm512_setzero_ps(), _CMP_NLE_UQ), x.v)};
}
inline VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline VecD larger(VecD a, VecD b) { return {_mm512_max_pd(a.v, b.v)}; }
inline VecD where_positive(VecD pre, VecD x) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(pre.v, _mm512_setzero_pd(), _CMP_NLE_UQ), x.v)};
}
inline VecD where_positive(VecD pre, VecD x, VecD otherwise) {
  return {_mm512_mask_mov_pd(otherwise.v, _mm512_cmp_pd_mask(pre.v, _mm512_setzero_pd(), _CMP_NLE_UQ), x.v)};
}

#if defined(FD_AVX512_BF16)
// As many pairs of bfloat16 as a vector has numbers, of two vectors' numbers: neighbouring channels, or the same
// channels of two pixels. A product adds those of both.
struct Pairs {
  __m512i v;
  static Pairs zero() { return {_mm512_setzero_si512()}; }
};
inline Pairs load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(uint32_t* p, Pairs x) { _mm512_storeu_si512(p, x.v); }
inline Pairs pair_channels(VecF low, VecF high) { return {(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)}; }
inline Pairs pair_pixels(VecF first, VecF second) {
  const __m512i even = _mm512_cvtepu16_epi32(narrow(first));
  return {_mm512_or_si512(even, _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(second)), 16))};
}
inline Pairs broadcast(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline VecF fma(Pairs a, Pairs b, VecF c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }
#endif

#elif defined(FD_AVX2)

template <>
struct Vec<float> {
  static constexpr int size = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
};
template <>
struct Vec<double> {
  static constexpr int size = 4;
  __m256d v;
  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec all(double x) { return {_mm256_set1_pd(x)}; }
};
using VecF = Vec<float>;
using VecD = Vec<double>;

inline __m256i lanes8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lanes4(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

inline VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline VecF load(const float* p, int n) { return n >= 8 ? load(p) : VecF{_mm256_maskload_ps(p, lanes8(n))}; }
inline void store(float* p, VecF x) { _mm256_storeu_ps(p, x.v); }
inline void store(float* p, VecF x, int n) {
  if (n >= 8)
    store(p, x);
  else
    _mm256_maskstore_ps(p, lanes8(n), x.v);
}
inline VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline VecD load(const double* p, int n) { return n >= 4 ? load(p) : VecD{_mm256_maskload_pd(p, lanes4(n))}; }
inline void store(double* p, VecD x) { _mm256_storeu_pd(p, x.v); }
inline void store(double* p, VecD x, int n) {
  if (n >= 4)
    store(p, x);
  else
    _mm256_maskstore_pd(p, lanes4(n), x.v);
}

inline __m128i load_16_bits(const void* p, int n) {
  if (n >= 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  __m128i x = _mm_setzero_si128();
  std::memcpy(&x, p, 2 * n);
  return x;
}
inline void store_16_bits(void* p, __m128i x, int n) { std::memcpy(p, &x, 2 * (n >= 8 ? 8 : n)); }
inline VecF load(const bf16* p, int n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bits(p, n)), 16))};
}
inline void store(bf16* p, VecF x, int n) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i top = _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), _mm256_set1_epi32(0x7fc0), nan);
  store_16_bits(p, _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)), n);
}
inline VecF load(const f16* p, int n) { return {_mm256_cvtph_ps(load_16_bits(p, n))}; }
inline void store(f16* p, VecF x, int n) {
  store_16_bits(p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
inline void stream(float* p, VecF x) { _mm256_stream_ps(p, x.v); }
inline void stream(double* p, VecD x) { _mm256_stream_pd(p, x.v); }
inline void fence() { _mm_sfence(); }

inline VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF larger(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }  // where one is a NaN: b
inline VecF where_positive(VecF pre, VecF x) {
  return {_mm256_and_ps(_mm256_cmp_ps(pre.v, _mm256_setzero_ps(), _CMP_NLE_UQ), x.v)};
}
inline VecF where_positive(VecF pre, VecF x, VecF otherwise) {
  return {_mm256_blendv_ps(otherwise.v, x.v, _mm256_cmp_ps(pre.v, _mm256_setzero_ps(), _CMP_NLE_UQ))};
}
inline VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline VecD larger(VecD a, VecD b) { return {_mm256_max_pd(a.v, b.v)}; }
inline VecD where_positive(VecD pre, VecD x) {
  return {_mm256_and_pd(_mm256_cmp_pd(pre.v, _mm256_setzero_pd(), _CMP_NLE_UQ), x.v)};
}
inline VecD where_positive(VecD pre, VecD x, VecD otherwise) {
  return {_mm256_blendv_pd(otherwise.v, x.v, _mm256_cmp_pd(pre.v, _mm256_setzero_pd(), _CMP_NLE_UQ))};
}

#elif defined(FD_NEON)

#include "vec_neon.inc"

#else

#include "vec_portable.inc"

#endif

template <class V>
inline V& operator+=(V& a, V b) {
  return a = a + b;
}
#if !defined(FD_NEON)
// A number as what fma multiplies a vector by.
template <class A>
inline Vec<A> broadcast(A x) {
  return Vec<A>::all(x);
}
#endif
template <class V>
inline V relu(V x) {
  return larger(V::zero(), x);
}
// z where z > 0, else slope * z, for slopes of more than 0 and at most 1.
template <class V>
inline V leaky(V z, V slope) {
  return larger(slope * z, z);
}

#if !defined(FD_AVX512) && !defined(FD_AVX2)
template <class A>
void stream(A* p, Vec<A> x) {
  store(p, x);
}
inline void fence() {}
#endif

// `n` numbers of 16 bits, up to as many as a vector of float32 has.
inline void copy_16_bits(void* to, const void* from, int n) {
#if defined(FD_AVX512)
  store_16_bits(to, load_16_bits(from, n), n);
#else
  std::memcpy(to, from, 2 * static_cast<size_t>(n));
#endif
}

// Stores numbers, past the caches where it `streams` (then a whole vector, aligned), and returns what was stored.
template <bool streams, class T, class V>
V put(T* p, V x, int n) {
#if defined(FD_AVX512)
  if constexpr (sizeof(T) == 2) {
    const __m256i bits = narrow_to(p, x);
    if constexpr (streams)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
    else
      store_16_bits(p, bits, n);
    return widen_from(p, bits);
  }
#endif
  if constexpr (streams && sizeof(T) != 2)
    stream(p, x);
  else
    store(p, x, n);
  if constexpr (sizeof(T) == 2) return load(p, n);
  return x;
}

// Storage types load into, and store from, vectors of their accumulation type.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

inline float as_number(const float* p) { return *p; }
inline double as_number(const double* p) { return *p; }
template <class Half>
float as_number(const Half* p) {
  float x[Vec<float>::size];
  store(x, load(p, 1));
  return x[0];
}

inline void store_number(float* p, float x) { *p = x; }
inline void store_number(double* p, double x) { *p = x; }
template <class Half>
void store_number(Half* p, float x) {
  store(p, Vec<float>::all(x), 1);
}

}  // namespace fused_densenet::FD_ISA
