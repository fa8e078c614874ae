// The few words of CUDA that the kernels use, for a CPU. A thread of a block is a fiber; blocks run one after the other.
// Which warp goes on, and in which order its lanes do, is drawn from a seed: a result that depends on it shows.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>
using std::acos;
using std::sqrt;

#define EMULATED 1
#define __device__
#define __global__
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned *name = emulated::shared.data()
#define TRAFFIC(bytes) emulated::traffic += (bytes)
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Dim { unsigned x; };

namespace emulated {
enum Wait { NOTHING, WARP_MATES, BLOCK };
struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    unsigned index;
    bool started, done;
    Wait waits;
};
static std::vector<Fiber> fibers;
static std::vector<unsigned> shared;
static jmp_buf scheduler;
static Fiber *now;
static Dim block_index, block_size, grid_size;
static std::function<void()> body;
static unsigned long long given[64][32];  // by warp and lane: what lanes show each other
static unsigned long long traffic;
static const size_t STACK = 1 << 16;

static void enter() {
    body();
    now->done = true;
    _longjmp(scheduler, 1);
}

static void wait(Wait kind) {
    now->waits = kind;
    if (!_setjmp(now->resume)) _longjmp(scheduler, 1);
}

static void resume(Fiber &fiber) {  // until it waits
    now = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

static void start(unsigned i) {
    Fiber &fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.index = i, fiber.started = fiber.done = false, fiber.waits = NOTHING;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
}

static bool all_wait(unsigned from, unsigned to, Wait kind) {
    bool any = false;
    for (unsigned i = from; i < to; i++)
        if (!fibers[i].done) {
            if (fibers[i].waits != kind) return false;
            any = true;
        }
    return any;
}

static void release(unsigned from, unsigned to) {
    for (unsigned i = from; i < to; i++) fibers[i].waits = NOTHING;
}

static bool run_block(unsigned block, std::mt19937 &random) {  // false: threads wait for others for ever
    for (unsigned i = 0; i < block; i++) start(i);
    std::vector<unsigned> order(32);
    for (unsigned i = 0; i < 32; i++) order[i] = i;
    const unsigned warps = block / 32;
    unsigned favourite = 0;  // a warp that runs ahead of the others for a while
    for (;;) {
        std::vector<unsigned> ready;
        for (unsigned w = 0; w < warps; w++)
            for (unsigned i = w * 32; i < w * 32 + 32; i++)
                if (!fibers[i].done && fibers[i].waits == NOTHING) {
                    ready.push_back(w);
                    break;
                }
        if (ready.empty()) {
            if (all_wait(0, block, BLOCK)) {
                release(0, block);
                continue;
            }
            return std::all_of(fibers.begin(), fibers.begin() + block, [](const Fiber &f) { return f.done; });
        }
        if (random() % 16 == 0) favourite = random() % warps;
        const bool there = std::find(ready.begin(), ready.end(), favourite) != ready.end();
        const unsigned warp = there ? favourite : ready[random() % ready.size()];
        if (random() % 8 == 0) std::shuffle(order.begin(), order.end(), random);
        for (unsigned lane : order) {
            Fiber &fiber = fibers[warp * 32 + lane];
            if (!fiber.done && fiber.waits == NOTHING) resume(fiber);
        }
        if (all_wait(warp * 32, warp * 32 + 32, WARP_MATES)) release(warp * 32, warp * 32 + 32);
    }
}

static int launch(unsigned grid, unsigned block, size_t shared_bytes, unsigned seed, std::function<void()> kernel) {
    std::mt19937 random(seed);
    grid_size.x = grid, block_size.x = block, body = kernel;
    if (block % 32 || block > 1024) return 1;
    if (fibers.size() < block) fibers.resize(block);
    std::vector<unsigned> order(grid);
    for (unsigned i = 0; i < grid; i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned at : order) {
        block_index.x = at;
        shared.assign(shared_bytes / 4, 0xDEADBEEFu);
        if (!run_block(block, random)) return 2;
    }
    return 0;
}

template <class V> static V exchange(V value, unsigned from) {  // every lane calls: that of lane `from`, or its own
    const unsigned warp = now->index / 32, lane = now->index % 32;
    given[warp][lane] = 0;
    std::memcpy(&given[warp][lane], &value, sizeof(V));
    wait(WARP_MATES);
    if (from < 32) std::memcpy(&value, &given[warp][from], sizeof(V));
    wait(WARP_MATES);
    return value;
}
}  // namespace emulated

#define threadIdx (Dim{emulated::now->index})
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size
static inline void __syncthreads() { emulated::wait(emulated::BLOCK); }
static inline void __syncwarp() { emulated::wait(emulated::WARP_MATES); }
static inline void __threadfence() {}
template <class V> static inline V __shfl_down_sync(unsigned, V value, int by) {
    return emulated::exchange(value, emulated::now->index % 32 + by);
}
template <class V> static inline V __shfl_sync(unsigned, V value, int lane) { return emulated::exchange(value, lane); }
static inline unsigned __ballot_sync(unsigned, bool value) {
    const unsigned warp = emulated::now->index / 32;
    emulated::given[warp][emulated::now->index % 32] = value;
    emulated::wait(emulated::WARP_MATES);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; i++) bits |= (unsigned)(emulated::given[warp][i] & 1) << i;
    emulated::wait(emulated::WARP_MATES);
    return bits;
}
template <class V> static inline V atomicAdd(V *at, V by) {
    const V was = *at;
    *at = was + by;
    return was;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class To, class From> static inline To same_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
static inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
static inline double __longlong_as_double(long long x) { return same_bits<double>(x); }
static inline unsigned short float_to_half(float x) { return same_bits<unsigned short>((_Float16)x); }
static inline float half_to_float(unsigned short x) { return (float)same_bits<_Float16>(x); }
