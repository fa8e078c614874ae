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
