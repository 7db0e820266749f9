/* The layout of a block's work and shared memory in the CUDA kernel of log_mel. */
#pragma once

#include "../clvp_fast.h"
#include "../fourier.h"

namespace clvp_fast {

/* The layout of the work on frames of N samples. */
template <int N_FFT>
struct Layout {
    static constexpr int N = N_FFT;
    static constexpr int FOLD = N <= 1024 ? 1 : N / 1024;
    static constexpr int M = N / FOLD;
    static constexpr int R1 = M == 1024 ? 32 : 16, R2 = M / R1;
    static constexpr int T = R1;           /* threads of a job */
    static constexpr int COLUMNS = R2 / T; /* transforms of radix R1 by one thread */
    static constexpr int FRAMES = FOLD == 1 ? 32 : 16, PAIRS = FRAMES / 2;
    static constexpr int THREADS = FOLD == 4 ? 512 : 256;
    static constexpr int BLOCKS_PER_SM = FOLD == 4 ? 1 : N == 256 ? 3 : 2;
    static constexpr int GROUPS = THREADS / T, ROUNDS = PAIRS * FOLD / GROUPS;
    static constexpr int KINDS = FOLD == 4 ? 3 : FOLD;
    static constexpr int BINS = N / 2 + 1;

    /* power[row][pair]: one column more than pairs spreads rows over the banks. A pair's exchange lies in its own
     * column: elements (k1, n2) and (k1 + HALF, n2) side by side in row ROW_STEP * k1 + n2. Writes of both (lanes are
     * n2) and reads of one (lanes are k1) then meet every bank once. */
    static constexpr int STRIDE = PAIRS + 1;
    static constexpr int HALF = R1 / 2, ROW_STEP = R2 + 1;
    static constexpr int JOB_ROWS = ROW_STEP * (HALF - 1) + R2;
    static constexpr int ROWS = FOLD * JOB_ROWS;
    static_assert(ROWS >= BINS && COLUMNS * T == R2 && ROUNDS * GROUPS == PAIRS * FOLD);
};

/* A number of each frame of a pair. */
struct alignas(8) FramePair {
    float of[2];
};

/* A mel channel: its band of bins, and what its logarithms are multiplied by. */
struct alignas(16) Channel {
    int first, bins;
    float inverse_norm;
};

/* A block's share of all rows: it does the same one of the `parts` (at most ROUNDS) of every `blocks`th tile of FRAMES
 * frames. */
struct Share {
    int block, blocks, part, parts;
};

/* At most FRAMES frames of one clip. */
struct FrameRange {
    const void *samples; /* of the row */
    int64_t row, length, first_frame;
    int64_t begin;           /* where the first frame begins, before the padding is reflected */
    int frames, true_frames; /* how many there are, and how many of them are the row's own: 0 .. FRAMES */
};

/* Shared memory, which also holds values that registers have no room for. */
template <int N>
struct Shared {
    using L = Layout<N>;
    Share share;
    FrameRange range;
    FramePair power[L::ROWS * L::STRIDE];
    /* The twiddle of row k1 = 4 a + b, column n2 of a job of residue r is low[kind][b][n2] * high[a][n2]. */
    Complex<float> low[L::KINDS][4][L::R2], high[L::R1 / 4][L::R2];
    Channel channels[256];
    FramePair spoil[L::PAIRS]; /* NaN for a frame that reaches a bad sample, else 0 */
    int tiles_of_row, tiles;   /* of all rows */
    int tile;                  /* the block's present one; from the last round on its next */
    uint32_t bins;             /* the end of the last band */
    float log_floor, log_unit; /* the logarithm of 2 */
    uint32_t loudest, last_block;
};

/* The values that a thread keeps in registers from phase to phase. */
template <int N>
struct Registers {
    Complex<float> x[Layout<N>::R2];
    uint32_t loudest;
};

template <class T>
CLVP_FAST_INLINE T read_only(const T *place) {
#ifdef __CUDA_ARCH__
    return __ldg(place);
#else
    return *place;
#endif
}
CLVP_FAST_INLINE Complex<float> read_only(const Complex<float> *place) {
#ifdef __CUDA_ARCH__
    const float2 pair = __ldg(reinterpret_cast<const float2 *>(place));
    return {pair.x, pair.y};
#else
    return *place;
#endif
}

/* One of the transforms that a block does. */
struct Job {
    int pair, index; /* of the pair's FOLD jobs */
    int thread;      /* 0 .. T - 1 */
    enum Kind { SUM, ALTERNATE, QUARTER } kind;
    int frame;   /* QUARTER: which frame of the pair */
    int residue; /* bins FOLD * k + residue */
};

template <class L>
CLVP_FAST_INLINE int residue_of(int kind) {
    return kind == Job::SUM ? 0 : kind == Job::ALTERNATE ? L::FOLD / 2 : 1;
}

template <class L>
CLVP_FAST_INLINE Job job_of(int thread, int round) {
    const int group = thread / L::T;
    Job job = {};
    job.thread = thread % L::T;
    if constexpr (L::T == 16) {
        job.pair = group / 2 + 8 * (group % 2); /* 8 columns apart: no bank in common */
    } else {
        job.pair = (round * L::GROUPS + group) / L::FOLD;
        job.index = (round * L::GROUPS + group) % L::FOLD;
    }
    job.kind = job.index == 0 ? Job::SUM : job.index == 1 ? Job::ALTERNATE : Job::QUARTER;
    job.frame = job.index == 3;
    job.residue = residue_of<L>(job.kind);
    return job;
}

/* The cell of elements (k1, n2) and (k1 + HALF, n2) of a job's exchange; k1 < HALF. */
template <class L>
CLVP_FAST_INLINE int exchange_cell(Job job, int k1, int n2) {
    return (L::JOB_ROWS * job.index + L::ROW_STEP * k1 + n2) * L::STRIDE + job.pair;
}

/* Returns true if the whole warp has no frame to transform. A warp's first pair is its earliest. */
template <int N>
CLVP_FAST_INLINE bool idle(const Shared<N> &shared, int thread, int round) {
    return 2 * job_of<Layout<N>>(thread & ~31, round).pair >= shared.range.true_frames;
}

}  // namespace clvp_fast
