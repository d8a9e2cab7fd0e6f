// The instruction set that a source compiles vector kernels for. It defines VECTOR_BYTES: 16 for
// any processor (SSE2 on x86-64, NEON on Arm), 32 for AVX2, 64 for AVX-512.
//
// A header of kernels includes what it uses, and after that its code stands between BEGIN_TARGET
// and END_TARGET, in a namespace of INSTRUCTION_SET. No header may be included there: what it
// defines would be compiled for AVX, and may be linked into portable code.
#pragma once

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif

#if VECTOR_BYTES == 16
#define INSTRUCTION_SET baseline
#define BEGIN_TARGET
#define END_TARGET
#else
#include <immintrin.h>
#if VECTOR_BYTES == 32
#define INSTRUCTION_SET avx2
#define TARGET "avx2,fma,f16c"
#elif defined(__clang__)
#define INSTRUCTION_SET avx512
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#else
#define INSTRUCTION_SET avx512
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"
#endif
#define QUOTED_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define PRAGMA(...) QUOTED_PRAGMA(__VA_ARGS__)  // after TARGET is replaced
#ifdef __clang__
#define BEGIN_TARGET \
  PRAGMA(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET PRAGMA(GCC push_options) PRAGMA(GCC target(TARGET))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#endif
