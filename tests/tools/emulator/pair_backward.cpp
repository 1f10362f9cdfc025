// The launchers of pair_backward.cu, compiled for the emulator.
#include "pair_backward.cu"
