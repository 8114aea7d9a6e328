"""Limits that kernels and planners share."""

from thinslice.units import MIB

# Slices and rings begin at multiples of this on a device: what a card reads at once.
DEVICE_ALIGNMENT = 256
# What is read and converted at a time on its way to a device.
PIECE_BYTES = 16 * MIB
# Rows that a device multiplies one by one, of a sequence those that it attends with one by one, and
# positions of one part of that.
MOST_SINGLE_ROWS = 16
ATTENTION_SPLIT = 512
