"""What nvcc makes of the CUDA kernels: registers, occupancy and the instructions of main loops."""
