/* Weighted sums and squared contrast of N flat arrays: one read of each, all sums in registers. TIES' two passes.
 *
 * No Python here: compiled.py loads the library with ctypes and calls `reduce_take_chunks` in each of its
 * threads, then `reduce_combine`. The passes themselves are in kernels_pass.h and kernels_ties.h, compiled once
 * for each instruction set; the processor decides at run time, so that one wheel fits all of them. (Not by
 * target_clones: it needs ifunc, which musl, macOS and older compilers lack.)
 *
 * Every product is added by a fused multiply-add, as PyTorch's add_(x, alpha=w) does, so the sums have the
 * same bits.
 */

#if !defined(__GNUC__)
#error "needs GCC or clang; without this library merge_callback uses PyTorch's own operations"
#endif

#include <stdint.h>
#include <string.h>

#define GROUP 64      /* elements of every source that are summed at once: 256 bytes, four lines, in fp32 */
#define BLOCK 4096    /* elements whose contrasts wait in the first-level cache to be squared, or that have one mark */
#define CACHED 24576  /* bytes of all sources that stay in the first-level cache for further sums */
#define CHUNK 65536   /* elements a thread takes at once; the squares of each are a partial sum */
#define AHEAD 1024    /* bytes that are asked for before they are needed; 512 and 2048 were much the same */
#define STREAMED (2 << 20) /* bytes of output from which on writes bypass the caches */

#define VECTORS (GROUP / LANES)
#define WIDE (LANES < 4 ? 4 : LANES) /* places of the compiler's own vectors */
#define PARTS (GROUP / WIDE)
#define UNROLL _Pragma("GCC unroll 64")
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { FP32, BF16, FP16 };
enum { WEIGHTED = 1, CONTRASTED = 2 };

typedef struct {
    const char *data;
    int32_t dtype;
    int32_t roles;
    float weight;
    float factor;
} Source;

typedef struct {
    const Source *sources;
    int64_t count;
    int64_t size;
    char *out; /* or NULL */
    int32_t out_dtype;
    int32_t roles;         /* all sources' together */
    const int64_t *bounds; /* ends of the segments */
    int64_t segments;
    double *partials; /* or NULL; segments + chunks of them, zeroed */
    int64_t next;     /* the first chunk that no thread has taken */
} Pass;

/* K weighted sums of the same sources; `pass` has these, and no output of its own. */
typedef struct {
    Pass pass;
    const float *weights; /* K for each source; 0 leaves it out */
    const float *starts;  /* K; what a sum begins with: -0, and 0 if no source has a weight in it */
    char *const *outs;    /* K of them; NULL is the contrast, which is squared */
    const int32_t *out_dtypes;
    int64_t count; /* K */
} Sums;

typedef struct {
    const char *data;
    int64_t end;   /* before it magnitudes up to `below` are trimmed, from it on up to `at_most` */
    int32_t dtype;
    float below;
    float at_most;
} Entries;

typedef struct {
    const char *initial;
    char *out;
    const Entries *entries; /* of each task vector */
    int64_t count;
    int64_t size;
    int64_t next; /* the first chunk that no thread has taken */
    int32_t initial_dtype;
    int32_t out_dtype;
    float scale;
} Election;

/* How many of a block's magnitudes are at the ends of a bracket, and between them. */
typedef struct {
    int32_t at_high, at_low, between;
} Mark;

/* What is counted of one task vector's magnitudes, as bits: above `high`, at it, at `low` if that is lower, and
 * between. The `found` ones between are also written, and behind them those that were picked and may be ends of
 * the bracket; all and GROUP more must have room. */
typedef struct {
    const char *theta;
    int32_t *between;
    Mark *marks; /* one for each block */
    int64_t above, at_high, at_low, found, picked;
    int32_t dtype;
    int32_t low, high;
} Tally;

typedef struct {
    const char *initial;
    Tally *tallies; /* of each task vector */
    int64_t count;
    int64_t size;
    int32_t initial_dtype;
} Census;

const int64_t reduce_version = 5;   /* of all structures and functions: compiled.py has the same number */
const int64_t reduce_chunk = CHUNK; /* for compiled.py, which makes room for the partial sums */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t width(int32_t dtype) { return dtype == FP32 ? 4 : 2; }

/* Whether an output is written past the caches. One that fits is left in them for the next reader. */
static int streams(const char *out, int32_t dtype, int64_t size) {
    return size * width(dtype) >= STREAMED && (uintptr_t)out % 64 == 0;
}

/* Elements of a block that some of the sums are made of before the others are: all, if these are at once. */
static int64_t part_of_block(const Sums *sums, int64_t at_once) {
    int64_t bytes = 0, part = BLOCK;
    for (int64_t i = 0; i < sums->pass.count; i++) bytes += width(sums->pass.sources[i].dtype);
    while (sums->count > at_once && part > GROUP && part * bytes > CACHED) part /= 2;
    return part;
}

