"""The kernels on a CUDA device: CUDA C++, compiled when it is first needed by the NVRTC that torch brings.

The source is `common.cu`, `count.cu`, `compare.cu` and `finish.cu`, one after the other. `device` compiles and launches
it, `calls` lays out what a launch is given, `backend` is what the observer calls. A launch for each site of a layer,
one more for the comparison of a block with its input, and one when the layer ends; nothing waits for the host.

- **Counts** are integers, in the shared memory of a multiprocessor: patterns of the octaves in which activations lie,
  as many as the card has room for, and zero. The rest, which is rare, is counted in global memory.
- **Floats** are added in an order that depends on shapes alone: results repeat to the bit, whatever the grid.

Tests compile the same source with g++ and run it on a CPU, thread by thread in drawn orders
(`tests/support/cuda`).
"""
