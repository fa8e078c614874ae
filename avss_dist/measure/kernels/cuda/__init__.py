"""CUDA kernels: CUDA C++, compiled on first use by the NVRTC that torch brings.

The source is `common.cu`, `count.cu`, `compare.cu` and `finish.cu`, one after the other. `device` compiles and launches
it, `calls` lays out the arguments of a launch, `backend` is the interface for the observer. There is one launch for
each site of a layer, one more for the comparison of a block with its input, and one at the end of the layer. No launch
waits for the host.

- **Counts** are integers in the shared memory of a multiprocessor, for zero and for the patterns of the octaves in
  which activations lie, as far as the card has room. The other patterns are rare and counted in global memory.
- **Floats** are added in an order that depends only on shapes. Results are bitwise reproducible for any grid.

Tests compile the same source with g++ and run it on a CPU, thread by thread in drawn orders
(`tests/support/cuda`).
"""