/* The first segment that ends after element `at`. */
static int64_t segment_at(const Pass *pass, int64_t at) {
    int64_t low = 0, high = pass->segments;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (pass->bounds[middle] > at)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define NAME(f) f##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#define LANES 16
typedef __m512 NAME(Lanes);

static inline TARGET __m512 spread_avx512(float x) { return _mm512_set1_ps(x); }
static inline TARGET __m512 fma_avx512(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
static inline TARGET __m512 load_fp32_avx512(const void *p) { return _mm512_loadu_ps(p); }
static inline TARGET __m512 load_fp16_avx512(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static inline TARGET __m512 load_bf16_avx512(const void *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline TARGET void store_fp32_avx512(void *p, __m512 x) { _mm512_storeu_ps(p, x); }
static inline TARGET void stream_fp32_avx512(void *p, __m512 x) { _mm512_stream_ps(p, x); }
static inline TARGET __m256i to_fp16_avx512(__m512 x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline TARGET __m256i to_bf16_avx512(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, even), _mm512_set1_epi32(0x7fff));
    __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40)); /* a NaN rounded up could become infinite */
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, quiet));
}
static inline TARGET void store_half_avx512(void *p, __m256i x) { _mm256_storeu_si256(p, x); }
static inline TARGET void stream_half_avx512(void *p, __m256i x) { _mm256_stream_si256(p, x); }
static inline TARGET void fence_avx512(void) { _mm_sfence(); }
typedef __m512i NAME(Bits);
typedef __mmask16 NAME(Mask);
static inline TARGET __m512i magnitude_avx512(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
static inline TARGET __m512i same_avx512(int32_t bits) { return _mm512_set1_epi32(bits); }
static inline TARGET __mmask16 above_avx512(__m512i a, __m512i b) { return _mm512_cmpgt_epi32_mask(a, b); }
static inline TARGET __mmask16 equal_avx512(__m512i a, __m512i b) { return _mm512_cmpeq_epi32_mask(a, b); }
static inline TARGET __mmask16 up_to_avx512(__mmask16 set, __m512i a, __m512i b) {
    return _mm512_mask_cmple_epi32_mask(set, a, b);
}
static inline TARGET int64_t number_avx512(__mmask16 set) { return __builtin_popcount(set); }
static inline TARGET int64_t pick_avx512(int32_t *to, __m512i bits, __mmask16 set) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(set, bits));
    return __builtin_popcount(set);
}
typedef __m256i NAME(Halves);
#include "kernels_pass.h"
#include "kernels_ties.h"
#undef NAME
#undef TARGET
#undef LANES

#define NAME(f) f##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
typedef __m256 NAME(Lanes);

static inline TARGET __m256 spread_avx2(float x) { return _mm256_set1_ps(x); }
static inline TARGET __m256 fma_avx2(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
static inline TARGET __m256 load_fp32_avx2(const void *p) { return _mm256_loadu_ps(p); }
static inline TARGET __m256 load_fp16_avx2(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline TARGET __m256 load_bf16_avx2(const void *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline TARGET void store_fp32_avx2(void *p, __m256 x) { _mm256_storeu_ps(p, x); }
static inline TARGET void stream_fp32_avx2(void *p, __m256 x) { _mm256_stream_ps(p, x); }
static inline TARGET __m128i to_fp16_avx2(__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
static inline TARGET __m128i to_bf16_avx2(__m256 x) {
    __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, even), _mm256_set1_epi32(0x7fff));
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
static inline TARGET void store_half_avx2(void *p, __m128i x) { _mm_storeu_si128(p, x); }
static inline TARGET void stream_half_avx2(void *p, __m128i x) { _mm_stream_si128(p, x); }
static inline TARGET void fence_avx2(void) { _mm_sfence(); }
typedef __m256i NAME(Bits);
typedef __m256i NAME(Mask);
static inline TARGET __m256i magnitude_avx2(__m256 x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}
static inline TARGET __m256i same_avx2(int32_t bits) { return _mm256_set1_epi32(bits); }
static inline TARGET __m256i above_avx2(__m256i a, __m256i b) { return _mm256_cmpgt_epi32(a, b); }
static inline TARGET __m256i equal_avx2(__m256i a, __m256i b) { return _mm256_cmpeq_epi32(a, b); }
static inline TARGET __m256i up_to_avx2(__m256i set, __m256i a, __m256i b) {
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(a, b), set);
}
static inline TARGET int64_t number_avx2(__m256i set) {
    return __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(set)));
}
/* Writes the set ones of four places side by side; an order is that of their numbers, a byte each. */
static inline TARGET void pick_half_avx2(int32_t *to, __m128i bits, int set) {
    static const int32_t orders[16] = {0, 0,      1,      0x0100,   2,      0x0200,   0x0201,   0x020100,
                                       3, 0x0300, 0x0301, 0x030100, 0x0302, 0x030200, 0x030201, 0x03020100};
    __m128i order = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(orders[set]));
    _mm_storeu_ps((float *)to, _mm_permutevar_ps(_mm_castsi128_ps(bits), order));
}
static inline TARGET int64_t pick_avx2(int32_t *to, __m256i bits, __m256i set) {
    int all = _mm256_movemask_ps(_mm256_castsi256_ps(set)), first = all & 15;
    pick_half_avx2(to, _mm256_castsi256_si128(bits), first);
    pick_half_avx2(to + __builtin_popcount(first), _mm256_extracti128_si256(bits, 1), all >> 4);
    return __builtin_popcount(all);
}
typedef __m128i NAME(Halves);
#include "kernels_pass.h"
#include "kernels_ties.h"
#undef NAME
#undef TARGET
#undef LANES

