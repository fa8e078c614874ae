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
    double *compared;     // [runs, 7]; see COMPARED
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

// A warp's part of the work: tokens `first` to `last` of a row, its lane's units `unit` to `unit + there`.
struct Item {
    int first, last, part, unit, there;
};

__device__ Item item_of(const Call &call, int part, int group) {
    const int chunks = chunks_of(call), tokens = (int)call.tokens, chunk = (int)call.chunk;
    const int start = part % chunks * chunk, row = part / chunks;
    Item item;
    item.unit = group * UNITS_A_WARP + threadIdx.x % WARP * UNITS_A_LANE;
    item.there = (int)call.units - item.unit;
    item.part = part;
    item.first = row * tokens + start;
    item.last = row * tokens + (start + chunk < tokens ? start + chunk : tokens);
    return item;
}

__device__ void store(double *into, const Call &call, const Item &item, const double *values) {
#pragma unroll
    for (int j = 0; j < UNITS_A_LANE; j++)
        if (j < item.there) {
            into[(i64)item.part * call.units + item.unit + j] = values[j];
            TRAFFIC(sizeof(double));
        }
}

// A permutation of the counters: differences of coarsely rounded numbers have zeros in their lowest bits, and would all
// lie in few of the 32 banks.
__device__ u32 slot(u32 i) { return i ^ ((i >> 5) & 31u); }

// Counters in shared memory. What was there is not asked for, so lanes that add to the same one do so at once.
struct Counters {
#ifdef EMULATED
    u32 *at;
    explicit Counters(u32 *counts) : at(counts) {}
    void add(u32 i, u32 number) const { at[slot(i)] += number; }
    void add_one(u32 i) const { at[slot(i)]++; }
#else
    u32 at;
    __device__ explicit Counters(u32 *counts) : at((u32)__cvta_generic_to_shared(counts)) {
        asm volatile("" : "+r"(at));
    }
    __device__ void add(u32 i, u32 number) const {
        asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(at + 4 * slot(i)), "r"(number) : "memory");
    }
    __device__ void add_one(u32 i) const {
        asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(at + 4 * slot(i)) : "memory");
    }
#endif
};

static const u32 ZERO = SPAN, EACH_SIGN = SPAN + 32;

// Which counter is that of abs(x), given as its pattern: those that have none are counted as zeros at first.
__device__ u32 counter_of(u32 size) { return size - LOW < SPAN ? size - LOW : ZERO; }
__device__ bool has_counter(u32 size) { return size == 0 || size - LOW < SPAN; }

__device__ void clear(u32 *counts, u32 number) {
    for (u32 i = threadIdx.x; i < number; i += blockDim.x) counts[i] = 0;
    __syncthreads();
}

// One item of a part that is not finite, summed again without the tokens that are not.
template <bool difference> __device__ void sum_again(const Call &call, const Item &item, const volatile u8 *bad) {
    double sums[UNITS_A_LANE] = {}, squares[UNITS_A_LANE] = {};
    for (int token = item.first; token < item.last; token++) {
        if (!call.mask[token] || bad[token]) continue;
        const i64 at = (i64)token * call.units + item.unit;
        Four four = load((const Bits *)call.x + at, item.there, false);
        if (difference) four = minus(four, load((const Bits *)call.before + at, item.there, false));
#pragma unroll
        for (int j = 0; j < UNITS_A_LANE; j++) {
            const double value = T::value(four[j]);
            sums[j] += value, squares[j] += value * value;
        }
    }
    store(call.sums, call, item, sums);
    if (call.squares) store(call.squares, call, item, squares);
}

