// The launchers of summary_backward.cu, compiled for the emulator.
#include "summary_backward.cu"
