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