// The warp is done with an item; the last one of its part counts the part's tokens, and mends its sums.
template <bool difference> __device__ void arrive(const Call &call, const Item &item, bool is_bad) {
    const int lane = threadIdx.x % WARP;
    const bool bad_item = __ballot_sync(EVERY_LANE, is_bad) != 0;
    __threadfence();
    __syncwarp();
    u32 arrived = 0;
    if (lane == 0) arrived = atomicAdd(call.arrived + item.part, bad_item ? A_BAD_ITEM + 1u : 1u);
    arrived = __shfl_sync(EVERY_LANE, arrived, 0);
    if (arrived % A_BAD_ITEM != (u32)groups_of(call) - 1) return;
    __threadfence();
    const bool bad_part = bad_item || arrived >= A_BAD_ITEM;
    const volatile u8 *bad = call.bad;
    int seen = 0, finite = 0;
    for (int token = item.first + lane; token < item.last; token += WARP) {
        const bool wanted = call.mask[token];
        seen += wanted, finite += wanted && !(bad_part && bad[token]);
    }
    __syncwarp();
    seen = warp_sum(seen), finite = warp_sum(finite);
    if (lane == 0) {
        call.seen[2 * item.part] = finite, call.seen[2 * item.part + 1] = seen;
        call.arrived[item.part] = 0;
    }
    if (!bad_part) return;
    for (int group = 0; group < groups_of(call); group++)
        sum_again<difference>(call, item_of(call, item.part, group), bad);
    __syncwarp();
    for (int token = item.first + lane; token < item.last; token += WARP) call.bad[token] = 0;
}

#if DTYPE != 32

static const u32 BOTH_SIGNS = 2 * EACH_SIGN;
static const int AHEAD = 4;  // tokens whose loads are under way together

__device__ void add_to_all(const Call &call, u32 pattern, u32 count) {
    if (call.wide)
        atomicAdd((u64 *)call.all_patterns + pattern, (u64)count);
    else
        atomicAdd((u32 *)call.all_patterns + pattern, count);
}

template <bool difference, bool squared> __device__ void count_elements(const Call &call) {
    DYNAMIC_SHARED(counts);
    clear(counts, BOTH_SIGNS);
    const Counters counters(counts);
    const bool aligned = is_aligned(call);
    const int items = items_of(call), groups = groups_of(call), units = (int)call.units;
    const int lane = threadIdx.x % WARP;
    for (int index = threadIdx.x / WARP * gridDim.x + blockIdx.x; index < items; index += blockDim.x / WARP * gridDim.x) {
        const Item item = item_of(call, index / groups, index % groups);
        double sums[UNITS_A_LANE] = {}, squares[UNITS_A_LANE] = {};
        u32 tokens = 0;
        bool is_bad = false;
        for (int tile = item.first; tile < item.last; tile += WARP) {
            u32 wanted = __ballot_sync(EVERY_LANE, tile + lane < item.last && call.mask[tile + lane]);
            tokens += __popc(wanted);
            const Bits *x = (const Bits *)call.x + (i64)tile * units + item.unit;
            const Bits *before = (const Bits *)call.before + (i64)tile * units + item.unit;
            for (int t = 0; wanted; t += AHEAD, wanted >>= AHEAD, x += AHEAD * units, before += AHEAD * units) {
                Four fours[AHEAD];
#pragma unroll
                for (int k = 0; k < AHEAD; k++)
                    if (wanted >> k & 1) fours[k] = load(x + k * units, item.there, aligned);
                if (difference) {
#pragma unroll
                    for (int k = 0; k < AHEAD; k++)
                        if (wanted >> k & 1) fours[k] = minus(fours[k], load(before + k * units, item.there, aligned));
                }
                u32 largest = 0, smallest = ~0u;  // `smallest`: less one, so that zeros are none
#pragma unroll
                for (int k = 0; k < AHEAD; k++) {
                    if (!(wanted >> k & 1)) continue;
#pragma unroll
                    for (int j = 0; j < UNITS_A_LANE; j++) {
                        const u32 pattern = fours[k][j], size = pattern & T::SIZE;
                        const double value = T::value(pattern);
                        sums[j] += value;
                        if (squared) squares[j] += value * value;
                        largest = size > largest ? size : largest;
                        smallest = size - 1 < smallest ? size - 1 : smallest;
                        counters.add_one(counter_of(size) + (pattern >> 15) * EACH_SIGN);
                    }
                }
                if (largest < LOW + SPAN && smallest >= LOW - 1) continue;
#pragma unroll 1
                for (int i = 0; i < AHEAD * UNITS_A_LANE; i++) {  // those without a counter
                    const int k = i / UNITS_A_LANE, j = i % UNITS_A_LANE;
                    if (!(wanted >> k & 1) || j >= item.there) continue;
                    u32 pattern = x[k * units + j];
                    if (difference) pattern = difference_of(pattern, before[k * units + j]);
                    if (has_counter(pattern & T::SIZE)) continue;
                    counters.add(ZERO + (pattern >> 15) * EACH_SIGN, -1u);
                    add_to_all(call, pattern, 1u);
                    if ((pattern & T::SIZE) >= T::INFINITE) call.bad[tile + t + k] = 1, is_bad = true;
                }
            }
        }
        store(call.sums, call, item, sums);
        if (squared) store(call.squares, call, item, squares);
        if (item.there < UNITS_A_LANE)  // the zeros beyond the end
            counters.add(ZERO, tokens * (u32)(item.there < 0 ? -UNITS_A_LANE : item.there - UNITS_A_LANE));
        arrive<difference>(call, item, is_bad);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < BOTH_SIGNS; i += blockDim.x) {
        const u32 count = counts[slot(i)], sign = i >= EACH_SIGN, size = i - sign * EACH_SIGN;
        if (count) add_to_all(call, sign << 15 | (size == ZERO ? 0 : LOW + size), count);
    }
}

