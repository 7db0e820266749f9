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
    static constexpr int BLOCKS_PER_SM = FOLD == 4 ? 1 : 2;
    static constexpr int GROUPS = THREADS / T, ROUNDS = PAIRS * FOLD / GROUPS;
    static constexpr int KINDS = FOLD == 4 ? 3 : FOLD;
    static constexpr int BINS = N / 2 + 1;

    /* power[row][frame]: the odd stride spreads rows over the banks. A pair's exchange lies in its own two columns:
     * element (k1, n2) in column k1 / HALF, row ROW_STEP * (k1 % HALF) + n2 + SHIFT * (k1 / HALF). Writes (lanes
     * are n2) and reads (lanes are k1) then meet every bank once. */
    static constexpr int STRIDE = FRAMES + 1;
    static constexpr int HALF = R1 / 2, ROW_STEP = R2 + 1;
    static constexpr int SHIFT = R1 == 16 ? 7 : FRAMES == 32 ? 15 : 31;
    static constexpr int JOB_ROWS = ROW_STEP * (HALF - 1) + R2 + SHIFT;
    static constexpr int ROWS = FOLD * JOB_ROWS;
    static_assert(ROWS >= BINS && COLUMNS * T == R2 && ROUNDS * GROUPS == PAIRS * FOLD);
};

struct Band {
    int first, last;
};

/* FRAMES frames of one clip. */
struct FrameRange {
    const void *samples; /* of the row */
    int64_t row, length, first_frame;
    int64_t begin;   /* where the first frame begins, before the padding is reflected */
    int true_frames; /* how many of the frames are the row's own: 0 .. FRAMES */
};

/* Shared memory, which also holds values that registers have no room for. */
template <int N>
struct Shared {
    using L = Layout<N>;
    FrameRange range;
    float power[L::ROWS * L::STRIDE];
    /* The twiddle of row k1 = 4 a + b, column n2 of a job of residue r is low[kind][b][n2] * high[a][n2]. */
    Complex<float> low[L::KINDS][4][L::R2], high[L::R1 / 4][L::R2];
    Band bands[256];
    int not_finite[L::FRAMES];
    uint32_t bins; /* the end of the last band */
    float log_floor;
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
        job.pair = group / 2 + 8 * (group % 2); /* 16 columns apart: no bank in common */
    } else {
        job.pair = (round * L::GROUPS + group) / L::FOLD;
        job.index = (round * L::GROUPS + group) % L::FOLD;
    }
    job.kind = job.index == 0 ? Job::SUM : job.index == 1 ? Job::ALTERNATE : Job::QUARTER;
    job.frame = job.index == 3;
    job.residue = residue_of<L>(job.kind);
    return job;
}

/* The cell of element (k1, n2) of a job's exchange. */
template <class L>
CLVP_FAST_INLINE int exchange_cell(Job job, int k1, int n2) {
    const int row = L::JOB_ROWS * job.index + L::ROW_STEP * (k1 % L::HALF) + n2 + L::SHIFT * (k1 / L::HALF);
    return row * L::STRIDE + 2 * job.pair + k1 / L::HALF;
}

/* Returns true if the whole warp has no frame to transform. A warp's first pair is its earliest. */
template <int N>
CLVP_FAST_INLINE bool idle(const Shared<N> &shared, int thread, int round) {
    return 2 * job_of<Layout<N>>(thread & ~31, round).pair >= shared.range.true_frames;
}

}  // namespace clvp_fast
