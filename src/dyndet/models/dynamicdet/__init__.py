"""What joins two detectors into one: composite links and the router.

Source: DynamicDet, Lin et al., CVPR 2023, arXiv:2304.05552.
"""