#else

// Counted of abs(x): its cuts (upper halves of patterns), and how many of `limits` are not above it: its rank.
template <bool difference, bool squared> __device__ void count_elements(const Call &call) {
    DYNAMIC_SHARED(counts);
    const u32 limits = (u32)call.num_limits;
    u32 *ranks = counts + EACH_SIGN, *zeros = ranks + limits + 1, *nonfinite = zeros + 1, *shared_limits = zeros + 2;
    for (u32 i = threadIdx.x; i < limits; i += blockDim.x) shared_limits[i] = call.limits[i];
    clear(counts, EACH_SIGN + limits + 3);
    const Counters counters(counts);
    const bool aligned = is_aligned(call);
    const int items = items_of(call), groups = groups_of(call);
    for (int index = threadIdx.x / WARP * gridDim.x + blockIdx.x; index < items; index += blockDim.x / WARP * gridDim.x) {
        const Item item = item_of(call, index / groups, index % groups);
        double sums[UNITS_A_LANE] = {}, squares[UNITS_A_LANE] = {};
        int finite = 0;
        double pivot = 0, shifted = 0, shifted_squares = 0;  // moments around the lane's first element
        float lowest = __uint_as_float(T::INFINITE), highest = -lowest;
        bool is_bad = false;
        for (int token = item.first; token < item.last; token++) {
            if (!call.mask[token]) continue;
            const i64 at = (i64)token * call.units + item.unit;
            Four four = load((const Bits *)call.x + at, item.there, aligned);
            if (difference) four = minus(four, load((const Bits *)call.before + at, item.there, aligned));
#pragma unroll
            for (int j = 0; j < UNITS_A_LANE; j++) {
                if (j >= item.there) continue;
                const u32 size = four[j] & T::SIZE, cut = size >> 16;
                if (size >= T::INFINITE) {
                    atomicAdd(nonfinite, 1u);
                    call.bad[token] = 1, is_bad = true;
                    continue;
                }
                const float value = T::value(four[j]);
                const double x = value;
                sums[j] += x;
                if (squared) squares[j] += x * x;
                if (!finite++) pivot = x;
                shifted += x - pivot, shifted_squares += (x - pivot) * (x - pivot);
                lowest = value < lowest ? value : lowest, highest = value > highest ? value : highest;
                u32 rank = 0;
                for (u32 k = 0; k < limits; k++) rank += size >= shared_limits[k];
                atomicAdd(ranks + rank, 1u);
                if (size == 0) atomicAdd(zeros, 1u);
                if (has_counter(cut))
                    counters.add_one(counter_of(cut));
                else
                    atomicAdd((u64 *)call.all_cuts + cut, (u64)1);
            }
        }
        store(call.sums, call, item, sums);
        if (squared) store(call.squares, call, item, squares);
        __syncwarp();
        Moments moments = {(double)finite, 0, 0};
        if (finite) moments.mean = pivot + shifted / finite, moments.m2 = shifted_squares - shifted * (shifted / finite);
        merge_lanes(moments);
        for (int step = WARP / 2; step; step /= 2) {
            const float low = from_below(lowest, step), high = from_below(highest, step);
            lowest = low < lowest ? low : lowest, highest = high > highest ? high : highest;
        }
        if (threadIdx.x % WARP == 0) {
            double *into = call.moments + 5 * (i64)index;
            into[0] = moments.count, into[1] = moments.mean, into[2] = moments.m2, into[3] = lowest, into[4] = highest;
        }
        arrive<difference>(call, item, is_bad);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < EACH_SIGN; i += blockDim.x)
        if (counts[slot(i)]) atomicAdd((u64 *)call.all_cuts + (i == ZERO ? 0 : LOW + i), (u64)counts[slot(i)]);
    if (threadIdx.x) return;
    u64 below = 0;
    for (u32 k = 0; k < limits; k++) atomicAdd((u64 *)call.all_near_zero + k, below += ranks[k]);
    atomicAdd((u64 *)call.all_elements + 1, (u64)*zeros);
    atomicAdd((u64 *)call.all_elements + 2, (u64)*nonfinite);
}

