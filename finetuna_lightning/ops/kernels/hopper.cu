// Y = s_x (X W^T) s_w + low M + bias + residual on Hopper's matrix units: gemm.py says what each is, hopper.py compiles
// this for OPERANDS and RESULT (0 int8, 1 bfloat16, 2 float16), for W in rows along K, or ALONG_N, for one or two SLICES
// of X, and for ROWS and COLUMNS of a tile and STAGES of the ring, by which it is launched too.
//
// Two slices are X in 16 bits: int8 codes, and what they leave in 256ths of their unit, in int8 as well (arXiv
// 2306.11975 multiplies floats so). The remainders' products come first; their sum is rounded to the codes' unit, and
// the codes' are added to it, all of it in int32.
//
// Two blocks make a cluster. Each has 128 rows of X of its own, both have the same 256 columns, so that either reads
// half of W's tile and the copy engine puts it into both ("multicast": a third less to read from L2). One warp group
// loads, four stages ahead and on into the next tile; two compute 64 x 256 each. While the units are busy with the
// beginning of a tile, what its end asks for is read, and the tile before is written. Instructions and layouts: PTX
// ISA, "Asynchronous warpgroup level matrix instructions" and "Tensor copy"; the division of labour is CUTLASS's
// "cooperative" one.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap { char bytes[128]; };

struct Given {
    void *out;
    const float *row_scale;
    const float *column_scale;
    const void *bias;
    const int *tiles;
    int n, k, c, step, stride_out, residual, tile_count, slice;
};

