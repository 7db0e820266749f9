/* The CUDA kernel's blocks on a CPU: the phases of csrc/cuda/log_mel_block.cuh, thread by thread.
 *
 * Between two barriers of the block the warps run one after another, each through all its phases; within a phase, lane
 * after lane; both in an order drawn at random. So a phase that needs a barrier which is not there finds what was not
 * written yet: shared memory, and registers, hold NaN before the first block and after each. */
#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/check.h"
#include "../../csrc/cuda/log_mel_block.cuh"

using namespace clvp_fast;

namespace {

template <int N>
class HostRun {
public:
    explicit HostRun(uint32_t seed) : random_(seed), registers_(Layout<N>::THREADS) {
        memset(static_cast<void *>(registers_.data()), 0xff, registers_.size() * sizeof registers_[0]);
    }

    template <Barrier AFTER, class Body>
    void phase(Body body) {
        phases_.push_back([body, this](int thread) { body(*this, thread, registers_[thread]); });
        if (AFTER == Barrier::BLOCK) run();
    }
    template <int T, int INDEX>
    Complex<float> from(Registers<N> &own, int partner) {
        const auto thread = int(&own - registers_.data());
        return registers_[thread / T * T + partner].x[INDEX];
    }
    void max(uint32_t *place, uint32_t value, int) { *place = std::max(*place, value); }
    uint32_t finish(uint32_t *maxima, uint32_t loudest) {
        maxima[0] = std::max(maxima[0], loudest);
        return maxima[1]++;
    }
    template <class T>
    T fresh(const T *place) {
        return *place;
    }
    bool finished() const { return phases_.empty(); }

private:
    void run() {
        std::vector<int> warps(Layout<N>::THREADS / 32), lanes(32);
        std::iota(warps.begin(), warps.end(), 0);
        std::iota(lanes.begin(), lanes.end(), 0);
        std::shuffle(warps.begin(), warps.end(), random_);
        for (int warp : warps) {
            for (auto &phase : phases_) {
                std::shuffle(lanes.begin(), lanes.end(), random_);
                for (int lane : lanes) phase(32 * warp + lane);
            }
        }
        phases_.clear();
    }

    std::mt19937 random_;
    std::vector<Registers<N>> registers_;
    std::vector<std::function<void(int)>> phases_;
};

template <int N, class Sample>
int launch(const clvp_fast_log_mel &call, uint32_t seed, int64_t most_blocks, bool in_parts) {
    const int blocks = int(std::min(tiles_of_row<N>(call) * call.batch, most_blocks));
    const int parts = in_parts ? Layout<N>::ROUNDS : 1;
    std::vector<int> order(blocks * parts);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    auto shared = std::make_unique<Shared<N>>();
    for (int index : order) {
        memset(static_cast<void *>(shared.get()), 0xff, sizeof *shared);
        HostRun<N> run(++seed);
        block<N, Sample>(run, shared.get(), &call, {index % blocks, blocks, index / blocks, parts});
        if (!run.finished()) return 1; /* a block that ends without a barrier */
    }
    return CLVP_FAST_OK;
}

template <int N>
int launch(const clvp_fast_log_mel &call, uint32_t seed, int64_t most_blocks, bool in_parts) {
    return call.samples_dtype == CLVP_FAST_INT16 ? launch<N, int16_t>(call, seed, most_blocks, in_parts)
                                                 : launch<N, float>(call, seed, most_blocks, in_parts);
}

/* Returns how often a warp's accesses, `words` words of each lane from these on, go through a memory of 32 banks: those
 * of two words in two halves of the warp. */
int passes(const std::vector<int> &first, int words) {
    int most = 0;
    for (size_t lane = 0; lane < first.size(); lane += 32 / words) {
        std::vector<int> sorted, count(32);
        for (int word = 0; word < words; ++word)
            for (int i = 0; i < 32 / words; ++i) sorted.push_back(first[lane + i] + word);
        std::sort(sorted.begin(), sorted.end());
        sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
        for (int word : sorted) ++count[word % 32];
        most = std::max(most, *std::max_element(count.begin(), count.end()));
    }
    return most;
}

template <int N>
void count_passes(int32_t *most) {
    using L = Layout<N>;
    most[0] = most[1] = most[2] = 0;
    for (int round = 0; round < L::ROUNDS; ++round) {
        for (int warp = 0; warp < L::THREADS; warp += 32) {
            for (int element = 0; element < L::R2; ++element) {
                std::vector<int> put, get, power;
                for (int thread = warp; thread < warp + 32; ++thread) {
                    const Job job = job_of<L>(thread, round);
                    const int n2 = job.thread + L::T * (element % L::COLUMNS), k1 = element / L::COLUMNS;
                    put.push_back(2 * exchange_cell<L>(job, k1 % L::HALF, n2));
                    get.push_back(2 * exchange_cell<L>(job, job.thread % L::HALF, element) + job.thread / L::HALF);
                    const int bin = L::FOLD * (job.thread + L::T * (element / 2)) + job.residue;
                    power.push_back(2 * (L::STRIDE * bin + job.pair));
                }
                most[0] = std::max(most[0], passes(put, 2));
                most[1] = std::max(most[1], passes(get, 1));
                most[2] = std::max(most[2], passes(power, 2));
            }
        }
    }
}

}  // namespace

/* The CUDA function on host memory. `seed` draws the order of everything. At most `most_blocks` blocks take all tiles;
 * in_parts: a tile is dealt to as many blocks as it has rounds. */
extern "C" int emulate_log_mel(const clvp_fast_log_mel *call, uint32_t seed, int64_t most_blocks, int32_t in_parts) {
    const int refused = clvp_fast_check_log_mel(call, 1);
    if (refused != CLVP_FAST_OK || call->batch == 0) return refused;
    switch (call->n_fft) {
        case 256: return launch<256>(*call, seed, most_blocks, in_parts);
        case 512: return launch<512>(*call, seed, most_blocks, in_parts);
        case 1024: return launch<1024>(*call, seed, most_blocks, in_parts);
        case 2048: return launch<2048>(*call, seed, most_blocks, in_parts);
        default: return launch<4096>(*call, seed, most_blocks, in_parts);
    }
}

/* The most passes of one access in shared memory: writes and reads of the exchange, writes of powers. */
extern "C" void bank_passes(int32_t n_fft, int32_t *most) {
    switch (n_fft) {
        case 256: return count_passes<256>(most);
        case 512: return count_passes<512>(most);
        case 1024: return count_passes<1024>(most);
        case 2048: return count_passes<2048>(most);
        default: return count_passes<4096>(most);
    }
}