#endif

#define COUNT(name, difference, squared)                                                                               \
    extern "C" __global__ void __launch_bounds__(1024, 1) name(const __grid_constant__ Call call) {                    \
        count_elements<difference, squared>(call);                                                                     \
    }
COUNT(count, false, false)
COUNT(count_squared, false, true)
COUNT(count_update, true, true)

static const int COMPARED = 7;  // numbers of a run: angles, cosine, angle, relative update; tokens, mean and m2 of the input

// `x` is the block's output, `before` its input; differences are those of the values, not of their rounding.
extern "C" __global__ void __launch_bounds__(256) compare(const __grid_constant__ Call call) {
    const bool aligned = is_aligned(call);
    const int warps = blockDim.x / WARP, runs = runs_of(call), units = (int)call.units, tokens = (int)call.tokens;
    const int lane = threadIdx.x % WARP;
    for (int run = blockIdx.x * warps + threadIdx.x / WARP; run < call.rows * runs; run += gridDim.x * warps) {
        const int start = run % runs * RUN, first = run / runs * tokens + start;
        const int number = tokens - start < RUN ? tokens - start : RUN;
        double angles = 0, cosines = 0, angle = 0, relative = 0;
        Moments input = {};
        for (int token = first; token < first + number; token++) {
            if (!call.mask[token]) continue;
            const double pivot = T::value(((const Bits *)call.before)[(i64)token * units]);
            double shifted = 0, shifted_squares = 0, dot = 0, old_squares = 0, new_squares = 0, change_squares = 0;
            bool finite = true;
#pragma unroll 4
            for (int u = lane * UNITS_A_LANE; u < units; u += UNITS_A_WARP) {
                const i64 at = (i64)token * units + u;
                const int there = units - u;
                const Four after = load((const Bits *)call.x + at, there, aligned);
                const Four before = load((const Bits *)call.before + at, there, aligned);
#pragma unroll
                for (int j = 0; j < UNITS_A_LANE; j++) {
                    if (j >= there) continue;
                    finite = finite && (before[j] & T::SIZE) < T::INFINITE && (after[j] & T::SIZE) < T::INFINITE;
                    const double a = T::value(before[j]), b = T::value(after[j]);
                    shifted += a - pivot, shifted_squares += (a - pivot) * (a - pivot);
                    dot += a * b, old_squares += a * a, new_squares += b * b;
                    change_squares += (b - a) * (b - a);
                }
            }
            __syncwarp();
            finite = __ballot_sync(EVERY_LANE, !finite) == 0;
            shifted = warp_sum(shifted), shifted_squares = warp_sum(shifted_squares), dot = warp_sum(dot);
            old_squares = warp_sum(old_squares), new_squares = warp_sum(new_squares);
            change_squares = warp_sum(change_squares);
            if (lane || !finite) continue;
            const double m2 = shifted_squares - shifted * (shifted / units);
            input.merge(1, pivot + shifted / units, m2 < 0 ? 0 : m2 / units);  // tokens count as one, and weigh alike
            if (!(old_squares > 0 && new_squares > 0)) continue;
            const double cosine = dot / sqrt(old_squares * new_squares), within = cosine < -1 ? -1 : cosine > 1 ? 1 : cosine;
            angles++, cosines += within;
            angle += acos(within) / 3.14159265358979323846;
            relative += sqrt(change_squares / old_squares);
        }
        if (lane) continue;
        double *into = call.compared + COMPARED * (i64)run;
        into[0] = angles, into[1] = cosines, into[2] = angle, into[3] = relative;
        into[4] = input.count, into[5] = input.mean, into[6] = input.m2;
    }
}

