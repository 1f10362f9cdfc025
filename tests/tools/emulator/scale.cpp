// The launchers of scale.cu, compiled for the emulator.
#include "scale.cu"