enum { AVX2 = 1, AVX512 = 2 };

/* This processor's best instruction set that has a kernel; 0 if there is none. */
int reduce_instructions(void) {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")))
        return 0; /* F16C came before AVX2 */
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return wide ? AVX512 : AVX2;
}

/* Works on chunks until none is left, with some instruction set up to the processor's. */
void reduce_take_chunks(Pass *pass, int instructions) {
    if (instructions == AVX512)
        take_chunks_avx512(pass);
    else
        take_chunks_avx2(pass);
}

void reduce_take_sums(Sums *sums, int instructions) {
    if (instructions == AVX512)
        take_sums_avx512(sums);
    else
        take_sums_avx2(sums);
}

void reduce_elect_chunks(Election *election, int instructions) {
    if (instructions == AVX512)
        elect_chunks_avx512(election);
    else
        elect_chunks_avx2(election);
}

void reduce_tally(const Census *census, int instructions) {
    if (instructions == AVX512)
        tally_avx512(census);
    else
        tally_avx2(census);
}

#elif defined(__FP_FAST_FMAF) && defined(__FLT16_MAX__)
/* If all processors of the architecture have fused multiply-adds (64-bit ARM), the compiler does the rest. */

#define NAME(f) f##_plain
#define TARGET
#define LANES 1
typedef float NAME(Lanes);

static inline float spread_plain(float x) { return x; }
static inline float fma_plain(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float load_fp32_plain(const void *p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}
static inline float load_fp16_plain(const void *p) {
    _Float16 x;
    memcpy(&x, p, 2);
    return (float)x;
}
static inline float load_bf16_plain(const void *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline void store_fp32_plain(void *p, float x) { memcpy(p, &x, 4); }
static inline uint16_t to_fp16_plain(float x) {
    _Float16 half = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static inline uint16_t to_bf16_plain(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? (bits >> 16) | 0x40 : (bits + ((bits >> 16) & 1) + 0x7fff) >> 16;
}
static inline void store_half_plain(void *p, uint16_t x) { memcpy(p, &x, 2); }
#define stream_fp32_plain store_fp32_plain
#define stream_half_plain store_half_plain
static inline void fence_plain(void) {}
typedef int32_t NAME(Bits);
typedef int32_t NAME(Mask);
static inline int32_t magnitude_plain(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}
static inline int32_t same_plain(int32_t bits) { return bits; }
static inline int32_t above_plain(int32_t a, int32_t b) { return a > b; }
static inline int32_t equal_plain(int32_t a, int32_t b) { return a == b; }
static inline int32_t up_to_plain(int32_t set, int32_t a, int32_t b) { return set & (a <= b); }
static inline int64_t number_plain(int32_t set) { return set; }
static inline int64_t pick_plain(int32_t *to, int32_t bits, int32_t set) {
    *to = bits;
    return set;
}
typedef uint16_t NAME(Halves);
#include "kernels_pass.h"
#include "kernels_ties.h"

int reduce_instructions(void) { return 1; }

void reduce_take_chunks(Pass *pass, int instructions) {
    (void)instructions;
    take_chunks_plain(pass);
}

void reduce_take_sums(Sums *sums, int instructions) {
    (void)instructions;
    take_sums_plain(sums);
}

void reduce_elect_chunks(Election *election, int instructions) {
    (void)instructions;
    elect_chunks_plain(election);
}

void reduce_tally(const Census *census, int instructions) {
    (void)instructions;
    tally_plain(census);
}

#else
#error "no kernel for this architecture; without this library merge_callback uses PyTorch's own operations"
#endif

/* Adds up each segment's partial sums in the order of the chunks, independently of the threads. */
void reduce_combine(const Pass *pass, double *squares) {
    int64_t start = 0;
    for (int64_t segment = 0; segment < pass->segments; segment++) {
        int64_t stop = pass->bounds[segment];
        double sum = 0;
        if (stop > start)
            for (int64_t chunk = start / CHUNK; chunk <= (stop - 1) / CHUNK; chunk++)
                sum += pass->partials[segment + chunk];
        squares[segment] = sum;
        start = stop;
    }
}