// A thread takes a unit: adds up its parts, row by row. A warp gives the spread of its 32 units' sums of each row.
__device__ void add_units(const Call &call, int unit) {
    const int chunks = chunks_of(call), strips = strips_of(call), rows = (int)call.rows;
    const i64 units = call.units;
    const bool is_unit = unit < units;
    double sums = 0, squares = 0;
    for (int row = 0; row < rows; row++) {
        double sum = 0, square = 0;
        if (is_unit) {
            const double *at = call.sums + (i64)row * chunks * units + unit;
#pragma unroll 4
            for (int chunk = 0; chunk < chunks; chunk++) sum += at[chunk * units];
            TRAFFIC(chunks * sizeof(double));
            if (call.squares) {
                at = call.squares + (i64)row * chunks * units + unit;
#pragma unroll 4
                for (int chunk = 0; chunk < chunks; chunk++) square += at[chunk * units];
                TRAFFIC(chunks * sizeof(double));
            }
        }
        __syncwarp();
        sums += sum, squares += square;
        Moments moments = {is_unit ? 1. : 0., sum, 0};
        merge_lanes(moments);
        if (threadIdx.x % WARP == 0 && is_unit) {
            double *spread = call.spread + 2 * (row * strips + unit / WARP);
            spread[0] = moments.mean, spread[1] = moments.m2;
        }
    }
    if (is_unit && call.all_unit_sums) {
        call.all_unit_sums[unit] += sums;
        call.all_unit_sums[units + unit] += squares;
    }
}

// A warp: the variance over units of the row's token-mean, and the row's tokens.
__device__ void finish_row(const Call &call, int row) {
    const int lane = threadIdx.x % WARP;
    const int chunks = chunks_of(call), strips = strips_of(call), units = (int)call.units;
    const volatile double *spread = call.spread + 2 * row * strips;
    int finite = 0, seen = 0;
    for (int part = row * chunks + lane; part < (row + 1) * chunks; part += WARP)
        finite += (int)call.seen[2 * part], seen += (int)call.seen[2 * part + 1];
    Moments moments = {};
    for (int strip = lane; strip < strips; strip += WARP) {
        const int there = units - strip * WARP;
        moments.merge(there < WARP ? there : WARP, spread[2 * strip], spread[2 * strip + 1]);
    }
    __syncwarp();
    finite = warp_sum(finite), seen = warp_sum(seen);
    merge_lanes(moments);
    if (lane) return;
    call.row_seen[2 * row] = finite, call.row_seen[2 * row + 1] = seen;
    call.pooled[row] = units > 1 && finite ? moments.m2 / finite / finite / (units - 1) : 0;
}

