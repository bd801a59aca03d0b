"""What joins two detectors into a cascade (DynamicDet, Lin et al., CVPR 2023, arXiv:2304.05552).

Composite links and the router.
"""
