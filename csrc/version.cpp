/* The version of a part of the library, which Python compares with its own before it calls anything. */
#include "clvp_fast.h"

extern "C" __attribute__((visibility("default"))) const char *clvp_fast_version(void) { return CLVP_FAST_VERSION; }
