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
