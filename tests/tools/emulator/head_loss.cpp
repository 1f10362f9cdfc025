// The launchers of head_loss.cu, compiled for the emulator.
#include "head_loss.cu"
