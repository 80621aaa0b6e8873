// tests/ptx/probes/probes.cu: all probes in one file, for nvcc: see probes.cuh.
#include "probes.cuh"
