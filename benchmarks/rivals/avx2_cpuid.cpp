// Preloaded into a rival's process: its libraries see a CPU that has AVX2 and nothing newer of that kind.
//
// `masked_cpuid.py` replaced each `cpuid` in copies of these libraries by two bytes that no 64-bit code has. The CPU
// faults on them, and the handler below answers in its place: what the CPU says, without the bits of AVX-512, AVX10,
// AMX and the VNNI of AVX. Any other illegal instruction ends the process, as without this file.
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

namespace {

struct Answer {
    unsigned eax, ebx, ecx, edx;
};

constexpr unsigned bits() { return 0; }

template <typename... Others>
constexpr unsigned bits(unsigned first, Others... others) {
    return 1u << first | bits(others...);
}

struct Mask {
    unsigned leaf, subleaf;
    Answer hidden;
};

constexpr Mask MASKS[] = {
    // AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; 4VNNIW, 4FMAPS, VP2INTERSECT,
    // AMX-BF16, AVX-512 FP16, AMX-TILE, AMX-INT8.
    {7, 0, {0, bits(16, 17, 21, 26, 27, 28, 30, 31), bits(1, 6, 11, 12, 14), bits(2, 3, 8, 22, 23, 24, 25)}},
    // AVX-VNNI, AVX-512 BF16, AMX-FP16, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10.
    {7, 1, {bits(4, 5, 21, 23), 0, 0, bits(4, 5, 8, 10, 19)}},
    // The states that the system keeps: of mask registers, of wide registers (two), of tiles (two).
    {0xD, 0, {bits(5, 6, 7, 17, 18), 0, 0, 0}},
    // Tiles (two leaves), and AVX10.
    {0x1D, 0, {~0u, ~0u, ~0u, ~0u}},
    {0x1E, 0, {~0u, ~0u, ~0u, ~0u}},
    {0x24, 0, {~0u, ~0u, ~0u, ~0u}},
};

Answer answered(unsigned leaf, unsigned subleaf) {
    Answer found;
    __cpuid_count(leaf, subleaf, found.eax, found.ebx, found.ecx, found.edx);
    for (const Mask &mask : MASKS) {
        if (mask.leaf == leaf && mask.subleaf == subleaf) {
            found.eax &= ~mask.hidden.eax;
            found.ebx &= ~mask.hidden.ebx;
            found.ecx &= ~mask.hidden.ecx;
            found.edx &= ~mask.hidden.edx;
        }
    }
    return found;
}

void handle(int, siginfo_t *, void *context) {
    greg_t *registers = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
    const unsigned char *at = reinterpret_cast<const unsigned char *>(registers[REG_RIP]);
    if (at[0] != CPUID_BYTE_0 || at[1] != CPUID_BYTE_1) {
        signal(SIGILL, SIG_DFL);
        raise(SIGILL);  // arrives when this handler returns
        return;
    }
    const Answer found = answered(registers[REG_RAX], registers[REG_RCX]);
    registers[REG_RAX] = found.eax;
    registers[REG_RBX] = found.ebx;
    registers[REG_RCX] = found.ecx;
    registers[REG_RDX] = found.edx;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) void install() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace
