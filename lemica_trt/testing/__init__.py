"""What tests of this package and of others need.

interpreter   the oracle: a step plan as its docstring reads
values        small samplers, trajectories and calibrations
toy_model     a model small enough to replay calibration naively
null          a device and a vendor without a GPU
pipelines     tiny random pipelines of many families, made in place (parts, images, videos)
"""