constexpr int BLOCK_K = OPERANDS == 0 ? 128 : 64;  // 128 bytes
static_assert(SLICES == 1 || SLICES == 2 && OPERANDS == 0, "floats are not sliced");
static_assert(ROWS == 128 && COLUMNS == 256, "two warp groups of 64 x 256, the widest product there is");
constexpr int GROUP = 8;
constexpr u32 HALF = 128;  // of the codes' unit, in remainders
// Sums of integers begin at OFFSET, and at their end OFFSET_LEFT is taken off again, so that they are as exact. From zero,
// a sum that changes its sign turns all its upper bits over, which costs power, and power is the limit here: 1% to 2% of
// the time. With ones in every second place a carry never goes far.
constexpr u32 OFFSET = OPERANDS == 0 ? 0x15555500 : 0, OFFSET_LEFT = SLICES == 2 ? OFFSET >> 8 : OFFSET;
static_assert(OFFSET % 256 == 0 && (OFFSET_LEFT == 0) == (OPERANDS != 0), "or remainders are rounded elsewhere");
constexpr int A_BYTES = ROWS * 128, B_BYTES = COLUMNS * 128, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int PANEL = 64 * 128;         // of a tile of W along N: 64 columns, 64 rows of 128 bytes
constexpr int PIECE = 16 * 128;         // of a tile of Y, on its way out: 16 rows, 64 columns
constexpr int STAGING = 8 * 2 * PIECE;  // two for each warp

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\nbra again;\ndone:\n}" ::"r"(bar), "r"(parity) : "memory");
}
// to the same barrier of the block `rank` of the cluster
__device__ __forceinline__ void barrier_arrive(u32 bar, u32 rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(bar), "r"(rank) : "memory");
}
__device__ __forceinline__ void group_sync(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void load(u32 to, const TensorMap &map, u32 bar, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(&map), "r"(bar), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void load_both(u32 to, const TensorMap &map, u32 bar, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(to), "l"(&map), "r"(bar), "r"(x), "r"(y), "h"((u16)3) : "memory");
}

__device__ __forceinline__ void store(u32 to, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void store(u32 to, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ u32 stored(u32 at) {
    u32 value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}
__device__ __forceinline__ uint4 stored_whole(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at)
                 : "memory");
    return v;
}

// where in a piece the two numbers i of 16 stand that a lane has of it, as the units leave them
__device__ __forceinline__ u32 place(int lane, int i) {
    return (lane / 4 + i % 2 * 8) * 128 + (i / 2 ^ lane / 4) * 16 + lane % 4 * 4;
}
// where in a piece a lane's 16 bytes of the rows 4 i to 4 i + 3 stand
__device__ __forceinline__ u32 part_of_row(int lane, int i) {
    const int row = lane / 8 + 4 * i;
    return row * 128 + (lane % 8 ^ row % 8) * 16;
}

// A matrix in shared memory in rows of 128 bytes, swizzled; `leading` only matters where it lies along M or N.
__device__ __forceinline__ u64 matrix(u32 address, u32 leading) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define R8(x, i) x(i), x(i + 1), x(i + 2), x(i + 3), x(i + 4), x(i + 5), x(i + 6), x(i + 7)
#define R64(x, i) \
    R8(x, i), R8(x, i + 8), R8(x, i + 16), R8(x, i + 24), R8(x, i + 32), R8(x, i + 40), R8(x, i + 48), R8(x, i + 56)
#define D(i) "+r"(d[i])
#define LIST \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, " \
    "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, " \
    "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

#if OPERANDS == 2
#define OF "f16"
#else
#define OF "bf16"
#endif
#if RESULT == 2
#define DELTA_OF "f16"
#else
#define DELTA_OF "bf16"
#endif

// d += a b: of integers, of 16-bit numbers with b along K, or along N, and the delta's, of Y's type, along N
#define MULTIPLY(name, instruction, rest) \
    __device__ __forceinline__ void name(u32 (&d)[128], u64 a, u64 b) { \
        asm volatile("wgmma.mma_async.sync.aligned." instruction " " LIST ", %128, %129, 1" rest ";" \
                     : R64(D, 0), R64(D, 64) : "l"(a), "l"(b)); \
    }
#if OPERANDS == 0
MULTIPLY(multiply, "m64n256k32.s32.s8.s8", "")
#elif ALONG_N
MULTIPLY(multiply, "m64n256k16.f32." OF "." OF, ", 1, 1, 0, 1")
#else
MULTIPLY(multiply, "m64n256k16.f32." OF "." OF, ", 1, 1, 0, 0")
#endif
MULTIPLY(multiply_delta, "m64n256k16.f32." DELTA_OF "." DELTA_OF, ", 1, 1, 0, 1")

__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }
// what the units leave
__device__ __forceinline__ float number(u32 bits) {
#if OPERANDS == 0
    return (float)(int)(bits - OFFSET_LEFT);
#else
    return __uint_as_float(bits);
#endif
}
__device__ __forceinline__ u32 times(float a, float b) { return __float_as_uint(__fmul_rn(a, b)); }
__device__ __forceinline__ u32 plus(float a, float b) { return __float_as_uint(__fadd_rn(a, b)); }
// the units write d while the threads go on: what they do with it stays before a beginning, and behind an end
__device__ __forceinline__ void settled(u32 (&d)[128]) { asm volatile("" : R64(D, 0), R64(D, 64)::"memory"); }
__device__ __forceinline__ void products_begin(u32 (&d)[128]) {
    settled(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
__device__ __forceinline__ void products_wait_all(u32 (&d)[128]) {
    products_wait<0>();
    settled(d);
}

__device__ __forceinline__ u32 pack(u32 low, u32 high) {
    u32 both;
#if RESULT == 2
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "r"(high), "r"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "r"(high), "r"(low));
#endif
    return both;
}
__device__ __forceinline__ float2 unpack(u32 both) {
    float2 out;
#if RESULT == 2
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(out.x), "=f"(out.y) : "r"(both));
#else
    out.x = __uint_as_float(both << 16);
    out.y = __uint_as_float(both & 0xFFFF0000u);
#endif
    return out;
}

