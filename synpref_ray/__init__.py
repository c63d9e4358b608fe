"""A distributed implementation of the Skywork-Reward-V2 / SynPref-40M pipeline (arXiv 2507.01352) on Ray."""

__version__ = "0.1.0"
