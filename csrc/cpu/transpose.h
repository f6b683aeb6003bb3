// As many vectors as a vector has numbers, rows for columns.

namespace fused_densenet::FD_ISA {

template <class A>
void transpose(Vec<A>* x) {
  constexpr int size = Vec<A>::size;
  A rows[size][size], columns[size][size];
  for (int i = 0; i < size; ++i) store(rows[i], x[i]);
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) columns[j][i] = rows[i][j];
  }
  for (int i = 0; i < size; ++i) x[i] = load(columns[i]);
}

#if defined(FD_AVX512)

template <>
inline void transpose(VecF* x) {
  __m512 pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // in lane l: rows i to i + 3 of columns 4 l, 4 l + 1, 4 l + 2, 4 l + 3
    const __m512d a = _mm512_castps_pd(pairs[i]), b = _mm512_castps_pd(pairs[i + 1]);
    const __m512d c = _mm512_castps_pd(pairs[i + 2]), d = _mm512_castps_pd(pairs[i + 3]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even0 = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x88);
    const __m512 even1 = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xdd);
    const __m512 odd1 = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xdd);
    x[i].v = _mm512_shuffle_f32x4(even0, even1, 0x88);
    x[i + 4].v = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    x[i + 8].v = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    x[i + 12].v = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}

#elif defined(FD_AVX2)

template <>
inline void transpose(VecF* x) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

#elif defined(FD_NEON)

template <>
inline void transpose(VecF* x) {
  const float32x4_t low0 = vzip1q_f32(x[0].v, x[2].v), high0 = vzip2q_f32(x[0].v, x[2].v);
  const float32x4_t low1 = vzip1q_f32(x[1].v, x[3].v), high1 = vzip2q_f32(x[1].v, x[3].v);
  x[0].v = vzip1q_f32(low0, low1);
  x[1].v = vzip2q_f32(low0, low1);
  x[2].v = vzip1q_f32(high0, high1);
  x[3].v = vzip2q_f32(high0, high1);
}

#endif

}  // namespace fused_densenet::FD_ISA
