// The launchers of pair_loss.cu, compiled for the emulator.
#include "pair_loss.cu"
