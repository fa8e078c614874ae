// The reductions of a batch of one (layer, site), x[rows, tokens, units], on a CUDA device. No headers: NVRTC has none.
//
//   count    a warp takes 128 units of `chunk` tokens, an item: counts patterns in shared memory, sums units in registers.
//            The items of a chunk are a part; the last warp of a part sums it again where tokens are not finite.
//   compare  a warp takes a run of tokens of a block: angles, relative updates, moments of the input
//   finish   at the end of a layer, for all its sites: adds up the parts, row by row, and what was compared
//
// DTYPE is 0 (bfloat16), 16 or 32. The SPAN patterns of abs(x) from LOW on (float32: upper halves of them) have counters
// in shared memory, and zero has one; both are chosen for the dtype and the card.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

static_assert(LOW > 0 && SPAN % 32 == 0, "zero has a counter of its own, and counters are permuted 32 by 32");

#ifndef EMULATED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u32 name[]
#define TRAFFIC(bytes)

__device__ float half_to_float(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ u16 float_to_half(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

static const int UNITS_A_LANE = 4, UNITS_A_WARP = 128, WARP = 32;
static const int RUN = 8;         // tokens that a warp compares
static const int FINISHERS = 128; // threads of a block of `finish`, one a unit
static const int MAX_CALLS = 8;  // that one launch finishes
static const u32 EVERY_LANE = 0xFFFFFFFFu, A_BAD_ITEM = 1u << 16;

// What a launch works on, 8 bytes each. Python reads the names from here.
struct Call {
    i64 rows;
    i64 tokens;
    i64 units;
    i64 chunk;
    i64 wide;             // whether `patterns` is int64
    i64 num_limits;
    const void *x;
    const void *before;   // the block's input
    const u8 *mask;       // [rows, tokens]
    const u32 *limits;    // float32: the pattern of the smallest value that is not below each threshold
    u32 *arrived;         // [parts], zero between launches: items that are done, and in the upper half those not finite
    u8 *bad;              // [rows, tokens], zero between launches: a token with an element that is not finite
    u32 *ticket;          // zero between launches: blocks of `finish` that are done
    double *sums;         // [parts, units]
    double *squares;      // [parts, units], or none
    i64 *seen;            // [parts, 2]: tokens that are finite, that count
    double *moments;      // float32: [items, 5]: count, mean, m2, lowest, highest
    double *compared;     // [runs, 7]; see compare.cu
    double *spread;       // [rows, strips of 32 units, 2]: mean and m2 of the sums of units
    double *pooled;       // [rows]
    i64 *row_seen;        // [rows, 2]
    i64 *all_sequences;   // the accumulator from here on
    double *all_pooled;
    i64 *all_unit_count;
    double *all_unit_sums;
    i64 *all_tokens;
    double *all_geometry;
    double *all_input_moments;
    void *all_patterns;
    i64 *all_cuts;
    i64 *all_near_zero;
    i64 *all_elements;
    double *all_moments;
    double *all_extremes;
};

struct Calls {
    i64 number;
    Call at[MAX_CALLS];
};

// ------------------------------------------------------------------------------------------------------------- dtypes

struct BFloat16 {
    typedef u16 Bits;
    static const u32 INFINITE = 0x7F80u, SIZE = 0x7FFFu;
    static __device__ float value(u32 bits) { return __uint_as_float(bits << 16); }
    static __device__ u32 rounded(float x) {  // to nearest even; NaN stays NaN
        const u32 bits = __float_as_uint(x);
        if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
        return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    }
};

struct Float16 {
    typedef u16 Bits;
    static const u32 INFINITE = 0x7C00u, SIZE = 0x7FFFu;
    static __device__ float value(u32 bits) { return half_to_float((u16)bits); }
    static __device__ u32 rounded(float x) { return float_to_half(x); }
};

struct Float32 {
    typedef u32 Bits;
    static const u32 INFINITE = 0x7F800000u, SIZE = 0x7FFFFFFFu;
    static __device__ float value(u32 bits) { return __uint_as_float(bits); }
    static __device__ u32 rounded(float x) { return __float_as_uint(x); }
};

#if DTYPE == 32
typedef Float32 T;
#elif DTYPE == 16
typedef Float16 T;
#else
typedef BFloat16 T;
#endif
typedef T::Bits Bits;

// Four elements of a token as they lie in memory; zeros where there are fewer.
struct Four {
    u32 words[sizeof(Bits)];

    __device__ u32 operator[](int j) const {
        if (sizeof(Bits) == 4) return words[j];
        return j % 2 ? words[j / 2] >> 16 : words[j / 2] & 0xFFFFu;
    }

    __device__ void set(int j, u32 bits) {
        if (sizeof(Bits) == 4)
            words[j] = bits;
        else
            words[j / 2] = j % 2 ? words[j / 2] | bits << 16 : bits;
    }
};

__device__ Four load(const Bits *at, int there, bool aligned) {
    Four four = {};
    if (there > 0) TRAFFIC((there < UNITS_A_LANE ? there : UNITS_A_LANE) * sizeof(Bits));
    if (aligned) {
        if (there <= 0) return four;
        if (sizeof(Bits) == 2) {
            const uint2 two = *(const uint2 *)at;
            four.words[0] = two.x, four.words[1] = two.y;
        } else {
            const uint4 all = *(const uint4 *)at;
            four.words[0] = all.x, four.words[1] = all.y, four.words[2] = all.z, four.words[3] = all.w;
        }
    } else {
        for (int j = 0; j < UNITS_A_LANE; j++) four.set(j, j < there ? (u32)at[j] : 0u);
    }
    return four;
}

__device__ bool is_aligned(const Call &call) {
    const u64 size = UNITS_A_LANE * sizeof(Bits);
    return call.units % UNITS_A_LANE == 0 && (u64)call.x % size == 0 && (u64)call.before % size == 0;
}

__device__ u32 difference_of(u32 after, u32 before) { return T::rounded(T::value(after) - T::value(before)); }

__device__ Four minus(const Four &after, const Four &before) {
    Four update;
#pragma unroll
    for (int j = 0; j < UNITS_A_LANE; j++) update.set(j, difference_of(after[j], before[j]));
    return update;
}

// -------------------------------------------------------------------------------------------------------------- parts

__device__ int parts_in(i64 whole, int part) { return ((int)whole + part - 1) / part; }
__device__ int chunks_of(const Call &call) { return parts_in(call.tokens, (int)call.chunk); }
__device__ int groups_of(const Call &call) { return parts_in(call.units, UNITS_A_WARP); }
__device__ int strips_of(const Call &call) { return parts_in(call.units, WARP); }
__device__ int runs_of(const Call &call) { return parts_in(call.tokens, RUN); }
__device__ int items_of(const Call &call) { return (int)call.rows * chunks_of(call) * groups_of(call); }

// Moments of a part of the elements, merged by Chan's update.
struct Moments {
    double count, mean, m2;

    __device__ void merge(double other_count, double other_mean, double other_m2) {
        if (other_count == 0) return;
        const double all = count + other_count, delta = other_mean - mean;
        mean += delta * (other_count / all);
        m2 += other_m2 + delta * delta * (count * (other_count / all));
        count = all;
    }
};

template <class V> __device__ V from_below(V value, int step) { return __shfl_down_sync(EVERY_LANE, value, step); }

__device__ void merge_lanes(Moments &moments) {  // lane 0 has all
    for (int step = WARP / 2; step; step /= 2) {
        const double count = from_below(moments.count, step), mean = from_below(moments.mean, step);
        moments.merge(count, mean, from_below(moments.m2, step));
    }
}

template <class V> __device__ V warp_sum(V x) {  // in lane 0
    for (int step = WARP / 2; step; step /= 2) x += from_below(x, step);
    return x;
}
