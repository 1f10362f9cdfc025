// The launchers of forward.cu, compiled for the emulator.
#include "forward.cu"
