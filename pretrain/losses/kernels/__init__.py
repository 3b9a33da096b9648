"""Kernels for GPUs: importing a file here needs Triton.

    fused.py  tiles of both losses

May import pretrain.losses.
"""
