// tests/emulator/samples/samples.cu: all samples in one file, for a GPU's compiler: what runs on the emulator compiles
// for sm_90a as it stands.
#include "bulk_pipeline.cuh"
#include "chunk_flags.cuh"
#include "cluster_recurrence.cuh"
#include "column_sums.cuh"
#include "mbarrier_ring.cuh"
#include "row_shares.cuh"
#include "tagged_words.cuh"
#include "tile_product.cuh"
#include "warp_roles.cuh"