// where a warp group stands in the ring of stages
struct Place {
    int stage;
    u32 parity;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// A tile of Y. The second block of a cluster has none where tiles are odd in number: it goes along and stores nothing.
struct Unit {
    int n0, start, stop, m0;
};
__device__ __forceinline__ Unit unit_of(int unit, int rank, const Given &g) {
    const int pairs = (g.tile_count + 1) / 2;
    const int width = GROUP * ((g.n + COLUMNS - 1) / COLUMNS);  // neighbours share operands in L2
    const int first = unit / width * GROUP, size = min(pairs - first, GROUP);
    const int tile = 2 * (first + unit % width % size) + rank;
    const bool none = tile >= g.tile_count;
    const int there = none ? g.tile_count - 1 : tile;
    Unit u;
    u.n0 = unit % width / size * COLUMNS;
    u.start = g.tiles[there];
    u.stop = none ? u.start : g.tiles[g.tile_count + there];
    u.m0 = g.tiles[2 * g.tile_count + there] * g.step;
    return u;
}

// A warp's part of a tile that has been computed: 16 rows of 256 columns, two numbers in each. It is written in pieces of
// 64 columns through shared memory, so that whole rows of a piece are written at a time; in rows of 128 bytes, swizzled,
// so that no two lanes meet in a bank.
struct Result {
    u32 two[64];
    int strip, stop, n0;  // first row, end row, first column
};
template <int I>
__device__ __forceinline__ void write(const Result &r, const Given &g, u32 mine, int lane) {
    const u32 buffer = mine + I % 2 * PIECE;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i)
        store(buffer + place(lane, i), r.two[16 * I + i]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = r.strip + lane / 8 + 4 * i, column = r.n0 + 64 * I + lane % 8 * 8;
        const uint4 values = stored_whole(buffer + part_of_row(lane, i));
        if (row < r.stop && column < g.n)
            *(uint4 *)((u16 *)g.out + (long long)row * g.stride_out + column) = values;
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
hopper_gemm(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
            const __grid_constant__ TensorMap low_map, const __grid_constant__ TensorMap m_map,
            const __grid_constant__ TensorMap residual_map, const Given g) {
    extern __shared__ unsigned char memory[];
    const u32 base = (shared_address(memory) + 1023) & ~1023u;  // as swizzled rows ask
    const u32 staging = base + STAGES * STAGE_BYTES;
    const u32 full = staging + STAGING, empty = full + 8 * STAGES;
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    const int units = (g.tile_count + 1) / 2 * ((g.n + COLUMNS - 1) / COLUMNS);
    const int blocks = (g.k + BLOCK_K - 1) / BLOCK_K;
    Place at = {0, 0};
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
                const Unit u = unit_of(unit, rank, g);
                for (int each = 0; each < SLICES * blocks; ++each, at.next()) {
                    const u32 a = base + at.stage * STAGE_BYTES, b = a + A_BYTES, bar = full + 8 * at.stage;
                    const bool second = SLICES == 2 && each < blocks;
                    const int block = SLICES == 2 && !second ? each - blocks : each;
                    barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
                    barrier_expect(bar, STAGE_BYTES);
                    load(a, a_map, bar, block * BLOCK_K, second ? g.slice + u.start : u.start);
#if ALONG_N
                    for (int i = 2 * rank; i < 2 * rank + 2; ++i)
                        load_both(b + i * PANEL, b_map, bar, u.n0 + 64 * i, block * BLOCK_K);
#else
                    load_both(b + rank * B_BYTES / 2, b_map, bar, block * BLOCK_K, u.n0 + rank * COLUMNS / 2);
#endif
                }
                for (int c = 0; c < g.c; c += 64, at.next()) {
                    const u32 a = base + at.stage * STAGE_BYTES, b = a + A_BYTES, bar = full + 8 * at.stage;
                    const int parts = min(64, g.c - c) / 16;
                    barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
                    barrier_expect(bar, A_BYTES + parts * 16 * 512);
                    load(a, low_map, bar, c, u.start);
                    for (int i = 0; i < 4; ++i)
                        for (int part = 0; part < parts; ++part)
                            load(b + i * PANEL + part * 2048, m_map, bar, u.n0 + 64 * i, u.m0 + c + 16 * part);
                }
                for (int column = 0; g.residual && column < COLUMNS; column += 128, at.next()) {
                    const u32 to = base + at.stage * STAGE_BYTES, bar = full + 8 * at.stage;
                    barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
                    barrier_expect(bar, 2 * A_BYTES);
                    load(to, residual_map, bar, u.n0 + column, u.start);
                    load(to + A_BYTES, residual_map, bar, u.n0 + column + 64, u.start);
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int thread = threadIdx.x - 128, group = thread / 128, warp = thread / 32, lane = thread % 32;
        const bool speaks = thread % 128 < 2;  // one thread for each block of the cluster
        const u32 mine = staging + warp * 2 * PIECE;
        Result result;
        bool waits = false;  // to be written
        for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
            u32 d[128];
#pragma unroll
            for (int i = 0; i < 128; ++i) d[i] = OFFSET + (SLICES == 2 ? HALF : 0);
            int block = 0, before = 0;
            auto begin = [&] {
                const u32 a = base + at.stage * STAGE_BYTES + group * A_BYTES / 2;
                const u32 b = base + at.stage * STAGE_BYTES + A_BYTES;
                barrier_wait(full + 8 * at.stage, at.parity);
                products_begin(d);
#pragma unroll
                for (int part = 0; part < 4; ++part) {
#if ALONG_N
                    multiply(d, matrix(a + 32 * part, 16), matrix(b + 2048 * part, PANEL));
#else
                    multiply(d, matrix(a + 32 * part, 16), matrix(b + 32 * part, 16));
#endif
                }
                products_commit();
            };
            auto end = [&] {
                products_wait<1>();
                if (block > 0 && speaks) barrier_arrive(empty + 8 * before, thread % 128);
                before = at.stage;
#if SLICES == 2
                if (block == blocks - 1) {  // the remainders': to the codes' unit
                    products_wait_all(d);
#pragma unroll
                    for (int i = 0; i < 128; ++i) d[i] = (u32)((int)d[i] >> 8);
                }
#endif
                at.next(), ++block;
            };
            if (waits) {  // the tile before is written while the units are busy
                const int last = SLICES * blocks - 1;
                begin(), write<0>(result, g, mine, lane), end();
#define AND_THEN(i) \
    if (i <= last) begin(); \
    write<i>(result, g, mine, lane); \
    if (i <= last) end();
                AND_THEN(1) AND_THEN(2) AND_THEN(3)
#undef AND_THEN
            }
            // what the end asks for, ahead of it
            const Unit u = unit_of(unit, rank, g);
            const int strip = u.start + 64 * group + warp % 4 * 16, row = strip + lane / 4;
            const float scale = g.row_scale && row < u.stop ? g.row_scale[row] : 0.f;
            const float scale8 = g.row_scale && row + 8 < u.stop ? g.row_scale[row + 8] : 0.f;
            float columns[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int column = u.n0 + 32 * i + lane;
                columns[i] = g.column_scale && column < g.n ? g.column_scale[column] : 0.f;
            }
            while (block < SLICES * blocks) begin(), end();
            products_wait_all(d);
            if (speaks) barrier_arrive(empty + 8 * before, thread % 128);
            if (g.row_scale)
#pragma unroll
                for (int i = 0; i < 128; ++i) d[i] = times(number(d[i]), i & 2 ? scale8 : scale);
            if (g.column_scale)
#pragma unroll
                for (int i = 0; i < 128; i += 4) {
                    const int from = i / 4 % 4 * 8 + lane % 4 * 2;
                    const float x = __shfl_sync(~0u, columns[i / 16], from);
                    const float y = __shfl_sync(~0u, columns[i / 16], from + 1);
                    d[i] = times(as_float(d[i]), x), d[i + 1] = times(as_float(d[i + 1]), y);
                    d[i + 2] = times(as_float(d[i + 2]), x), d[i + 3] = times(as_float(d[i + 3]), y);
                }
            for (int c = 0; c < g.c; c += 64, at.next()) {
                const u32 a = base + at.stage * STAGE_BYTES + group * A_BYTES / 2;
                const u32 b = base + at.stage * STAGE_BYTES + A_BYTES;
                barrier_wait(full + 8 * at.stage, at.parity);
                for (int part = 0; part < min(64, g.c - c) / 16; ++part) {
                    products_begin(d);
                    multiply_delta(d, matrix(a + 32 * part, 16), matrix(b + 2048 * part, PANEL));
                    products_commit();
                    products_wait_all(d);
                }
                if (speaks) barrier_arrive(empty + 8 * at.stage, thread % 128);
            }
            if (g.bias)
#pragma unroll
                for (int i = 0; i < 128; i += 4) {
                    const int column = u.n0 + 2 * i + lane % 4 * 2;
                    if (column < g.n) {
                        const float2 s = unpack(*(const u32 *)((const u16 *)g.bias + column));
                        d[i] = plus(as_float(d[i]), s.x), d[i + 1] = plus(as_float(d[i + 1]), s.y);
                        d[i + 2] = plus(as_float(d[i + 2]), s.x), d[i + 3] = plus(as_float(d[i + 3]), s.y);
                    }
                }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (g.residual) {
                    const u32 from = base + at.stage * STAGE_BYTES + (64 * group + warp % 4 * 16) * 128;
                    barrier_wait(full + 8 * at.stage, at.parity);
#pragma unroll
                    for (int i = 0; i < 32; ++i) {
                        u32 *two = d + 64 * half + 2 * i;
                        const float2 s = unpack(stored(from + i / 16 * A_BYTES + place(lane, i % 16)));
                        two[0] = plus(as_float(two[0]), s.x), two[1] = plus(as_float(two[1]), s.y);
                    }
                    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // read, before it is loaded again
                    group_sync(group);
                    if (speaks) barrier_arrive(empty + 8 * at.stage, thread % 128);
                    at.next();
                }
#pragma unroll
                for (int i = 32 * half; i < 32 * half + 32; ++i) result.two[i] = pack(d[2 * i], d[2 * i + 1]);
            }
            result.strip = strip, result.stop = u.stop, result.n0 = u.n0, waits = true;
        }
        if (waits) {
            write<0>(result, g, mine, lane), write<1>(result, g, mine, lane);
            write<2>(result, g, mine, lane), write<3>(result, g, mine, lane);
        }
    }
    cluster_sync();  // a block that has ended must not be signalled
}