__device__ void merge_into(double *moments, i64 seen, const Moments &more) {
    Moments all = {(double)seen, moments[0], moments[1]};
    all.merge(more.count, more.mean, more.m2);
    moments[0] = all.mean, moments[1] = all.m2;
}

// A warp: the runs of a block's comparison, each lane's in order, then the lanes'.
__device__ void finish_comparison(const Call &call) {
    const int lane = threadIdx.x % WARP, runs = (int)call.rows * runs_of(call);
    double sums[4] = {};
    for (int run = lane; run < runs; run += WARP)
        for (int k = 0; k < 4; k++) sums[k] += call.compared[COMPARED * (i64)run + k];
    Moments input = {};
    for (int run = lane; run < runs; run += WARP) {
        const double *at = call.compared + COMPARED * (i64)run;
        input.merge(at[4], at[5], at[6]);
        TRAFFIC(COMPARED * sizeof(double));
    }
    __syncwarp();
    for (int k = 0; k < 4; k++) sums[k] = warp_sum(sums[k]);
    merge_lanes(input);
    if (lane) return;
    for (int k = 0; k < 3; k++) call.all_geometry[k] += sums[k + 1];
    input.count *= call.units, input.m2 *= call.units;
    merge_into(call.all_input_moments, call.all_tokens[1], input);
    call.all_tokens[0] += (i64)sums[0], call.all_tokens[1] += (i64)input.count;
}

// A warp: the items' moments of float32.
__device__ void finish_moments(const Call &call) {
    const int lane = threadIdx.x % WARP;
    Moments moments = {};
    double low = __longlong_as_double(0x7FF0000000000000ll), high = -low;
    for (int item = lane; item < items_of(call); item += WARP) {
        const double *at = call.moments + 5 * (i64)item;
        moments.merge(at[0], at[1], at[2]);
        low = at[3] < low ? at[3] : low, high = at[4] > high ? at[4] : high;
        TRAFFIC(5 * sizeof(double));
    }
    __syncwarp();
    merge_lanes(moments);
    for (int step = WARP / 2; step; step /= 2) {
        const double lower = from_below(low, step), higher = from_below(high, step);
        low = lower < low ? lower : low, high = higher > high ? higher : high;
    }
    if (lane) return;
    merge_into(call.all_moments, call.all_elements[0], moments);
    call.all_elements[0] += (i64)moments.count;
    call.all_extremes[0] = low < call.all_extremes[0] ? low : call.all_extremes[0];
    call.all_extremes[1] = high > call.all_extremes[1] ? high : call.all_extremes[1];
}

__device__ void finish_rows(const Call &call) {
    for (i64 row = 0; row < call.rows; row++) {  // in order
        const i64 finite = call.row_seen[2 * row];
        if (finite > 0 && finite == call.row_seen[2 * row + 1]) {
            *call.all_sequences += 1;
            *call.all_pooled += call.pooled[row];
        }
        if (call.all_unit_count) *call.all_unit_count += finite;
    }
}

// A block takes 128 units of a call; the last block of a call brings its accumulator up to date.
extern "C" __global__ void __launch_bounds__(FINISHERS, 4) finish(const __grid_constant__ Calls calls) {
    __shared__ bool is_last;
    int group = blockIdx.x, number = 0;
    while (group >= groups_of(calls.at[number])) group -= groups_of(calls.at[number++]);
    const Call &call = calls.at[number];
    const int warp = threadIdx.x / WARP, warps = FINISHERS / WARP;
    add_units(call, group * FINISHERS + threadIdx.x);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(call.ticket, 1u) == (u32)groups_of(call) - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int row = warp; row < call.rows; row += warps) finish_row(call, row);
    if (warp == 1 && call.compared) finish_comparison(call);
    if (warp == 2 && call.moments) finish_moments(call);
    __syncthreads();
    if (threadIdx.x) return;
    finish_rows(call);
    *call.ticket = 0;
}
