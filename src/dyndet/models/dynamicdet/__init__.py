"""What joins two detectors into a cascade (DynamicDet, Lin et al., CVPR 2023): composite links and the router."""
